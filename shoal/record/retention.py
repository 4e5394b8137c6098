"""How much of a run's past its record keeps.

A record that keeps all grows by a model with every version. With a `Retention` the newest versions are kept whole, and of the
older ones the first and every n-th; of the others a row remains, so that the line has no gap, and what their rounds cost, added up.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Self

from shoal import validate

SETTING: Final = "retention"
"""Where it stands in a run's config."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Retention:
    """What is kept of old versions: tensors, metrics, rounds."""

    recent: int
    """Newest versions that are kept whole."""
    every: int = 0
    """Of older versions those whose number is a multiple of it are kept too, and the first; 0: only the first."""

    def __post_init__(self) -> None:
        validate.types(self)
        validate.positive(recent=self.recent)
        validate.not_negative(every=self.every)

    def to_json(self) -> dict[str, Any]:
        return {"recent": self.recent, "every": self.every}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Raises ValueError or TypeError for anything that `to_json` would not have written."""
        return cls(**data)

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Self | None:
        """What a run's config says; None where all versions are kept."""
        return cls.from_json(config[SETTING]) if SETTING in config else None

    @classmethod
    def parse(cls, text: str) -> Self:
        """`100` or `100:1000`: recent, and every. Raises ValueError for anything else."""
        recent, _, every = text.partition(":")
        try:
            return cls(recent=int(recent), every=int(every or 0))
        except ValueError as error:
            raise ValueError(f"Expected RECENT or RECENT:EVERY, for example 100:1000, got {text!r}.") from error
