"""Noise on examples: each is clipped alone, hidden by noise of a key that is the device's own, and told of in no other way."""

from dataclasses import replace
from functools import partial
from itertools import product
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import stats

import shoal
from shoal.audit.inversion import dense_input
from shoal.data.store import Examples
from shoal.gradients import clipped_sum, noisy_gradient, normal
from shoal.local import local_rule
from shoal.plan.build import build
from shoal.plan.check import check_plan
from shoal.plan.jax_runner import JaxRunner
from shoal.plan.manifest import Manifest
from shoal.plan.runner import Limits
from shoal.plan.train import member_randomness, program_key, train
from shoal.policy import ExamplePrivacy, Privacy
from shoal.task import Local, Task, Variables
from tests.plan.plan_tasks import B, C, D, K, feed, linear_init, linear_loss, noisy_task, tiny_task
from tests.plan.test_local import Norm, assert_equal, run

KEY = np.arange(6, dtype=np.uint32)
LOCAL = Local(batch_size=B, steps_per_block=K, weighting="uniform")


def hidden_task(**changes: Any) -> Task:
    """The tiny task with noise on its examples."""
    hides = Privacy(examples=ExamplePrivacy(clip_norm=0.5, noise_multiplier=1.0))
    return tiny_task(**{"privacy": hides, "local": LOCAL, **changes})


def squares(params: Any, batch: Any, number: Any) -> Any:
    """Its gradient by w is (w . x - y) x."""
    del number
    return 0.5 * jnp.sum(jnp.square(batch["x"] @ params["w"] - batch["y"]))


summed = jax.jit(partial(clipped_sum, squares), static_argnums=2)


def batch_of(x: np.ndarray, y: np.ndarray, mask: np.ndarray) -> dict[str, jax.Array]:
    return {"x": jnp.asarray(x), "y": jnp.asarray(y), "mask": jnp.asarray(mask)}


def by_hand(w: np.ndarray, x: np.ndarray, y: np.ndarray, mask: np.ndarray, clip: float) -> np.ndarray:
    """The clipped gradients' sum as the paper writes it, in float64."""
    total = np.zeros_like(w, np.float64)
    for row, target, is_real in zip(x.astype(np.float64), y.astype(np.float64), mask, strict=True):
        gradient = (row @ w - target) * row
        total += is_real * gradient / max(1.0, float(np.linalg.norm(gradient)) / clip)
    return total


@pytest.mark.parametrize("clip", [0.01, 0.5, 3.0, 1e3])
def test_each_example_is_clipped_alone_as_in_the_paper(clip: float) -> None:
    for real in range(8):
        rng = np.random.default_rng(real)
        w, x, y = (rng.normal(size=shape).astype(np.float32) for shape in ((4,), (7, 4), (7,)))
        mask = np.arange(7) < real
        made = summed({"w": jnp.asarray(w)}, batch_of(x, y, mask), clip)["w"]
        np.testing.assert_allclose(made, by_hand(w, x, y, mask, clip), rtol=1e-4, atol=1e-4 * min(clip, 1.0))


def test_an_example_changes_the_step_by_at_most_the_norm_whatever_it_holds() -> None:
    rng, clip = np.random.default_rng(0), 0.7
    x, y, w = rng.normal(size=(5, 4)).astype(np.float32), np.zeros(5, np.float32), {"w": jnp.ones(4)}
    gone = summed(w, batch_of(x, y, np.arange(5) != 2), clip)["w"]
    odd = [[np.nan, 0, 0, 0], [np.inf] * 4, [-np.inf, np.inf, 0, 0], [1e38] * 4, [1e20, 1, 1, 1], [1e-40] * 4]
    far = [rng.normal(size=4) * 10.0**power for power in range(-20, 25, 3)]
    for row, target in product([*odd, *far], (0.0, -1e6, np.nan)):
        x[2], y[2] = row, target
        with jax.debug_nans(False):
            there = summed(w, batch_of(x, y, np.ones(5, bool)), clip)["w"]
        moved = np.linalg.norm(np.asarray(there, np.float64) - np.asarray(gone, np.float64))
        assert moved <= clip * (1 + 1e-6), (row, target)


