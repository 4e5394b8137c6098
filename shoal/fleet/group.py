"""Groups: updates that are added together before anybody sees them. What an Edge's groups of one task are told, and say.

Two machines answer the same events: `ClearGroups` sees single updates on their way into a sum, `SecureGroups` sees sums only. Tensors are
not state: a machine holds nonces and numbers of groups, says what is to be done with them, and is told when it is.

Invariants (tests cite them by number):
    (1) Every member ends in exactly one of counted, refused, released.
    (2) `Add` is said at most once for a nonce, one at a time, and only after `Checked(ok)`.
    (3) After `Closed` nothing is added to the groups that it names, and none of them is below the minimum.
    (4) What was added is *counted* only by `Stored` or `Committed`: acknowledged means durable.
    (5) At most `most` members are ever added to what one version sums up; the others are released at its close.
    (6) Nobody is more than `max_staleness` versions behind when it is added.
    (7) What is added below the minimum is never lost: its group stays, or becomes part of a later one.
    (8) Whoever is checked, and has room, is added next: nobody in the queue waits for something else to happen.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from enum import Enum
from typing import Final

from shoal.errors import InvalidTransition
from shoal.policy import RoundPolicy

NO_NEED: Final = "the round has what it needs"


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


@dataclass(slots=True)
class Group:
    version: int
    """Whose sum it is part of."""
    members: list[bytes] = field(default_factory=list)


class Groups(ABC):
    """What every kind of groups has in common: members that come and go, rounds that open, close and end."""

    def __init__(self, policy: RoundPolicy, *, most: int) -> None:
        """`most`: members that fit the sum of one version."""
        self._policy, self._most = policy, most
        self._version = -1
        self._is_open = self._is_ending = False
        self._states: dict[bytes, Member] = {}
        self._versions: dict[bytes, int] = {}  # of those that are in no group
        self._groups: dict[int, Group] = {}
        self._num_groups = 0
        self._room: dict[int, int] = {}  # version -> members that its sum has room for
        self._closing: Close | None = None
        self._closed: tuple[int, ...] = ()

    def state(self, nonce: bytes) -> Member | None:
        """Where a member is; None where it is none."""
        return self._states.get(nonce)

    def base_version(self, group: int) -> int:
        """The version whose sum a group is part of."""
        return self._groups[group].version

    def members(self, group: int) -> tuple[bytes, ...]:
        """Who is in a group."""
        return tuple(self._groups[group].members)

    def takes(self, version: int) -> bool:
        """Whether a member on that version may still join."""
        return self._is_open and 0 <= self._version - version <= self._policy.max_staleness

    def step(self, event: Event, now_s: float) -> list[Command]:
        """Advances by one event."""
        del now_s  # groups have no windows of their own
        match event:
            case Open(version, taken):
                self._room |= {of: self._most - members for of, members in taken}
                return self._open(version)
            case Joined(nonce, version):
                return self._join(nonce, version)
            case Offered(nonce) if self._states.get(nonce) is Member.JOINED:
                self._states[nonce] = Member.OFFERED
                return self._offered(nonce)
            case Offered(nonce) if nonce in self._states:
                return []  # offered again by a device that heard no answer
            case Offered(nonce):
                return [Tell(nonce, "refused", reason="late", detail="The round has closed.")]
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
        told = self._step(event)
        if told is None:
            raise InvalidTransition(f"{event} is not allowed; open: {self._is_open}, closing: {self._closing}.")
        return told

    # What each kind does in its own way.

    @abstractmethod
    def _step(self, event: Event) -> list[Command] | None:
        """An event of its own; None where it is not allowed."""

    @abstractmethod
    def _after_open(self) -> list[Command]:
        """A version's first round has opened."""

    @abstractmethod
    def _offered(self, nonce: bytes) -> list[Command]:
        """A member has its update."""

    @abstractmethod
    def _finish_closing(self) -> list[Command]:
        """Ends a close once nothing is to be waited for."""

    @abstractmethod
    def _dissolve(self) -> list[Command]:
        """Gives up what is below the minimum."""

    def _forget(self, nonce: bytes) -> None:
        """Of one that is in no group nothing remains."""
        del self._states[nonce]
        self._versions.pop(nonce, None)

    # Rounds.

    def _open(self, version: int) -> list[Command]:
        assert self._closing is None, "a close ends before the next round opens"
        again = version == self._version and self._is_open
        self._version, self._is_open = version, True
        if again:
            return []  # the round before was abandoned: its groups go on
        told: list[Command] = []
        for nonce, trained_on in list(self._versions.items()):
            if not self.takes(trained_on):
                told += self._release(nonce, "too late")
        self._room = {v: room for v, room in self._room.items() if version - v <= self._policy.max_staleness}
        self._room.setdefault(version, self._most)
        return told + self._after_open()

    def _close(self, close: Close) -> list[Command]:
        self._closing, self._is_ending = close, close.final
        told: list[Command] = []
        if close.final and not self._policy.max_staleness:
            for nonce in [n for n, state in self._states.items() if state is Member.JOINED]:
                told += self._release(nonce, NO_NEED)
        return told + self._finish_closing()

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
            return [Tell(nonce, "released", reason=NO_NEED)]
        self._states[nonce], self._versions[nonce] = Member.JOINED, version
        return [JoinRound(nonce, version)]

    def _drop(self, nonce: bytes) -> list[Command]:
        if self._states.get(nonce) not in (Member.JOINED, Member.OFFERED):
            return []
        self._forget(nonce)
        dropped: list[Command] = [ReleaseMember(nonce)]
        return dropped + self._finish_closing()

    def _release(self, nonce: bytes, why: str) -> list[Command]:
        self._forget(nonce)
        return [Tell(nonce, "released", reason=why), ReleaseMember(nonce)]

    def _sum_of(self, trained_on: int) -> int:
        """The version whose sum an update becomes part of."""
        return trained_on if self._policy.late.kind == "patch" else self._version
