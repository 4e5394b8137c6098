"""The membership machine of a pod: which hosts train together, and when that ends and begins anew.

XLA's runtime cannot lose a member: whoever waits in a collective waits for ever, or dies with the coordination service. So
membership is ours, outside XLA. A *life* is one set of workers, a worker on each host, under one coordinator; when a member dies, hangs or
is lost, its life ends with all its workers, and the next begins with the hosts that are there, from the last checkpoint. A host, here, is a
place for one worker; a machine may have several.

It does no I/O: events in, commands out (`membership_events.py`). The shell is `supervisor.py`.

    WAITING ─hosts are there, back-off over─> RUNNING ─all workers exit 0─> OVER (Done)
       ^                                         │  └─all exit, some PAUSED─> WAITING
       └────── every worker is gone ── STOPPING <┘ a worker fails, hangs, is lost; Stop
                                          └─> OVER (Done after Stop, GiveUp after too many lives without progress)
    WAITING ─too few hosts for too long─> OVER (GiveUp)

Invariants (tests cite them by number):
    (1) One life at a time: none starts before every worker of the last has exited, or its host has been lost for `lost_s`, by when
        it has ended it, or has joined again, which it does without a worker.
    (2) A life has only hosts that are there when it starts, each once, and at least `least` of them.
    (3) A member that comes no further for its limit ends the life. Whoever does not run at all is named; else who is behind the
        others; nobody where all are equally far.
    (4) It ends: after `lives_without_progress` such lives one after the other there is none again. Progress is a step or a
        checkpoint beyond all before.
    (5) `Done` and `GiveUp` come once, last, and leave no worker.
    (6) Time in which the machine itself was not run counts for nobody.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import inf
from statistics import median
from typing import Final, Literal

from shoal import validate
from shoal.errors import InvalidTransition
from shoal.pod.membership_events import (
    PAUSED,
    AskToStop,
    Command,
    Done,
    Event,
    Exited,
    GiveUp,
    Joined,
    Leaves,
    LifeEnded,
    Lost,
    Mark,
    Marked,
    Phase,
    Snapshot,
    StartWorker,
    Stop,
    StopWorkers,
    Tick,
)

LAG_S: Final = 2.0
"""A longer pause between two events is the machine's own: ticks come every second."""
QUIET_S: Final = 3.0
"""A worker that says nothing for so long, where others speak, is the one that does not run: it should speak twice a second."""


_KILLED: Final = -9
"""What it said before has nothing to do with it."""


@dataclass(frozen=True, kw_only=True)
class PodPolicy:
    """How long a pod waits for whom."""

    hosts: int = 1
    """The first life starts when so many are there …"""
    least: int = 1
    """… or `gather_s` are over and so many are. Later lives start with any number from here."""
    multiple: int = 1
    """A life has a multiple of so many hosts, where tensors are split over several. The others are left out."""
    gather_s: float = 300.0
    """With fewer than `least` for so long it gives up."""
    floor_s: float = 10.0
    """A step that takes no longer than this is never taken for stuck …"""
    factor: float = 10.0
    """… nor one that takes no more than so many times the median."""
    begin_s: float = 600.0
    """For start and compilation, up to the first step."""
    pause_s: float = 600.0
    """For an evaluation, or a checkpoint."""
    silent_s: float = 60.0
    """A worker that says nothing at all for so long is stuck, whatever it does."""
    end_s: float = 60.0
    """When the first worker is at its end, the others have so long."""
    lost_s: float = 12.0
    """After so long the worker of a lost host is gone."""
    lives_without_progress: int = 4
    """After so many, one after the other, it gives up."""
    backoff_s: float = 1.0
    """Pause after a life without progress, twice as long after each further one …"""
    longest_backoff_s: float = 60.0
    """… up to this."""
    late: Literal["ask", "wait"] = "ask"
    """A host that comes while others train: they are asked to pause at their next checkpoint, or it waits for the next life."""

    def __post_init__(self) -> None:
        counts = {"hosts": self.hosts, "least": self.least, "multiple": self.multiple}
        validate.whole(1, **counts, lives_without_progress=self.lives_without_progress)
        validate.positive(gather_s=self.gather_s, floor_s=self.floor_s, begin_s=self.begin_s, pause_s=self.pause_s)
        validate.positive(silent_s=self.silent_s, end_s=self.end_s)
        validate.not_negative(lost_s=self.lost_s, backoff_s=self.backoff_s, longest_backoff_s=self.longest_backoff_s)
        validate.one_of(("ask", "wait"), late=self.late)
        if not self.factor >= 1:
            raise ValueError(f"Expected factor >= 1, got factor={self.factor!r}.")
        if self.hosts < max(self.least, self.multiple):
            raise ValueError(
                f"Expected hosts >= least and >= multiple, got hosts={self.hosts}, least={self.least}, multiple={self.multiple}."
            )

    def limit_s(self, mark: Mark | None, typical_s: float) -> float:
        """How long a worker may stay where it is."""
        if mark is None or mark.doing in ("starting", "compiling"):
            return self.begin_s
        if mark.doing != "training":
            return self.pause_s
        return max(self.floor_s, self.factor * typical_s) if typical_s else self.begin_s

    def backoff(self, lives: int) -> float:
        """Seconds to wait after so many lives without progress."""
        return min(self.longest_backoff_s, self.backoff_s * 2.0 ** min(lives - 1, 60)) if lives else 0.0


