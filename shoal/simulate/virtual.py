"""The virtual fleet: a fleet's own Coordinator, groups and pace steering under a clock that jumps from event to event.

What is real: the round machine, the groups, the pace, the commits and the record, all of them the code of a live host.
What is made up: the devices. They are drawn from a `VirtualPopulation`: when each may serve (a window a day, more of them by
night), how fast it is, how it is connected, how often it is lost. Check-ins, by far the most numerous events, are
handled a second at a time in arrays; whatever happens to a device that was taken is an event of its own.

    population ─ check-ins a second ─> pool ─> Coordinator: round machine ─ assigned ─> training ─ reported ─> groups
                        └─ too many: told when to come again (pace)          └─ lost       └─ released: aborted

Training itself is left out (`update_of=None`: nothing but who, when and how long), or done by a function that gives each
device's update; then versions have an accuracy, over virtual time.
"""

import heapq
from collections.abc import Awaitable, Callable, Coroutine, Generator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np

from shoal.aggregate.choose import aggregator_of, noised
from shoal.fleet import group as g
from shoal.fleet.analytics import Seen
from shoal.fleet.configuration import Configuration
from shoal.fleet.coordinator import Coordinator
from shoal.fleet.group_sums import GroupResult, GroupSums
from shoal.fleet.host import run_seed
from shoal.fleet.keys import HostKeys
from shoal.fleet.pace import MOST_S, Pace
from shoal.fleet.wire import fleet_pb2 as pb
from shoal.plan.manifest import Manifest, Promises, ServerHalf, Training
from shoal.plan.plan import Plan
from shoal.plan.run_plan import write_initial_model
from shoal.policy import About, Privacy, RoundPolicy, ServerRule
from shoal.record.memory import MemoryStore
from shoal.record.retention import Retention
from shoal.record.store import RunRow, Store
from shoal.simulate.virtual_population import VirtualPopulation
from shoal.tensors import Index, Tensors, sha256

DAY_S: Final = 86_400.0
RUN: Final = "virtual"
SLOT_S: Final = 600
"""Check-ins are counted in slots of this length."""

NO_COSTS: Final = pb.Costs()

UpdateOf = Callable[[int, int, int], tuple[Tensors, int]]
"""(device, version that it started from, blocks that it does at most) -> its update and the update's weight."""
ALL: Final = 1 << 30
"""Blocks of a training that is not interrupted."""


@dataclass
class Tally:
    """What a virtual run came to."""

    check_ins: dict[int, int] = field(default_factory=dict)
    """Second at which a slot of `SLOT_S` begins -> check-ins in it."""
    told_later: int = 0
    assigned: int = 0
    seconds: dict[str, float] = field(
        default_factory=lambda: dict.fromkeys(("used", "aborted", "unused", "dropped", "bytes_down", "bytes_up"), 0.0)
    )
    """Device-seconds trained, by what became of them; `used` at its discount, the rest of a late one is `unused`."""
    commits: list[tuple[float, int, int]] = field(default_factory=list)
    """(virtual time, updates, late updates among them) of every version."""

    @property
    def num_check_ins(self) -> int:
        return sum(self.check_ins.values())

    @property
    def wasted(self) -> float:
        """Share of the device-seconds trained that are in no commit, drop-out of the devices' own making apart."""
        ours = self.seconds["aborted"] + self.seconds["unused"]
        trained = ours + self.seconds["used"]
        return ours / trained if trained else 0.0


@dataclass(slots=True)
class _Work:
    """An assignment under way."""

    device: int
    version: int
    begins_s: float
    """When its training begins (the model is there)."""
    trains_s: float
    discount: float = 1.0
    reported: bool = False
    blocks: int = ALL
    """Done at most: fewer than the training has where it was interrupted."""


class VirtualClock:
    """Seconds since the virtual fleet began."""

    def __init__(self, *, begins_s: float = 0.0) -> None:
        """`begins_s`: seconds since the epoch at which it is taken to begin."""
        self.time_s, self._begins_s = 0.0, begins_s

    def now_s(self) -> float:
        return self.time_s

    def wall_s(self) -> float:
        return self._begins_s + self.time_s

    async def sleep_until(self, deadline_s: float) -> None:
        raise AssertionError("nothing waits in a virtual fleet")


