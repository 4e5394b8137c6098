"""How large a demo is. Kept in the run's config, so that a demo that goes on is the same demo."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Self


@dataclass(frozen=True, kw_only=True)
class DemoSettings:
    """The settings of one demo."""

    rounds: int = 40
    """Versions to commit."""
    devices: int = 100
    """Devices in all."""
    processes: int = 4
    """Processes that they are spread over, evenly."""
    goal: int = 20
    """Updates that close a round."""
    alpha: float = 0.3
    """Concentration of the Dirichlet split: the smaller, the less alike the devices."""
    num_train: int | None = None
    """Pictures for training; None: all."""
    num_watched: int = 2000
    """Test pictures on which versions are evaluated while training goes on; at the end it is all of them."""
    num_test: int | None = None
    """Test pictures; None: all."""
    alone: int = 5
    """Devices that are also trained alone, for comparison."""
    alone_passes: int = 20
    """Passes of such a device over its own pictures."""
    goal_accuracy: float = 0.8
    """The time to this accuracy is told."""
    seed: int = 0
    """Of the split, the initial model and the devices' randomness."""

    @classmethod
    def of(cls, *, rounds: int | None, quick: bool) -> Self:
        """The whole demo, or one for tests."""
        chosen = cls()
        if quick:
            chosen = replace(
                chosen, rounds=4, devices=20, processes=2, goal=8, num_train=2000, num_watched=200, num_test=400, alone=1,
                alone_passes=2,
            )  # fmt: skip
        return chosen if rounds is None else replace(chosen, rounds=rounds)

    @property
    def per_process(self) -> int:
        """Devices in one process."""
        return self.devices // self.processes

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        return cls(**data)
