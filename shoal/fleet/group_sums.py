"""The sums that a machine of groups speaks of: made, added to, merged, and handed out when they are closed. No I/O.

Carries out the machine's commands for whoever holds the updates: an Edge, or a fleet that is played.
"""

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Protocol, runtime_checkable

import numpy as np

from shoal.aggregate.accumulator import Accumulator
from shoal.errors import StoreError
from shoal.fleet import group as g
from shoal.fleet.analytics import Analytics
from shoal.fleet.clear_groups import ClearGroups
from shoal.fleet.configuration import Configuration
from shoal.fleet.costs import Costs
from shoal.fleet.secure_groups import SecureGroups
from shoal.fleet.wire import fleet_pb2 as pb
from shoal.plan.manifest import Manifest
from shoal.plan.secure import fits, grouping, terms

log = logging.getLogger("shoal.edge")


@dataclass(frozen=True)
class GroupResult:
    """A closed group: its sum, who is in it, what it cost."""

    base_version: int
    """The version whose sum it is part of."""
    sums: Accumulator
    counted: tuple[tuple[bytes, float], ...]
    """(nonce, expiry) of every member."""
    costs: Costs


@runtime_checkable
class Keeper(Protocol):
    """Who holds the updates. What takes time is answered with None, and said later with `GroupSums.step`."""

    def check(self, nonce: bytes) -> g.Checked | None: ...
    def add(self, nonce: bytes, group: int, discount: float) -> g.Added | None:
        """To be done with `GroupSums.add`."""
        ...

    def tell(self, tell: g.Tell) -> None: ...
    def closed(self) -> None:
        """`GroupSums.take_closed` has what is to be seen."""
        ...


@runtime_checkable
class Forms(Protocol):
    """A keeper whose updates come in secure groups."""

    def form(self, form: g.Form) -> None:
        """To be answered with `GroupSums.step`, after `GroupSums.merge` where a sum came of it."""
        ...


@runtime_checkable
class Round(Protocol):
    """What the round is told of members: the Coordinator."""

    def joined(self, nonce: bytes, version: int) -> None: ...
    def counted(self, nonce: bytes, version: int, staleness: int) -> None: ...
    def released(self, nonce: bytes) -> None: ...


