"""Attacks find what is there, and nothing where there is nothing."""

import numpy as np
import pytest
from scipy.stats import binom

from shoal.audit.inversion import best_similarity, dense_input, similarity
from shoal.audit.membership import by_likelihood_ratio, by_loss, told_apart
from shoal.audit.one_run import bound


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
