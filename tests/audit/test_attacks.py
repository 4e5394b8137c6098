"""Attacks find what is there, and nothing where there is nothing."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy.stats import binom

import shoal
from shoal.audit.inversion import best_similarity, dense_input, similarity
from shoal.audit.learned import learned, losses_of
from shoal.audit.membership import by_likelihood_ratio, by_loss, told_apart
from shoal.audit.one_run import bound
from shoal.audit.read_back import ReadBack, first_dense, read_back
from shoal.errors import DataError

from .conftest import stddev_of


def test_nothing_is_refuted_by_guessing() -> None:
    rng = np.random.default_rng(0)
    refuted = [bound(rng.standard_normal(300), rng.random(300) < 0.5, delta=1e-6).epsilon for _ in range(200)]
    assert np.mean(np.array(refuted) > 0) <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / 200)


def test_of_randomized_response_the_bound_is_below_its_epsilon_and_near_it() -> None:
    rng = np.random.default_rng(1)
    epsilon, count = 1.0, 2000
    found = []
    for _ in range(50):
        was_in = rng.random(count) < 0.5
        said = np.where(rng.random(count) < 1 / (1 + np.exp(-epsilon)), was_in, ~was_in)
        found.append(bound(said + 1e-6 * rng.random(count), was_in, delta=0.0, guesses=count).epsilon)
    assert np.mean(np.array(found) > epsilon) <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / 50)
    assert np.median(found) > 0.85 * epsilon


def test_what_gives_all_away_is_caught() -> None:
    was_in = np.arange(400) % 2 == 0
    found = bound(was_in.astype(float), was_in, delta=1e-6)
    assert (found.right, found.guesses) == (132, 132) and found.epsilon > 3.5
    assert binom.sf(131, 132, 1 / (1 + np.exp(-found.epsilon))) == pytest.approx(0.05, abs=0.002)


@pytest.mark.parametrize(("scores", "guesses", "text"), [((3,), 2, "was_in"), ((4,), 6, "at most 4 guesses")])
def test_a_wrong_audit_is_refused(scores: tuple[int, ...], guesses: int, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        bound(np.zeros(scores), np.zeros(4, bool), delta=0.0, guesses=guesses)


def test_a_dense_layer_s_gradient_is_its_input() -> None:
    rng = np.random.default_rng(2)
    x, upstream = rng.random(49), rng.standard_normal(5)
    np.testing.assert_allclose(dense_input(np.outer(x, upstream), upstream), x)
    with pytest.raises(ValueError, match="got zeros"):
        dense_input(np.zeros((3, 2)), np.zeros(2))


def test_similarity_is_one_of_the_same_and_near_zero_of_noise() -> None:
    rng = np.random.default_rng(3)
    picture = np.clip(np.add.outer(np.linspace(0, 0.6, 28), np.linspace(0, 0.4, 28)), 0, 1)
    assert similarity(picture, picture) == pytest.approx(1.0)
    assert similarity(picture, rng.random((28, 28))) < 0.2
    assert best_similarity(picture + 0.01, [rng.random((28, 28)), picture]) > 0.9


def test_scores_that_tell_nothing_have_an_area_of_half() -> None:
    rng = np.random.default_rng(4)
    found = told_apart(rng.standard_normal(4000), rng.standard_normal(4000))
    assert found.auc == pytest.approx(0.5, abs=0.03) and found.low <= 0.01 <= found.high
    whole = told_apart(np.ones(100), np.zeros(100))
    assert (whole.auc, whole.found) == (1.0, 1.0) and whole.low > 0.95


def test_the_likelihood_ratio_finds_members_that_the_loss_does_not() -> None:
    """Examples differ more from one another than membership changes them: only a comparison with shadows tells."""
    rng = np.random.default_rng(5)
    count, shadows = 2000, 8
    hard = rng.uniform(0.2, 4.0, count)

    def losses(is_in: np.ndarray) -> np.ndarray:
        return np.asarray(hard * np.where(is_in, 0.6, 1.0) * np.exp(0.05 * rng.standard_normal(is_in.shape)))

    shadow_in = np.array([rng.permutation(np.arange(shadows) < shadows // 2) for _ in range(count)]).T
    was_in = rng.random(count) < 0.5
    own, theirs = losses(was_in), losses(shadow_in)
    ratio = told_apart(*(by_likelihood_ratio(own, theirs, shadow_in)[part] for part in (was_in, ~was_in)))
    loss = told_apart(*(by_loss(own)[part] for part in (was_in, ~was_in)))
    assert ratio.auc > 0.9 > loss.auc and ratio.found > 5 * loss.found


def dense_task(**privacy: Any) -> shoal.Task:
    """Two dense layers on 30 numbers."""

    def init(key: jax.Array) -> Any:
        one, two = jax.random.split(key)
        return {
            "first": {"kernel": jax.random.normal(one, (30, 16)) / 5, "bias": jnp.zeros(16)},
            "last": {"kernel": jax.random.normal(two, (16, 3)) / 4, "bias": jnp.zeros(3)},
        }

    def loss(params: Any, state: Any, batch: Any, key: Any) -> Any:
        hidden = jax.nn.relu(batch["x"] @ params["first"]["kernel"] + params["first"]["bias"][None, :])
        scores = hidden @ params["last"]["kernel"] + params["last"]["bias"][None, :]
        return optax.softmax_cross_entropy_with_integer_labels(scores, batch["y"])

    return shoal.Task(
        name="dense", init=init, loss=loss, batch={"x": ((30,), "float32"), "y": ((), "int32")},
        local=shoal.Local(optimizer=optax.sgd(0.5), batch_size=4, epochs=40, weighting="uniform", max_examples=400),
        rounds=shoal.RoundPolicy(goal=4, minimum_group=4), privacy=shoal.Privacy(**privacy),
    )  # fmt: skip


def users_with(examples: int) -> shoal.data.Population:
    rng = np.random.default_rng(0)
    return shoal.data.Population.from_arrays({
        f"u{i:02d}": {
            "x": rng.standard_normal((examples, 30)).astype(np.float32), "y": rng.integers(0, 3, examples).astype(np.int32)
        }
        for i in range(16)
    })  # fmt: skip


def test_what_a_task_learned_by_heart_is_told() -> None:
    by_heart = learned(dense_task(), users_with(8), rounds=6, shadows=0, wrong=0.05)
    assert by_heart.examples == 128 and by_heart.claimed is None
    assert by_heart.by_loss.auc > 0.7 and by_heart.by_likelihood is None


@pytest.mark.slow
def test_noise_ends_what_losses_tell() -> None:
    noisy = learned(dense_task(clip_norm=0.5, noise_multiplier=4.0), users_with(8), rounds=2, shadows=0, wrong=0.05)
    assert noisy.claimed is not None and abs(noisy.by_loss.auc - 0.5) < 0.2


@pytest.mark.slow
def test_shadows_tell_it_too() -> None:
    made = learned(dense_task(), users_with(8), rounds=6, shadows=4, wrong=0.05)
    assert made.by_likelihood is not None and made.by_likelihood.auc > 0.7


def test_losses_are_those_of_each_example_in_order() -> None:
    task, examples = dense_task(), next(iter(users_with(300).items()))[1]
    params = task.init(jax.random.key(0))
    tensors = {f"params/{a}/{b}": np.asarray(params[a][b]) for a in params for b in params[a]}
    batch = {**examples.fields, "mask": np.ones(300, bool)}
    expected = task.losses(params, {}, batch, jax.random.key(0)).per_example
    np.testing.assert_allclose(losses_of(task, tensors, examples), expected, rtol=1e-5)


def test_users_and_shadows_that_cannot_be_halved_are_refused() -> None:
    with pytest.raises(DataError, match="at least two examples of each user"):
        learned(dense_task(), users_with(1), rounds=1)
    with pytest.raises(ValueError, match="shadows to be even"):
        learned(dense_task(), users_with(2), rounds=1, shadows=3)


def test_an_update_is_read_back_and_noise_ends_it_just_that_of_the_task(drawn: list[float]) -> None:
    task = dense_task(clip_norm=1.0, noise_multiplier=2.0, correlated=shoal.Correlated(rounds=8, kind="tree"))
    task = task.replace(
        local=replace(task.local, batch_size=1, steps_per_block=1, epochs=1),
        rounds=replace(task.rounds, min_separation=8),
    )
    bare, group, noisy = read_back(task, users_with(1), trials=3)
    assert (bare.devices, group.devices, noisy.noise) == (1, 4, 2.0)
    assert bare.known[1] > 0.999 and bare.guessed[0] > 0.999, "one example, one step: the example itself"
    assert noisy.known[0] < 0.8 and noisy.chance is not None and noisy.known[0] - noisy.chance[0] < 0.2
    assert bare.chance is not None and bare.chance[0] < 0.8
    assert bare.beyond_chance > 0.999 and noisy.beyond_chance < 0.5
    assert drawn == pytest.approx([stddev_of(task)] * 3, rel=0.15), (
        "made for devices that rest, more of whom than there are users"
    )


@pytest.mark.parametrize(("chance", "expected"), [(0.6, 0.5), (0.9, 0.0), (1.0, 0.0), (None, 0.3)])
def test_what_is_read_counts_beyond_chance_or_as_guessed(chance: float | None, expected: float) -> None:
    spread = None if chance is None else (chance, chance, chance)
    made = ReadBack(what="", devices=8, noise=1.0, guessed=(0.3, 0.1, 0.4), known=(0.8, 0.7, 0.9), chance=spread)
    assert made.beyond_chance == pytest.approx(expected)


def test_a_task_without_such_a_layer_cannot_be_read_so() -> None:
    other = dense_task().replace(batch={"x": ((31,), "float32"), "y": ((), "int32")})
    with pytest.raises(DataError, match="no dense layer with a bias that reads a field"):
        first_dense(other, {"params/first/kernel": np.zeros((30, 16)), "params/first/bias": np.zeros(16)})
    layer = first_dense(dense_task(), {"params/first/bias": np.zeros(16), "params/first/kernel": np.zeros((30, 16))})
    assert (layer.kernel, layer.bias, layer.field) == ("params/first/kernel", "params/first/bias", "x")
