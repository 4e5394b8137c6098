"""Compressed updates: unbiased, or fed back; and what they would cost."""

from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest

import shoal
from shoal.aggregate.linear import Linear
from shoal.algorithms.compression import BFLOAT16, INT8, through, top_k
from shoal.codec.packed import pack
from shoal.codec.rounding import BLOCK
from shoal.fixed import SumSpec
from shoal.local import local_rule
from shoal.plan.build import build
from shoal.tensors import TensorSpec
from tests.algorithms.problem import task


def values(size: int = 40) -> jax.Array:
    return jnp.asarray(np.random.default_rng(1).normal(size=size).astype(np.float32))


def test_int8_is_right_in_the_mean_and_off_by_less_than_a_level() -> None:
    given = values()
    made = jax.vmap(lambda number: INT8.apply(given, jax.random.key(number)))(jnp.arange(2000))
    level = float(jnp.max(jnp.abs(given))) / 127 * (1 + 2**-7)
    assert float(jnp.max(jnp.abs(made - given[None]))) <= level * 1.001
    spread = level / 2 / np.sqrt(2000)
    assert float(jnp.max(jnp.abs(made.mean(axis=0) - given))) < 5 * spread


@pytest.mark.parametrize(
    "given", [np.zeros(5, np.float32), np.array([-127.0, 64.0], np.float32), np.zeros((0, 2), np.float32)]
)
def test_int8_keeps_what_it_can_say_exactly(given: np.ndarray) -> None:
    np.testing.assert_array_equal(INT8.apply(jnp.asarray(given), jax.random.key(0)), given)


@pytest.mark.parametrize("size", [1, BLOCK - 1, BLOCK, 3 * BLOCK + 5])
def test_each_block_has_levels_of_its_own(size: int) -> None:
    rng = np.random.default_rng(size)
    given = rng.normal(size=size).astype(np.float32) * np.repeat([1e-6, 1.0, 1e4, 1.0], BLOCK)[:size].astype(np.float32)
    made = np.asarray(INT8.apply(jnp.asarray(given), jax.random.key(0)))
    for start in range(0, size, BLOCK):
        block = slice(start, start + BLOCK)
        assert np.max(np.abs(made[block] - given[block])) <= np.max(np.abs(given[block])) / 127 * (1 + 2**-7)
    assert np.array_equal(BFLOAT16.apply(jnp.asarray(given), None), given.astype(ml_dtypes.bfloat16).astype(np.float32))


@pytest.mark.parametrize(("up", "most"), [("int8", 0.25), ("bfloat16", 0.5), ("top_k", 0.1)])
def test_what_comes_out_takes_few_bytes(up: str, most: float) -> None:
    codec = {"int8": INT8, "bfloat16": BFLOAT16, "top_k": top_k(0.02)}[up]
    made = np.asarray(jax.jit(codec.apply)(values(5 * BLOCK + 77), jax.random.key(3)))
    assert len(pack(made.tobytes(), "float32")) <= min(codec.size_bytes(made.size) + 64, most * made.nbytes)


def test_top_k_keeps_the_largest() -> None:
    given = jnp.asarray([0.1, -3.0, 2.0, 0.0, -0.5], jnp.float32)
    made = top_k(0.4).apply(given, jax.random.key(0))
    np.testing.assert_array_equal(made, [0.0, -3.0, 2.0, 0.0, 0.0])
    assert np.count_nonzero(top_k(0.01).apply(values(), jax.random.key(0))) == 1
    assert top_k(0.01).apply(jnp.zeros((0,), jnp.float32), jax.random.key(0)).size == 0


@pytest.mark.parametrize(
    ("kind", "share", "expected"),
    [("int8", None, 6 + 4 + 2 + 4), ("bfloat16", None, 2 * (6 + 2)), ("top_k", 0.3, 2 * 4 + 4)],
)
def test_what_the_message_would_take_is_a_metric(kind: str, share: float | None, expected: int) -> None:
    chosen = shoal.compressed(task(), kind, share=share)  # type: ignore[arg-type]
    rule = local_rule(chosen)
    broadcast = {spec.name: jnp.zeros(spec.shape, spec.dtype) for spec in rule.broadcast}
    kept = {spec.name: jnp.zeros(spec.shape, spec.dtype) for spec in rule.device_state}
    report = rule.finish(rule.begin(broadcast, kept), broadcast)
    assert float(report.metrics["update_bytes/numerator"]) == expected
    assert float(report.metrics["update_bytes/denominator"]) == 1.0


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match=r"0 < share <= 1, got share=0\.0"):
        shoal.compressed(task(), "top_k", share=0.0)
    with pytest.raises(ValueError, match="has compressed already"):
        shoal.compressed(shoal.compressed(task(), "int8"), "top_k")
    with pytest.raises(ValueError, match="plain local training for scaffold"):
        shoal.scaffold(shoal.compressed(task(), "int8"), devices=5)


