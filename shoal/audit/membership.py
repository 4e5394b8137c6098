"""Membership inference: from a model's loss on an example, was it trained on?

The rate that matters is that of right accusations where hardly any are wrong (Carlini et al. 2022, "Membership Inference Attacks From First
Principles"), not the share of right guesses.
"""

from dataclasses import dataclass

import numpy as np
from scipy.stats import beta, norm


@dataclass(frozen=True, kw_only=True)
class Membership:
    """How well members are told from others."""

    auc: float
    """Chance that a member looks more like one than somebody else does; 0.5: nothing is told."""
    found: float
    """Share of the members that are found where `wrong` of the others are accused."""
    low: float
    high: float
    """95 % interval of `found` (Clopper and Pearson), as if examples were independent."""
    wrong: float


def told_apart(members: np.ndarray, others: np.ndarray, *, wrong: float = 0.01) -> Membership:
    """How well scores tell members from others.

    Args:
        members: scores of examples that were trained on, (n,), higher for what looks like one.
        others: of examples that were not, (m,).
        wrong: share of the others that may be accused.
    """
    if not len(members) or not len(others):
        raise ValueError("Expected scores of members and of others, got none of one of them.")
    order = np.sort(others)
    below, ties = np.searchsorted(order, members, "left"), np.searchsorted(order, members, "right")
    allowed = int(np.floor(wrong * len(others)))
    threshold = order[-allowed - 1] if allowed < len(others) else -np.inf
    hits, count = int(np.sum(members > threshold)), len(members)
    low = float(beta.ppf(0.025, hits, count - hits + 1)) if hits else 0.0
    high = float(beta.ppf(0.975, hits + 1, count - hits)) if hits < count else 1.0
    auc = float(np.mean(below + ties) / 2 / len(others))
    return Membership(auc=auc, found=hits / count, low=low, high=high, wrong=wrong)


def by_loss(losses: np.ndarray) -> np.ndarray:
    """Scores by a threshold on the loss (Yeom et al. 2018): the lower the likelier."""
    return -np.asarray(losses, np.float64)


def by_likelihood_ratio(losses: np.ndarray, shadow_losses: np.ndarray, shadow_in: np.ndarray) -> np.ndarray:
    """Scores by LiRA, online, with one variance for all, as few shadow models ask for (Carlini et al. 2022, section VI).

    Args:
        losses: of the model under attack, (examples,).
        shadow_losses: of models that somebody trained for comparison, (shadows, examples).
        shadow_in: (shadows, examples) bool: that example was among what that shadow was trained on. Each example is in some and not in others.

    Returns:
        (examples,) log of the likelihood ratio in : out.
    """
    if shadow_losses.shape != shadow_in.shape or losses.shape != shadow_losses.shape[1:]:
        raise ValueError(
            f"Expected losses (examples,) and shadows (shadows, examples), got {losses.shape}, {shadow_losses.shape}, {shadow_in.shape}."
        )
    counts = shadow_in.sum(axis=0)
    if not np.all((counts > 0) & (counts < len(shadow_in))):
        raise ValueError("Expected every example in at least one shadow and out of at least one.")
    own, shadows = _logit(losses), _logit(shadow_losses)
    mean_in = np.sum(np.where(shadow_in, shadows, 0), axis=0) / counts
    mean_out = np.sum(np.where(shadow_in, 0, shadows), axis=0) / (len(shadow_in) - counts)
    spread_in = np.sqrt(np.mean(np.square(shadows - mean_in)[shadow_in])) + 1e-6
    spread_out = np.sqrt(np.mean(np.square(shadows - mean_out)[~shadow_in])) + 1e-6
    return np.asarray(norm.logpdf(own, mean_in, spread_in) - norm.logpdf(own, mean_out, spread_out))


def _logit(losses: np.ndarray) -> np.ndarray:
    """log p / (1 - p) of the right label's probability p = exp(-loss): nearly normal."""
    bounded = np.clip(np.asarray(losses, np.float64), 1e-7, 50.0)
    return -bounded - np.log(-np.expm1(-bounded))