def test_the_norm_is_over_all_learned_tensors_together() -> None:
    def loss(params: Any, batch: Any, number: Any) -> Any:
        del number
        return 3.0 * params["a"] * batch["x"][0] + 4.0 * params["b"] * batch["x"][0]

    params, batch = {"a": jnp.float32(0.0), "b": jnp.float32(0.0)}, {"x": jnp.ones(1), "mask": jnp.ones(1, bool)}
    made = clipped_sum(loss, params, batch, 1.0)
    np.testing.assert_allclose([made["a"], made["b"]], [0.6, 0.8], rtol=1e-4)


def test_the_noise_is_normal_with_the_multiple_of_the_norm_over_the_batch_s_size() -> None:
    privacy, size = ExamplePrivacy(clip_norm=0.25, noise_multiplier=3.0), 8
    params = {"w": jnp.zeros((100, 100)), "b": jnp.zeros(77)}

    def none(params: Any, batch: Any, number: Any) -> Any:
        del batch, number
        return 0.0 * sum(jnp.sum(values) for values in jax.tree.leaves(params))

    batch = {"x": jnp.zeros(size), "mask": jnp.arange(size) < 3}
    made = noisy_gradient(none, params, batch, privacy, key=jnp.asarray(KEY[2:]), step=jnp.int32(5))
    drawn = np.concatenate([np.asarray(made[name], np.float64).ravel() for name in ("b", "w")])
    stddev = 3.0 * 0.25 / size
    assert abs(np.std(drawn) / stddev - 1) < 4 / np.sqrt(2 * drawn.size)
    assert stats.kstest(drawn / stddev, "norm").pvalue > 1e-3
    assert len(set(drawn.tolist())) > 0.99 * drawn.size


def test_every_word_of_the_key_and_the_step_make_other_noise() -> None:
    key = jnp.asarray(KEY[2:])
    drawn = [normal(key, jnp.int32(step), 5) for step in (0, 1)]
    drawn += [normal(key.at[word].add(1), jnp.int32(0), 5) for word in range(4)]
    assert len({np.asarray(values).tobytes() for values in drawn}) == len(drawn)


def test_a_step_is_along_the_mean_of_clipped_gradients_with_noise() -> None:
    task = hidden_task()
    examples = task.privacy.examples
    assert examples is not None
    batches, mask, _ = feed(np.random.default_rng(1), k=1)
    carry, report = run(task, batches, mask, KEY)
    params = task.variables(jax.random.key(0)).params

    def loss(params: Any, batch: Any, number: Any) -> Any:
        del number
        return linear_loss(params, {}, batch, None)[0]

    batch = {name: jnp.asarray(values[0]) for name, values in batches.items()} | {"mask": jnp.asarray(mask[0])}
    along = noisy_gradient(loss, params, batch, examples, key=jnp.asarray(KEY[2:]), step=jnp.int32(0))
    for name in ("w", "b"):
        np.testing.assert_allclose(report.sums["delta"][f"params/{name}"], -0.1 * along[name], rtol=1e-4, atol=1e-6)
    assert report.metrics == {} and int(report.weight) == 1
    assert not [name for name in carry if name.startswith("metric/")]


def test_padding_adds_nothing_and_a_step_of_padding_not_even_noise() -> None:
    batches, mask, _ = feed(np.random.default_rng(2))
    mask[0, 2:] = mask[1] = False
    other = {name: values.copy() for name, values in batches.items()}
    other["x"][0, 2:] = other["x"][1] = 7.0
    one, two = (run(hidden_task(), fields, mask, KEY)[1] for fields in (batches, other))
    assert_equal(one.sums["delta"], two.sums["delta"])
    alone = run(hidden_task(), {name: values[:1] for name, values in batches.items()}, mask[:1], KEY)[1]
    assert_equal(one.sums["delta"], alone.sums["delta"])


def test_blocks_of_any_length_draw_the_same_noise() -> None:
    batches, mask, _ = feed(np.random.default_rng(3), k=4)
    whole, apart = (run(hidden_task(), batches, mask, KEY, k=k)[1] for k in (4, 1))
    assert_equal(whole.sums["delta"], apart.sums["delta"])


