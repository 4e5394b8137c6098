"""Updates clipped by the devices' program: never longer than the norm, in their own direction, and the rest as it was."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from shoal.aggregate.accumulator import Accumulator
from shoal.clip_norm import LOG_SCALE, AdaptiveClip, norm_bound
from shoal.errors import UpdateRefused
from shoal.fixed import SumSpec
from shoal.local import LocalRule, Named, Report, clipped, local_rule
from shoal.policy import Privacy
from shoal.privacy import clipping
from shoal.tensors import TensorSpec
from tests.plan.plan_tasks import tiny_task


def rule_of(delta: dict[str, np.ndarray]) -> LocalRule:
    """A rule that reports this."""
    inner = local_rule(tiny_task())
    sums = tuple(
        SumSpec(tensor=TensorSpec.of(f"delta/{name}", value), bound=256.0, weighted=True)
        for name, value in delta.items()
    )

    def finish(carry: Named, broadcast: Named) -> Report:
        del carry, broadcast
        return Report({"delta": {name: jnp.asarray(value) for name, value in delta.items()}}, jnp.int32(1), {}, {})

    return LocalRule(
        begin=inner.begin, block=inner.block, finish=finish, broadcast=inner.broadcast, device_state=(), sums=sums
    )


def norm(delta: dict[str, np.ndarray]) -> float:
    return float(np.sqrt(sum(np.sum(np.square(np.asarray(value, np.float64))) for value in delta.values())))


@settings(max_examples=60, deadline=None)
@given(
    values=st.lists(st.floats(-(2.0**127), 2.0**127, width=32), min_size=1, max_size=9),
    clip=st.floats(1e-3, 1e3),
    scale=st.floats(1e-6, 1.0),
)
def test_no_update_is_longer_than_the_norm_and_its_direction_stays(
    values: list[float], clip: float, scale: float
) -> None:
    given_delta = {"a": np.float32(values[:4]) * np.float32(scale), "b": np.float32(values[4:])}
    report = clipped(rule_of(given_delta), clip).finish({}, {})
    made = {name: np.asarray(value, np.float64) for name, value in report.sums["delta"].items()}
    length = norm(given_delta)
    assert norm(made) <= clip
    if length <= clip * (1 - 1e-4):
        for name, value in given_delta.items():
            np.testing.assert_array_equal(made[name], value)
        assert report.metrics["clipped/numerator"] == 0
    elif length > clip:
        assert norm(made) >= clip * (1 - 1e-4)
        assert report.metrics["clipped/numerator"] == 1
        for name, value in given_delta.items():
            np.testing.assert_allclose(
                made[name] * length, np.asarray(value, np.float64) * clip, rtol=1e-4, atol=1e-5 * length * clip
            )


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_is_still_refused(bad: float) -> None:
    with jax.debug_nans(False):
        report = clipped(rule_of({"a": np.float32([1.0, bad])}), 1.0).finish({}, {})
    assert not np.all(np.isfinite(report.sums["delta"]["a"]))


def test_the_plan_s_bound_is_the_norm_and_what_is_longer_in_one_element_is_refused() -> None:
    rule = local_rule(tiny_task().replace(privacy=Privacy(clip_norm=0.25)))
    specs = {spec.tensor.name: spec for spec in rule.sums}
    deltas = [name for name in specs if name.startswith("delta/")]
    assert deltas
    assert {specs[name].bound for name in deltas} == {0.25}
    sums = Accumulator.finest([specs[deltas[0]]], max_weight=1, max_members=2)
    with pytest.raises(UpdateRefused):
        sums.add({deltas[0]: np.full(specs[deltas[0]].tensor.shape, 0.26, np.float32)}, weight=1)


def test_a_task_that_sends_no_updates_cannot_clip_them() -> None:
    rule = local_rule(tiny_task())
    none = LocalRule(
        begin=rule.begin, block=rule.block, finish=rule.finish, broadcast=rule.broadcast, device_state=(), sums=()
    )
    with pytest.raises(ValueError, match="sends no updates"):
        clipped(none, 1.0)


BY_NAME = {"params/*bias": 0.3, "*": 2.0}
SHAPES = {"params/a/kernel": 3, "params/a/bias": 2, "params/b/bias": 1}


@functools.cache
def clips_by_name() -> Callable[[dict[str, np.ndarray]], Report]:
    def report(delta: dict[str, np.ndarray]) -> Report:
        return clipped(rule_of(delta), BY_NAME).finish({}, {})

    return jax.jit(report)


@settings(max_examples=100, deadline=None)
@given(values=st.lists(st.floats(-(2.0**127), 2.0**127, width=32), min_size=6, max_size=6), scale=st.floats(1e-38, 1.0))
@example(values=[0.0] * 6, scale=1.0)
@example(values=[1e38] * 3 + [1e-30] * 3, scale=1.0)
def test_each_group_is_scaled_on_its_own_to_its_own_bound(values: list[float], scale: float) -> None:
    parts = np.split(np.float32(values) * np.float32(scale), np.cumsum(list(SHAPES.values()))[:-1])
    delta = dict(zip(SHAPES, parts, strict=True))
    report = clips_by_name()(delta)
    made = {name: np.asarray(value) for name, value in report.sums["delta"].items()}
    biases = {name: made[name] for name in SHAPES if name.endswith("bias")}
    assert norm(biases) <= 0.3 and norm({"": made["params/a/kernel"]}) <= 2.0 and norm(made) <= norm_bound(BY_NAME)
    expected, norms = clipping.clip(delta, BY_NAME)
    for name, value in expected.items():
        np.testing.assert_allclose(made[name], value, rtol=1e-4, atol=1e-5)
    if all(abs(norms[pattern] / bound - 1) > 1e-4 for pattern, bound in BY_NAME.items()):
        assert bool(report.metrics["clipped/numerator"]) is any(norms[pattern] > BY_NAME[pattern] for pattern in norms)


ADAPTIVE = AdaptiveClip(initial=0.5, quantile=0.3, learning_rate=0.2, lowest=1e-6, highest=1e3)


@functools.cache
def clips_adaptively() -> Callable[..., Report]:
    def report(delta: dict[str, np.ndarray], log_scale: np.ndarray) -> Report:
        return clipped(rule_of(delta), ADAPTIVE).finish({}, {LOG_SCALE: log_scale})

    return jax.jit(report)


def scale_and_step(delta: dict[str, np.ndarray], log_scale: float) -> tuple[dict[str, np.ndarray], float, bool]:
    report = clips_adaptively()(delta, np.float32(log_scale))
    made = {name: np.asarray(value, np.float64) for name, value in report.sums["delta"].items()}
    return made, float(made.pop(LOG_SCALE)), bool(report.metrics["clipped/numerator"])


@settings(max_examples=300, deadline=None)
@given(
    values=st.lists(st.floats(-(2.0**127), 2.0**127, width=32), min_size=6, max_size=6), size=st.floats(1e-38, 1.0),
    log_scale=st.floats(-20.0, 20.0, width=32),
)  # fmt: skip
@example(values=[0.0] * 6, size=1.0, log_scale=0.0)
@example(values=[2.0**127] * 6, size=1.0, log_scale=-20.0)
@example(values=[1e-38] * 6, size=1.0, log_scale=20.0)
def test_whatever_a_device_has_what_it_sends_is_within_the_initial_norm(
    values: list[float], size: float, log_scale: float
) -> None:
    delta = {"a": np.float32(values[:4]) * np.float32(size), "b": np.float32(values[4:]) * np.float32(size)}
    made, step, is_over = scale_and_step(delta, log_scale)
    assert norm(made) <= 0.5 and abs(step) <= ADAPTIVE.largest_step
    limit = 0.5 * np.exp(np.float64(log_scale))
    if abs(norm(delta) / limit - 1) > 1e-4:
        assert is_over == (norm(delta) > limit)
    factor = min(0.5 / max(norm(delta), 1e-300), np.exp(-np.float64(log_scale)))
    for name, value in delta.items():
        np.testing.assert_allclose(made[name], np.asarray(value, np.float64) * factor, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("length", "step"), [(0.49, -0.2 * 0.7), (0.51, 0.2 * 0.3), (0.0, -0.2 * 0.7)])
def test_a_device_says_whether_it_was_within_the_norm(length: float, step: float) -> None:
    delta = {"a": np.float32([length, 0, 0, 0]), "b": np.zeros(2, np.float32)}
    assert scale_and_step(delta, 0.0)[1] == pytest.approx(step)


@pytest.mark.parametrize("outside", [-3.0, 3.0])
def test_what_is_out_of_its_range_is_brought_back_by_all(outside: float) -> None:
    low, high = ADAPTIVE.log_range
    log_scale = low - 3.0 if outside < 0 else high + 3.0
    for length in (0.0, 1e9):
        delta = {"a": np.float32([length, 0, 0, 0]), "b": np.zeros(2, np.float32)}
        assert scale_and_step(delta, log_scale)[1] == pytest.approx(np.sign(-outside) * ADAPTIVE.largest_step)


def test_a_sum_s_bound_is_its_group_s() -> None:
    rule = local_rule(tiny_task().replace(privacy=Privacy(clip_norm={"params/b": 0.25, "params/*": 0.5})))
    bounds = {spec.tensor.name: spec.bound for spec in rule.sums}
    assert (bounds["delta/params/b"], bounds["delta/params/w"]) == (0.25, 0.5)


@pytest.mark.parametrize(
    ("clip_norm", "text"),
    [
        ({"params/b": 1.0}, "every tensor of an update to match a pattern of clip_norm=.*, got params/w"),
        ({"*": 1.0, "params/b": 0.1}, "the first that some tensor matches, got 'params/b', which is that for none of params/b, params/w"),
        ({"params/bais": 0.1, "*": 1.0}, "got 'params/bais'"),
    ],
)  # fmt: skip
def test_patterns_and_tensors_that_do_not_match_are_refused(clip_norm: dict[str, float], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        local_rule(tiny_task().replace(privacy=Privacy(clip_norm=clip_norm)))