class VirtualFleet:
    """An Edge without bytes, and the devices around it; drives a Coordinator."""

    def __init__(
        self,
        population: VirtualPopulation,
        manifest: Manifest,
        clock: VirtualClock,
        *,
        update_of: UpdateOf | None = None,
        blocks_of: Callable[[int], int] | None = None,
        model_bytes: int = 0,
        update_bytes: int = 0,
        steers: bool = True,
        aborts: bool = True,
        hears_losses: bool = True,
        most_delay_s: float = MOST_S,
    ) -> None:
        """
        Args:
            population: the devices.
            manifest: of the task; its policy is run.
            clock: shared with the Coordinator.
            update_of: gives the devices' updates; None: training is left out, and the manifest has no sums.
            blocks_of: device -> blocks of its training. Given: one that is interrupted reports those it has done.
            model_bytes: that a device downloads.
            update_bytes: that it uploads.
            steers: whether devices are told when to come again; else they come every minute.
            hears_losses: whether a device that is lost is replaced at once.
            most_delay_s: longest mean delay that they are told.
            aborts: whether a device hears at once that its update is not needed; else when it reports.
        """
        self.population, self.manifest, self.clock = population, manifest, clock
        self._blocks_of = blocks_of
        self._update_of, self._steers, self._aborts, self._hears_losses = update_of, steers, aborts, hears_losses
        self._policy = manifest.server.rounds
        self.sums = GroupSums(manifest, self, clock.now_s)
        self._seen = self.sums.analytics
        self._work: dict[bytes, _Work] = {}
        self.finished = False
        self.tally = Tally()
        self.coordinator: Coordinator
        self._begun = False
        takes = self._policy.most_at_once
        self.pace = Pace(devices_a_round=takes, resting=self._policy.most_resting, now_s=0.0, most_s=most_delay_s)
        self._waiting: dict[int, float] = {}  # device -> since when
        self._rng = np.random.default_rng(population.seed)
        self._draw_devices(model_bytes, update_bytes)
        self._soon: list[tuple[float, int, Callable[[], None]]] = []
        self._count = 0
        self._due: dict[int, list[np.ndarray]] = {}  # second -> devices that check in
        self._second = 0
        self._begin_days()

    # Devices.

    def _draw_devices(self, model_bytes: int, update_bytes: int) -> None:
        population, rng, n = self.population, self._rng, self.population.devices
        self.slowness: np.ndarray = rng.lognormal(0.0, population.speed_sigma, n)
        shares = np.array([network.share for network in population.networks])
        network = rng.choice(len(shares), n, p=shares / shares.sum())
        down = np.array([x.down_mbit_s for x in population.networks])[network]
        up = np.array([x.up_mbit_s for x in population.networks])[network]
        self._down_s, self._up_s = 8e-6 * model_bytes / down, 8e-6 * update_bytes / up
        self._bytes = model_bytes, update_bytes
        mean_s = population.window_hours * 3600.0
        self._window_s = rng.lognormal(np.log(mean_s) - 0.125, 0.5, n)
        self._window_s[self._window_s >= DAY_S] = np.inf
        if population.window_hours >= 24.0:
            self._window_s[:] = np.inf
        # The number of open windows swings as 1 + a cos; a window of length w smooths the swing of where windows lie.
        swing = (population.daily_swing - 1.0) / (population.daily_swing + 1.0)
        amplitude = min(0.999, swing / float(np.sinc(mean_s / DAY_S)))
        grid = np.linspace(0.0, 1.0, 4097)
        share_before = grid + amplitude * np.sin(2 * np.pi * grid) / (2 * np.pi)
        centre_s = np.interp(rng.random(n), share_before, grid) * DAY_S
        self._start_s = (centre_s - np.minimum(self._window_s, DAY_S) / 2) % DAY_S
        self._ends_s = np.zeros(n)

    def _begin_days(self) -> None:
        """The windows of the first day, those that are open when it begins among them."""
        devices = np.arange(self.population.devices)
        over_midnight = self._start_s + self._window_s > DAY_S
        self._ends_s = np.where(over_midnight, self._start_s + self._window_s - DAY_S, self._start_s + self._window_s)
        first_s = np.where(over_midnight, self._rng.uniform(0.0, 60.0, len(devices)), self._start_s)
        self._check_in_at(devices, first_s)

    def _check_in_at(self, devices: np.ndarray, times_s: np.ndarray) -> None:
        """Schedules check-ins; of those whose window is over by then, at the next one's beginning."""
        closed = times_s >= self._ends_s[devices]
        if closed.any():
            late = devices[closed]
            jitter_s = self._rng.uniform(0.0, 600.0, len(late))
            day = np.floor((times_s[closed] - self._start_s[late]) / DAY_S) + 1.0
            begins_s = day * DAY_S + self._start_s[late]
            self._ends_s[late] = begins_s + self._window_s[late]
            times_s = times_s.copy()
            times_s[closed] = np.minimum(begins_s + jitter_s, self._ends_s[late] - 1.0)
        seconds = np.maximum(times_s.astype(np.int64), self._second + 1)
        if len(devices) == 1:
            self._due.setdefault(int(seconds[0]), []).append(devices)
            return
        order = np.argsort(seconds, kind="stable")
        seconds, devices = seconds[order], devices[order]
        cuts = np.flatnonzero(np.diff(seconds)) + 1
        for second, group in zip(seconds[np.r_[0, cuts]], np.split(devices, cuts), strict=True):
            self._due.setdefault(int(second), []).append(group)

    def _come_again(self, devices: np.ndarray) -> None:
        now_s = self.clock.time_s
        low, high = self.pace.window(now_s) if self._steers else (55.0, 65.0)
        self._check_in_at(devices, now_s + self._rng.uniform(low, high, len(devices)))

    def _check_ins(self, second: int) -> None:
        devices = np.concatenate(self._due.pop(second))
        slot = second - second % SLOT_S
        self.tally.check_ins[slot] = self.tally.check_ins.get(slot, 0) + len(devices)
        self._seen.count("check_ins", len(devices))
        self.pace.arrived(len(devices), self.clock.time_s)
        room = max(0, self.pace.pool - len(self._waiting))
        if len(devices) > room:
            devices = self._rng.permutation(devices)
            self.tally.told_later += len(devices) - room
            self._seen.count("told_later", len(devices) - room)
            self._come_again(devices[room:])
        taken = [int(device) for device in devices[:room]]
        self._waiting.update(dict.fromkeys(taken, self.clock.time_s))
        if taken:
            self.coordinator.arrived(*map(str, taken))

    # What the Coordinator says.

    def connect(self, coordinator: Any) -> None:
        self.coordinator = coordinator
        self.sums.connect(coordinator)

    def open_groups(self, configuration: Configuration, model: Index, *, taken: Mapping[int, int]) -> None:
        self.pace.opened(self.clock.time_s)
        self.sums.configuration = configuration
        self.sums.step(g.Open(configuration.base_version, tuple(taken.items())))

    def assign(self, device: str, token: pb.Token, assignment: pb.Assignment) -> bool:
        number, now_s = int(device), self.clock.time_s
        since_s = self._waiting.pop(number, now_s)
        if now_s >= self._ends_s[number]:
            self._come_again(np.array([number]))
            return False  # its window closed while it waited
        population, nonce = self.population, assignment.nonce
        trains_s = population.train_s * self.slowness[number] * self._rng.lognormal(0.0, population.round_sigma)
        begins_s = now_s + self._down_s[number]
        work = self._work[nonce] = _Work(number, assignment.base_version, begins_s, trains_s)
        self.tally.assigned += 1
        self.tally.seconds["bytes_down"] += self._bytes[0]
        self.sums.step(g.Joined(nonce, assignment.base_version))
        self._seen.assigned(nonce, now_s, waited_s=now_s - since_s)
        reports_s = begins_s + trains_s + self._up_s[number]
        if self._rng.random() < population.drop_out:
            lost_s = now_s + self._rng.random() * (reports_s - now_s)
            is_connected = population.interrupted > 0.0 and self._rng.random() < population.interrupted
            self._at(lost_s, lambda: self._interrupt(nonce, work) if is_connected else self._drop(nonce, work))
        elif reports_s > self._ends_s[number]:
            self._at(float(self._ends_s[number]), lambda: self._interrupt(nonce, work))
        else:
            self._at(reports_s, lambda: self._report(nonce, work))
        return True

    async def close_groups(self, *, final: bool = True) -> list[GroupResult]:
        self.sums.step(g.Close(final))
        return self.sums.take_closed(lambda nonce: self.clock.wall_s() + DAY_S)

    def take_analytics(self) -> Seen:
        return self._seen.take()

    def gather(self) -> None:
        """Nothing to do: one Edge alone has all there is."""

    def stored(self) -> None:
        self.sums.step(g.Stored())

    def committed(self, version: int) -> None:
        self.sums.step(g.Committed(version))

    def failed(self, why: str) -> None:
        self.sums.step(g.Failed(why))

    def finish(self, why: str) -> None:
        self.finished = True

    # Work.

    def _at(self, time_s: float, do: Callable[[], None]) -> None:
        self._count += 1
        heapq.heappush(self._soon, (time_s, self._count, do))

    def _drop(self, nonce: bytes, work: _Work) -> None:
        """The device is lost, and its stream breaks."""
        if self._work.pop(nonce, None) is not work:
            return
        if self.clock.time_s >= work.begins_s:
            self._seen.training(nonce)
        self._seen.away(nonce, self.clock.time_s)
        if self._hears_losses:
            self.coordinator.away(nonce)
        self.tally.seconds["dropped"] += self._trained_s(work)
        self._come_again(np.array([work.device]))

    def _interrupt(self, nonce: bytes, work: _Work) -> None:
        """The device can go no further, and reports the blocks that it has done, if that may be and there are any."""
        if self._work.get(nonce) is not work:
            return
        done = 0
        if self._blocks_of is not None:
            done = int(self._trained_s(work) / work.trains_s * self._blocks_of(work.device))
        if not done:
            return self._drop(nonce, work)
        work.blocks, work.trains_s = done, self._trained_s(work)
        self._at(self.clock.time_s + float(self._up_s[work.device]), lambda: self._report(nonce, work))

    def _report(self, nonce: bytes, work: _Work) -> None:
        if self._work.get(nonce) is not work:
            return
        work.reported = True
        self.tally.seconds["bytes_up"] += self._bytes[1]
        self._seen.sending(nonce, self.clock.time_s - float(self._up_s[work.device]))
        if self.sums.groups.state(nonce) is None and self.sums.groups.takes(work.version):
            self.sums.step(g.Joined(nonce, work.version))
        self.sums.step(g.Offered(nonce))

    def _trained_s(self, work: _Work) -> float:
        return float(min(work.trains_s, max(0.0, self.clock.time_s - work.begins_s)))

    # What the groups want.

    def check(self, nonce: bytes) -> g.Checked:
        """Every update is a good one."""
        return g.Checked(nonce)

    def add(self, nonce: bytes, group: int, discount: float) -> g.Added:
        """Adds the update, where there is one."""
        work = self._work[nonce]
        work.discount = discount
        update: Tensors = {}
        weight = 1
        if self._update_of is not None:
            update, weight = self._update_of(work.device, work.version, work.blocks)
        pieces = ((name, 0, value.reshape(-1)) for name, value in update.items())
        self.sums.begin_adding(group, NO_COSTS)
        self.sums.add(group, pieces, weight=weight, discount=discount)
        return g.Added(nonce)

    def closed(self) -> None:
        """`close_groups` finds them."""

    def tell(self, tell: g.Tell) -> None:
        """What becomes of a device's time."""
        nonce, outcome = tell.nonce, tell.outcome
        work = self._work.get(nonce)
        if work is None:
            return  # it was lost
        if outcome != "counted" and not work.reported and not self._aborts:
            return  # it hears of it when it reports
        del self._work[nonce]
        trained_s, seconds = self._trained_s(work), self.tally.seconds
        if outcome == "counted":
            seconds["used"] += work.discount * trained_s
            seconds["unused"] += (1.0 - work.discount) * trained_s
        elif work.reported:
            seconds["unused"] += trained_s
        else:
            seconds["aborted"] += trained_s
        self._come_again(np.array([work.device]))

    # Time.

    def run(self, *, until_s: float, commits: int = 1 << 30) -> None:
        """Lets the fleet live until then, or for so many commits, or until the run's last version."""
        enough = len(self.tally.commits) + commits
        if not self._begun:
            self._begun = True
            _at_once(self.coordinator.take_up())
        while not self.finished and self.clock.time_s < until_s and len(self.tally.commits) < enough:
            while (event := self.coordinator.pending()) is not None:
                _at_once(self.coordinator.step(event))
            self._next(until_s)

    def _next(self, until_s: float) -> None:
        """What happens next: a second's check-ins, an event of a device, or the Coordinator's clock."""
        wake_s = self.coordinator.wake_s
        event_s = min(self._soon[0][0] if self._soon else until_s, until_s if wake_s is None else wake_s, until_s)
        while self._second + 1 <= event_s:
            self._second += 1
            if self._second in self._due:
                self.clock.time_s = float(self._second)
                return self._check_ins(self._second)
        self.clock.time_s = max(self.clock.time_s, event_s)
        if self._soon and self._soon[0][0] <= event_s:
            heapq.heappop(self._soon)[2]()