def test_the_penalty_is_added_whole_and_without_a_norm() -> None:
    batches, mask, _ = feed(np.random.default_rng(4), k=1)
    plain, pulled = (
        run(hidden_task(penalty=penalty), batches, mask, KEY)[1]
        for penalty in (None, lambda params: 50.0 * jnp.sum(params["b"] + 1.0))
    )
    moved = np.asarray(pulled.sums["delta"]["params/b"] - plain.sums["delta"]["params/b"])
    np.testing.assert_allclose(moved, np.full(C, -0.1 * 50.0), rtol=1e-5)


def test_each_example_has_randomness_of_its_own() -> None:
    def loss(params: Any, state: Any, batch: Any, key: Any) -> Any:
        del state
        return params["w"] * jax.random.normal(key, (batch["mask"].shape[0],))

    seen: list[np.ndarray] = []

    def keep(gradients: Any, state: Any, params: Any = None) -> Any:
        return gradients, state

    task = Task(
        name="own", init=lambda key: {"w": jnp.float32(0.0)}, loss=loss, batch={"x": ((), "float32")},
        privacy=Privacy(examples=ExamplePrivacy(clip_norm=1e6, noise_multiplier=1e-12)),
        local=Local(batch_size=B, weighting="uniform", optimizer=optax.GradientTransformation(lambda p: (), keep)),
    )  # fmt: skip
    for real in (1, 2):
        mask = np.arange(B)[None] < real
        seen.append(run(task, {"x": np.zeros((1, B), np.float32)}, mask, KEY)[1].sums["delta"]["params/w"])
    assert abs(seen[1] - 2 * seen[0]) > 1e-3


def test_state_that_examples_change_is_refused() -> None:
    hides = Privacy(examples=ExamplePrivacy(clip_norm=1.0, noise_multiplier=1.0))
    with pytest.raises(ValueError, match="without state"):
        local_rule(noisy_task(privacy=hides, local=LOCAL))
    norm = shoal.Task.from_flax(
        Norm, loss="softmax_cross_entropy", batch={"x": ((D,), "float32"), "label": ((), "int32")},
        privacy=hides, local=LOCAL, name="norm",
    )  # fmt: skip
    with pytest.raises(ValueError, match="without state"):
        local_rule(norm)


