"""Several Edges as one: what the Coordinator of a host with Edges in other processes or on other machines talks to.

Every Edge has a name, and a life: from the moment it joins until its link breaks. Between two lives it keeps nothing: what
it held is given up when it is lost, and its devices, who still have their updates, offer them elsewhere. This file
knows where each device and each update is, so that an update is at one Edge at a time and counts once:

    * A device's last check-in says where it waits.
    * An update is at the Edge that its device was assigned at. Another Edge that it is offered to asks first (`token_row`);
      the Edge that has it lets go of it, unless it is in its sum already: then it counts there.
    * What an Edge has closed counts, also if the Edge is lost before it hears so.

No I/O and no clock: calls in, calls out. Everything belongs to one event loop.
"""

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from math import inf
from typing import Protocol, runtime_checkable

from shoal.errors import NetworkError, ProtocolError, StoreError
from shoal.fleet import coordinator as c
from shoal.fleet.analytics import Seen
from shoal.fleet.configuration import Configuration
from shoal.fleet.edge import Coordinator as HeardByEdge
from shoal.fleet.group_sums import GroupResult
from shoal.fleet.wire import fleet_pb2 as pb
from shoal.policy import RoundPolicy
from shoal.record.store import TokenRow
from shoal.tensors import Index

log = logging.getLogger("shoal.coordinator")


class EdgeLost(NetworkError):
    """The link to an Edge is broken, and what it held is gone."""


@runtime_checkable
class Member(c.Edge, Protocol):
    """One of several Edges. `close_groups` asks at once, and may raise `EdgeLost` when it is awaited."""

    def neighbours(self, addresses: Sequence[str]) -> None:
        """Where devices find the other Edges."""
        ...

    def lose(self, why: str) -> None:
        """Nobody listens to it any more; what it was asked for is answered as from one that holds nothing."""
        ...

    def withdraw(self, nonce: bytes, answer: Callable[[bool], None]) -> None:
        """Lets go of an update, unless it is in a sum; says whether it is not here (any more). A lost Edge says yes."""
        ...

    def dissolve(self, address: str) -> None:
        """Gives up a group that is below the minimum; its devices are told to offer their updates at that address."""
        ...

    def send_away(self, device: str) -> None:
        """Tells a device that was taken from those that wait to come later."""
        ...


