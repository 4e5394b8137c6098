"""Groups: updates that are added together before anybody sees them. The machine of an Edge's groups for one task.

`ClearGroups` sees single updates on their way into a sum, held whole until they are checked. (`SecureGroups` will
answer the same events with key and share phases in between.) Tensors are not state: the machine holds nonces and
numbers of groups, says `Check(nonce)` and `Add(nonce, group)`, and is told `Checked` and `Added`.

A member belongs to no group until it is added. One that is on the present version goes into the *present* group; a late
one goes where the policy says: nowhere (discard), into the present group at a discount, or into the group of its own
version (patch), which changes that version's sum as if it had come in time.

Invariants (tests cite them by number):
    (1) Every member ends in exactly one of counted, refused, released.
    (2) `Add` is said at most once for a nonce, one at a time, and only after `Checked(ok)`.
    (3) After `Closed` nothing is added to the groups that it names, and none of them is below the minimum.
    (4) What was added is *counted* only by `Stored` or `Committed`: acknowledged means durable.
    (5) At most `most` members are ever added to what one version sums up; the others are released at its close.
    (6) Nobody is more than `max_staleness` versions behind when it is added.
    (7) What is added below the minimum is never lost: its group stays, or becomes part of a later one.
    (8) Whoever is checked, and has room, is added next: nobody in the queue waits for something else to happen.

One member's way::

    Joined─> joined ─Offered─> offered ─Checked(ok)─> checked ─(its turn)─> adding ─Added─> added ─Stored/Committed─> counted
    any of the first four ─Refuse / Close / too late / Gone─> refused | released
"""

from collections import deque
from dataclasses import dataclass, field
from enum import Enum
from typing import Protocol, runtime_checkable

from shoal.errors import InvalidTransition
from shoal.policy import RoundPolicy


class Member(Enum):
    JOINED = "joined"
    OFFERED = "offered"
    CHECKED = "checked"
    ADDING = "adding"
    ADDED = "added"


@dataclass(frozen=True, slots=True)
class Open:
    """A round begins on `version`: the one before, if it was abandoned, or the next."""

    version: int
    taken: tuple[tuple[int, int], ...] = ()
    """(version, members) that sums of the record hold already; said when a run is taken up."""


@dataclass(frozen=True, slots=True)
class Joined:
    """A member that trains, or has trained, on `version`."""

    nonce: bytes
    version: int


@dataclass(frozen=True, slots=True)
class Offered:
    """The member's update is here, whole."""

    nonce: bytes


@dataclass(frozen=True, slots=True)
class Checked:
    """What the check of an update found; `reason` is empty where it is good. A bad one may be found before it is whole."""

    nonce: bytes
    reason: str = ""
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Added:
    nonce: bytes


@dataclass(frozen=True, slots=True)
class Gone:
    """The member gave up."""

    nonce: bytes
    why: str


@dataclass(frozen=True, slots=True)
class Dissolve:
    """The present group will not reach the minimum here: its members are to offer their updates elsewhere."""


@dataclass(frozen=True, slots=True)
class Close:
    """The sums are wanted: all at the round's end, or (not `final`) those of full groups, to be kept while it goes on."""

    final: bool = True


@dataclass(frozen=True, slots=True)
class Stored:
    """The groups named by `Closed` are in the record; a later commit takes them in."""


@dataclass(frozen=True, slots=True)
class Committed:
    """The groups named by `Closed` are in this version."""

    version: int


@dataclass(frozen=True, slots=True)
class Failed:
    """The groups named by `Closed` could not be used."""

    why: str


@dataclass(frozen=True, slots=True)
class Formed:
    """The group's sum is there: of these, who are some of those it was made of."""

    group: int
    survivors: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class Broke:
    """No sum came of the group; `spent` have revealed shares for it."""

    group: int
    spent: tuple[bytes, ...]
    why: str


Event = (
    Open | Joined | Offered | Checked | Added | Gone | Dissolve | Close | Stored | Committed | Failed | Formed | Broke
)


@dataclass(frozen=True, slots=True)
class Check:
    """Check the update; answer `Checked`."""

    nonce: bytes


