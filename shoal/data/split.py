"""Ways to deal one data set out to users: IID, label-skewed, or by the users that are in the data.

Each returns user id -> indices, for `Population.from_split`. Made users are called `device-000`,
`device-001`, ... Every example goes to exactly one user, and the same generator state gives the same split.
Indices are ascending, so that reads of memory-mapped arrays go forward; shuffling is the business of
`batch.py`.

References:
    McMahan et al., 2017, "Communication-Efficient Learning of Deep Networks from Decentralized Data",
    https://arxiv.org/abs/1602.05629, section 3 (`shards`).
    Yurochkin et al., 2019, "Bayesian Nonparametric Federated Learning of Neural Networks",
    https://arxiv.org/abs/1905.12022, section 4 (`dirichlet`: proportions over users, drawn per class).
"""

import heapq
import math

import numpy as np

from shoal import validate

Split = dict[str, np.ndarray]
"""User id -> indices (n,) int64, ascending."""


def iid(num_examples: int, num_users: int, *, rng: np.random.Generator) -> Split:
    """Deals examples out at random; sizes differ by at most one.

    Raises:
        ValueError: No users, or fewer examples than users.
    """
    _check_enough(num_examples, num_users, 1, "num_users")
    owner = np.empty(num_examples, np.int64)
    owner[rng.permutation(num_examples)] = np.arange(num_examples) % num_users
    return _named(_group(owner, num_users))


def dirichlet(
    labels: np.ndarray, num_users: int, *, alpha: float, rng: np.random.Generator, min_examples: int = 1
) -> Split:
    """Deals each class out in proportions drawn from a symmetric Dirichlet over the users.

    Departure from the paper: users left with fewer than `min_examples` are given random examples of whoever
    holds most at that moment, instead of drawing again until all have enough, which for many users or a small
    alpha never ends.

    Args:
        labels: Class of each example (N,).
        num_users: How many users to make.
        alpha: Concentration > 0. 0.1 is heavily skewed, 100 nearly IID; `math.inf` gives equal proportions.
        rng: Source of the proportions and of the order within a class.
        min_examples: The least that a user is left with.

    Raises:
        ValueError: An argument out of range, or fewer than num_users x min_examples labels.
    """
    validate.positive(alpha=alpha)
    validate.not_negative(min_examples=min_examples)
    _check_labels(labels)
    _check_enough(len(labels), num_users, max(1, min_examples), "num_users x min_examples")
    owner = np.empty(len(labels), np.int64)
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        cuts = np.floor(np.cumsum(_proportions(num_users, alpha, rng)) * len(members) + 0.5)
        cuts[-1] = len(members)  # the sum of the proportions may be a rounding error away from one
        owner[members] = np.searchsorted(cuts, np.arange(len(members)), side="right")
    parts = _group(owner, num_users)
    _give_to_the_poor(parts, min_examples, rng)
    return _named(parts)


def shards(labels: np.ndarray, num_users: int, *, shards_per_user: int, rng: np.random.Generator) -> Split:
    """Sorts by label, cuts into equal shards and gives each user some: few classes per user.

    Args:
        labels: Class of each example (N,).
        num_users: How many users to make (100 in the paper).
        shards_per_user: Shards that each user gets (2 in the paper).
        rng: Decides who gets which shard.

    Raises:
        ValueError: An argument below one, or fewer labels than shards.
    """
    validate.positive(shards_per_user=shards_per_user)
    _check_labels(labels)
    _check_enough(len(labels), num_users, shards_per_user, "num_users x shards_per_user")
    pieces = np.array_split(np.argsort(labels, kind="stable"), num_users * shards_per_user)
    dealt = rng.permutation(len(pieces)).reshape(num_users, shards_per_user)
    return _named([np.sort(np.concatenate([pieces[shard] for shard in row])) for row in dealt])


