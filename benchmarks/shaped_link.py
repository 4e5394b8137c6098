"""Two network namespaces joined by a link whose rate is shaped on both sides (`tbf`); needs root, `ip` and `tc`.

Where that is not to be had, `loopback` stands in: no shaping, and whoever uses it says so.
"""

import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Final

BURST_BYTES: Final = 96 << 10
"""More than the 64 KiB that the kernel hands on in one piece: else each is cut into packets, which takes a processor."""
QUEUE_BYTES: Final = 1 << 20
_SIDES: Final = (("shoal-a", "shoal-va", "10.99.7.1"), ("shoal-b", "shoal-vb", "10.99.7.2"))


@dataclass(frozen=True)
class Link:
    """Two ends, 0 and 1."""

    def address(self, end: int) -> str:
        return _SIDES[end][2]

    def command(self, end: int, words: Sequence[str]) -> list[str]:
        """To be run at one end."""
        return ["ip", "netns", "exec", _SIDES[end][0], *words]

    def shape(self, bytes_per_s: float | None) -> None:
        """The rate in each direction; None: as fast as it goes."""
        for space, device, _ in _SIDES:
            inside = ["ip", "netns", "exec", space, "tc", "qdisc"]
            with suppress(subprocess.CalledProcessError):
                _run([*inside, "del", "dev", device, "root"])
            if bytes_per_s is not None:
                rate = f"{8 * bytes_per_s:.0f}bit"
                _run([*inside, "add", "dev", device, "root", "tbf", "rate", rate, "burst", str(BURST_BYTES), "limit", str(QUEUE_BYTES)])  # fmt: skip


def why_not() -> str:
    """Why there can be no such link here; empty: there can."""
    missing = [name for name in ("ip", "tc") if shutil.which(name) is None]
    if missing:
        return f"{' and '.join(missing)} is not installed"
    if os.geteuid() != 0:
        return "it takes root to make network namespaces"
    return ""


@contextmanager
def shaped_link() -> Iterator[Link]:
    """Raises RuntimeError where it cannot be had."""
    if why := why_not():
        raise RuntimeError(f"Expected to make two network namespaces, but {why}.")
    _clear()
    try:
        (a, va, ip_a), (b, vb, ip_b) = _SIDES
        for space in (a, b):
            _run(["ip", "netns", "add", space])
        _run(["ip", "link", "add", va, "type", "veth", "peer", "name", vb])
        for space, device, address in ((a, va, ip_a), (b, vb, ip_b)):
            _run(["ip", "link", "set", device, "netns", space])
            _run(["ip", "-n", space, "addr", "add", f"{address}/24", "dev", device])
            for each in (device, "lo"):
                _run(["ip", "-n", space, "link", "set", each, "up"])
        yield Link()
    finally:
        _clear()


def _clear() -> None:
    for space, _, _ in _SIDES:
        with suppress(subprocess.CalledProcessError):
            _run(["ip", "netns", "del", space])


def _run(words: list[str]) -> None:
    subprocess.run(words, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