def test_what_does_not_go_together_is_refused() -> None:
    secure = task(privacy=shoal.Privacy(clip_norm=1.0, secure=shoal.Secure()))
    late = shoal.RoundPolicy(late=shoal.Late.discount(0.5, max_staleness=2))
    for chosen, settings, line in (
        (secure, {"up": "int8"}, "send integers of the group's bits"),
        (task(), {"up": "top_k", "rotate": True}, "rotate=False with up='top_k'"),
        (task(), {"up": "random_k", "share": 0.3}, "1, 1/2, 1/4"),
        (task(), {"up": "random_k", "share": 2.0**-13}, "1/4096 with up='random_k'"),
        (task(rounds=late), {"up": "random_k"}, "whose late updates are discarded"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=line):
            shoal.compressed(chosen, **settings)


def test_what_is_changed_after_is_looked_at_when_the_plan_is_made() -> None:
    late = shoal.RoundPolicy(late=shoal.Late.discount(0.5, max_staleness=2))
    secure = shoal.Privacy(clip_norm=1.0, secure=shoal.Secure())
    for made, changes, line in (
        (shoal.compressed(task(), "random_k"), {"rounds": late}, "whose late updates are discarded"),
        (shoal.compressed(task(), "int8"), {"privacy": secure}, "send integers of the group's bits"),
    ):
        with pytest.raises(ValueError, match=line):
            build(made.replace(**changes))


def test_all_elements_of_a_random_choice_are_no_compression() -> None:
    specs = local_rule(shoal.compressed(task(), "random_k", share=1.0)).sums
    assert all(spec.one_of == 1 and len(spec.tensor.shape) for spec in specs if spec.tensor.name == "delta/params/w")


def test_what_devices_hold_in_the_mean_is_sent_whole() -> None:
    specs = local_rule(shoal.compressed(shoal.scaffold(wide(), devices=8), "random_k", share=0.5)).sums
    assert {spec.one_of for spec in specs if spec.tensor.name.startswith("delta/params/")} == {2}
    assert {spec.one_of for spec in specs if spec.tensor.name.startswith("delta/control/")} == {1}


def test_every_element_has_its_turn() -> None:
    """Whatever the model's bits are: those of elements that are alike, say."""
    chosen = shoal.compressed(wide(), "random_k", share=1 / 16)
    moved = np.asarray(shoal.simulate(chosen, users(), rounds=120, seed=0).model["params/w"])
    assert np.count_nonzero(moved) == moved.size


def test_an_update_out_of_bounds_is_refused_when_it_is_rotated_too() -> None:
    spec = SumSpec(
        tensor=TensorSpec(name="delta/params/w", shape=(64,), dtype="float32"), bound=6.0, weighted=True, rotated=8
    )
    within, beyond = np.full(64, 0.9, np.float32), np.eye(1, 64, 3, dtype=np.float32)[0] * 1.1
    assert np.all(np.isfinite(through(spec, jnp.asarray(within), 1.0, None)))
    assert not np.any(np.isfinite(through(spec, jnp.asarray(beyond), 1.0, None)))
    assert np.all(np.isfinite(through(spec, jnp.asarray(beyond), None, None))), "it will be clipped"


def wide() -> shoal.Task:
    """A model of 64 numbers that begin alike and are drawn to one alike."""

    def loss(params: Any, state: Any, batch: Any, key: Any) -> shoal.Loss:
        far = jnp.sum(jnp.square(params["w"] - 1.0)) * batch["on"]
        return shoal.Loss(far, state, {})

    return shoal.Task(
        name="wide", init=lambda key: shoal.Variables({"w": jnp.zeros(64)}, {}), loss=loss, batch={"on": ((), "float32")},
        local=shoal.Local(optimizer=optax.sgd(0.05), batch_size=2, weighting="uniform"),
        rounds=shoal.RoundPolicy(goal=2, minimum_group=2),
    )  # fmt: skip


def users() -> shoal.data.Population:
    return shoal.data.Population.from_arrays({f"u{i}": {"on": np.ones(2, np.float32)} for i in range(2)})


def test_some_elements_are_right_in_the_mean_over_versions() -> None:
    """Each version draws another of each few; times their number the mean is the update's."""
    size, rng = 16, np.random.default_rng(0)
    update = rng.normal(size=size).astype(np.float32)
    total = np.zeros(size)
    tensor = TensorSpec(name="delta/params/w", shape=(4,), dtype="float32")
    spec = SumSpec(tensor=tensor, bound=4.0, weighted=True, one_of=4)
    for version in range(500):
        sent = np.asarray(through(spec, jnp.asarray(update), 1.0, np.array([version], np.uint32)), np.float64)
        total += Linear(spec, size, version=version).undone(lambda part, sent=sent: sent[part], slice(0, size))
    np.testing.assert_allclose(total / 500, update, atol=5 * 2 * np.abs(update).max() / np.sqrt(500))


def test_nothing_to_compress_is_refused() -> None:
    with pytest.raises(ValueError, match="Expected something to compress"):
        shoal.compressed(task())


def test_a_share_of_int8_is_refused() -> None:
    with pytest.raises(ValueError, match=r"share only with up='top_k' or 'random_k', got share=0\.5"):
        shoal.compressed(task(), "int8", share=0.5)