def by_user(users: np.ndarray) -> Split:
    """Groups examples by the user who is in the data.

    Args:
        users: User of each example (N,): text, bytes or integers.

    Returns:
        The user as text -> its indices, users in ascending order (integers by value).

    Raises:
        ValueError: Another dtype, or not one dim.
    """
    if users.ndim != 1 or users.dtype.kind not in "UTSiu":
        raise ValueError(f"Expected users (N,) of text or integers, got {users.dtype} {users.shape}.")
    found, owner = np.unique(users, return_inverse=True)
    names = (u.decode() if isinstance(u, bytes) else str(u) for u in found.tolist())
    return dict(zip(names, _group(owner, len(found)), strict=True))


def holdout(labels: np.ndarray, *, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Cuts a fixed test part out of a data set that has none, with the same fraction of every class.

    Uses the raw stream of Philox, which NumPy never changes, so that the cut is the same for ever.

    Args:
        labels: Class of each example (N,).
        fraction: Part of each class that goes to the test part, in [0, 1], rounded to whole examples.
        seed: Key of the stream.

    Returns:
        Indices of the training part and of the test part, both ascending.
    """
    validate.between(0, 1, fraction=fraction)
    _check_labels(labels)
    lots = np.random.Philox(key=seed).random_raw(len(labels))
    is_test = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        drawn = np.argsort(lots[members], kind="stable")[: round(len(members) * fraction)]
        is_test[members[drawn]] = True
    return np.flatnonzero(~is_test), np.flatnonzero(is_test)


def held_out_part(num_examples: int, *, fraction: float, is_held_out: bool) -> np.ndarray:
    """Indices of what a device holds out of training, or of the rest: every so many-th of its examples, by position.

    Whether an example is held out depends on its position alone, so that those that are added later move none.

    Args:
        num_examples: N.
        fraction: the part held out, in [0, 1); floor(N * fraction) examples are.
        is_held_out: which part.

    >>> held_out_part(10, fraction=0.2, is_held_out=True).tolist()
    [4, 9]
    """
    steps = np.floor(np.arange(num_examples + 1) * fraction)
    return np.flatnonzero((np.diff(steps) > 0) == is_held_out)


def _proportions(num_users: int, alpha: float, rng: np.random.Generator) -> np.ndarray:
    if math.isinf(alpha):
        return np.full(num_users, 1 / num_users)
    return rng.dirichlet(np.full(num_users, alpha))


def _group(owner: np.ndarray, num_users: int) -> list[np.ndarray]:
    """Indices by owner, ascending; one sort, so 100,000 users cost no loop over examples."""
    order = np.argsort(owner, kind="stable")
    ends = np.cumsum(np.bincount(owner, minlength=num_users))
    return np.split(order, ends[:-1])


def _give_to_the_poor(parts: list[np.ndarray], min_examples: int, rng: np.random.Generator) -> None:
    """Moves random examples, one at a time, from whoever holds most to those below the minimum; in place."""
    poor = [user for user, part in enumerate(parts) if len(part) < min_examples]
    rich = [(-len(part), user) for user, part in enumerate(parts) if len(part) > min_examples]
    heapq.heapify(rich)
    for user in poor:
        while len(parts[user]) < min_examples:
            giver = rich[0][1]
            given = rng.integers(len(parts[giver]))
            parts[user] = np.sort(np.append(parts[user], parts[giver][given]))
            parts[giver] = np.delete(parts[giver], given)
            heapq.heapreplace(rich, (-len(parts[giver]), giver))


def _named(parts: list[np.ndarray]) -> Split:
    width = max(3, len(str(len(parts) - 1)))
    return {f"device-{number:0{width}}": part for number, part in enumerate(parts)}


def _check_labels(labels: np.ndarray) -> None:
    if labels.ndim != 1:
        raise ValueError(f"Expected labels (N,), got shape {labels.shape}.")


def _check_enough(num_examples: int, num_users: int, per_user: int, what: str) -> None:
    validate.positive(num_users=num_users)
    if num_examples < num_users * per_user:
        raise ValueError(
            f"Expected at least {what} = {num_users * per_user} examples, got {num_examples}. Take fewer users."
        )
