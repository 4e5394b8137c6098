"""Which of several runs gets the devices that wait: turns, by weight or by order.

A round needs many devices at once. Dealt out one by one, few devices would be divided between runs none of which could
then begin; so runs take turns. The run whose turn it is gets every device that it may take, until it wants no more, one
that goes before it wants some, or it has kept others waiting for its selection window; then the turn is another's, and so
are the devices that nobody has enough of yet.

By weight, the run goes first that has had the fewest devices for its weight (stride scheduling: Waldspurger and Weihl
1995, "Stride scheduling: deterministic proportional-share resource management"). One that did not want any meanwhile
has saved nothing up. By order, it is the first run that wants devices, and the others get what it leaves.

No I/O: events in, commands out. A shell (`frontdoor.py`) says what runs want and moves devices.

Invariants (tests cite them by number):
    (1) A device is idle, given to one run, or out (it trains, or has left): never in two places.
    (2) No device idles while a run wants more and may take it.
    (3) What a run was given and has no use for is taken back: it never keeps a device from another run.
    (4) A run that cannot be filled keeps the others waiting for its window at most; by weight, every run that the
        devices are enough for has its rounds.
    (5) By weight: runs that want devices at all times get them in proportion, to within a round of each.
    (6) A device that no run may ever take again is dismissed.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import inf

import numpy as np

from shoal import validate


@dataclass(frozen=True, slots=True)
class Opened:
    """A run is served from now on."""

    run: str
    weight: float
    patience_s: float
    """Longest turn."""


@dataclass(frozen=True, slots=True)
class Over:
    """A run is served no more."""

    run: str


@dataclass(frozen=True, slots=True)
class Asks:
    """A run could use so many devices beyond those that wait for it there; below zero: so many are too many."""

    run: str
    number: int
    waiting: frozenset[str] = frozenset()
    """Devices that wait there, of those that it was given."""
    rests: bool = False
    """It has nothing to do for now: no round of it is open."""


@dataclass(frozen=True, slots=True)
class Entered:
    """A device waits; it can serve these runs."""

    device: str
    runs: frozenset[str]
    expected: str = ""
    """The run that it has lost an assignment of: it goes back to it."""


@dataclass(frozen=True, slots=True)
class Taken:
    """The run that a device was given to has assigned it."""

    device: str


@dataclass(frozen=True, slots=True)
class Left:
    """A device is gone."""

    device: str


@dataclass(frozen=True, slots=True)
class Tick:
    """It is later than it was."""


Event = Opened | Over | Asks | Entered | Taken | Left | Tick


@dataclass(frozen=True, slots=True)
class Give:
    """These devices are to wait at that run."""

    run: str
    devices: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class TakeBack:
    """These devices are to wait at that run no more."""

    run: str
    devices: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Dismiss:
    """All runs that these devices can serve are over."""

    devices: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class WakeAt:
    """Say `Tick` at this time, if nothing happens before."""

    time_s: float


Command = Give | TakeBack | Dismiss | WakeAt


@dataclass(frozen=True)
class Snapshot:
    """Who is where."""

    idle: frozenset[str]
    given: tuple[tuple[str, str], ...]
    """(device, run)."""
    turn: str
    """The run whose turn it is; empty: nobody's."""
    had: tuple[tuple[str, int], ...]
    """(run, devices that it was given and took)."""


@dataclass
class _Run:
    weight: float
    patience_s: float
    wants: int = 0
    waiting: frozenset[str] = frozenset()
    had: int = 0
    rests: bool = False
    stride: float = 0.0
    """Devices had, over weight; when it has rested, no less than where the others are."""


