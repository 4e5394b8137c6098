"""What a device notes of its days, and when it tells of them. A machine without I/O: its state is small, and all that is kept.

Invariants (tests cite them by number):
    (1) About a day a device tells at most once, over restarts and whatever its clock does (of the last `REMEMBERED` days that it told in). It is
        settled before anything is sent.
    (2) On day d it tells of day d - 1, at its slot of day d, whether or not anything happened.
    (3) A device that is off or asleep at its slot skips that day; nothing is made up for later.
    (4) A slot follows from the secret and the day: not from what the device does, nor from when it was started.
"""

import json
from dataclasses import dataclass, field
from math import floor
from typing import Final, Self

from shoal.errors import StoreError
from shoal.privacy.telemetry import COUNTS, DAY_S, HISTOGRAMS, Day, slot_s

GRACE_S: Final = 60.0
"""So long after its slot a device that wakes may still tell: timers are late, and a slot is no secret to the second."""
REMEMBERED: Final = 64
NOTED: Final = 3
"""Days whose notes are kept: today, yesterday, and one for a clock that is set back."""
MOST: Final = 2.0**53


@dataclass
class _Notes:
    hours: set[int] = field(default_factory=set)
    amounts: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Tell:
    """Tell of this day; it is settled, and once the diary is written down the report may leave."""

    day: int
    """Since 1970-01-01 UTC."""
    told: Day


class Diary:
    """See the module's text."""

    def __init__(self, secret: bytes) -> None:
        """`secret`: 32 random bytes of this device's, from which its slots follow."""
        self._secret = secret
        self._settled: list[int] = []
        self._days: dict[int, _Notes] = {}

    # What happens.

    def was_there(self, wall_s: float) -> None:
        """The device was there for work at that time, seconds since the epoch."""
        self._notes(wall_s).hours.add(int(wall_s % DAY_S // 3600.0))

    def add(self, name: str, amount: float, wall_s: float) -> None:
        """Some of what `COUNTS` and `HISTOGRAMS` name. Raises KeyError for another name."""
        if name not in COUNTS and name not in HISTOGRAMS:
            raise KeyError(name)
        amounts = self._notes(wall_s).amounts
        amounts[name] = min(MOST, amounts.get(name, 0.0) + max(0.0, amount))

    # When it tells.

    def due(self, wall_s: float) -> Tell | None:
        """What is to be told now, if anything; asked again, it is not."""
        day = floor(wall_s / DAY_S)
        slot = day * DAY_S + slot_s(self._secret, day)
        if day in self._settled or not slot <= wall_s <= slot + GRACE_S:
            return None
        self._settled = [*self._settled, day][-REMEMBERED:]
        notes = self._days.pop(day - 1, _Notes())
        return Tell(day - 1, Day(hours=frozenset(notes.hours), amounts=notes.amounts))

    def next_s(self, wall_s: float) -> float:
        """Its next slot, seconds since the epoch."""
        day = floor(wall_s / DAY_S)
        slots = (each * DAY_S + slot_s(self._secret, each) for each in (day, day + 1))
        return next(slot for slot in slots if slot > wall_s)

    # What is kept of it.

    def to_bytes(self) -> bytes:
        days = {str(day): [sorted(notes.hours), notes.amounts] for day, notes in self._days.items()}
        return json.dumps({"secret": self._secret.hex(), "settled": self._settled, "days": days}).encode()

    @classmethod
    def of_bytes(cls, data: bytes) -> Self:
        """Raises StoreError for what `to_bytes` did not write: a new diary could tell of a day twice."""
        try:
            kept = json.loads(data)
            diary = cls(bytes.fromhex(kept["secret"]))
            diary._settled = [int(day) for day in kept["settled"]][-REMEMBERED:]
            for day, (hours, amounts) in kept["days"].items():
                numbers = {str(name): float(amount) for name, amount in amounts.items()}
                diary._days[int(day)] = _Notes({int(hour) for hour in hours}, numbers)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise StoreError(
                f"Expected what a device noted for telemetry, got {len(data)} other bytes: {error}"
            ) from error
        if len(diary._secret) != 32:
            raise StoreError(
                f"Expected a secret of 32 bytes in what a device noted for telemetry, got {len(diary._secret)}."
            )
        return diary

    def _notes(self, wall_s: float) -> _Notes:
        day = floor(wall_s / DAY_S)
        notes = self._days.setdefault(day, _Notes())
        for other in sorted(self._days, key=lambda each: abs(each - day))[NOTED:]:
            del self._days[other]
        return notes