class Edges:
    """See the module's text."""

    def __init__(self, policy: RoundPolicy) -> None:
        """Raises ValueError for a policy that several Edges cannot serve."""
        if policy.selection.kind == "exact" and policy.minimum_group > 1:
            raise ValueError(
                f"Expected minimum_group=1 to take exact devices at several Edges, got {policy.minimum_group}: nobody can say "
                "how many of them come to each. Serve them with one Edge."
            )
        self.policy = policy
        self._seats: dict[str, _Seat] = {}
        self._coordinator: c.Coordinator | None = None
        self._at: dict[str, dict[_Seat, None]] = {}
        """Device that waits -> where, the place it was heard from last at the end: one Edge may not know yet that it went."""
        self._holder: dict[bytes, tuple[_Seat, float]] = {}
        """Nonce -> where its update is, or may come; and the last version that is open while it may."""
        self._settling: set[bytes] = set()
        """Nonces in groups that are closed and not in the record yet."""
        self._moving: set[bytes] = set()
        """Nonces that an Edge was asked to let go of."""
        self._opened: tuple[Configuration, Index] | None = None
        self._is_open = False
        self._finished = ""

    @property
    def names(self) -> tuple[str, ...]:
        """Of the Edges that are here."""
        return tuple(self._seats)

    @property
    def is_finished(self) -> bool:
        """The run is over: Edges that come are told so, and go."""
        return bool(self._finished)

    # Edges come and go.

    def join(self, name: str, edge: Member, *, address: str = "") -> None:
        """An Edge begins to serve. One of the same name is taken to be lost.

        Args:
            name: its own among the Edges.
            edge: how it is spoken to.
            address: where devices find just this one; empty: nowhere.
        """
        assert self._coordinator is not None, "the Coordinator is connected first"
        self.lost(name, why="another of its name has come")
        self._seats[name] = seat = _Seat(self, name, edge, self._coordinator, address)
        edge.connect(seat)
        if self._finished:
            edge.finish(self._finished)
        elif self._is_open and self._opened is not None:
            edge.open_groups(*self._opened, taken={})
        self._introduce()

    def lost(self, name: str, edge: Member | None = None, *, why: str) -> None:
        """The link to an Edge is broken: what it says is not heard any more, what it held is given up.

        Args:
            name: its name; where there is none of that name, nothing happens.
            edge: if named, just this one in this life.
            why: in words.
        """
        seat = self._seats.get(name)
        if seat is None or edge not in (None, seat.edge):
            return
        del self._seats[name]
        for device in [device for device, at in self._at.items() if seat in at]:
            self.went(seat, device)
        for nonce in [nonce for nonce, (holder, _) in self._holder.items() if holder is seat]:
            del self._holder[nonce]
            seat.coordinator.released(nonce)
        seat.edge.lose(why)
        self._introduce()

    def _introduce(self) -> None:
        """Every Edge is told of the others."""
        for seat in self._seats.values():
            seat.edge.neighbours([s.address for s in self._seats.values() if s.address and s is not seat])

    # What the Coordinator says.

    def connect(self, coordinator: HeardByEdge) -> None:
        assert isinstance(coordinator, c.Coordinator), "one that knows of several Edges"
        self._coordinator = coordinator

    def open_groups(self, configuration: Configuration, model: Index, *, taken: Mapping[int, int]) -> None:
        self._opened, self._is_open = (configuration, model), True
        self._holder = {nonce: held for nonce, held in self._holder.items() if held[1] >= configuration.base_version}
        for seat in self._seats.values():
            seat.told_counted.intersection_update(self._holder)
            seat.edge.open_groups(configuration, model, taken=taken)

    def gather(self) -> None:
        """Groups below the minimum come together at one Edge."""
        sizes = {seat: len(seat.open) for seat in self._seats.values()}
        small = [seat for seat, size in sizes.items() if 0 < size < self.policy.minimum_group]
        to = max((seat for seat in sizes if seat.address), key=lambda seat: (sizes[seat], seat.name), default=None)
        if to is not None and len(small) > (to in small):
            for seat in small:
                if seat is not to:
                    seat.edge.dissolve(to.address)

    def assign(self, device: str, token: pb.Token, assignment: pb.Assignment) -> bool:
        at = self._at.get(device)
        if not at:
            return False
        seat, _ = at.popitem()
        if not at:
            del self._at[device]

        def assign(is_free: bool) -> None:
            if not is_free:
                seat.edge.send_away(device)
            elif not (seat.is_present and seat.edge.assign(device, token, assignment)):
                seat.released(assignment.nonce)

        self.claim(seat, assignment.nonce, assign)
        return True

    async def close_groups(self, *, final: bool = True) -> list[GroupResult]:
        if final:
            self._is_open = False
        closing = [(seat, seat.edge.close_groups(final=final)) for seat in self._seats.values()]
        groups: list[GroupResult] = []
        broken: StoreError | None = None
        for seat, closed in closing:
            try:
                groups += self._closed(seat, await closed)
            except EdgeLost as error:
                log.warning("Edge %s is lost, and the groups that it held: %s", seat.name, error)
                self.lost(seat.name, seat.edge, why=str(error))
            except StoreError as error:
                broken = error
        if broken is not None:
            raise broken
        return groups

    def _closed(self, seat: "_Seat", groups: list[GroupResult]) -> list[GroupResult]:
        nonces = [nonce for group in groups for nonce, _ in group.counted]
        elsewhere = (self._holder.get(nonce, (seat, 0.0))[0] is not seat for nonce in nonces)
        if len(set(nonces)) < len(nonces) or not self._settling.isdisjoint(nonces) or any(elsewhere):
            why = "its sums have updates in them that are not its own"
            self.lost(seat.name, seat.edge, why=why)
            raise EdgeLost(why)
        for nonce in nonces:
            self._settling.add(nonce)
            self.let_go(nonce)
        return groups

    def stored(self) -> None:
        self._settling.clear()
        for seat in self._seats.values():
            seat.edge.stored()

    def committed(self, version: int) -> None:
        self._settling.clear()
        for seat in self._seats.values():
            if self.policy.late.kind == "patch":
                seat.open.clear()  # what has stayed is patched in where it belongs
            seat.edge.committed(version)

    def failed(self, why: str) -> None:
        self._settling.clear()
        for seat in self._seats.values():
            seat.edge.failed(why)

    def take_analytics(self) -> Seen:
        seen = Seen()
        for seat in self._seats.values():
            seen.merge(seat.edge.take_analytics())
        return seen

    def finish(self, why: str) -> None:
        self._finished = why
        for seat in self._seats.values():
            seat.edge.finish(why)

    # Where devices and updates are.

    def claim(self, seat: "_Seat", nonce: bytes, answer: Callable[[bool], None]) -> None:
        """Says whether an update may be at an Edge: it is nowhere else, or the other one has let go of it."""
        holder = self._holder.get(nonce, (seat, 0.0))[0]
        if nonce in self._settling or nonce in self._moving:
            return answer(False)
        if holder is seat or not holder.is_present:
            return self._hold(seat, nonce, answer)

        def withdrawn(is_gone: bool) -> None:
            self._moving.discard(nonce)
            if is_gone and nonce not in self._settling:
                self._hold(seat, nonce, answer)
            else:
                answer(False)

        self._moving.add(nonce)  # until the answer nobody is given it, the holder neither: it may have let go by then
        holder.edge.withdraw(nonce, withdrawn)

    def _hold(self, seat: "_Seat", nonce: bytes, answer: Callable[[bool], None]) -> None:
        if seat.is_present:
            present = self._opened[0].base_version if self._opened is not None else 0
            holder, until = self._holder.get(nonce, (None, 0.0))
            until = until if holder is seat else 0.0  # one that has it in its sum already keeps it while that waits
            self._holder[nonce] = (seat, max(until, present + self.policy.max_staleness))
        answer(True)

    def is_present(self, seat: "_Seat") -> bool:
        return self._seats.get(seat.name) is seat

    def joined(self, seat: "_Seat", nonce: bytes) -> None:
        self._holder[nonce] = (seat, inf)

    def is_at(self, seat: "_Seat", nonce: bytes) -> bool:
        return self._holder.get(nonce, (None, 0))[0] is seat

    def waits(self, seat: "_Seat", devices: tuple[str, ...]) -> None:
        for device in devices:
            at = self._at.setdefault(device, {})
            at.pop(seat, None)
            at[seat] = None

    def went(self, seat: "_Seat", device: str) -> None:
        """It is not there any more; where it waits elsewhere, it still does."""
        at = self._at.get(device, {})
        at.pop(seat, None)
        if at:
            return seat.coordinator.arrived(device, edge=next(reversed(at)).name)
        self._at.pop(device, None)
        seat.coordinator.left(device)

    def let_go(self, nonce: bytes) -> None:
        held = self._holder.pop(nonce, None)
        if held is not None:
            held[0].open.discard(nonce)
            held[0].told_counted.discard(nonce)


