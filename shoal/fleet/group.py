"""A group: updates that are added together before anybody sees them. One interface, a state machine for each mode.

`ClearGroup` sees single updates on their way into the sum, held whole until they are checked. (`SecureGroup` will
answer the same events with key and share phases in between.) Tensors are not state: the machine holds nonces, says
`Check(nonce)` and `Add(nonce)`, and is told `Checked` and `Added`.

Invariants (tests cite them by number):
    (1) Every member ends in exactly one of counted, refused, released.
    (2) `Add` is said at most once for a nonce, one at a time, and only after `Checked(ok)`.
    (3) After `Close` nothing is added; an addition under way is waited for before `Closed`.
    (4) What was added is *counted* only by `Committed`: acknowledged means durable.
    (5) At most `most` members are ever added, however fast they come; the others wait for the close.

One member's way::

    Joined─> joined ─Offered─> offered ─Checked(ok)─> checked ─(its turn)─> adding ─Added─> added ─Committed─> counted
    any of the first four ─Refuse / Close / Gone─> refused | released
"""

from collections import deque
from dataclasses import dataclass
from enum import Enum
from typing import Protocol, runtime_checkable

from shoal.errors import InvalidTransition


class Member(Enum):
    JOINED = "joined"
    OFFERED = "offered"
    CHECKED = "checked"
    ADDING = "adding"
    ADDED = "added"


@dataclass(frozen=True, slots=True)
class Joined:
    nonce: bytes


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
class Close:
    """Nothing more is wanted."""


@dataclass(frozen=True, slots=True)
class Committed:
    """What was added is durable, in this version."""

    version: int


Event = Joined | Offered | Checked | Added | Gone | Close | Committed


@dataclass(frozen=True, slots=True)
class Check:
    """Check the update; answer `Checked`."""

    nonce: bytes


@dataclass(frozen=True, slots=True)
class Add:
    """Add the update to the sum; answer `Added`."""

    nonce: bytes


@dataclass(frozen=True, slots=True)
class Tell:
    """Tell the member how it ended: counted | refused | released."""

    nonce: bytes
    outcome: str
    version: int = 0
    reason: str = ""
    detail: str = ""


@dataclass(frozen=True, slots=True)
class JoinRound:
    """For the round: a member joined."""

    nonce: bytes


@dataclass(frozen=True, slots=True)
class CountMember:
    """For the round: a member's update is in the sum."""

    nonce: bytes


@dataclass(frozen=True, slots=True)
class ReleaseMember:
    """For the round: a member is given up."""

    nonce: bytes


@dataclass(frozen=True, slots=True)
class Closed:
    """For the round: the sum is final."""


Command = Check | Add | Tell | JoinRound | CountMember | ReleaseMember | Closed


@runtime_checkable
class Group(Protocol):
    """What every mode's group is."""

    def step(self, event: Event, now_s: float) -> list[Command]:
        """Advances by one event."""
        ...

    @property
    def added(self) -> tuple[bytes, ...]:
        """Nonces whose updates are in the sum."""
        ...


class ClearGroup:
    """The group that sees single updates. See the module's text."""

    def __init__(self, *, most: int) -> None:
        """`most`: members that fit its sum."""
        self._most, self._num_added = most, 0
        self._members: dict[bytes, Member] = {}
        self._queue: deque[bytes] = deque()
        self._adding: bytes | None = None
        self._closing = self._closed = False

    @property
    def added(self) -> tuple[bytes, ...]:
        return tuple(nonce for nonce, state in self._members.items() if state is Member.ADDED)

    def state(self, nonce: bytes) -> Member | None:
        """Where a member is; None where it is none."""
        return self._members.get(nonce)

    def step(self, event: Event, now_s: float) -> list[Command]:
        del now_s  # this mode has no windows of its own
        match event:
            case Joined(nonce):
                return self._join(nonce)
            case Offered(nonce) if self._members.get(nonce) is Member.JOINED:
                self._members[nonce] = Member.OFFERED
                return [Check(nonce)]
            case Offered(nonce) if nonce in self._members:
                return []  # offered again by a device that heard no answer
            case Offered(nonce):
                return [Tell(nonce, "refused", reason="late", detail="The round has closed.")]
            case Checked(nonce, reason, detail):
                return self._checked(nonce, reason, detail)
            case Added(nonce) if nonce == self._adding:
                return self._was_added(nonce)
            case Gone(nonce, _):
                return self._drop(nonce)
            case Close():
                return self._close()
            case Committed(version):
                return self._commit(version)
        raise InvalidTransition(f"{event} is not allowed: member is {self._members.get(event.nonce)}.")

    def _join(self, nonce: bytes) -> list[Command]:
        if self._closing:
            return [Tell(nonce, "released", reason="the round has what it needs")]
        if nonce in self._members:
            return []
        self._members[nonce] = Member.JOINED
        return [JoinRound(nonce)]

    def _checked(self, nonce: bytes, reason: str, detail: str) -> list[Command]:
        if self._members.get(nonce) not in (Member.JOINED, Member.OFFERED):
            return []  # the group closed while it was checked
        if reason:
            del self._members[nonce]
            return [Tell(nonce, "refused", reason=reason, detail=detail), ReleaseMember(nonce)]
        assert self._members[nonce] is Member.OFFERED, "only what is whole is found good"
        self._members[nonce] = Member.CHECKED
        self._queue.append(nonce)
        return self._add_next()

    def _add_next(self) -> list[Command]:
        if self._adding is not None or self._closing or not self._queue or self._num_added >= self._most:
            return []
        self._adding = self._queue.popleft()
        self._num_added += 1
        self._members[self._adding] = Member.ADDING
        return [Add(self._adding)]

    def _was_added(self, nonce: bytes) -> list[Command]:
        self._members[nonce], self._adding = Member.ADDED, None
        counted: list[Command] = [CountMember(nonce)]
        return counted + (self._finish_closing() if self._closing else self._add_next())

    def _drop(self, nonce: bytes) -> list[Command]:
        if self._members.get(nonce) in (Member.JOINED, Member.OFFERED):
            del self._members[nonce]
            return [ReleaseMember(nonce)]
        return []

    def _close(self) -> list[Command]:
        self._closing = True
        kept = (Member.ADDED, Member.ADDING)
        surplus = [nonce for nonce, state in self._members.items() if state not in kept]
        for nonce in surplus:
            del self._members[nonce]
        self._queue.clear()
        told: list[Command] = []
        for nonce in surplus:
            told += [Tell(nonce, "released", reason="the round has what it needs"), ReleaseMember(nonce)]
        return told + self._finish_closing()

    def _finish_closing(self) -> list[Command]:
        if self._adding is not None or self._closed:
            return []
        self._closed = True
        return [Closed()]

    def _commit(self, version: int) -> list[Command]:
        assert self._closed, "invariant (3)"
        counted = self.added
        self._members.clear()
        return [Tell(nonce, "counted", version=version) for nonce in counted]
