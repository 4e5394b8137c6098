"""The round machine: selection, configuration, reporting, commit, over and over (Bonawitz et al. 2019, section 2.2).

It does no I/O and holds no tensor: events in, commands out. It decides who is taken and when a round closes; what an
update is worth is the group's affair, of which it sees only *joined, counted, released, failed*.

Invariants (tests cite them by number):
    (1) Versions follow one another: after `Committed(v)` the next round starts from v.
    (2) A nonce is counted at most once per version.
    (3) A round closes for commit with at least `policy.minimum` counted; the group sees to it that they are never more
        than fit its sum.
    (4) With `Selection.exact` only the named devices are assigned, and every one of them counts in every version.
    (5) What was counted before a round was abandoned counts in the next one: the group goes on. Only a commit that
        failed takes its group along.
    (6) No device waits in vain: while a round wants members, one that waits and may be taken is assigned as soon as the
        selection is complete or its window over. Those that were taken and then not heard of in the reporting window
        do not stand in its way; they may still report.
    (7) After `Stop` no round is opened, and the one that is open ends within its windows.

States and who moves them::

    IDLE ─Started/Committed─> OPENING ─Opened─> SELECTING ─enough wait, or window over─> REPORTING
    REPORTING ─goal met, or window over with the minimum─> COMMITTING ─Committed─> OPENING … or DONE after the last
    SELECTING ─goal met by late reports─> COMMITTING
    REPORTING ─window over below the minimum─> ABANDONING ─Abandoned─> OPENING (same version, same group) … or DONE
    SELECTING ─Stop, and the minimum cannot be met─> ABANDONING
    COMMITTING ─Failed─> ABANDONING (the group is gone)

Events about a group are only stepped while it is open: what came from it before its `Committed` or `Failed` and was not
stepped yet is dropped by the shell, since the close of the group says it all.

A crash forgets all of this. A new machine is `Started` at the last commit; tokens of the current version that devices
still hold join its first round as if it had assigned them.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Final

import numpy as np

from shoal.errors import InvalidTransition
from shoal.policy import RoundPolicy


class Phase(Enum):
    IDLE = "idle"
    OPENING = "opening"
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


@dataclass(frozen=True, slots=True)
class Opened:
    """The round is in the record."""


@dataclass(frozen=True, slots=True)
class Arrived:
    """A device waits to be taken."""

    device: str


@dataclass(frozen=True, slots=True)
class Left:
    """A waiting device is gone."""

    device: str


@dataclass(frozen=True, slots=True)
class Joined:
    """The group holds this assignment."""

    nonce: bytes


@dataclass(frozen=True, slots=True)
class Counted:
    """The group added this member's update."""

    nonce: bytes


@dataclass(frozen=True, slots=True)
class Released:
    """The group gave this member up: refused, dropped, or it cannot."""

    nonce: bytes


@dataclass(frozen=True, slots=True)
class Failed:
    """The group or the commit failed."""

    why: str


@dataclass(frozen=True, slots=True)
class Committed:
    version: int


@dataclass(frozen=True, slots=True)
class Abandoned:
    """The round's end is in the record."""


@dataclass(frozen=True, slots=True)
class Tick:
    """Time has passed."""


@dataclass(frozen=True, slots=True)
class Stop:
    """No round after this one."""


Event = Started | Opened | Arrived | Left | Joined | Counted | Released | Failed | Committed | Abandoned | Tick | Stop


@dataclass(frozen=True, slots=True)
class OpenRound:
    """Begin to write the round into the record, make a group, then say `Opened`. The row comes before the round's end."""

    round: int
    base_version: int


@dataclass(frozen=True, slots=True)
class Assign:
    """Send each device its token and configuration; the group then says `Joined`."""

    devices: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class CommitRound:
    """Close the group, make the next version of it, then say `Committed` (or `Failed`)."""

    round: int
    reason: str


@dataclass(frozen=True, slots=True)
class AbandonRound:
    """Write the round's end into the record, then say `Abandoned`."""

    round: int
    reason: str


@dataclass(frozen=True, slots=True)
class Finish:
    """The line has its last version: tell every device."""


@dataclass(frozen=True, slots=True)
class WakeAt:
    """Say `Tick` at this time."""

    time_s: float


Command = OpenRound | Assign | CommitRound | AbandonRound | Finish | WakeAt


@dataclass(frozen=True, kw_only=True, slots=True)
class Snapshot:
    """A frozen view of the machine."""

    phase: Phase
    round: int
    version: int
    waiting: int
    outstanding: int
    counted: int
    goal: int
    deadline_s: float | None
    """When the present window ends."""
    selected: int
    """Devices that joined in this round."""
    released: int