class Grants:
    """Whether an Edge that lets go of an update knew that it had been given it again meanwhile.

    What is said goes out in order; so it is enough to know how much of it an Edge had heard.
    """

    def __init__(self) -> None:
        self._said = 0
        self._given: dict[bytes, int] = {}  # those that it may not have heard of yet, oldest first

    def said(self, nonce: bytes | None = None) -> None:
        """A command goes out; one that gives it an update names that."""
        self._said += 1
        if nonce is not None:
            self._given.pop(nonce, None)
            self._given[nonce] = self._said

    def knew(self, nonce: bytes, heard: int) -> bool:
        """Whether it knew, after so many commands, that the update was its own."""
        while self._given and (oldest := next(iter(self._given.items())))[1] <= heard:
            del self._given[oldest[0]]
        return nonce not in self._given


class _Seat:
    """One Edge in one of its lives, and the Coordinator as that Edge sees it."""

    def __init__(self, edges: Edges, name: str, edge: Member, coordinator: c.Coordinator, address: str) -> None:
        self._edges, self.name, self.edge, self.coordinator, self.address = edges, name, edge, coordinator, address
        self.open: set[bytes] = set()
        """Updates in its present group."""
        self.told_counted: set[bytes] = set()
        """Those that it has said it added, while it may have them."""

    @property
    def is_present(self) -> bool:
        return self._edges.is_present(self)

    def arrived(self, *devices: str) -> None:
        if self.is_present:
            self._edges.waits(self, devices)
            self.coordinator.arrived(*devices, edge=self.name)

    def left(self, device: str) -> None:
        if self.is_present:
            self._edges.went(self, device)

    def joined(self, nonce: bytes, version: int) -> None:
        if self._edges.is_at(self, nonce):
            self._edges.joined(self, nonce)
            self.coordinator.joined(nonce, version)

    def counted(self, nonce: bytes, version: int, staleness: int) -> None:
        """Raises ProtocolError where it says so twice."""
        if self._edges.is_at(self, nonce):
            if nonce in self.told_counted:
                raise ProtocolError(f"Edge {self.name!r} says that it added one update twice.")
            self.told_counted.add(nonce)
            if not staleness or self._edges.policy.late.kind != "patch":
                self.open.add(nonce)
            self.coordinator.counted(nonce, version, staleness, edge=self.name)

    def released(self, nonce: bytes) -> None:
        if self._edges.is_at(self, nonce):
            self._edges.let_go(nonce)
            self.coordinator.released(nonce)

    def away(self, nonce: bytes) -> None:
        if self._edges.is_at(self, nonce):
            self.coordinator.away(nonce)

    async def token_row(self, nonce: bytes) -> TokenRow | None:
        answered: asyncio.Future[bool] = asyncio.get_running_loop().create_future()

        def answer(is_free: bool) -> None:
            if not answered.done():  # who asked may be gone
                answered.set_result(is_free)

        self._edges.claim(self, nonce, answer)
        if await answered:
            row = await self.coordinator.token_row(nonce)
            if self._edges.is_at(self, nonce):  # else another Edge has asked for it meanwhile, and this one let go
                return row
        raise NetworkError("The update is at another Edge; ask again.")
