"""When a device may work: conditions that a probe reads, held to for a while before it begins. No I/O; the probes are in `probe.py`."""

from collections.abc import Collection
from dataclasses import dataclass, fields
from typing import Final, Protocol, final, runtime_checkable

from shoal import validate

SETTLE_S: Final = 30.0
"""How long conditions hold before work begins, unless said otherwise."""
_NOT: Final = {
    "charging": ("it is not charging", "whether it is charging is not known"),
    "idle": ("others use this machine", "whether others use this machine is not known"),
    "unmetered": ("the network is metered", "whether the network is metered is not known"),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Conditions:
    """What a probe says of a machine; None: it cannot tell."""

    charging: bool | None = None
    """On mains, or without a battery."""
    idle: bool | None = None
    """Nobody else needs it."""
    unmetered: bool | None = None
    """What goes over its network costs nothing."""


CONDITIONS: Final = tuple(field.name for field in fields(Conditions))


@final
class Eligibility:
    """Whether a device may work. It may once all that is wanted has held for `settle_s`, and until something does not.

    What cannot be told does not hold.
    """

    def __init__(self, wanted: Collection[str], *, settle_s: float = SETTLE_S) -> None:
        """Raises ValueError for a condition that there is none of."""
        for name in wanted:
            validate.one_of(CONDITIONS, condition=name)
        validate.not_negative(settle_s=settle_s)
        self.wanted = tuple(dict.fromkeys(wanted))
        self._settle_s = settle_s
        self._since_s: float | None = None
        """From when on all of it has held."""

    def step(self, conditions: Conditions, *, now_s: float) -> str:
        """Why the device may not work, in words; empty: it may."""
        for name in self.wanted:
            holds: bool | None = getattr(conditions, name)
            if not holds:
                self._since_s = None
                return _NOT[name][holds is None]
        if self._since_s is None:
            self._since_s = now_s
        if not self.wanted or now_s - self._since_s >= self._settle_s:
            return ""
        return f"its conditions have held for less than {self._settle_s:g} s"


@runtime_checkable
class Probe(Protocol):
    """Reads the conditions. Calls may take a while."""

    def read(self) -> Conditions:
        """Raises DataError: it could not be read."""
        ...


def untold(probe: Probe, wanted: tuple[str, ...]) -> str:
    """What of the wanted conditions cannot be told here, in words; empty: nothing. Raises as `Probe.read`.

    Whether a machine is idle shows only after a while.
    """
    read = probe.read()
    unknown = [f.name for f in fields(read) if f.name in wanted and f.name != "idle" and getattr(read, f.name) is None]
    return " or ".join(unknown)