def virtual_fleet(
    population: VirtualPopulation, policy: RoundPolicy, *, rounds: int = 1 << 30, **settings: Any
) -> VirtualFleet:
    """A fleet that trains nothing: who takes part, when, and what becomes of the work. Its record is in memory.

    Args:
        population: the devices.
        policy: how rounds are run.
        rounds: versions after which it ends.
        settings: of `VirtualFleet`.
    """
    plan = bare_plan(policy)
    store, clock = MemoryStore(), VirtualClock()
    run = RunRow(
        id=RUN, name=plan.manifest.task, kind="simulate", plan_hash="", config={}, provenance={}, status="running",
        created_s=0.0,
    )  # fmt: skip
    store.create_run(run)
    write_initial_model(store, RUN, plan, {}, time_s=0.0)
    fleet = VirtualFleet(population, plan.manifest, clock, **settings)
    drive(fleet, store, RUN, rounds=rounds, keys=HostKeys.make(), seed=population.seed)
    return fleet


def bare_plan(policy: RoundPolicy) -> Plan:
    """A plan without programs and tensors."""
    half = ServerHalf(rounds=policy, rule=ServerRule(), about=About())
    manifest = Manifest(
        task="virtual", programs=(), broadcast=(), device_state=(), sums=(), metrics=(), batch=(),
        training=Training(
            batch_size=1, steps_per_block=1, epochs=1, max_examples=1, max_weight=1, whole_batches=False,
            drop_remainder=False, evaluate_batch_size=1,
        ),
        promises=Promises(minimum_group=policy.minimum_group, privacy=Privacy()), server_hash=sha256(half.data), half=half,
    )  # fmt: skip
    return Plan(manifest, {})


