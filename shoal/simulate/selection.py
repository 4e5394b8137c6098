"""Who is in a round of a simulation: drawn from the round's seed alone, so that a run taken up draws the same.

uniform   goal members, each set of them as likely as any other
exact     those that are named
by_size   goal draws, each by the members' numbers of examples, with replacement: who is drawn twice counts twice. With
          updates that count alike the mean is right for all examples pooled (Li et al. 2020, "On the convergence of
          FedAvg on non-IID data", scheme I)
poisson   each member on its own with chance goal / members (McMahan et al. 2018, "Learning differentially private
          recurrent language models", section 2): the size of the round is random. Drawn again where it is below the
          smallest group, or above what a sum holds.

With `min_separation` members are dealt out to so many hands, once for the whole run, and versions take from the hands in turn:
so who has been in one rests until its hand's turn comes again.
"""

import hashlib
from collections.abc import Sequence

import numpy as np
from scipy.stats import binom

from shoal.policy import RoundPolicy


def select(
    policy: RoundPolicy,
    members: Sequence[str],
    sizes: np.ndarray,
    seed: bytes,
    *,
    version: int = 0,
    run_seed: bytes = b"",
) -> tuple[str, ...]:
    """The cohort of a round.

    Args:
        policy: of the run.
        members: who can take part, in an order that stays.
        sizes: (members,) int64: examples that each trains on.
        seed: of the round, 32 bytes.
        version: that the round starts from.
        run_seed: of the run.
    """
    rng = np.random.Generator(np.random.Philox(key=int.from_bytes(seed[:16], "little")))
    match policy.selection.kind:
        case "exact":
            return policy.selection.ids
        case "by_size":
            chosen = rng.choice(len(members), policy.goal, p=sizes / sizes.sum())
        case "poisson":
            chosen = _poisson(policy, len(members), rng)
        case _:
            hand = _hand(policy.min_separation, len(members), version, run_seed)
            chosen = rng.choice(hand, policy.goal, replace=False)
    return tuple(members[i] for i in chosen)


def _hand(hands: int, members: int, version: int, run_seed: bytes) -> np.ndarray:
    """Those whose turn it is."""
    if hands == 1:
        return np.arange(members)
    key = hashlib.sha256(b"shoal hands v1\0" + run_seed).digest()[:16]
    dealt = np.random.Generator(np.random.Philox(key=int.from_bytes(key, "little"))).permutation(members)
    return np.sort(dealt[version % hands :: hands])


def _poisson(policy: RoundPolicy, members: int, rng: np.random.Generator) -> np.ndarray:
    while True:
        chosen = np.flatnonzero(rng.random(members) < policy.goal / members)
        if policy.minimum_group <= len(chosen) <= policy.max_members:
            return chosen


def redrawn(policy: RoundPolicy, members: int) -> float:
    """The chance that a Poisson cohort is drawn again, being too small or too large."""
    size = binom(members, policy.goal / members)
    return float(size.cdf(policy.minimum_group - 1) + size.sf(policy.max_members))
