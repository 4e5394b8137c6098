"""When the Coordinator of a run takes its lease, renews it, gives it up: who serves a run is one process at a time.

A lease is a row of the record with an expiry and a *fence*, a number that rises with every holder. Every write shows the
fence, so a process that was taken for dead, and is not, can write nothing (`record/store.py`, invariant 6). Clocks do not
matter for that, only for how soon a dead holder is replaced.

No I/O: events in, commands out; `now_s` is monotonic. The shell is `lease_keeper.py`.

    IDLE ─Begin─> TAKING ─Taken─> HELD ─Tick─> RENEWING ─Renewed/Unavailable─> HELD … ─End─> OVER
                    └─Held─> WAITING ─Tick─> TAKING            └─Lost─> OVER

Invariants (tests cite them by number):
    (1) A lease that is held is renewed at a third of its life, whatever else goes on; where the record cannot be written it
        is tried again sooner, and not given up: only the record says that it is lost.
    (2) A lease that has not expired is taken only where its holder is known to be dead: it was of this machine, and this
        process is alone on the record; or its row stayed the same for a whole life while this one waited.
    (3) One that waits gives up as soon as the row has changed: the holder lives, or somebody else was first.
"""

import os
import secrets
import socket
from dataclasses import dataclass
from enum import Enum, auto
from typing import Final

from shoal import validate
from shoal.record.store import LeaseRow

LIFE_S: Final = 30.0
RENEWED_AFTER: Final = 1 / 3
"""Of its life: two renewals may fail."""
TRIED_AGAIN_AFTER: Final = 1 / 15


def holder_name() -> str:
    """A new name for a holder: the machine, the process, and what tells this life of it from all others."""
    return f"{socket.gethostname() or 'unnamed'} process {os.getpid()} {secrets.token_hex(4)}"


def machine_of(holder: str) -> str:
    """The machine in a holder's name."""
    return holder.split(" ", 1)[0]


class Phase(Enum):
    IDLE = auto()
    TAKING = auto()
    WAITING = auto()
    HELD = auto()
    RENEWING = auto()
    OVER = auto()


@dataclass(frozen=True, slots=True)
class Begin:
    """The run is to be served from here."""


@dataclass(frozen=True, slots=True)
class Taken:
    """The lease is ours."""


@dataclass(frozen=True, slots=True)
class Held:
    """Another has it."""

    row: LeaseRow
    left_s: float
    """Until it expires, by our clock."""


@dataclass(frozen=True, slots=True)
class Renewed:
    """It lasts a life from when that was asked for."""


@dataclass(frozen=True, slots=True)
class Unavailable:
    """The record could not be written."""


@dataclass(frozen=True, slots=True)
class Lost:
    """Another has taken it, says the record."""


@dataclass(frozen=True, slots=True)
class Tick:
    """It is later than it was."""


@dataclass(frozen=True, slots=True)
class End:
    """The run is not served from here any more."""


Event = Begin | Taken | Held | Renewed | Unavailable | Lost | Tick | End


@dataclass(frozen=True, slots=True)
class Take:
    """Take the lease; answer `Taken` or `Held`."""

    instead_of: LeaseRow | None = None
    """A holder that is dead."""


@dataclass(frozen=True, slots=True)
class Renew:
    """Let it last a life from now; answer `Renewed`, `Unavailable` or `Lost`."""


@dataclass(frozen=True, slots=True)
class Release:
    """Let others have it."""


@dataclass(frozen=True, slots=True)
class GiveUp:
    """It is another's: serve the run no more, or do not begin."""


@dataclass(frozen=True, slots=True)
class WakeAt:
    """Say `Tick` at this time."""

    time_s: float


Command = Take | Renew | Release | GiveUp | WakeAt


class LeaseMachine:
    """See the module's text. `step` is the only thing that changes it."""

    def __init__(self, holder: str, *, life_s: float = LIFE_S, alone: bool = False, waits: bool = False) -> None:
        """
        Args:
            holder: our name.
            life_s: of the lease.
            alone: no other process of this machine has the record: one of it that holds the lease is dead.
            waits: for another's lease to expire, once; else gives up.
        """
        validate.positive(life_s=life_s)
        self._machine, self._life_s, self._alone, self._waits = machine_of(holder), life_s, alone, waits
        self._phase = Phase.IDLE
        self._wake_s = self._asked_s = 0.0
        self._met: LeaseRow | None = None
        """Another's lease, that was said to be dead or waited for."""

    @property
    def phase(self) -> Phase:
        return self._phase

    def step(self, event: Event, now_s: float) -> list[Command]:
        """Advances by one event. What comes after the end, or too early, changes nothing."""
        match event, self._phase:
            case Begin(), Phase.IDLE:
                return self._to(Phase.TAKING, Take())
            case Taken(), Phase.TAKING:
                return self._hold(now_s, RENEWED_AFTER)
            case Held(row, left_s), Phase.TAKING:
                return self._meet(row, left_s, now_s)
            case Tick(), Phase.WAITING if now_s >= self._wake_s:
                return self._to(Phase.TAKING, Take(self._met))
            case Tick(), Phase.HELD if now_s >= self._wake_s:
                self._asked_s = now_s
                return self._to(Phase.RENEWING, Renew())
            case Renewed(), Phase.RENEWING:
                return self._hold(self._asked_s, RENEWED_AFTER)
            case Unavailable(), Phase.RENEWING:
                return self._hold(now_s, TRIED_AGAIN_AFTER)
            case Lost(), Phase.HELD | Phase.RENEWING:
                return self._to(Phase.OVER, GiveUp())
            case End(), Phase.HELD | Phase.RENEWING:
                return self._to(Phase.OVER, Release())
            case End(), _:
                return self._to(Phase.OVER)
        return []

    def _to(self, phase: Phase, *commands: Command) -> list[Command]:
        self._phase = phase
        return [*commands]

    def _hold(self, since_s: float, share: float) -> list[Command]:
        self._wake_s = since_s + share * self._life_s
        return self._to(Phase.HELD, WakeAt(self._wake_s))

    def _meet(self, row: LeaseRow, left_s: float, now_s: float) -> list[Command]:
        met, self._met = self._met, row
        if self._alone and machine_of(row.holder) == self._machine and row != met:
            return [Take(row)]
        if not self._waits or met is not None:
            return self._to(Phase.OVER, GiveUp())
        self._wake_s = now_s + min(max(0.0, left_s), self._life_s)
        return self._to(Phase.WAITING, WakeAt(self._wake_s))
