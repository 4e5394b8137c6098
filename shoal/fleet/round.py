"""The round machine: selection, configuration, reporting, commit, over and over (Bonawitz et al. 2019, section 2.2).

It does no I/O and holds no tensor: events in, commands out. It decides who is taken and when a round closes; what an
update is worth is the groups' affair, of which it sees only *joined, counted, released, failed*. Synchronous rounds and
asynchronous ones (Nguyen et al. 2022, "FedBuff") are the same machine: the latter take devices at any time, count every
update, however late, and commit whenever the buffer is full.

Invariants (tests cite them by number):
    (1) Versions follow one another: after `Committed(v)` the next round starts from v.
    (2) A nonce is counted at most once.
    (3) A round closes for commit with at least `policy.minimum` updates that may be seen: in the record's groups, or
        enough for a group of their Edge's; the groups see to it that they are never more than fit their sum.
    (4) With `Selection.exact` only the named devices are assigned, and every one of them counts in every version.
    (5) What was counted before a round was abandoned counts in the next one: the groups go on. Only a commit that
        failed takes its groups along.
    (6) No device waits in vain: while a round wants members, one that waits and may be taken is assigned as soon as the
        selection is complete or its window over. Those that were taken and then not heard of in the reporting window
        do not stand in its way; they may still report.
    (7) After `Stop` no round is opened, and the one that is open ends within its windows.
    (8) Asynchronous: never more than `policy.at_once` devices train.
    (9) Who is counted in version v is assigned in none of the `policy.min_separation` - 1 after it, crashes or not.

States and who moves them::

    IDLE ─Started/Committed─> SELECTING ─enough wait, or window over─> REPORTING
    REPORTING ─goal met, or window over with the minimum─> COMMITTING ─Committed─> SELECTING … or DONE after the last
    SELECTING ─goal met by late reports─> COMMITTING
    REPORTING ─window over below the minimum─> ABANDONING ─Abandoned─> SELECTING (same version, same groups) … or DONE
    SELECTING ─Stop, and the minimum cannot be met─> ABANDONING
    COMMITTING ─Failed─> ABANDONING (the groups are gone)

Events name the version that was open when they happened, so that one that comes after the close of its round is told
from one of the next.

A crash forgets all of this. A new machine is `Started` at the last commit, with what is in groups that wait for the next
one; tokens that devices still hold join its first round as if it had assigned them.
"""

from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping
from math import ceil
from typing import Any, Final, Self

import numpy as np

from shoal.errors import InvalidTransition
from shoal.fleet.round_events import (
    Abandoned,
    AbandonRound,
    Arrived,
    Assign,
    Away,
    Command,
    CommitRound,
    Committed,
    Counted,
    Event,
    Failed,
    Finish,
    Gather,
    Joined,
    Left,
    OpenRound,
    Phase,
    Released,
    Snapshot,
    Started,
    Stop,
    Stored,
    StoreGroup,
    Tick,
    WakeAt,
)
from shoal.fleet.windows import ReportTimes, closes_at
from shoal.policy import RoundPolicy

