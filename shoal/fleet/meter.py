"""What taking part takes of this machine, as the system says."""

from collections.abc import Callable
from typing import final

import psutil

from shoal.fleet.impact import Sample


@final
class Meter:
    """What this process and those that run its programs have taken."""

    def __init__(self, children: Callable[[], list[int]], moved_bytes: Callable[[], int]) -> None:
        """
        Args:
            children: ids of the processes that run programs now.
            moved_bytes: down and up, since the process began.
        """
        self._children, self._moved_bytes = children, moved_bytes
        self._own = psutil.Process()

    def cpu_s(self) -> float:
        """Processor seconds so far, those of children that have ended too."""
        own = self._own.cpu_times()
        living = sum(sum(_times(pid)[:2]) for pid in self._children())
        return own.user + own.system + own.children_user + own.children_system + living

    def __call__(self) -> Sample:
        memory = self._own.memory_info().rss + sum(_memory_bytes(pid) for pid in self._children())
        return Sample(
            cpu_s=self.cpu_s(), moved_bytes=self._moved_bytes(), memory_bytes=memory, battery_percent=_charge(), celsius=_celsius()
        )  # fmt: skip


def _times(pid: int) -> tuple[float, float]:
    try:
        times = psutil.Process(pid).cpu_times()
    except psutil.Error:  # it has ended
        return 0.0, 0.0
    return times.user, times.system


def _memory_bytes(pid: int) -> int:
    try:
        return int(psutil.Process(pid).memory_info().rss)
    except psutil.Error:
        return 0


def _charge() -> float | None:
    battery = psutil.sensors_battery() if hasattr(psutil, "sensors_battery") else None
    return None if battery is None or battery.power_plugged else float(battery.percent)


def _celsius() -> float | None:
    read = psutil.sensors_temperatures() if hasattr(psutil, "sensors_temperatures") else {}
    return max((sensor.current for sensors in read.values() for sensor in sensors), default=None)