class RoundMachine:
    """See the module's text. `step` is the only thing that changes it."""

    def __init__(
        self,
        policy: RoundPolicy,
        *,
        last_version: int,
        nonce_of: Callable[[int, str], bytes],
        rng: np.random.Generator,
    ) -> None:
        """
        Args:
            policy: how rounds are run.
            last_version: the version after which the run is over.
            nonce_of: (version, device) -> nonce; pure.
            rng: draws the devices.

        Raises:
            ValueError: a setting that this version does not run.
        """
        refuse_unsupported(policy)
        self.policy: Final = policy
        self._last_version, self._nonce_of, self._rng = last_version, nonce_of, rng
        self._phase = Phase.IDLE
        self._version = self._round = 0
        self._waiting: dict[str, None] = {}  # ordered by arrival
        self._outstanding: set[bytes] = set()
        self._counted: set[bytes] = set()
        self._gave_way: set[bytes] = set()  # released in this version: taken again only when nobody else waits
        self._deadline_s: float | None = None
        self._selected = self._released = 0
        self._stopping = False
        self._story: deque[tuple[float, Phase, Event]] = deque(maxlen=30)
        self._nonces: dict[str, bytes] = {}  # of this version, as they are needed

    def snapshot(self) -> Snapshot:
        return Snapshot(
            phase=self._phase,
            round=self._round,
            version=self._version,
            waiting=len(self._waiting),
            outstanding=len(self._outstanding),
            counted=len(self._counted),
            goal=self.policy.goal,
            deadline_s=self._deadline_s,
            selected=self._selected,
            released=self._released,
        )

    def step(self, event: Event, now_s: float) -> list[Command]:
        """Advances by one event. Raises InvalidTransition, with the story, for one that the state does not allow."""
        self._story.append((now_s, self._phase, event))
        commands: list[Command] = []
        match event:
            case Started(version, round) if self._phase is Phase.IDLE:
                self._version, self._round = version, round
                commands += self._next_round()
            case Arrived(device):
                if self._phase is Phase.DONE:
                    commands.append(Finish())
                elif self._is_returning(device):
                    self._waiting.pop(device, None)
                    commands.append(Assign((device,)))
                else:
                    self._waiting[device] = None
            case Left(device):
                self._waiting.pop(device, None)
            case Joined(nonce):
                if nonce not in self._counted and nonce not in self._outstanding:
                    self._outstanding.add(nonce)
                    self._selected += 1
            case Counted(nonce):
                assert nonce not in self._counted, "invariant (2)"
                self._outstanding.discard(nonce)
                self._counted.add(nonce)
            case Released(nonce):
                self._gave_way.add(nonce)
                if nonce in self._outstanding:
                    self._outstanding.discard(nonce)
                    self._released += 1
            case Opened() if self._phase is Phase.OPENING:
                commands += self._enter(Phase.SELECTING, now_s + self.policy.selection_window_s)
                commands += self._assign_again()
            case Committed(version) if self._phase is Phase.COMMITTING and version == self._version + 1:
                self._version = version
                self._forget_group()
                commands += self._next_round()
            case Failed(why) if self._phase is Phase.COMMITTING:
                self._forget_group()
                commands += self._abandon(f"commit failed: {why}")
            case Abandoned() if self._phase is Phase.ABANDONING:
                commands += self._next_round()
            case Stop():
                self._stopping = True
            case Tick():
                pass
            case _:
                story = "\n".join(f"{at_s:.3f} {phase.value}: {seen}" for at_s, phase, seen in self._story)
                raise InvalidTransition(f"{event} is not allowed in {self._phase.value}.\n{story}")
        return commands + self._move_on(now_s)

    def _enter(self, phase: Phase, deadline_s: float | None) -> list[Command]:
        self._phase, self._deadline_s = phase, deadline_s
        return [] if deadline_s is None else [WakeAt(deadline_s)]

    def _forget_group(self) -> None:
        self._outstanding, self._counted, self._gave_way = set(), set(), set()
        self._nonces.clear()

    def _nonce(self, device: str) -> bytes:
        if device not in self._nonces:
            self._nonces[device] = self._nonce_of(self._version, device)
        return self._nonces[device]

    def _is_returning(self, device: str) -> bool:
        in_round = self._phase in (Phase.SELECTING, Phase.REPORTING)
        return in_round and self._nonce(device) in self._outstanding

    def _next_round(self) -> list[Command]:
        if self._version >= self._last_version or self._stopping:
            return self._finish()
        self._round += 1
        self._selected = self._released = 0
        self._enter(Phase.OPENING, None)
        return [OpenRound(self._round, self._version)]

    def _finish(self) -> list[Command]:
        self._enter(Phase.DONE, None)
        self._waiting.clear()  # they are told, too
        return [Finish()]

    def _abandon(self, reason: str) -> list[Command]:
        if self.policy.selection.kind != "exact":  # there nobody can take their place
            self._outstanding.clear()
        self._enter(Phase.ABANDONING, None)
        return [AbandonRound(self._round, reason)]

    def _move_on(self, now_s: float) -> list[Command]:
        """What follows from the state alone, whatever event led to it."""
        if self._phase is Phase.SELECTING:
            return self._select(now_s)
        if self._phase is Phase.REPORTING:
            return self._report(now_s)
        return []

    def _select(self, now_s: float) -> list[Command]:
        assert self._deadline_s is not None
        taking_part = len(self._outstanding) + len(self._counted)
        wanted = self.policy.num_selected - taking_part
        if len(self._counted) >= self.policy.goal:
            return self._commit("goal")
        if self._stopping and not taking_part:
            return self._abandon("stopped")
        window_over = now_s >= self._deadline_s or self._stopping
        if len(self._waiting) < wanted and not window_over:
            return []
        ready = self._ready()
        can_start = taking_part + len(ready) >= self.policy.minimum
        if len(ready) < wanted and not (window_over and can_start):
            return self._abandon("stopped") if self._stopping else []
        entered = self._enter(Phase.REPORTING, now_s + self.policy.reporting_window_s)
        return [*entered, *self._assign(ready, wanted), *self._report(now_s)]

    def _commit(self, reason: str) -> list[Command]:
        self._enter(Phase.COMMITTING, None)
        return [CommitRound(self._round, reason)]

    def _report(self, now_s: float) -> list[Command]:
        assert self._deadline_s is not None
        if len(self._counted) >= self.policy.goal:
            return self._commit("goal")
        if now_s >= self._deadline_s:
            if len(self._counted) >= self.policy.minimum:
                return self._commit("window")
            return self._abandon(f"{len(self._counted)} of at least {self.policy.minimum} reported in the window")
        # Those that dropped out are replaced as soon as the goal cannot be met without: waiting would be for nothing.
        short = self.policy.goal - len(self._counted) - len(self._outstanding)
        return self._assign(self._ready(), short) if short > 0 and self._waiting else []

    def _ready(self) -> list[str]:
        """Waiting devices that may be taken in this version, oldest arrival first."""
        exact = set(self.policy.selection.ids)
        able = [device for device in self._waiting if not exact or device in exact]
        return [d for d in able if self._nonce(d) not in self._counted and self._nonce(d) not in self._outstanding]

    def _assign(self, ready: list[str], wanted: int) -> list[Command]:
        """Takes `wanted` of those that are ready, at random where there are more."""
        chosen = tuple(self._draw(ready, wanted))
        for device in chosen:
            del self._waiting[device]
            self._outstanding.add(self._nonce(device))
        self._selected += len(chosen)
        return [Assign(chosen)] if chosen else []

    def _draw(self, ready: list[str], wanted: int) -> list[str]:
        if wanted <= 0:
            return []
        # One whose update was refused would send the same again: it comes after all others.
        fresh = [device for device in ready if self._nonce(device) not in self._gave_way]
        again = [device for device in ready if self._nonce(device) in self._gave_way]
        if len(fresh) <= wanted:
            return fresh + again[: wanted - len(fresh)]
        return [fresh[i] for i in sorted(self._rng.choice(len(fresh), wanted, replace=False))]

    def _assign_again(self) -> list[Command]:
        """A device whose assignment is outstanding has lost it and comes again: it gets the same one back."""
        again = tuple(d for d in self._waiting if self._nonce(d) in self._outstanding)
        for device in again:
            del self._waiting[device]
        return [Assign(again)] if again else []


def refuse_unsupported(policy: RoundPolicy) -> None:
    """Raises ValueError for settings that are understood but not run by this version."""
    for name, value, allowed in (
        ("late.kind", policy.late.kind, "discard"),
        ("buffer", policy.buffer, 0),
        ("concurrency", policy.concurrency, 1),
    ):
        if value != allowed:
            raise ValueError(
                f"Expected {name}={allowed!r}, got {name}={value!r}: this version runs synchronous rounds only."
            )
