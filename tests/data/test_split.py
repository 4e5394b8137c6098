import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.data import by_user, dirichlet, holdout, iid, shards


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=seed))


def assert_every_index_once(split, num_examples):
    np.testing.assert_array_equal(np.sort(np.concatenate(list(split.values()))), np.arange(num_examples))


def assert_equal(first, second):
    assert list(first) == list(second)
    for user in first:
        np.testing.assert_array_equal(first[user], second[user])


@st.composite
def cases(draw):
    num_users = draw(st.integers(1, 12))
    labels = draw(st.lists(st.integers(0, 4), min_size=num_users * 3, max_size=80))
    return np.array(labels), num_users, draw(st.integers(0, 99))


@given(cases())
@settings(max_examples=25, deadline=None)
def test_iid_uses_every_example_once(case):
    labels, num_users, seed = case
    split = iid(len(labels), num_users, rng=rng(seed))
    assert_every_index_once(split, len(labels))
    sizes = [len(part) for part in split.values()]
    assert len(sizes) == num_users and max(sizes) - min(sizes) <= 1
    assert_equal(split, iid(len(labels), num_users, rng=rng(seed)))


@given(cases(), st.sampled_from([1e-6, 0.05, 1.0, 1e4, math.inf]), st.integers(0, 3))
@settings(max_examples=40, deadline=None)
def test_dirichlet_uses_every_example_once(case, alpha, min_examples):
    labels, num_users, seed = case
    split = dirichlet(labels, num_users, alpha=alpha, rng=rng(seed), min_examples=min_examples)
    assert_every_index_once(split, len(labels))
    assert len(split) == num_users and min(len(part) for part in split.values()) >= min_examples
    again = dirichlet(labels, num_users, alpha=alpha, rng=rng(seed), min_examples=min_examples)
    assert_equal(split, again)


@given(cases(), st.integers(1, 3))
@settings(max_examples=25, deadline=None)
def test_shards_use_every_example_once(case, shards_per_user):
    labels, num_users, seed = case
    split = shards(labels, num_users, shards_per_user=shards_per_user, rng=rng(seed))
    assert_every_index_once(split, len(labels))
    assert_equal(split, shards(labels, num_users, shards_per_user=shards_per_user, rng=rng(seed)))


@given(st.lists(st.one_of(st.integers(0, 5).map(str)), min_size=1, max_size=40))
@settings(max_examples=25, deadline=None)
def test_by_user_groups(users):
    split = by_user(np.array(users))
    assert_every_index_once(split, len(users))
    assert all(users[i] == user for user, part in split.items() for i in part)


def label_shares(split, labels):
    return np.stack([np.bincount(labels[part], minlength=10) / len(part) for part in split.values()])


def skew(alpha: float, seed: int = 0) -> float:
    """Mean total variation between a user's label shares and the whole's."""
    labels = np.arange(5000) % 10
    shares = label_shares(dirichlet(labels, 20, alpha=alpha, rng=rng(seed)), labels)
    return float(np.abs(shares - 0.1).sum(1).mean() / 2)


def test_a_large_alpha_tends_to_iid_and_a_small_one_is_skewed():
    assert skew(math.inf) < 0.01
    assert skew(1e6) < 0.01
    assert skew(1e6) < skew(100) < skew(1) < skew(0.1)
    assert skew(0.1) > 0.5


def test_seeds_differ():
    assert any(
        len(a) != len(b) or (a != b).any()
        for a, b in zip(iid(50, 5, rng=rng(1)).values(), iid(50, 5, rng=rng(2)).values(), strict=True)
    )


def test_shards_give_few_classes():
    labels = np.arange(1000) % 10
    split = shards(labels, 50, shards_per_user=2, rng=rng())
    assert max(len(np.unique(labels[part])) for part in split.values()) <= 2


def test_ids_are_padded():
    assert list(iid(3, 2, rng=rng())) == ["device-000", "device-001"]
    assert list(iid(1500, 1500, rng=rng()))[-1] == "device-1499"


def test_users_keep_their_order():
    assert list(by_user(np.array([10, 9, 10]))) == ["9", "10"]
    assert list(by_user(np.array([b"x", b"a"]))) == ["a", "x"]
    with pytest.raises(ValueError, match="text or integers, got float64"):
        by_user(np.array([1.5]))


def test_the_repair_takes_from_whoever_holds_most():
    split = dirichlet(np.zeros(100, int), 10, alpha=1e-6, rng=rng(), min_examples=5)
    assert sorted(map(len, split.values())) == [5] * 9 + [55]


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: iid(3, 4, rng=rng()), "num_users = 4 examples, got 3"),
        (lambda: iid(3, 0, rng=rng()), "num_users > 0, got num_users=0"),
        (lambda: dirichlet(np.zeros(9, int), 2, alpha=0.0, rng=rng()), "alpha > 0"),
        (lambda: dirichlet(np.zeros(9, int), 2, alpha=1.0, rng=rng(), min_examples=5), "= 10 examples, got 9"),
        (lambda: dirichlet(np.zeros((9, 1), int), 2, alpha=1.0, rng=rng()), r"labels \(N,\)"),
        (lambda: shards(np.zeros(3, int), 2, shards_per_user=2, rng=rng()), "num_users x shards_per_user = 4"),
        (lambda: holdout(np.zeros(3, int), fraction=1.5, seed=0), "fraction"),
    ],
)
def test_bad_arguments_are_refused(call, says):
    with pytest.raises(ValueError, match=says):
        call()


def test_holdout_keeps_the_classes_and_never_changes():
    labels = np.repeat([0, 1], [10, 20])
    train, test = holdout(labels, fraction=0.2, seed=0)
    np.testing.assert_array_equal(np.sort(np.concatenate([train, test])), np.arange(30))
    assert np.bincount(labels[test]).tolist() == [2, 4]
    assert test.tolist() == holdout(labels, fraction=0.2, seed=0)[1].tolist()
    assert test.tolist() != holdout(labels, fraction=0.2, seed=1)[1].tolist()