class GroupSums:
    """See the module's text."""

    def __init__(self, manifest: Manifest, keeper: Keeper, now_s: Callable[[], float]) -> None:
        policy = manifest.server.rounds
        self.groups = _machine(manifest)
        self.num_counted = 0
        """Updates added since it began."""
        self.analytics = Analytics()
        """What is seen of members; whoever speaks with them adds what the machine does not hear of."""
        self._manifest, self._keeper, self._now_s = manifest, keeper, now_s
        self._patches = policy.late.kind == "patch"
        self._round: Round | None = None
        self.configuration: Configuration | None = None
        """Of the round that is open, or was last; set before the machine hears of it."""
        self._sums: dict[int, Accumulator] = {}
        self._costs: dict[int, Costs] = {}
        self._broken: dict[int, str] = {}  # groups of which an addition broke off
        self._closed: tuple[int, ...] = ()
        self._staleness: dict[bytes, int] = {}  # of members that were added, until their group closes

    def connect(self, round: Round) -> None:
        """Whom to tell of members. Called once, before the first event."""
        self._round = round

    def step(self, event: g.Event) -> None:
        """Steps the machine, then carries out its commands; what they answer is stepped at once, in order."""
        if isinstance(event, g.Open):
            self.analytics.round_began(self._now_s())
        elif isinstance(event, g.Offered):
            self.analytics.whole(event.nonce, self._now_s())
        pending = [event]
        while pending:
            for command in self.groups.step(pending.pop(0), self._now_s()):
                answer = self.carry_out(command)
                if answer is not None:
                    pending.append(answer)

    def carry_out(self, command: g.Command) -> g.Event | None:
        """Does what the machine wants; returns what it is to be told of that at once."""
        assert self._round is not None, "connect comes first"
        match command:
            case g.Check(nonce):
                return self._keeper.check(nonce)
            case g.Add(nonce, group, discount):
                return self._keeper.add(nonce, group, discount)
            case g.Form():
                assert isinstance(self._keeper, Forms)
                self._keeper.form(command)
            case g.Merge(source, target):
                self._merge(source, target)
            case g.Drop(group):
                del self._sums[group], self._costs[group]
                self._broken.pop(group, None)
            case g.Tell(nonce, outcome):
                self.analytics.told(nonce, outcome, command.reason, self._now_s())
                self._keeper.tell(command)
            case g.JoinRound(nonce, version):
                self.analytics.joined(nonce)
                self._round.joined(nonce, version)
            case g.CountMember(nonce, staleness):
                assert self.configuration is not None
                self.num_counted += 1
                self._staleness[nonce] = staleness
                self._round.counted(nonce, self.configuration.base_version, staleness)
            case g.ReleaseMember(nonce):
                self.analytics.gone(nonce)
                if self._staleness.pop(nonce, None) is not None:
                    self.num_counted -= 1  # its group came to nothing
                self._round.released(nonce)
            case g.Closed(groups):
                self._closed = groups
                for group in groups:
                    self._told_of(self.groups.members(group))
                self._keeper.closed()
        return None

    def _told_of(self, members: tuple[bytes, ...]) -> None:
        """A group closes: with it its members are counted."""
        self.analytics.closed(members, self._now_s())
        for nonce in members:
            self.analytics.count("counted")
            if self._staleness.pop(nonce, 0):
                self.analytics.count("patched" if self._patches else "discounted")

    def begin_adding(self, group: int, costs: pb.Costs) -> None:
        """A member's costs, and a sum for the group if it has none yet. Comes before `add`."""
        assert self.configuration is not None
        if group not in self._sums:
            self._sums[group], self._costs[group] = self.configuration.accumulator(self._manifest), Costs()
        self._costs[group].add(costs)

    def add(
        self, group: int, pieces: Iterable[tuple[str, int, np.ndarray]], *, weight: int, discount: float = 1.0
    ) -> None:
        """Adds a checked update; a thread may do so. What goes wrong is said when the group is closed."""
        try:
            self._sums[group].add_checked(pieces, weight=weight, discount=discount)
        except Exception as error:  # half of it may be in the sum: nothing can be done with that any more
            log.exception("an update could not be added")
            self._broken[group] = f"an update could not be added: {error}"

    def merge(
        self, group: int, pieces: Iterable[tuple[str, int, np.ndarray]], *, weight: int, members: int, discount: float
    ) -> None:
        """Adds what a secure group summed up to, after `begin_adding` of each member."""
        self._sums[group].merge(pieces, weight=weight, members=members, discount=discount)

    def take_closed(self, expires_s: Callable[[bytes], float]) -> list[GroupResult]:
        """What was closed, once. `expires_s`: of a member's token.

        Raises:
            StoreError: an addition broke off; the sums are of no use.
        """
        if broken := [self._broken.pop(group) for group in self._closed if group in self._broken]:
            for group in self._closed:
                del self._sums[group], self._costs[group]
            raise StoreError(f"The sum of a group is broken: {broken[0]}")
        return [self._result(group, expires_s) for group in self._closed]

    def _result(self, group: int, expires_s: Callable[[bytes], float]) -> GroupResult:
        counted = tuple((nonce, expires_s(nonce)) for nonce in self.groups.members(group))
        return GroupResult(self.groups.base_version(group), self._sums.pop(group), counted, self._costs.pop(group))

    def _merge(self, source: int, target: int) -> None:
        sums, costs = self._sums.pop(source), self._costs.pop(source)
        if source in self._broken:
            self._broken[target] = self._broken.pop(source)
        if target not in self._sums:
            self._sums[target], self._costs[target] = sums, costs
            return
        self._sums[target].merge_all(sums)
        self._costs[target].merge(costs)


def _machine(manifest: Manifest) -> g.Groups:
    policy, secure = grouping(manifest), manifest.promises.privacy.secure
    if secure is None:
        # Some updates count for the version after their own or not at all, and so do those of devices that rest then.
        is_drawn = any(spec.one_of > 1 for spec in manifest.sums)  # elements, by the version
        moves_on = not manifest.promises.privacy.binds_to_version and policy.min_separation == 1 and not is_drawn
        return ClearGroups(policy, most=policy.max_members, moves_on=moves_on)
    made = terms(manifest, model="")  # of which only the numbers are asked for
    return SecureGroups(policy, most=policy.max_members, size=secure.members, fits=partial(fits, made))
