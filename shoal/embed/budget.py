"""How much a store may write: capacities a day, so that a drive lives as long as its maker says.

What users change is always written; it is what they came for. What the store writes on its own account (compaction,
re-placement) waits until the budget has room: an account that fills with time up to a quarter of a day's worth, and from
which every byte that goes to the device is taken, users' too. Below zero the store only writes what it is told to.
A table's first rows are not taken from it, as no store could leave them unwritten.

References: JEDEC JESD218 (endurance as terabytes written; drive writes a day over the warranty).
"""

from typing import Final, final

from shoal import validate

DAY_S: Final = 86_400.0
BURST: Final = 0.25
"""The account's limit, in days."""


@final
class WriteBudget:
    """The account. `now_s` is seconds since 1970, so it goes on filling while a store is closed."""

    def __init__(self, *, writes_per_day: float, capacity_bytes: int, balance: float, now_s: float) -> None:
        validate.positive(writes_per_day=writes_per_day, capacity_bytes=capacity_bytes)
        self.writes_per_day, self._capacity_bytes = writes_per_day, capacity_bytes
        self._balance, self._at_s = balance, now_s
        self.spent = 0
        """Bytes written since this object was made."""

    @property
    def bytes_per_day(self) -> float:
        return self.writes_per_day * self._capacity_bytes

    def resize(self, capacity_bytes: int) -> None:
        self._capacity_bytes = capacity_bytes

    def spend(self, num_bytes: int, *, is_first: bool = False) -> None:
        """Counts bytes that were written; those of a table that had no rows before (`is_first`) are not taken from the account."""
        self._balance -= 0 if is_first else num_bytes
        self.spent += num_bytes

    def available(self, now_s: float) -> float:
        """Bytes that may be written now; below zero, what users wrote beyond the budget."""
        filled = self._balance + max(0.0, now_s - self._at_s) / DAY_S * self.bytes_per_day
        self._balance, self._at_s = min(filled, BURST * self.bytes_per_day), max(now_s, self._at_s)
        return self._balance
