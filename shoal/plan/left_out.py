"""Users who cannot take part in a task, as far as the number of their examples tells it."""

from collections.abc import Mapping, Sequence
from typing import Final

from shoal.plan.manifest import Training

NAMED: Final = 3
EMPTY: Final = "no examples"
HEED_THE_MASK: Final = "Give the model's __call__ a `mask` argument and pass it on, or set Local(drop_remainder=True)."
"""What to do about partial batches."""


def obstacle(training: Training, num_examples: int) -> str:
    """What keeps a user with so many examples from taking part; "" where nothing does."""
    size, held = training.batch_size, num_examples
    num_examples = training.num_used(num_examples)
    if not num_examples:
        return EMPTY if not held else f"too few examples to hold {training.holdout:.0%} of them out"
    if training.drop_remainder:
        return f"fewer examples than a batch of {size}" if num_examples < size else ""
    # Of more examples than a round takes, as many whole batches are drawn as it does.
    if training.whole_batches and num_examples <= training.max_examples // training.epochs and num_examples % size:
        return f"a partial batch (of {size}), and the model mixes examples (batch norm?) and does not take the mask"
    return ""


def left_out(training: Training, sizes: Mapping[str, int]) -> dict[str, tuple[str, ...]]:
    """Obstacle -> the users that it keeps from taking part, in their order.

    Args:
        training: of the task's manifest.
        sizes: user -> number of examples.
    """
    found: dict[str, list[str]] = {}
    for user, num in sizes.items():
        if why := obstacle(training, num):
            found.setdefault(why, []).append(user)
    return {why: tuple(users) for why, users in found.items()}


def named(users: Sequence[str]) -> str:
    """The first of them by name.

    >>> named(["alice"]), named(["alice", "bob"]), named(["alice", "bob", "carol", "dave", "erin"])
    ('alice', 'alice and bob', 'alice, bob, carol and 2 more')
    """
    shown = [*users] if len(users) <= NAMED else [*users[:NAMED], f"{len(users) - NAMED:,} more"]
    return " and ".join(filter(None, [", ".join(shown[:-1]), shown[-1]]))


def told(users: Sequence[str], why: str) -> str:
    """Who is left out, and why, in one line."""
    return f"{named(users)} {'is' if len(users) == 1 else 'are'} left out: {why}"
