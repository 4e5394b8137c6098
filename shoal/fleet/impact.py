"""What taking part costs this machine, a day at a time, and where that ends. A pure machine: samples in, a verdict out."""

from dataclasses import dataclass, replace
from typing import Final, final

from shoal import validate
from shoal.fleet.device_file import Day

COOLER_BY: Final = 3.0
"""Degrees below its limit that a machine cools to before it goes on."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ImpactBudget:
    """The most that taking part may cost a machine on one day; None: whatever it takes."""

    cpu_s: float | None = None
    """Processor seconds, over all cores."""
    moved_bytes: int | None = None
    """Down and up."""
    battery_percent: float | None = None
    """By how much its charge may fall while it works."""
    memory_bytes: int | None = None
    """At a time, over all processes: one that takes more is done for the day."""
    celsius: float | None = None
    """The hottest part of the machine, where it can be read: work stops until it is cooler."""

    def __post_init__(self) -> None:
        """Raises ValueError for a budget that is not above zero."""
        validate.positive(**{name: value for name, value in self.given().items()})

    def given(self) -> dict[str, float]:
        """Those that are set."""
        every = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return {name: value for name, value in every.items() if value is not None}


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """What this machine says of itself at one time."""

    cpu_s: float
    """Of our processes since they began; never falls."""
    moved_bytes: int
    """Down and up since the process began; never falls."""
    memory_bytes: int
    """Of our processes now."""
    battery_percent: float | None = None
    """The charge; None: there is no battery, or it is charging."""
    celsius: float | None = None


@final
class Impact:
    """See the module's text."""

    def __init__(self, budget: ImpactBudget, first: Sample) -> None:
        self._budget, self._last = budget, first
        self._is_hot = False
        self.today = Day()
        """What the day has cost so far."""

    def step(self, sample: Sample, today: Day, *, works: bool) -> str:
        """Adds what it has cost since the last sample.

        Args:
            sample: now.
            today: what the day that it now is had cost by the last sample.
            works: whether the device has worked since: only then is it answerable for the battery.

        Returns:
            Why it is to stop, in words; empty: it may go on.
        """
        # A child that has ended is out of the sum until the system has its times; nothing is counted twice for that.
        last, self._last = self._last, replace(sample, cpu_s=max(sample.cpu_s, self._last.cpu_s))
        drop = 0.0
        if works and sample.battery_percent is not None and last.battery_percent is not None:
            drop = max(0.0, last.battery_percent - sample.battery_percent)
        self.today = replace(
            today,
            cpu_s=today.cpu_s + self._last.cpu_s - last.cpu_s,
            moved_bytes=today.moved_bytes + sample.moved_bytes - last.moved_bytes,
            battery_percent=today.battery_percent + drop,
            peak_bytes=max(today.peak_bytes, sample.memory_bytes),
        )
        return self._verdict(sample)

    def _verdict(self, sample: Sample) -> str:
        day, most = self.today, self._budget
        spent = (
            ("processor time", day.cpu_s, most.cpu_s, "s", 1.0),
            ("traffic", day.moved_bytes, most.moved_bytes, "MB", 1e-6),
            ("battery", day.battery_percent, most.battery_percent, "%", 1.0),
            ("memory", day.peak_bytes, most.memory_bytes, "MB", 1e-6),
        )
        for what, value, limit, unit, scale in spent:
            if limit is not None and value >= limit:
                return f"today's {what} is used up ({value * scale:.4g} of {limit * scale:.4g} {unit})"
        if most.celsius is not None and sample.celsius is not None:
            self._is_hot = sample.celsius >= most.celsius - (COOLER_BY if self._is_hot else 0.0)
            if self._is_hot:
                return f"it is too hot ({sample.celsius:.0f} of {most.celsius:g} °C)"
        return ""