OVERHEAD_S: Final = 1.0
"""What a round is taken to cost besides waiting for reports, before one has been measured."""
SHORTEST_S: Final = 1e-3
_NOT_SAVED: Final = frozenset({"policy", "_nonce_of", "_rng", "_story"})


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
            ValueError: only a simulation can select as the policy says.
        """
        policy.check_on_fleet()
        self.policy: Final = policy
        self._last_version, self._nonce_of, self._rng = last_version, nonce_of, rng
        self._phase = Phase.IDLE
        self._version = self._round = 0
        self._waiting: dict[str, str] = {}  # device -> its Edge, ordered by arrival
        self._outstanding: set[bytes] = set()  # of this version
        self._behind: dict[bytes, int] = {}  # of versions before: nonce -> version
        self._counted: set[bytes] = set()
        self._late = 0
        self._unstored = 0
        self._safe: set[bytes] = set()  # those that are in groups of the record
        self._open: dict[bytes, str] = {}  # members of present groups, late ones too -> their Edge
        self._edges: dict[str, None] = {}  # that devices have come to, or their updates
        self._edge_of: dict[bytes, str] = {}  # of those assigned in this version
        self._gave_way: set[bytes] = set()  # released in this version: taken again only when nobody else waits
        self._deadline_s: float | None = None
        self._wake_s: float | None = None
        self._selected = self._released = 0
        self._stopping = False
        self._story: deque[tuple[float, Phase, Event]] = deque(maxlen=30)
        self._nonces: dict[str, bytes] = {}  # of this version, as they are needed
        self._recent: dict[int, frozenset[bytes]] = {}  # version -> who is in it, where that still matters
        self._rests: dict[str, int] = {}  # device -> version from which it may be taken, as they are asked for
        self._times = ReportTimes()
        self._assigned_s: dict[bytes, float] = {}
        self._selected_s = self._closed_s = 0.0
        self._overhead_s: float | None = None  # from the close of a round to the assignment of the next

    def snapshot(self) -> Snapshot:
        return Snapshot(
            phase=self._phase,
            round=self._round,
            version=self._version,
            waiting=len(self._waiting),
            outstanding=len(self._outstanding) + len(self._behind),
            counted=len(self._counted),
            late=self._late,
            goal=self.policy.commit_at,
            deadline_s=self._deadline_s,
            selected=self._selected,
            released=self._released,
            resting=len(self._waiting) - len(self._able()) if self.policy.min_separation > 1 else 0,
        )

    def saved(self) -> dict[str, Any]:
        """All that `step` goes by but the policy and what nonces are: a copy, by attribute; and the generator's state."""
        kept = {name: value for name, value in vars(self).items() if name not in _NOT_SAVED}
        return {name: value.copy() if hasattr(value, "copy") else value for name, value in kept.items()} | {
            "rng": self._rng.bit_generator.state
        }

    def nonces(self) -> dict[str, bytes]:
        """Of the devices that it has had to do with in this version."""
        return dict(self._nonces)

    @classmethod
    def restored(
        cls,
        policy: RoundPolicy,
        saved: Mapping[str, Any],
        *,
        nonce_of: Callable[[int, str], bytes],
        rng: np.random.Generator,
    ) -> Self:
        """A machine that goes on as the one that was `saved`; `rng` is one of its kind, and takes its state."""
        made = cls(policy, last_version=0, nonce_of=nonce_of, rng=rng)
        kept = made.saved().keys()
        if kept != saved.keys():
            raise ValueError(f"Expected the state of a round machine ({', '.join(sorted(kept))}), got {sorted(saved)}.")
        rng.bit_generator.state = saved["rng"]
        vars(made).update({name: value for name, value in saved.items() if name != "rng"})
        return made

    def demand(self) -> int:
        """How many devices it could use beyond those that wait; below zero: so many of these are too many."""
        if self._phase in (Phase.IDLE, Phase.DONE) or self._stopping:
            return -len(self._waiting)
        if self._phase in (Phase.COMMITTING, Phase.ABANDONING):  # what the next round will want
            is_last = self._phase is Phase.COMMITTING and self._version + 1 >= self._last_version
            number = 0 if is_last else self.policy.most_at_once
            number -= len(self._behind) + len(self._outstanding) if self.policy.buffer else 0
            return max(number - len(self._able()), -len(self._waiting))
        training = len(self._outstanding)
        if self.policy.buffer:
            number = self.policy.at_once - training - len(self._behind)
        elif self._phase is Phase.SELECTING:
            number = self.policy.num_selected - training - len(self._counted)
        else:
            number = self.policy.goal - training - len(self._counted)
        return max(number - sum(map(self._may_be_taken, self._able())), -len(self._waiting))

    def waits(self, device: str) -> bool:
        """Whether the device waits for an assignment."""
        return device in self._waiting

    def may_take(self, device: str) -> bool:
        """Whether the device could be assigned in this round, or in the next where this one is at its end."""
        exact = self.policy.selection.ids
        if (exact and device not in exact) or self._is_resting(device):
            return False
        return self._phase is Phase.COMMITTING or self._may_be_taken(device)

    def expects(self, device: str) -> bool:
        """Whether the device has an assignment of this version that it has not reported on."""
        in_round = self._phase in (Phase.SELECTING, Phase.REPORTING)
        return in_round and bool(self._outstanding) and self._nonce(device) in self._outstanding

    def step(self, event: Event, now_s: float) -> list[Command]:
        """Advances by one event. Raises InvalidTransition, with the story, for one that the state does not allow."""
        self._story.append((now_s, self._phase, event))
        commands: list[Command] = []
        match event:
            case Started(version, round, counted, recent) if self._phase is Phase.IDLE:
                self._version, self._round, self._recent = version, round, dict(recent)
                self._counted, self._safe = set(counted), set(counted)
                commands += self._next_round(now_s)
            case Arrived(devices, edge):
                commands += self._arrive(devices, edge, now_s)
            case Left(device):
                self._waiting.pop(device, None)
            case Joined(nonce, version):
                self._join(nonce, version)
            case Counted():
                self._count(event, now_s)
            case Released(nonce):
                self._release(nonce)
            case Away(nonce):
                if self.policy.selection.kind != "exact":  # there nobody can take its place
                    self._forget_member(nonce)
            case Stored(nonces):
                self._safe |= nonces  # of some it has yet to hear that they are counted
                self._open = {nonce: edge for nonce, edge in self._open.items() if nonce not in nonces}
            case Committed(version, closed) if self._phase is Phase.COMMITTING and version == self._version + 1:
                self._commit_done(version, closed)
                commands += self._next_round(now_s)
            case Failed(why) if self._phase is Phase.COMMITTING:
                safe = self._safe & self._counted
                self._forget_round()
                self._counted, self._safe = set(safe), safe
                commands += self._abandon(f"commit failed: {why}", now_s)
            case Abandoned() if self._phase is Phase.ABANDONING:
                commands += self._next_round(now_s) + self._gather()
            case Stop():
                self._stopping = True
            case Tick():
                pass
            case _:
                story = "\n".join(f"{at_s:.3f} {phase.value}: {seen}" for at_s, phase, seen in self._story)
                raise InvalidTransition(f"{event} is not allowed in {self._phase.value}.\n{story}")
        return commands + self._move_on(now_s)

    # Devices and members.

    def _arrive(self, devices: tuple[str, ...], edge: str, now_s: float) -> list[Command]:
        if self._phase is Phase.DONE:
            return [Finish()]
        in_round = self._phase in (Phase.SELECTING, Phase.REPORTING)
        returning = tuple(d for d in devices if in_round and self._outstanding and self._nonce(d) in self._outstanding)
        self._edges[edge] = None
        for device in devices:
            self._waiting[device] = edge
        return self._send(returning, now_s)  # one that has lost its assignment gets the same one back

    def _join(self, nonce: bytes, version: int) -> None:
        if nonce in self._counted or nonce in self._outstanding or nonce in self._behind:
            return
        self._selected += 1
        if version == self._version:
            self._outstanding.add(nonce)
        else:
            self._behind[nonce] = version

    def _count(self, event: Counted, now_s: float) -> None:
        nonce, staleness = event.nonce, event.staleness
        self._edges[event.edge] = None
        self._forget_member(nonce)
        if (assigned_s := self._assigned_s.pop(nonce, None)) is not None:
            self._times.reported(now_s - assigned_s)
        if event.version != self._version:
            return  # it was added before the last commit, and is in it
        assert nonce not in self._counted, "invariant (2)"
        self._unstored += 1
        self._late += staleness > 0
        if nonce not in self._safe and (not staleness or self.policy.late.kind != "patch"):
            self._open[nonce] = event.edge
        if not staleness or self.policy.buffer:
            self._counted.add(nonce)

    def _release(self, nonce: bytes) -> None:
        self._gave_way.add(nonce)
        self._assigned_s.pop(nonce, None)
        self._counted.discard(nonce)  # its group could not be stored
        self._open.pop(nonce, None)
        self._released += self._forget_member(nonce)

    def _forget_member(self, nonce: bytes) -> bool:
        known = nonce in self._outstanding or nonce in self._behind
        self._outstanding.discard(nonce)
        self._behind.pop(nonce, None)
        return known

    def _nonce(self, device: str) -> bytes:
        if device not in self._nonces:
            self._nonces[device] = self._nonce_of(self._version, device)
        return self._nonces[device]

    # Rounds.

    def _next_round(self, now_s: float) -> list[Command]:
        if self._version >= self._last_version or self._stopping:
            self._enter(Phase.DONE, None)
            self._waiting.clear()  # they are told, too
            return [Finish()]
        self._round += 1
        self._selected = self._released = 0
        opened = OpenRound(self._round, self._version)
        if self.policy.buffer:
            return [opened, *self._enter(Phase.REPORTING, now_s + self.policy.reporting_window_s)]
        again = tuple(d for d in self._waiting if self._nonce(d) in self._outstanding) if self._outstanding else ()
        entered = self._enter(Phase.SELECTING, now_s + self.policy.selection_window_s)
        return [opened, *entered, *self._send(again, now_s)]

    def _enter(self, phase: Phase, deadline_s: float | None) -> list[Command]:
        self._phase, self._deadline_s, self._wake_s = phase, deadline_s, None
        return [] if deadline_s is None else self._wake(deadline_s)

    def _wake(self, time_s: float) -> list[Command]:
        if time_s == self._wake_s:
            return []
        self._wake_s = time_s
        return [WakeAt(time_s)]

    def _forget_round(self) -> None:
        self._outstanding, self._counted, self._safe, self._gave_way = set(), set(), set(), set()
        self._open, self._edge_of = {}, {}
        self._late = self._unstored = 0
        self._assigned_s.clear()
        self._nonces.clear()

    def _commit_done(self, version: int, closed: frozenset[bytes] | None) -> None:
        oldest = version - self.policy.max_staleness
        self._behind |= dict.fromkeys(self._outstanding, self._version)
        self._behind = {nonce: of for nonce, of in self._behind.items() if of >= oldest}
        kept = {nonce: at_s for nonce, at_s in self._assigned_s.items() if nonce in self._behind}
        for nonce, at_s in self._assigned_s.items():
            if nonce not in kept:
                self._times.still_out(self._closed_s - at_s)
        self._times.fade()
        self._version = version
        going_on: dict[bytes, str] = {}
        if closed is not None and self.policy.late.kind != "patch":  # else they are patched in where they belong
            going_on = {nonce: edge for nonce, edge in self._open.items() if nonce not in closed}
        counted = self._counted & going_on.keys()
        if self.policy.min_separation > 1:
            self._let_rest(version - 1, self._counted if closed is None else closed | (self._safe & self._counted))
        self._forget_round()
        self._counted, self._open = counted, going_on
        self._assigned_s = kept

    def _let_rest(self, version: int, nonces: Iterable[bytes]) -> None:
        """Those that trained from the version and are in the next."""
        separation = self.policy.min_separation
        self._recent[version] = frozenset(nonces)
        self._recent = {of: those for of, those in self._recent.items() if of + separation > version + 1}
        kept = {device: free for device, free in self._rests.items() if free > version + 1 or device in self._waiting}
        took_part = (device for device, nonce in self._nonces.items() if nonce in self._recent.get(version, ()))
        self._rests = kept | dict.fromkeys(took_part, version + separation)

    def _is_resting(self, device: str) -> bool:
        separation = self.policy.min_separation
        if separation == 1:
            return False
        self._nonce(device)  # known from here on, should it be counted by a token of before a crash
        if device not in self._rests:
            took_part = (of for of, nonces in self._recent.items() if self._nonce_of(of, device) in nonces)
            self._rests[device] = max((of + separation for of in took_part), default=0)
        return self._rests[device] > self._version

    def _abandon(self, reason: str, now_s: float) -> list[Command]:
        if self.policy.buffer:
            recent = {n for n, at_s in self._assigned_s.items() if at_s > now_s - self.policy.reporting_window_s}
            self._outstanding &= recent  # those that were sent for a window ago give up their place
            self._behind = {nonce: of for nonce, of in self._behind.items() if nonce in recent}
        elif self.policy.selection.kind != "exact":
            self._outstanding.clear()  # others take their place; where nobody can, they are waited for
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
        taking_part = self._taking_part
        wanted = self.policy.num_selected - taking_part
        if self._committable >= self.policy.goal:
            return self._commit("goal", now_s)
        if self._stopping and not taking_part:
            return self._abandon("stopped", now_s)
        window_over = now_s >= self._deadline_s or self._stopping
        if len(self._waiting) < wanted and not window_over:
            return []
        ready = sum(map(self._may_be_taken, self._able()))
        can_start = len(self._outstanding) + max(len(self._counted), self._seen) + ready >= self.policy.minimum
        if ready < wanted and not (window_over and can_start):
            if self._stopping:
                return self._abandon("stopped", now_s)
            if not window_over or not (gather := self._gather()):
                return []
            self._deadline_s = now_s + self.policy.selection_window_s
            return [*gather, *self._wake(self._deadline_s)]
        self._selected_s = now_s
        if self._closed_s:
            self._overhead_s = max(SHORTEST_S, now_s - self._closed_s)
        entered = self._enter(Phase.REPORTING, now_s + self.policy.reporting_window_s)
        return [*entered, *self._assign(wanted, now_s), *self._report(now_s)]

    def _gather(self) -> list[Command]:
        sizes = self._group_sizes().values()
        return [Gather()] if len(sizes) > 1 and min(sizes) < self.policy.minimum_group else []

    def _group_sizes(self) -> Mapping[str, int]:
        """Edge -> members of its present group, where there are any."""
        if len(self._edges) > 1:
            return Counter(self._open.values())
        return {next(iter(self._open.values())): len(self._open)} if self._open else {}

    def _report(self, now_s: float) -> list[Command]:
        assert self._deadline_s is not None
        policy = self.policy
        committable = self._committable
        if committable >= policy.commit_at:
            return self._commit("goal", now_s)
        if committable >= policy.minimum:
            closes_s = self._closes_s(now_s)
            if now_s >= closes_s:
                return self._commit("window" if now_s >= self._deadline_s else "waiting did not pay", now_s)
            wake = self._wake(closes_s)
        elif now_s >= self._deadline_s and self._seen >= policy.minimum:
            return self._commit("window", now_s)
        elif now_s >= self._deadline_s or (self._stopping and not self._outstanding and not self._behind):
            return self._abandon(f"{len(self._counted)} of at least {policy.minimum} reported in the window", now_s)
        else:
            wake = self._wake(self._deadline_s)
        if self._store_is_due():
            self._unstored = 0
            return [*wake, StoreGroup()]
        if policy.buffer:
            wanted = 0 if self._stopping else policy.at_once - len(self._outstanding) - len(self._behind)
        else:
            # Those that dropped out are replaced as soon as the goal cannot be met without: waiting would be for nothing.
            wanted = policy.goal - self._taking_part
        return [*wake, *self._assign(wanted, now_s)]

    @property
    def _committable(self) -> int:
        """Updates that a commit would take in now: what is stored, and what is in groups of their own, or nothing."""
        small = {edge for edge, size in self._group_sizes().items() if size < self.policy.minimum_group}
        if not small:
            return len(self._counted)
        return len(self._counted) - sum(edge in small and nonce in self._counted for nonce, edge in self._open.items())

    @property
    def _seen(self) -> int:
        """Updates that a commit would take in now, late ones too: few devices may all be waiting for it."""
        sizes = self._group_sizes().values()
        return len(self._safe) + sum(size for size in sizes if size >= self.policy.minimum_group)

    @property
    def _taking_part(self) -> int:
        """Members that have reported or may, but for those at an Edge that has too few of them for a group."""
        taking_part = len(self._outstanding) + len(self._counted)
        if len(self._edges) <= 1:
            return taking_part
        out = Counter(self._edge_of.get(nonce, "") for nonce in self._outstanding)
        sizes = out + Counter(self._group_sizes())
        small = {edge for edge, size in sizes.items() if size < self.policy.minimum_group}
        counted = sum(edge in small and nonce in self._counted for nonce, edge in self._open.items())
        return taking_part - counted - sum(out[edge] for edge in small)

    def _closes_s(self, now_s: float) -> float:
        """When the round closes if nothing more comes: at its deadline, or before that when waiting stops to pay."""
        assert self._deadline_s is not None
        # Where late work is discarded, to close early is to throw more of it away.
        if not self.policy.adaptive or not self.policy.max_staleness or self.policy.buffer:
            return self._deadline_s
        return self._selected_s + closes_at(
            self._times,
            counted=len(self._counted),
            outstanding=len(self._outstanding),
            since_s=now_s - self._selected_s,
            overhead_s=OVERHEAD_S if self._overhead_s is None else self._overhead_s,
            until_s=self._deadline_s - self._selected_s,
        )

    def _store_is_due(self) -> bool:
        return 0 < self.policy.group_size <= self._unstored

    def _commit(self, reason: str, now_s: float) -> list[Command]:
        self._closed_s = now_s
        self._enter(Phase.COMMITTING, None)
        return [CommitRound(self._round, reason)]

    # Who is taken.

    def _able(self) -> list[str]:
        """Those that wait and are not out of the question, oldest arrival first."""
        if exact := set(self.policy.selection.ids):
            return [device for device in self._waiting if device in exact]
        if self.policy.min_separation > 1:
            return [device for device in self._waiting if not self._is_resting(device)]
        return list(self._waiting)

    def _at_few_edges(self, able: list[str], wanted: int) -> list[str]:
        """Those of so few Edges that each of them can be expected to have a group of its own."""
        if len(self._edges) <= 1:
            return able
        policy, waiting = self.policy, Counter(map(self._waiting.__getitem__, able))
        few = max(1, policy.most_at_once // ceil(policy.minimum_group * policy.over_selection - 1e-9))
        used = set(self._open.values())
        used |= {self._edge_of[nonce] for nonce in self._outstanding if nonce in self._edge_of}
        if len(used | waiting.keys()) <= few or policy.selection.kind == "exact":
            return able
        for edge in sorted(waiting, key=lambda edge: self._rng.random() ** (1.0 / waiting[edge]), reverse=True):
            if len(used) >= few and sum(waiting[edge] for edge in used) >= wanted:
                break
            used.add(edge)
        return [device for device in able if self._waiting[device] in used]

    def _may_be_taken(self, device: str) -> bool:
        return self._nonce(device) not in self._counted and self._nonce(device) not in self._outstanding

    def _assign(self, wanted: int, now_s: float) -> list[Command]:
        """Takes `wanted` of those that may be taken, at random where there are more."""
        chosen = self._draw(wanted) if wanted > 0 and self._waiting else ()
        self._outstanding.update(map(self._nonce, chosen))
        self._selected += len(chosen)
        return self._send(chosen, now_s)

    def _draw(self, wanted: int) -> tuple[str, ...]:
        able = self._at_few_edges(self._able(), wanted)
        order: Iterable[int] = range(len(able))
        if len(able) > wanted:
            few = min(len(able), 4 * wanted + 16)  # nearly always enough; else all of them, in any order
            drawn = self._rng.choice(len(able), few, replace=False).tolist()
            enough = sum(self._may_be_taken(able[number]) for number in drawn) >= wanted
            order = drawn if enough else self._rng.permutation(len(able)).tolist()
        chosen: list[int] = []
        again: list[int] = []  # whose update was refused would send the same: it comes after all others
        for number in order:
            if len(chosen) == wanted:
                break
            if self._may_be_taken(able[number]):
                (again if self._nonce(able[number]) in self._gave_way else chosen).append(number)
        chosen += again[: wanted - len(chosen)]
        return tuple(able[number] for number in sorted(chosen))

    def _send(self, devices: tuple[str, ...], now_s: float) -> list[Command]:
        for device in devices:
            self._edge_of[self._nonce(device)] = self._waiting.pop(device)
            self._assigned_s[self._nonce(device)] = now_s
        return [Assign(devices)] if devices else []