@dataclass(slots=True)
class _Member:
    """A worker of the present life."""

    heard_s: float
    moved_s: float
    mark: Mark | None = None
    code: int | None = None
    """With which it exited."""
    lost_s: float | None = None
    """Since when its host is lost."""


class MembershipMachine:
    """See the module's text. `step` is the only thing that changes it."""

    def __init__(self, policy: PodPolicy) -> None:
        self.policy: Final = policy
        self._phase = Phase.WAITING
        self._hosts: dict[str, Joined] = {}  # in the order in which they came
        self._life = 0
        self._members: dict[str, _Member] = {}  # of the life, by process id
        self._since_s: float | None = None  # it waits
        self._not_before_s = 0.0
        self._now_s: float | None = None  # of the last event
        self._first_exit_s: float | None = None
        self._asked = self._stopping = False
        self._furthest = self._saved = -1  # of the lives before
        self._barren = 0  # lives without progress, one after the other
        self._last_why = ""

    def snapshot(self) -> Snapshot:
        return Snapshot(
            phase=self._phase,
            life=self._life,
            hosts=tuple(self._hosts),
            members=tuple(self._members),
            step=max(self._furthest, self._reached),
            lives_without_progress=self._barren,
        )

    def step(self, event: Event, now_s: float) -> list[Command]:
        """Advances by one event. Raises InvalidTransition for a host that joins twice."""
        self._take_time(now_s)
        if self._phase is Phase.OVER:
            return []
        commands: list[Command] = []
        match event:
            case Joined(host) if host in self._hosts:
                raise InvalidTransition(f"{host!r} has joined already; a host is Lost before it joins again.")
            case Joined(host):
                self._hosts[host] = event
                if (member := self._members.get(host)) and member.lost_s is not None:
                    member.lost_s = -inf  # it came without a worker
            case Lost(host):
                commands += self._lose(host, now_s)
            case Leaves(host):
                commands += self._let_go(host)
            case Marked(host, life, mark) if life == self._life and host in self._members:
                self._hear(self._members[host], mark, now_s)
            case Exited(host, life) if life == self._life and host in self._members:
                commands += self._exit(event, now_s)
            case Stop():
                self._stopping = True
            case Exited() | Marked() | Tick():
                pass
        return commands + self._move_on(now_s)

    # What happened.

    def _take_time(self, now_s: float) -> None:
        gap_s = now_s - self._now_s if self._now_s is not None else 0.0
        self._now_s = now_s
        if gap_s > LAG_S:  # invariant (6)
            for member in self._members.values():
                member.heard_s += gap_s
                member.moved_s += gap_s
            if self._first_exit_s is not None:
                self._first_exit_s += gap_s

    def _lose(self, host: str, now_s: float) -> list[Command]:
        self._hosts.pop(host, None)
        member = self._members.get(host)
        if member is None or member.code is not None or member.lost_s is not None:
            return []
        member.lost_s = now_s
        return self._end((host,), f"{host} is gone") if self._phase is Phase.RUNNING else []

    def _let_go(self, host: str) -> list[Command]:
        self._hosts.pop(host, None)
        member = self._members.get(host)
        is_wanted = member is not None and member.code is None and self._phase is Phase.RUNNING
        return self._end((host,), f"{host} leaves") if is_wanted else []

    def _hear(self, member: _Member, mark: Mark, now_s: float) -> None:
        before, member.mark, member.heard_s = member.mark, mark, now_s
        if before is None or _place(before) != _place(mark):
            member.moved_s = now_s

    def _exit(self, event: Exited, now_s: float) -> list[Command]:
        member = self._members[event.host]
        if member.code is not None:
            return []
        member.code = event.code
        if self._phase is not Phase.RUNNING:
            return []
        if event.code in (0, PAUSED):
            self._first_exit_s = now_s if self._first_exit_s is None else self._first_exit_s
            return []
        why = f"{event.host}'s worker {_exit_text(event.code)}" + (
            f": {event.why}" if event.why and event.code != _KILLED else ""
        )
        if quiet := self._quiet(QUIET_S, now_s):  # what is seen first need not be what happened first
            why = f"{_names(quiet)} had stopped running; then {why}"
        return self._end(quiet or (event.host,), why)

    # What follows from it.

    def _move_on(self, now_s: float) -> list[Command]:
        if self._phase is Phase.WAITING:
            return self._wait(now_s)
        if self._phase is Phase.RUNNING:
            return self._watch(now_s)
        if self._phase is Phase.STOPPING and all(self._is_gone(member, now_s) for member in self._members.values()):
            return self._begin_waiting(now_s)
        return []

    def _wait(self, now_s: float) -> list[Command]:
        if self._stopping:
            return self._finish(Done(finished=False))
        self._since_s = now_s if self._since_s is None else self._since_s
        is_over = now_s >= self._since_s + self.policy.gather_s
        wanted = self.policy.hosts if self._life == 0 and not is_over else self.policy.least
        chosen = self._choice()
        if len(chosen) >= wanted:
            return self._begin(chosen, now_s) if now_s >= self._not_before_s else []
        if not is_over:
            return []
        return self._finish(
            GiveUp(
                f"There are too few hosts: {len(self._hosts)} ({', '.join(self._hosts) or 'none'}) after {self.policy.gather_s:g} s, and a life "
                f"needs {max(self.policy.least, self.policy.multiple)}."
            )
        )

    def _choice(self) -> tuple[str, ...]:
        """Who would be in a life that began now."""
        return tuple(self._hosts)[: len(self._hosts) - len(self._hosts) % self.policy.multiple]

    def _begin(self, hosts: Sequence[str], now_s: float) -> list[Command]:
        self._life += 1
        self._phase, self._asked, self._first_exit_s = Phase.RUNNING, False, None
        self._members = {host: _Member(heard_s=now_s, moved_s=now_s) for host in hosts}
        first = self._hosts[hosts[0]]
        port = first.ports[(self._life - 1) % len(first.ports)]
        address = f"[{first.address}]" if ":" in first.address else first.address
        return [
            StartWorker(host, self._life, number, len(hosts), f"{address}:{port}") for number, host in enumerate(hosts)
        ]

    def _watch(self, now_s: float) -> list[Command]:
        codes = [member.code for member in self._members.values()]
        if self._stopping and None in codes:
            return self._end((), "it was stopped")
        if None not in codes:
            return self._all_exited(now_s)
        if found := self._stuck(now_s):
            hosts, why = found
            return self._end(hosts, why, stuck=hosts)
        is_larger = self.policy.late == "ask" and len(self._choice()) > len(self._members)
        if is_larger and self._has_progress and not self._asked and self._first_exit_s is None:
            self._asked = True
            return [AskToStop(self._life)]
        return []

    def _all_exited(self, now_s: float) -> list[Command]:
        if all(member.code == 0 for member in self._members.values()):
            return self._finish(Done(finished=True))
        why = "it paused for others to join" if self._asked else "it paused, though nobody asked"
        return [
            LifeEnded(self._life, (), why, self._reached),
            *self._begin_waiting(now_s, is_wanted=self._asked, why=why),
        ]

    def _stuck(self, now_s: float) -> tuple[tuple[str, ...], str] | None:
        running = {host: member for host, member in self._members.items() if member.code is None}
        if self._first_exit_s is not None and now_s - self._first_exit_s > self.policy.end_s:
            return tuple(running), f"{_names(running)} had not ended {self.policy.end_s:g} s after another had"
        if silent := self._quiet(self.policy.silent_s, now_s):
            return silent, f"{_names(silent)} said nothing for {self.policy.silent_s:g} s"
        # One that saves or compiles keeps the others waiting: the longest limit is everyone's.
        typical_s = self._typical_s
        limit_s = max(self.policy.limit_s(member.mark, typical_s) for member in running.values())
        late_s = max(now_s - member.moved_s for member in running.values())
        if late_s <= limit_s or self._first_exit_s is not None:
            return None
        hosts = self._quiet(QUIET_S, now_s) or self._behind(running)
        for_s = f"for {late_s:.0f} s (limit {limit_s:.0f} s)"
        if hosts:
            return hosts, f"{_names(hosts)} came no further than {self._where(hosts[0])} {for_s}"
        return (
            (),
            f"no member came further than {self._where(next(iter(running)))} {for_s}, and none is behind the others",
        )

    @property
    def _typical_s(self) -> float:
        """Median seconds of a step; 0 before there was one."""
        seconds = [member.mark.step_s for member in self._members.values() if member.mark and member.mark.step_s > 0]
        return median(seconds) if seconds else 0.0

    def _quiet(self, longer_s: float, now_s: float) -> tuple[str, ...]:
        """Those that spoke once and are silent now, unless all are."""
        running = {host: member for host, member in self._members.items() if member.code is None and member.mark}
        quiet = tuple(host for host, member in running.items() if now_s - member.heard_s > longer_s)
        is_alone = len(self._members) == 1
        return quiet if is_alone or len(quiet) < len(self._members) else ()

    def _behind(self, running: dict[str, _Member]) -> tuple[str, ...]:
        """Those that hold the others up: nobody, where all are equally far."""
        places = {host: (m.mark.begun, m.mark.step) if m.mark else (-1, -1) for host, m in running.items()}
        least = min(places.values())
        behind = tuple(host for host, place in places.items() if place == least)
        return behind if len(behind) < len(self._members) or len(self._members) == 1 else ()

    def _where(self, host: str) -> str:
        mark = self._members[host].mark
        return "its start" if mark is None else f"step {mark.step} ({mark.doing})"

    # The end of a life.

    def _end(self, hosts: tuple[str, ...], why: str, *, stuck: tuple[str, ...] = ()) -> list[Command]:
        self._phase, self._last_why = Phase.STOPPING, why
        return [LifeEnded(self._life, hosts, why, self._reached), StopWorkers(self._life, stuck)]

    def _is_gone(self, member: _Member, now_s: float) -> bool:
        return member.code is not None or (
            member.lost_s is not None and now_s >= member.lost_s + self.policy.lost_s  # invariant (1)
        )

    def _begin_waiting(self, now_s: float, *, is_wanted: bool = False, why: str = "") -> list[Command]:
        self._last_why = why or self._last_why
        if self._has_progress:
            self._barren = 0
        elif not is_wanted:
            self._barren += 1
        self._saved = max([self._saved, *(m.mark.saved for m in self._members.values() if m.mark)])
        self._furthest = max(self._furthest, self._reached)
        self._phase, self._members, self._since_s = Phase.WAITING, {}, now_s
        self._not_before_s = now_s + self.policy.backoff(self._barren)
        if self._barren >= self.policy.lives_without_progress and not self._stopping:
            furthest = f"step {self._furthest}" if self._furthest >= 0 else "its start"
            lives = "1 life" if self._barren == 1 else f"{self._barren} lives one after the other"
            return self._finish(
                GiveUp(f"{lives} came no further than {furthest}; the last ended because {self._last_why}")
            )
        return self._wait(now_s)

    def _finish(self, last: Done | GiveUp) -> list[Command]:
        self._furthest = max(self._furthest, self._reached)
        self._phase, self._members = Phase.OVER, {}
        return [last]

    @property
    def _reached(self) -> int:
        return max([-1, *(member.mark.step for member in self._members.values() if member.mark)])

    @property
    def _has_progress(self) -> bool:
        saved = max([-1, *(member.mark.saved for member in self._members.values() if member.mark)])
        return self._reached > self._furthest or saved > self._saved


def _place(mark: Mark) -> tuple[str, int, int, int]:
    return mark.doing, mark.step, mark.begun, mark.saved


def _names(hosts: Iterable[str]) -> str:
    return " and ".join(hosts)


def _exit_text(code: int) -> str:
    if code == _KILLED:
        return "was killed (SIGKILL), by somebody or by the system for want of memory"
    number = code - 128 if 128 < code <= 128 + 64 else -code
    return f"was ended by signal {number}" if number > 0 else f"ended with code {code}"