def test_frozen_state_stays_as_it_is() -> None:
    def init(key: Any) -> Variables:
        return Variables(linear_init(key), {"scale": jnp.float32(2.0)})

    def loss(params: Any, state: Any, batch: Any, key: Any) -> shoal.Loss:
        made = linear_loss(params, state, batch, key)
        return shoal.Loss(made, {"scale": state["scale"] + jnp.sum(made)}, {})

    task = hidden_task(init=init, loss=loss, leaves={"state/*": "frozen"})
    batches, mask, _ = feed(np.random.default_rng(5))
    carry, report = run(task, batches, mask, KEY)
    assert carry["state/scale"] == 2.0
    assert sorted(report.sums["delta"]) == ["params/b", "params/w"]


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"local": replace(LOCAL, weighting="examples")}, "weighting='uniform'"),
        ({"local": replace(LOCAL, partial="fednova")}, "partial='drop'"),
        ({"heeds_mask": False}, "heeds_mask"),
        ({"keys": lambda batch: {}}, "keys=None"),
        ({"aggregator": "statistics"}, "statistics"),
    ],
)
def test_what_noise_on_examples_cannot_protect_is_refused(changes: dict[str, Any], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        hidden_task(**changes)


def test_settings_out_of_range_are_refused() -> None:
    for wrong in ({"clip_norm": 0.0}, {"clip_norm": 1e9}, {"noise_multiplier": 0.0}, {"delta": 1.0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            ExamplePrivacy(**{"clip_norm": 1.0, "noise_multiplier": 1.0, **wrong})


def test_algorithms_with_gradients_of_several_examples_or_rules_of_their_own_are_refused() -> None:
    for made in (shoal.per_fedavg(hidden_task()), shoal.ditto(hidden_task())):
        with pytest.raises(ValueError, match=r"Privacy\(examples=…\)"):
            local_rule(made)
    bare = local_rule(tiny_task(local=LOCAL))
    with pytest.raises(ValueError, match="a rule of its own"):
        local_rule(hidden_task(rule=lambda task: bare))


@pytest.mark.parametrize(
    "algorithm",
    [
        lambda task: shoal.fedprox(task, mu=0.1),
        lambda task: shoal.scaffold(task, devices=20),
        lambda task: shoal.compressed(task, "int8"),
        shoal.reptile,
    ],
)
def test_algorithms_that_only_see_the_noisy_gradient_go_with_it(algorithm: Any) -> None:
    task = algorithm(hidden_task())
    assert local_rule(task).hides_examples
    built = build(task)
    assert not [name for name in (spec.tensor.name for spec in built.plan.manifest.sums) if name.startswith("metric/")]
    update_of(built, noise_seed=bytes(32))


def test_it_goes_with_clipping_and_noise_of_whole_updates() -> None:
    both = replace(hidden_task().privacy, clip_norm=1e-3, noise_multiplier=1.0)
    batches, mask, _ = feed(np.random.default_rng(6))
    report = run(hidden_task(privacy=both), batches, mask, KEY)[1]
    length = np.sqrt(sum(float(jnp.sum(jnp.square(v))) for v in report.sums["delta"].values()))
    assert length == pytest.approx(1e-3, rel=1e-3)


def examples_of(count: int = 9) -> Examples:
    rng = np.random.default_rng(7)
    return Examples({
        "x": rng.normal(size=(count, D)).astype(np.float32), "y": rng.integers(0, C, count).astype(np.int32)
    })  # fmt: skip


def update_of(built: Any, *, noise_seed: bytes | None, seed: bytes = bytes(32)) -> Any:
    runner = JaxRunner(built.plan)
    runner.set_model("root", built.model)
    manifest = built.plan.manifest
    return train(runner, manifest, "root", examples_of(), None, seed=seed, member="a", noise_seed=noise_seed)


def test_the_plan_says_so_and_the_program_s_key_is_made_of_the_secret_alone() -> None:
    built = build(hidden_task())
    manifest = built.plan.manifest
    check_plan(manifest, Limits())
    assert Manifest.parse(manifest.data).promises.privacy == hidden_task().privacy
    one, same, other = (update_of(built, noise_seed=bytes([byte]) * 32).sums for byte in (1, 1, 2))
    assert_equal(one, same)
    assert not np.array_equal(one["delta/params/w"], other["delta/params/w"])
    public = member_randomness(bytes(32), "a").key
    made = program_key(manifest.promises.privacy, public, noise_seed=bytes(32), member="a")
    assert made.shape == (6,) and not np.array_equal(made[:2], public)


def test_a_server_that_knows_the_key_reads_the_example_and_one_that_does_not_reads_noise() -> None:
    round_seed, examples = bytes(range(32)), Examples({"x": np.float32([[0.3, -0.9, 0.6]]), "y": np.int32([1])})
    built = build(hidden_task())
    runner, manifest, privacy = JaxRunner(built.plan), built.plan.manifest, built.plan.manifest.promises.privacy
    runner.set_model("root", built.model)
    key = program_key(privacy, member_randomness(round_seed, "a").key, noise_seed=round_seed, member="a")
    noise = 0.5 * np.asarray(normal(jnp.asarray(key[2:]), jnp.int32(0), C + D * C))

    def missed(noise_seed: bytes) -> float:
        sums = train(runner, manifest, "root", examples, None, seed=round_seed, member="a", noise_seed=noise_seed).sums
        bias, kernel = (-sums[f"delta/params/{name}"] / 0.1 * B for name in ("b", "w"))
        read = dense_input(kernel - noise[C:].reshape(D, C), bias - noise[:C])
        return float(np.max(np.abs(read - examples.fields["x"][0])))

    assert missed(round_seed) < 1e-3
    assert min(missed(bytes([byte]) * 32) for byte in range(5)) > 0.3


@pytest.mark.parametrize("short", [None, b"", b"short"])
def test_nobody_trains_with_noise_that_others_know_by_mistake(short: bytes | None) -> None:
    with pytest.raises(ValueError, match="noise_seed"):
        update_of(build(hidden_task()), noise_seed=short)


def test_other_plans_draw_from_the_round_s_seed_as_before() -> None:
    public = member_randomness(bytes(32), "a").key
    assert program_key(Privacy(), public, noise_seed=None, member="a") is public


def test_the_check_of_a_task_passes() -> None:
    made = shoal.testing.check(hidden_task())
    assert made.ok, str(made)
