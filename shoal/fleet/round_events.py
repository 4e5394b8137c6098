"""What goes into and comes out of the round machine (`round.py`): what has happened, what is to be done, where it stands."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum


class Phase(Enum):
    IDLE = "idle"
    SELECTING = "selecting"
    REPORTING = "reporting"
    COMMITTING = "committing"
    ABANDONING = "abandoning"
    DONE = "done"


@dataclass(frozen=True, slots=True)
class Started:
    """The line is at `version`; `round` is the number of the last round ever opened."""

    version: int
    round: int
    counted: frozenset[bytes] = frozenset()
    """Nonces in groups that wait for the next commit."""
    recent: Mapping[int, frozenset[bytes]] = field(default_factory=dict)
    """Version -> nonces of who trained from it and is in the next, as far back as `min_separation` looks."""


@dataclass(frozen=True, slots=True)
class Arrived:
    """Devices checked in and wait."""

    devices: tuple[str, ...]
    edge: str = ""
    """Where."""


@dataclass(frozen=True, slots=True)
class Left:
    """A device that waited is gone."""

    device: str


@dataclass(frozen=True, slots=True)
class Joined:
    """A member is in: one that was assigned, or one with a token that is still good."""

    nonce: bytes
    version: int
    """That it trains on."""


@dataclass(frozen=True, slots=True)
class Counted:
    """A member's update is in a sum, `staleness` versions late, when `version` was open."""

    nonce: bytes
    version: int
    staleness: int = 0
    edge: str = ""
    """Whose group it is in."""


@dataclass(frozen=True, slots=True)
class Released:
    """A member is given up: it was gone, refused, or too late."""

    nonce: bytes


@dataclass(frozen=True, slots=True)
class Away:
    """A member's stream broke. It may come back, and its update counts if it does; others may take its place."""

    nonce: bytes


@dataclass(frozen=True, slots=True)
class Stored:
    """What `StoreGroup` asked for is done: these nonces are in groups of the record."""

    nonces: frozenset[bytes]


@dataclass(frozen=True, slots=True)
class Committed:
    version: int
    closed: frozenset[bytes] | None = None
    """Nonces in the groups that were closed for it; the others' are below the minimum and go on. None: all are closed."""


@dataclass(frozen=True, slots=True)
class Failed:
    """The commit failed for a reason of its own (not the disk's): its groups are gone."""

    why: str


@dataclass(frozen=True, slots=True)
class Abandoned:
    """The record knows that the round was abandoned."""


@dataclass(frozen=True, slots=True)
class Tick:
    """It is later than it was."""


@dataclass(frozen=True, slots=True)
class Stop:
    """Open no round after this one."""


Event = (
    Started
    | Arrived
    | Left
    | Joined
    | Counted
    | Released
    | Away
    | Stored
    | Committed
    | Failed
    | Abandoned
    | Tick
    | Stop
)


@dataclass(frozen=True, slots=True)
class OpenRound:
    """Begin to write the round into the record, open its groups. The row comes before the round's end."""

    round: int
    base_version: int


@dataclass(frozen=True, slots=True)
class Assign:
    """Send each of these devices its assignment, then say `Joined`; or `Released` for one that has gone."""

    devices: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class StoreGroup:
    """Write what has been added so far into the record, then say `Stored`."""


@dataclass(frozen=True, slots=True)
class Gather:
    """There are groups below the minimum, and nobody comes: let what is at several Edges come together at one."""


@dataclass(frozen=True, slots=True)
class CommitRound:
    """Close the groups, commit; then say `Committed` or `Failed`."""

    round: int
    reason: str


@dataclass(frozen=True, slots=True)
class AbandonRound:
    """Write that the round ended without a commit, then say `Abandoned`."""

    round: int
    reason: str


@dataclass(frozen=True, slots=True)
class Finish:
    """The run is over: tell everybody."""


@dataclass(frozen=True, slots=True)
class WakeAt:
    """Say `Tick` at this time, if nothing happens before."""

    time_s: float


Command = OpenRound | Assign | StoreGroup | Gather | CommitRound | AbandonRound | Finish | WakeAt


@dataclass(frozen=True)
class Snapshot:
    """Where a round is; for people and for the record."""

    phase: Phase
    round: int
    version: int
    waiting: int
    outstanding: int
    """Devices that train, or are to."""
    counted: int
    """Updates that the next commit takes in and that count for its goal."""
    late: int
    """Updates beside them, from versions before."""
    goal: int
    deadline_s: float | None
    selected: int
    """Devices that joined in this round."""
    released: int
    resting: int = 0
    """Of those that wait: who was in a version before, and may not be in the next."""
