"""What a metric's name says of it: whose it is, and whether more of it is better.

accuracy            of a version, on the examples held out
left_out/accuracy   of a version, on users who never train
train/loss          of a cohort, before its version
accuracy/p10        of the users it was measured on one by one, what the worst tenth do not exceed; likewise p90
"""

import re
from collections.abc import Mapping
from typing import Final

LEFT_OUT: Final = "left_out/"
LOW_TAIL: Final = "/p10"
HIGH_TAIL: Final = "/p90"
_LESS_IS_BETTER: Final = re.compile(r"(^|[^a-z])(loss|error|errors|perplexity|mae|mse|rmse|nll|regret|cost)([^a-z]|$)")


def higher_is_better(metric: str) -> bool:
    """Whether more of a metric is better, as far as its name tells: losses and errors should fall, all else should rise.

    >>> higher_is_better("left_out/accuracy"), higher_is_better("train/loss"), higher_is_better("top_5_error/p90")
    (True, False, False)
    """
    return not _LESS_IS_BETTER.search(metric.lower())


def is_tail(metric: str) -> bool:
    """Whether it is a quantile over users."""
    return metric.endswith((LOW_TAIL, HIGH_TAIL))


def worst_tail(metric: str) -> str:
    """The name of what a tenth of the users are at, or worse.

    >>> worst_tail("accuracy"), worst_tail("loss")
    ('accuracy/p10', 'loss/p90')
    """
    return metric + (LOW_TAIL if higher_is_better(metric) else HIGH_TAIL)


def without_tails(metrics: Mapping[str, float]) -> dict[str, float]:
    """Metrics without the quantiles over users.

    >>> without_tails({"accuracy": 0.9, "accuracy/p10": 0.7, "accuracy/p90": 1.0})
    {'accuracy': 0.9}
    """
    return {name: value for name, value in metrics.items() if not is_tail(name)}