class Turns:
    """See the module's text. `step` is the only thing that changes it."""

    def __init__(
        self, *, may_take: Callable[[str, str], bool], rng: np.random.Generator, by_order: bool = False
    ) -> None:
        """
        Args:
            may_take: (run, device) -> whether that run could assign that device as things stand there; pure.
            rng: draws the devices that a run gets of those that wait.
            by_order: the first run that wants devices has the turn, in the order of opening; else by weight.
        """
        self._may_take, self._rng, self._by_order = may_take, rng, by_order
        self._runs: dict[str, _Run] = {}
        self._idle: dict[str, frozenset[str]] = {}
        self._given: dict[str, tuple[str, frozenset[str]]] = {}  # device -> run, what it can serve
        self._turn = ""
        self._ends_s = inf
        self._passed: set[str] = set()  # runs whose turn ended without what they wanted, since the last that did not

    def snapshot(self) -> Snapshot:
        return Snapshot(
            idle=frozenset(self._idle),
            given=tuple((device, run) for device, (run, _) in self._given.items()),
            turn=self._turn,
            had=tuple((name, run.had) for name, run in self._runs.items()),
        )

    @property
    def num_idle(self) -> int:
        return len(self._idle)

    def given(self) -> dict[str, list[str]]:
        """Run -> devices that it was given and has not assigned."""
        made: dict[str, list[str]] = {name: [] for name in self._runs}
        for device, (run, _) in self._given.items():
            made[run].append(device)
        return made

    def step(self, events: Iterable[Event], now_s: float) -> list[Command]:
        """Advances by some events at once, then deals devices out."""
        commands: list[Command] = []
        for event in events:
            commands += self._hear(event)
        return commands + self._deal(now_s)

    def _hear(self, event: Event) -> list[Command]:
        match event:
            case Opened(run, weight, patience_s):
                validate.positive(weight=weight, patience_s=patience_s)
                self._runs[run] = _Run(weight, patience_s, stride=self._level())
            case Over(run):
                return self._end_run(run)
            case Asks(run, number, waiting, rests) if run in self._runs:
                self._ask(self._runs[run], number, waiting, rests)
            case Entered(device, runs, expected):
                return self._enter(device, runs, expected)
            case Taken(device) if device in self._given:
                self._had(self._given.pop(device)[0])
            case Left(device):
                self._idle.pop(device, None)
                self._given.pop(device, None)
        return []

    def _ask(self, run: _Run, number: int, waiting: frozenset[str], rests: bool) -> None:
        if run.rests and not rests:
            run.stride = max(run.stride, self._level())
        run.wants, run.waiting, run.rests = number, waiting, rests

    def _level(self) -> float:
        """Where the runs are that do not rest: the one that has had the least for its weight."""
        return min((run.stride for run in self._runs.values() if not run.rests), default=0.0)

    def _had(self, name: str) -> None:
        if run := self._runs.get(name):
            run.had += 1
            run.stride += 1 / run.weight

    def _enter(self, device: str, runs: frozenset[str], expected: str) -> list[Command]:
        self._given.pop(device, None)
        if expected in self._runs:
            self._idle.pop(device, None)
            self._given[device] = (expected, runs)
            return [Give(expected, (device,))]
        self._idle[device] = runs
        return []

    def _end_run(self, name: str) -> list[Command]:
        self._runs.pop(name, None)
        self._passed.discard(name)
        if self._turn == name:
            self._turn = ""
        return self._back(name, [device for device, (run, _) in self._given.items() if run == name])

    def _back(self, run: str, devices: Sequence[str]) -> list[Command]:
        for device in devices:
            self._idle[device] = self._given.pop(device)[1]
        return [TakeBack(run, tuple(devices))] if devices else []

    # Who gets what.

    def _deal(self, now_s: float) -> list[Command]:
        commands = self._take_back()
        self._give_way()
        while True:
            if self._turn and self._free(self._turn) <= 0:
                self._turn = ""
                self._passed.clear()
            if not self._turn and not self._begin_turn():
                break
            if given := [*self._fetch(self._turn), *self._give(self._turn)]:
                commands += given
            elif self._is_overdue(now_s):
                self._pass_over()
            else:
                break
        # Devices that the run whose turn it is may not take need not wait for its end.
        for name in self._in_order(self._others()):
            commands += self._give(name)
        commands += self._dismiss()
        if self._turn and self._ends_s < inf:
            commands.append(WakeAt(self._ends_s))
        return commands

    def _in_order(self, names: Sequence[str]) -> Sequence[str]:
        return names if self._by_order else sorted(names, key=lambda name: self._runs[name].stride)

    def _free(self, name: str) -> int:
        """Devices that the run wants beyond those that are on their way to it."""
        run = self._runs[name]
        on_the_way = sum(of == name and device not in run.waiting for device, (of, _) in self._given.items())
        return run.wants - on_the_way

    def _eligible(self, name: str) -> list[str]:
        return [device for device, runs in self._idle.items() if name in runs and self._may_take(name, device)]

    def _take_back(self) -> list[Command]:
        commands: list[Command] = []
        for name, run in self._runs.items():
            waiting = [device for device, (of, _) in self._given.items() if of == name and device in run.waiting]
            useless = [device for device in waiting if not self._may_take(name, device)]
            surplus = [device for device in waiting if device not in useless][: max(0, -run.wants)]
            back = [*useless, *surplus]
            run.wants += len(surplus)
            run.waiting -= set(back)
            commands += self._back(name, back)
        return commands

    def _give_way(self) -> None:
        """The turn is over where a run that goes before it wants devices."""
        if not self._turn or self._turn in self._passed:
            return
        before = self._in_order([*self._runs])
        others = [name for name in before[: before.index(self._turn)] if name not in self._passed]
        equal = self._runs[self._turn].stride
        if any(self._by_order or self._runs[name].stride < equal for name in self._could_use(others)):
            self._turn = ""

    def _pass_over(self) -> None:
        """The run whose turn it is cannot be filled."""
        self._passed.add(self._turn)
        if self._passed >= set(self._could_use(self._others())):
            self._passed = {self._turn}
        self._turn = ""

    def _is_overdue(self, now_s: float) -> bool:
        """Whether the turn has kept the others waiting as long as it may: its clock runs while one could use devices."""
        if not self._could_use(self._others()):
            self._ends_s = inf
        elif self._ends_s == inf:
            self._ends_s = now_s + self._runs[self._turn].patience_s
        return now_s >= self._ends_s

    def _others(self) -> list[str]:
        return [name for name in self._runs if name != self._turn]

    def _could_use(self, names: Sequence[str]) -> list[str]:
        """Those that want devices and may take one that is idle, or that another was given which has not enough yet."""
        return [name for name in names if self._free(name) > 0 and self._pool(name)]

    def _pool(self, name: str) -> list[str]:
        if idle := self._eligible(name):
            return idle
        unfilled = {other for other in self._runs if other != name and self._free(other) > 0}
        given = [device for device, (of, runs) in self._given.items() if of in unfilled and name in runs]
        return [device for device in given if self._may_take(name, device)]

    def _begin_turn(self) -> bool:
        wanting = self._could_use([*self._runs])
        able = self._in_order([name for name in wanting if name not in self._passed] or wanting)
        if not able:
            return False
        self._turn, self._ends_s = able[0], inf
        return True

    def _fetch(self, name: str) -> list[Command]:
        """What waits at runs that have not enough yet is for the one whose turn it is, where it needs more than idle."""
        missing = self._free(name) - len(self._eligible(name))
        commands: list[Command] = []
        for other in [other for other in self._others() if self._free(other) > 0]:
            if missing <= 0:
                break
            waiting = self._runs[other].waiting
            found = [d for d, (of, runs) in self._given.items() if of == other and d in waiting and name in runs]
            found = [device for device in found if self._may_take(name, device)][:missing]
            missing -= len(found)
            self._runs[other].wants += len(found)
            self._runs[other].waiting = waiting.difference(found)
            commands += self._back(other, found)
        return commands

    def _give(self, name: str) -> list[Command]:
        free = self._free(name)
        eligible = self._eligible(name) if free > 0 and self._idle else []
        number = min(free, len(eligible))
        if number <= 0:
            return []
        chosen = sorted(self._rng.choice(len(eligible), number, replace=False).tolist())
        devices = tuple(eligible[index] for index in chosen)
        for device in devices:
            self._given[device] = (name, self._idle.pop(device))
        return [Give(name, devices)]

    def _dismiss(self) -> list[Command]:
        gone = tuple(device for device, runs in self._idle.items() if not runs & self._runs.keys())
        for device in gone:
            del self._idle[device]
        return [Dismiss(gone)] if gone else []