def drive(fleet: VirtualFleet, store: Store, run_id: str, *, rounds: int, keys: HostKeys, seed: int) -> None:
    """Gives a fleet its Coordinator, the one of a live host, which goes on from where the record stands."""
    commits, half = fleet.tally.commits, fleet.manifest.server
    aggregator = noised(
        aggregator_of(half.aggregator, half.rule, half.options), fleet.manifest.promises.privacy, half.rounds,
        secret=keys.noise_secret, run=run_id, last_version=rounds,
    )  # fmt: skip
    Coordinator(
        store=store, run=run_id, manifest=fleet.manifest, edge=fleet, aggregator=aggregator,
        token_key=keys.token, run_seed=run_seed(seed), last_version=rounds, clock=fleet.clock,
        rng=np.random.default_rng(seed), retention=Retention.of(store.run(run_id).config), in_thread=in_this_thread, beside=done_at_once,
        on_commit=lambda commit: commits.append((fleet.clock.time_s, commit.row.members, commit.late)),
    )  # fmt: skip


async def in_this_thread(work: Callable[[], Any]) -> Any:
    """What a Coordinator awaits in place of a thread."""
    return work()


class Done:
    """What has been done already, for those who await it."""

    def __await__(self) -> Generator[None, None, None]:
        yield from ()


def done_at_once(work: Coroutine[Any, Any, None]) -> Awaitable[None]:
    """What a Coordinator begins and awaits later."""
    _at_once(work)
    return Done()


def _at_once(steps: Coroutine[Any, Any, None]) -> None:
    """Runs what never waits."""
    try:
        steps.send(None)
    except StopIteration:
        return
    raise AssertionError("a virtual fleet's Coordinator waited")
