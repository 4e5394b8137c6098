"""A lower bound on epsilon from one run: of many canaries each is in it or not by the toss of a coin, and somebody guesses which.

Whatever is (epsilon, delta)-differentially private keeps all guessing near chance: of r guesses the number that are right is hardly ever above
what Binomial(r, 1 / (1 + e^-epsilon)) gives (Steinke, Nasr, Jagielski 2023, "Privacy Auditing with One (1) Training Run", theorem 5.2).
So many right ones refute a smaller epsilon. A bound that lies above what a run claims is a proof that the claim is wrong; one that lies
below proves nothing.
"""

from dataclasses import dataclass
from math import exp

import numpy as np
from scipy.stats import binom

from shoal import validate


@dataclass(frozen=True, kw_only=True)
class Bound:
    """What was refuted."""

    epsilon: float
    """Every smaller one is, with this confidence; 0: none."""
    delta: float
    confidence: float
    right: int
    guesses: int
    canaries: int


def bound(
    scores: np.ndarray, was_in: np.ndarray, *, delta: float, guesses: int | None = None, confidence: float = 0.95
) -> Bound:
    """Guesses by scores, half of them the highest as in, half the lowest as out.

    Args:
        scores: (canaries,) float, higher for what seems to have been in.
        was_in: (canaries,) bool, each by a fair coin of its own.
        delta: that epsilon is stated at.
        guesses: how many, fixed before the scores are seen; None: a third of the canaries.
        confidence: of the bound.
    """
    count = len(scores)
    if scores.shape != (count,) or was_in.shape != (count,) or count < 2:
        raise ValueError(f"Expected scores and was_in (canaries,), got {scores.shape} and {was_in.shape}.")
    validate.between(0.5, 1.0, confidence=confidence)
    each = max(1, (count // 3 if guesses is None else guesses) // 2)
    if 2 * each > count:
        raise ValueError(f"Expected at most {count} guesses, as many as canaries, got guesses={guesses}.")
    order = np.argsort(scores, kind="stable")
    right = int(np.sum(was_in[order[-each:]]) + np.sum(~was_in[order[:each]]))
    low, high = 0.0, 1.0
    while _chance(count, 2 * each, right, high, delta) < 1 - confidence:
        low, high = high, 2 * high
    while high - low > 1e-4:
        middle = (low + high) / 2
        refuted = _chance(count, 2 * each, right, middle, delta) < 1 - confidence
        low, high = (middle, high) if refuted else (low, middle)
    return Bound(epsilon=low, delta=delta, confidence=confidence, right=right, guesses=2 * each, canaries=count)


def _chance(canaries: int, guesses: int, right: int, epsilon: float, delta: float) -> float:
    """That so many or more are right, at most, of what is (epsilon, delta)-private."""
    success = 1 / (1 + exp(-epsilon))
    tail = float(binom.sf(right - 1, guesses, success))
    # What delta can add: the largest mean of the masses just below.
    masses = np.cumsum(binom.pmf(right - np.arange(1, right + 1), guesses, success))
    slack = float(np.max(masses / np.arange(1, right + 1), initial=0.0))
    return min(1.0, tail + 2 * canaries * delta * slack)
