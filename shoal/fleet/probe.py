"""What the conditions of this machine are: as the system says, or as a command or a file of the owner's says instead.

A command or a file gives JSON such as `{"charging": true, "idle": false}`; what it leaves out is as the system says. An app knows
better than any system call whether its user is busy: it writes the file, or is asked by the command.
"""

import json
import platform
import shlex
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Final, final

import psutil

from shoal.errors import DataError
from shoal.fleet.conditions import CONDITIONS, Conditions, Probe

IDLE_BELOW: Final = 0.15
"""Share of all cores that others may use on an idle machine."""
SHORTEST_LOOK_S: Final = 1.0
"""Of all cores' time: a shorter one says nothing about who uses them."""
COMMAND_S: Final = 10.0
"""Longest that a command may take."""
MOST_BYTES: Final = 4096
FILE: Final = "file:"
_METERED: Final = ("wwan", "ppp", "rmnet", "pdp_ip")
"""What interfaces of mobile networks are called (Linux, Android, macOS)."""
_ANYWHERE: Final = "0" * 32
"""Where the route to everywhere else leads, as IPv6's table has it."""


@final
class SystemProbe:
    """What the system says, by psutil."""

    def __init__(self, own_cpu_s: Callable[[], float]) -> None:
        """`own_cpu_s`: processor seconds of this process and its children, which are no use by others."""
        self._own_cpu_s = own_cpu_s
        self._before = self._taken()
        self._was_idle: bool | None = None

    def read(self) -> Conditions:
        return Conditions(charging=_is_charging(), idle=self._is_idle(), unmetered=_is_unmetered())

    def _is_idle(self) -> bool | None:
        (busy, idle, own), before = self._taken(), self._before
        others, all_s = busy - before[0] - (own - before[2]), busy + idle - before[0] - before[1]
        if all_s >= SHORTEST_LOOK_S:
            self._before, self._was_idle = (busy, idle, own), others / all_s < IDLE_BELOW
        return self._was_idle

    def _taken(self) -> tuple[float, float, float]:
        """Processor seconds since the machine started, of all cores: busy, idle; and our own."""
        times = psutil.cpu_times()
        idle = times.idle + getattr(times, "iowait", 0.0)
        busy = times.user + times.system + getattr(times, "nice", 0.0) + getattr(times, "irq", 0.0)
        return busy, idle, self._own_cpu_s()


def _is_charging() -> bool | None:
    battery = psutil.sensors_battery() if hasattr(psutil, "sensors_battery") else None  # not on every system
    return True if battery is None else battery.power_plugged


def _is_unmetered() -> bool | None:
    system = platform.system()
    if system == "Linux":
        return not any(name.startswith(_METERED) for name in _default_interfaces())
    if system == "Darwin":
        up = [
            name for name, stats in psutil.net_if_stats().items() if stats.isup and name.startswith(("en", *_METERED))
        ]
        return any(name.startswith("en") for name in up) or not up
    return None


def _default_interfaces(tables: Path = Path("/proc/net")) -> list[str]:
    """Interfaces over which what leaves this machine goes, by IPv4 or IPv6; none where nothing can."""
    four = [row[0] for row in _rows(tables / "route") if len(row) > 7 and row[1] == row[7] == "0" * 8]
    six = [row[9] for row in _rows(tables / "ipv6_route") if len(row) > 9 and row[:2] == ["0" * 32, "00"]]
    return [*four, *(name for name in six if name != "lo")]  # where unreachable routes lead


def _rows(table: Path) -> list[list[str]]:
    try:
        return [line.split() for line in table.read_text().splitlines()]
    except OSError:
        return []


@final
class OwnersProbe:
    """What the owner's command or file says; what that leaves out, as the system says."""

    def __init__(self, source: str, system: Probe) -> None:
        """`source`: a command line, or `file:` and a path."""
        self._source, self._system = source, system

    def read(self) -> Conditions:
        data = _of_file(self._source.removeprefix(FILE)) if self._source.startswith(FILE) else _of_command(self._source)
        return replace(self._system.read(), **_parsed(data, self._source))


def _of_file(path: str) -> bytes:
    try:
        with Path(path).open("rb") as file:
            return file.read(MOST_BYTES + 1)
    except OSError as error:
        raise DataError(f"The probe's file {path} cannot be read: {error.strerror}.") from error


def _of_command(command: str) -> bytes:
    try:
        done = subprocess.run(
            shlex.split(command), stdin=subprocess.DEVNULL, capture_output=True, timeout=COMMAND_S, check=False
        )
    except (OSError, ValueError, subprocess.TimeoutExpired) as error:
        raise DataError(f"The probe's command {command!r} failed: {error}.") from error
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip().splitlines() or ["nothing"]
        raise DataError(f"The probe's command {command!r} ended with code {done.returncode}; it said: {said[-1][:200]}")
    return done.stdout


def _parsed(data: bytes, source: str) -> dict[str, bool]:
    wanted = f"Expected {source} to give JSON of {', '.join(CONDITIONS)}, each true or false"
    try:
        value = json.loads(data) if len(data) <= MOST_BYTES else None
    except ValueError as error:
        raise DataError(f"{wanted}, got {data[:80]!r}.") from error
    if (
        not isinstance(value, dict)
        or not set(value) <= set(CONDITIONS)
        or not all(type(v) is bool for v in value.values())
    ):
        raise DataError(f"{wanted}, got {data[:80]!r}.")
    return value