@dataclass(frozen=True, slots=True)
class Add:
    """Add the update to the sum of a group (a new one is empty), times the discount; answer `Added`."""

    nonce: bytes
    group: int
    discount: float


@dataclass(frozen=True, slots=True)
class Form:
    """Make a secure group of these, and add its sum to the group's, times the discount; answer `Formed` or `Broke`."""

    group: int
    nonces: tuple[bytes, ...]
    discount: float


@dataclass(frozen=True, slots=True)
class Merge:
    """Add the sum of one group to that of another, and forget it."""

    source: int
    target: int


@dataclass(frozen=True, slots=True)
class Drop:
    """Forget the sum of a group: its members offer their updates elsewhere."""

    group: int


@dataclass(frozen=True, slots=True)
class Tell:
    """Tell the member how it ended: counted | refused | released | moved (it is to offer its update elsewhere)."""

    nonce: bytes
    outcome: str
    version: int = 0
    reason: str = ""
    detail: str = ""


@dataclass(frozen=True, slots=True)
class JoinRound:
    """For the round: a member joined."""

    nonce: bytes
    version: int


@dataclass(frozen=True, slots=True)
class CountMember:
    """For the round: a member's update is in a sum that the next commit may take in, so many versions late."""

    nonce: bytes
    staleness: int


@dataclass(frozen=True, slots=True)
class ReleaseMember:
    """For the round: a member is given up."""

    nonce: bytes


@dataclass(frozen=True, slots=True)
class Closed:
    """For the round: these sums are final."""

    groups: tuple[int, ...]


Command = Check | Add | Merge | Drop | Tell | JoinRound | CountMember | ReleaseMember | Closed | Form


@runtime_checkable
class Groups(Protocol):
    """What every mode's groups are."""

    def step(self, event: Event, now_s: float) -> list[Command]:
        """Advances by one event."""
        ...

    def state(self, nonce: bytes) -> Member | None:
        """Where a member is; None where it is none."""
        ...

    def base_version(self, group: int) -> int:
        """The version whose sum a group is part of."""
        ...

    def members(self, group: int) -> tuple[bytes, ...]:
        """Who is in a group."""
        ...


@dataclass(slots=True)
class _Group:
    version: int
    """Whose sum it is part of."""
    members: list[bytes] = field(default_factory=list)


