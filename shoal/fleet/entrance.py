"""Who may come in, and how much may come from one network address: what a door asks of each control stream.

A device is known by what it says of itself. What it cannot choose at will is its address: streams are bounded by it in number and in
how fast new ones come, whatever names they check in under, and each stream in how fast it talks. Pure; time is passed in.
"""

import ipaddress
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Final

from shoal import validate
from shoal.fleet.wire import fleet_pb2 as pb

Admit = Callable[[pb.CheckIn], Awaitable[str]]
"""What a device that checks in lacks, in words; "": it may come in. May raise StoreError or NetworkError: not now."""

PER_ADDRESS: Final = 10_000
MESSAGES_PER_S: Final = 200.0
MESSAGES_AT_ONCE: Final = 2_000.0
"""Of one stream: who says more is read more slowly."""
MINUTE_S: Final = 60.0
FORGET_AT: Final = 4_096
"""Addresses that are remembered before those are forgotten that nothing has come from for a minute."""


async def admit_all(check_in: pb.CheckIn) -> str:
    """Whoever comes."""
    return ""


@dataclass(frozen=True, kw_only=True)
class Entrance:
    """See the module's text."""

    admit: Admit | None = None
    """None: whoever comes may come in."""
    per_address: int = PER_ADDRESS
    """Control streams of one address at once; as many new ones may come together, and in each minute after."""

    def __post_init__(self) -> None:
        validate.positive(per_address=self.per_address)


OPEN: Final = Entrance()
"""Whoever comes, within the usual bounds."""


class Allowance:
    """So much at once, and so much a second after that (a token bucket)."""

    __slots__ = ("_at_s", "_left", "_most", "_rate_per_s")

    def __init__(self, most: float, rate_per_s: float, *, now_s: float) -> None:
        self._most, self._rate_per_s, self._left, self._at_s = most, rate_per_s, most, now_s

    def take(self, now_s: float) -> float:
        """Takes one; returns in how many seconds it would have been due, 0.0: now."""
        self._left = min(self._most, self._left + (now_s - self._at_s) * self._rate_per_s) - 1.0
        self._at_s = now_s
        return max(0.0, -self._left / self._rate_per_s)

    def give_back(self) -> None:
        self._left += 1.0

    def is_full(self, now_s: float) -> bool:
        """Whether as much may come as ever."""
        return self._left + (now_s - self._at_s) * self._rate_per_s >= self._most


@dataclass(slots=True)
class _Crowd:
    allowance: Allowance
    num: int = 0


class Crowds:
    """Control streams by address. Costs a small object for each address that has some or had some in the last minute."""

    def __init__(self, per_address: int) -> None:
        self._most = per_address
        self._of: dict[str, _Crowd] = {}
        self._forget_at = FORGET_AT

    def __len__(self) -> int:
        return len(self._of)

    def come(self, address: str, now_s: float) -> str:
        """One more of it; why that is one too many, in words, else "". Each that came is to go, too, but for those of "", this process."""
        if not address:
            return ""
        crowd = self._of.get(address)
        if crowd is None:
            self._forget(now_s)
            crowd = self._of[address] = _Crowd(Allowance(self._most, self._most / MINUTE_S, now_s=now_s))
        crowd.num += 1
        if crowd.num > self._most:
            return f"{self._most:,} sessions of your network address are here already"
        if crowd.allowance.take(now_s):
            crowd.allowance.give_back()  # else who tries again at once would never get in
            return f"more than {self._most:,} sessions of your network address have begun within a minute"
        return ""

    def gone(self, address: str) -> None:
        """One that came has left."""
        if address:
            self._of[address].num -= 1

    def _forget(self, now_s: float) -> None:
        if len(self._of) < self._forget_at:
            return
        self._of = {a: c for a, c in self._of.items() if c.num or not c.allowance.is_full(now_s)}
        self._forget_at = max(FORGET_AT, 2 * len(self._of))  # a sweep for every so many that are new


def neighbourhood(peer: str) -> str:
    """Of gRPC's name of a peer (`ipv4:192.0.2.1:5678`): its address without port; of IPv6 the /64, which is one customer's."""
    address = peer.rpartition(":")[0]
    if not address.startswith("ipv6:"):
        return address
    inside = address.removeprefix("ipv6:").replace("%5B", "").replace("%5D", "").strip("[]").partition("%")[0]
    try:
        found = ipaddress.IPv6Address(inside)
    except ValueError:
        return address
    if found.ipv4_mapped is not None:
        return f"ipv4:{found.ipv4_mapped}"
    return f"ipv6:{ipaddress.IPv6Network((int(found) >> 64 << 64, 64))}"
