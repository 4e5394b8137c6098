"""Early stopping: when a run ends before its last round. Decided by the metrics of the record alone, so that a run that was
interrupted ends where it would have ended."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from math import isfinite
from typing import Any, Literal, Self, final

from shoal import validate
from shoal.metric_names import higher_is_better


@final
@dataclass(frozen=True, slots=True)
class StopWhen:
    """Ends a run early: when a metric reaches a value, or has not become better for some rounds.

    Example:
        >>> rule = StopWhen("accuracy", patience=2)
        >>> rule.why([(1, 0.5), (2, 0.7), (3, 0.6)])
        ''
        >>> rule.why([(1, 0.5), (2, 0.7), (3, 0.6), (4, 0.7)])
        'accuracy has not risen for 2 rounds (0.7 in round 2)'
    """

    metric: str
    """Its name, as the run tells it: `accuracy`, `left_out/accuracy`, `train/loss`."""
    patience: int = 0
    """Rounds without an improvement after which the run ends; 0: any number. They count from the best measurement."""
    reaches: float | None = None
    """The value at which the run ends."""
    least: float = 0.0
    """What is no larger than this is no improvement."""
    better: Literal["", "higher", "lower"] = ""
    """Which way is better; empty: as the name says (losses and errors should fall, all else should rise)."""

    def __post_init__(self) -> None:
        """Raises ValueError for a rule that never stops a run, or makes no sense."""
        validate.one_of(("", "higher", "lower"), better=self.better)
        validate.not_negative(patience=self.patience, least=self.least)
        if not self.metric:
            raise ValueError("Expected the name of a metric, got ''.")
        if not self.patience and self.reaches is None:
            raise ValueError(
                f"Expected patience=… or reaches=… for {self.metric}: with neither the run never stops early."
            )
        if self.reaches is not None and not isfinite(self.reaches):
            raise ValueError(f"Expected reaches to be a finite number, got reaches={self.reaches!r}.")

    @property
    def is_rising(self) -> bool:
        """Whether more is better."""
        return self.better == "higher" if self.better else higher_is_better(self.metric)

    def why(self, points: Sequence[tuple[int, float]]) -> str:
        """Why the run ends with the last of these measurements, in words; empty if it goes on.

        Args:
            points: (version, value) by version; what is no number is no improvement.
        """
        if not points:
            return ""
        sign = 1.0 if self.is_rising else -1.0
        last, value = points[-1]
        if self.reaches is not None and sign * value >= sign * self.reaches:
            return f"{self.metric} has reached {self.reaches:.4g} ({value:.4g})"
        best, best_at = float("-inf"), points[0][0]
        for version, measured in points:
            if sign * measured > best + (self.least if isfinite(best) else 0.0):
                best, best_at = sign * measured, version
        if self.patience and last - best_at >= self.patience:
            moved = "risen" if self.is_rising else "fallen"
            least = f" by more than {self.least:.4g}" if self.least else ""
            return f"{self.metric} has not {moved}{least} for {last - best_at} rounds ({sign * best:.4g} in round {best_at})"
        return ""

    def to_json(self) -> dict[str, Any]:
        """What differs from the defaults."""
        return {field.name: value for field in fields(self) if (value := getattr(self, field.name)) != field.default}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        """Reads what `to_json` gave; raises ValueError or TypeError for anything else."""
        known = {field.name for field in fields(cls)}
        if unknown := sorted(set(value) - known):
            raise ValueError(f"Expected {' | '.join(sorted(known))} in a rule to stop by, got {unknown[0]!r}.")
        made = cls(**value)
        validate.types(made)
        return made