class ClearGroups:
    """Groups that see single updates. See the module's text."""

    def __init__(self, policy: RoundPolicy, *, most: int) -> None:
        """`most`: members that fit the sum of one version."""
        self._policy, self._most = policy, most
        self._version = -1
        self._is_open = self._is_ending = False
        self._states: dict[bytes, Member] = {}
        self._versions: dict[bytes, int] = {}  # of those that are not added yet
        self._queue: deque[bytes] = deque()
        self._adding: bytes | None = None
        self._groups: dict[int, _Group] = {}
        self._num_groups = 0
        self._room: dict[int, int] = {}  # version -> members that its sum has room for
        self._present = self._new_group(-1)
        self._closing: Close | None = None
        self._closed: tuple[int, ...] = ()

    def state(self, nonce: bytes) -> Member | None:
        return self._states.get(nonce)

    def base_version(self, group: int) -> int:
        return self._groups[group].version

    def members(self, group: int) -> tuple[bytes, ...]:
        return tuple(self._groups[group].members)

    def takes(self, version: int) -> bool:
        """Whether a member on that version may still join."""
        return self._is_open and 0 <= self._version - version <= self._policy.max_staleness

    def step(self, event: Event, now_s: float) -> list[Command]:
        del now_s  # this mode has no windows of its own
        match event:
            case Open(version, taken):
                self._room |= {of: self._most - members for of, members in taken}
                return self._open(version)
            case Joined(nonce, version):
                return self._join(nonce, version)
            case Offered(nonce) if self._states.get(nonce) is Member.JOINED:
                self._states[nonce] = Member.OFFERED
                return [Check(nonce)]
            case Offered(nonce) if nonce in self._states:
                return []  # offered again by a device that heard no answer
            case Offered(nonce):
                return [Tell(nonce, "refused", reason="late", detail="The round has closed.")]
            case Checked(nonce, reason, detail):
                return self._checked(nonce, reason, detail)
            case Added(nonce) if nonce == self._adding:
                return self._was_added(nonce)
            case Gone(nonce, _):
                return self._drop(nonce)
            case Dissolve():
                return self._dissolve()
            case Close() if self._closing is None:
                return self._close(event)
            case Stored():
                return self._end("counted", 0)
            case Committed(version):
                self._is_open = self._is_ending = False
                return self._end("counted", version)
            case Failed(why):
                return self._fail(why)
        raise InvalidTransition(f"{event} is not allowed; open: {self._is_open}, closing: {self._closing}.")

    def _new_group(self, version: int) -> int:
        self._num_groups += 1
        self._groups[self._num_groups] = _Group(version)
        return self._num_groups

    # Rounds.

    def _open(self, version: int) -> list[Command]:
        assert self._closing is None, "a close ends before the next round opens"
        again = version == self._version and self._is_open
        self._version, self._is_open = version, True
        if again:
            return []  # the round before was abandoned: its group goes on
        told: list[Command] = []
        for nonce, trained_on in list(self._versions.items()):
            if not self.takes(trained_on):
                told += self._release(nonce, "too late")
        self._room = {v: room for v, room in self._room.items() if version - v <= self._policy.max_staleness}
        self._room.setdefault(version, self._most)
        return told + self._regroup() + self._add_next()

    def _regroup(self) -> list[Command]:
        """Groups that nobody has seen yet: those that can still be patched in stay, the others go into the present one."""
        old, self._present = self._groups, 0
        self._groups = {}
        self._present = self._new_group(self._version)
        merged: list[Command] = []
        for number, group in old.items():
            if not group.members:
                continue
            if self._policy.late.kind == "patch" and self.takes(group.version) and group.version != self._version:
                self._groups[number] = group
            else:
                merged.append(Merge(number, self._present))
                self._groups[self._present].members += group.members
                if group.version != self._version:
                    self._room[self._version] -= len(group.members)
        return merged

    def _close(self, close: Close) -> list[Command]:
        self._closing, self._is_ending = close, close.final
        told: list[Command] = []
        if close.final and not self._policy.max_staleness:
            for nonce in [n for n, state in self._states.items() if state is Member.JOINED]:
                told += self._release(nonce, "the round has what it needs")
        return told + self._finish_closing()

    def _finish_closing(self) -> list[Command]:
        close = self._closing
        if close is None:
            return []
        if not close.final:
            return self._close_full_groups()
        if self._adding is not None:
            return []
        if adding := self._add_next():  # those who have finished are used
            return adding
        if any(state is Member.OFFERED for state in self._states.values()):
            return []  # they are being checked
        self._closing = None
        told: list[Command] = []
        for nonce in list(self._queue):  # no room for them
            told += self._release(nonce, "the round has what it needs")
        minimum = self._policy.minimum_group
        self._closed = tuple(n for n, group in self._groups.items() if len(group.members) >= minimum)
        return [*told, Closed(self._closed)]

    def _close_full_groups(self) -> list[Command]:
        self._roll()
        full = [n for n, group in self._groups.items() if n != self._present and group.version == self._version]
        if self._adding is not None and any(self._adding in self._groups[n].members for n in full):
            return []
        self._closing, self._closed = None, tuple(full)
        return [Closed(self._closed), *self._add_next()]

    def _end(self, outcome: str, version: int, *, reason: str = "", detail: str = "") -> list[Command]:
        told: list[Command] = []
        for number in self._closed:
            for nonce in self._groups.pop(number).members:
                del self._states[nonce]
                told.append(Tell(nonce, outcome, version=version, reason=reason, detail=detail))
        self._closed = ()
        return told

    def _fail(self, why: str) -> list[Command]:
        gone: list[Command] = []
        for number in self._closed:
            self._room[self._groups[number].version] += len(self._groups[number].members)
            if not self._is_ending:  # else the round begins anew, and forgets everybody
                gone += [ReleaseMember(nonce) for nonce in self._groups[number].members]
        if self._is_ending:
            self._is_open = self._is_ending = False
        return self._end("refused", 0, reason="failed", detail=why) + gone

    # Members.

    def _join(self, nonce: bytes, version: int) -> list[Command]:
        if nonce in self._states:
            return []
        if not self.takes(version) or (self._is_ending and not self._policy.max_staleness):
            return [Tell(nonce, "released", reason="the round has what it needs")]
        self._states[nonce], self._versions[nonce] = Member.JOINED, version
        return [JoinRound(nonce, version)]

    def _checked(self, nonce: bytes, reason: str, detail: str) -> list[Command]:
        if self._states.get(nonce) not in (Member.JOINED, Member.OFFERED):
            return []  # it was released while it was checked
        if reason:
            self._forget(nonce)
            told: list[Command] = [Tell(nonce, "refused", reason=reason, detail=detail), ReleaseMember(nonce)]
            return told + self._finish_closing()
        assert self._states[nonce] is Member.OFFERED, "only what is whole is found good"
        self._states[nonce] = Member.CHECKED
        self._queue.append(nonce)
        return self._add_next()

    def _add_next(self) -> list[Command]:
        """The oldest in the queue whose version's sum has room."""
        if self._adding is not None or not self._is_open or (self._is_ending and self._closing is None):
            return []
        for nonce in self._queue:
            staleness = self._version - self._versions[nonce]
            version = self._versions[nonce] if self._policy.late.kind == "patch" else self._version
            if self._room.setdefault(version, self._most) <= 0:
                continue
            self._roll()
            self._queue.remove(nonce)
            self._room[version] -= 1
            self._adding, self._states[nonce] = nonce, Member.ADDING
            group = self._present if version == self._version else self._late_group(version)
            self._groups[group].members.append(nonce)
            return [Add(nonce, group, self._policy.discount(staleness))]
        return []

    def _roll(self) -> None:
        """A new present group where the last is full, unless what is left to the goal could not be a group of its own."""
        added = self._most - self._room[self._version]
        left = self._policy.commit_at - added
        is_full = 0 < self._policy.group_size <= len(self._groups[self._present].members)
        if is_full and left >= self._policy.minimum_group:
            self._present = self._new_group(self._version)

    def _late_group(self, version: int) -> int:
        late = [n for n, group in self._groups.items() if group.version == version and n != self._present]
        return late[0] if late else self._new_group(version)

    def _was_added(self, nonce: bytes) -> list[Command]:
        staleness = self._version - self._versions.pop(nonce)
        self._states[nonce], self._adding = Member.ADDED, None
        counted: list[Command] = [CountMember(nonce, staleness)]
        return counted + (self._finish_closing() if self._closing is not None else self._add_next())

    def _drop(self, nonce: bytes) -> list[Command]:
        if self._states.get(nonce) in (Member.JOINED, Member.OFFERED):
            self._forget(nonce)
            dropped: list[Command] = [ReleaseMember(nonce)]
            return dropped + self._finish_closing()
        return []

    def _dissolve(self) -> list[Command]:
        group = self._groups[self._present]
        is_busy = self._closing is not None or self._closed or self._adding is not None or self._queue
        if is_busy or len(group.members) >= self._policy.minimum_group:
            return []
        commands: list[Command] = [Drop(self._present)] if group.members else []
        self._room[self._version] += len(group.members)
        for nonce in [*group.members, *self._versions]:
            self._states.pop(nonce)
            self._versions.pop(nonce, None)
            commands += [Tell(nonce, "moved"), ReleaseMember(nonce)]
        group.members.clear()
        return commands

    def _release(self, nonce: bytes, why: str) -> list[Command]:
        self._forget(nonce)
        return [Tell(nonce, "released", reason=why), ReleaseMember(nonce)]

    def _forget(self, nonce: bytes) -> None:
        del self._states[nonce], self._versions[nonce]
        if nonce in self._queue:
            self._queue.remove(nonce)
