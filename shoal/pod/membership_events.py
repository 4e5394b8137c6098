"""What goes into and comes out of the membership machine (`membership.py`): what has happened, what is to be done, where it stands."""

from dataclasses import dataclass
from enum import Enum
from typing import Final, Literal

PAUSED: Final = 75
"""Exit code (EX_TEMPFAIL) of a worker that has saved its state and left because it was asked to: the training is not over."""

Doing = Literal["starting", "compiling", "training", "evaluating", "saving"]
"""What a worker says that it does. Each has a limit of its own."""


class Phase(Enum):
    WAITING = "waiting"
    RUNNING = "running"
    STOPPING = "stopping"
    OVER = "over"


@dataclass(frozen=True, slots=True)
class Mark:
    """Where a worker is. It says so twice a second, also while nothing changes: silence means that it does not run at all."""

    doing: Doing
    step: int = -1
    """The last one that is done; -1: none yet in this life."""
    begun: int = -1
    """The last one that it has begun: of members that wait for one another the one that holds them up has begun the least."""
    saved: int = -1
    """The last one that is in a checkpoint."""
    step_s: float = 0.0
    """Median seconds of its last steps; 0: none yet."""


@dataclass(frozen=True, slots=True)
class Joined:
    """A host has come, with no worker running."""

    host: str
    address: str
    """Under which the others reach it."""
    devices: int
    ports: tuple[int, ...]
    """Free ones there, for coordinators: one life after the other takes the next."""


@dataclass(frozen=True, slots=True)
class Lost:
    """A host is gone or cannot be heard. It ends its worker by itself within `PodPolicy.lost_s`."""

    host: str


@dataclass(frozen=True, slots=True)
class Leaves:
    """A host is about to go: it ends its worker, says `Exited`, and then it is `Lost`."""

    host: str


@dataclass(frozen=True, slots=True)
class Marked:
    """A worker said where it is."""

    host: str
    life: int
    mark: Mark


@dataclass(frozen=True, slots=True)
class Exited:
    """A worker is gone, and so are all the processes that it started."""

    host: str
    life: int
    code: int
    """0: the training is over; `PAUSED`; below zero: the signal; anything else is a failure."""
    why: str = ""
    """Its last lines of error."""


@dataclass(frozen=True, slots=True)
class Stop:
    """The user wants no more of it."""


@dataclass(frozen=True, slots=True)
class Tick:
    """It is later than it was. To be said at least every second."""


Event = Joined | Lost | Leaves | Marked | Exited | Stop | Tick


@dataclass(frozen=True, slots=True)
class StartWorker:
    """Start this host's worker; say `Exited` when it is gone, unless the host is `Lost`."""

    host: str
    life: int
    process_id: int
    num_processes: int
    coordinator: str
    """HOST:PORT."""


@dataclass(frozen=True, slots=True)
class AskToStop:
    """Ask the workers to leave with `PAUSED` at their next checkpoint."""

    life: int


@dataclass(frozen=True, slots=True)
class StopWorkers:
    """End all of them."""

    life: int
    stuck: tuple[str, ...] = ()
    """Hosts whose workers do not listen: kill these at once."""


@dataclass(frozen=True, slots=True)
class LifeEnded:
    """For the record and the screen."""

    life: int
    hosts: tuple[str, ...]
    """To whom it is put down; none: to nobody in particular."""
    why: str
    step: int
    """The furthest that it came."""


@dataclass(frozen=True, slots=True)
class Done:
    """It is over: `finished`, or as the user wanted."""

    finished: bool


@dataclass(frozen=True, slots=True)
class GiveUp:
    """It is over, and was not finished."""

    why: str


Command = StartWorker | AskToStop | StopWorkers | LifeEnded | Done | GiveUp


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Where it stands."""

    phase: Phase
    life: int
    """Number of the present or the last one; 0: none yet."""
    hosts: tuple[str, ...]
    """Those that are there."""
    members: tuple[str, ...]
    """Those of the life, by process id."""
    step: int
    """The furthest that is done, in any life."""
    lives_without_progress: int
    """The last ones, one after the other."""
