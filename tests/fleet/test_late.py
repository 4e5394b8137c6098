"""Late work is used: discounted, or with the bits of the run in which it came in time; and asynchronous rounds."""

import asyncio
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from shoal.aggregate.accumulator import Accumulator
from shoal.aggregate.commit import WeightedMean
from shoal.aggregate.sums import save_sums
from shoal.clock import SystemClock
from shoal.errors import ProtocolError, StoreUnavailable
from shoal.fleet.analytics import Seen
from shoal.fleet.configuration import Configuration, configure
from shoal.fleet.coordinator import Coordinator
from shoal.fleet.costs import Costs
from shoal.fleet.group_sums import GroupResult
from shoal.fleet.wire import fleet_pb2 as pb
from shoal.plan.plan import Plan
from shoal.plan.run_plan import write_initial_model
from shoal.policy import Late, RoundPolicy, ServerRule
from shoal.record.memory import MemoryStore
from shoal.record.store import GroupRow, RunRow, Store
from shoal.tensors import Index
from tests.fleet import toy

RUN = "run"
SHAPE = {"params/w": (3,)}
POLICY = RoundPolicy(
    goal=2, minimum_group=1, minimum_fraction=0.5, over_selection=2.0, late=Late.patch(max_staleness=3)
)
ONE_IS_ENOUGH = RoundPolicy(goal=1, minimum_group=1, over_selection=2.0, selection_window_s=0.2, adaptive=False)
RULES = [
    ServerRule(),
    ServerRule(momentum=0.9, learning_rate=0.7),
    ServerRule(kind="adam", learning_rate=0.1),
    ServerRule(kind="yogi", learning_rate=0.1),
]


class ScriptedEdge:
    """Hands the Coordinator the groups that a script names, one list a commit."""

    def __init__(self, made: Plan, script: Sequence[Sequence[tuple[int, Sequence[int]]]]) -> None:
        self.made, self.script = made, list(script)
        self.coordinator: Any = None
        self.configuration: Configuration | None = None

    def connect(self, coordinator: Any) -> None:
        self.coordinator = coordinator

    def open_groups(self, configuration: Configuration, model: Index, *, taken: Mapping[int, int]) -> None:
        self.configuration = configuration
        for number in range(POLICY.goal):  # as many are counted as close the round
            self.coordinator.counted(b"%d/%d" % (configuration.base_version, number), configuration.base_version, 0)

    async def close_groups(self, *, final: bool = True) -> list[GroupResult]:
        return [self.group(version, members) for version, members in self.script.pop(0)]

    def group(self, version: int, members: Sequence[int]) -> GroupResult:
        assert self.configuration is not None
        sums = self.configuration.accumulator(self.made.manifest)
        for member in members:
            sums.add(toy.update(self.made, value=0.3 * member + version), weight=member + 1)
        return GroupResult(version, sums, tuple((b"%d-%d" % (version, member), 1e10) for member in members), Costs())

    def assign(self, *_: object) -> bool:
        return False

    def take_analytics(self) -> Seen:
        return Seen()

    def stored(self) -> None: ...
    def gather(self) -> None: ...
    def committed(self, version: int) -> None: ...
    def failed(self, why: str) -> None:
        raise AssertionError(why)

    def finish(self, why: str) -> None: ...


def plan(rule: ServerRule, policy: RoundPolicy = POLICY) -> Plan:
    return toy.plan(policy, SHAPE, rule=rule)


def run(made: Plan, script: Sequence[Sequence[tuple[int, Sequence[int]]]], store: Store | None = None) -> Store:
    """Commits what the script says, from the first version or where the store stands."""
    if store is None:
        store = MemoryStore()
        store.create_run(
            RunRow(id=RUN, name="toy", kind="host", plan_hash="", config={}, provenance={}, status="running", created_s=0.0)
        )  # fmt: skip
        write_initial_model(store, RUN, made, {"params/w": np.zeros(3, np.float32)}, time_s=0.0)
    last = store.last_version(RUN)
    assert last is not None
    coordinator = Coordinator(
        store=store, run=RUN, manifest=made.manifest, edge=ScriptedEdge(made, script),
        aggregator=WeightedMean(made.manifest.server.rule), token_key=toy.KEYS.token, run_seed=bytes(32),
        last_version=last + len(script), clock=SystemClock(), rng=np.random.default_rng(0),
    )  # fmt: skip
    asyncio.run(coordinator.run())
    return store


def model(store: Store) -> bytes:
    commit = store.last_commit(RUN)
    assert commit is not None
    (entry,) = commit.model
    return store.blobs.get(entry.hash)


IN_TIME = [[(0, [1, 2, 3])], [(1, [1, 2])], [(2, [4])], [(3, [1, 5])]]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.kind)
@pytest.mark.parametrize(
    "late",
    [
        [[(0, [1, 2])], [(1, [1, 2]), (0, [3])], [(2, [4])], [(3, [1, 5])]],
        [[(0, [1])], [(1, [1, 2])], [(2, [4]), (0, [2])], [(3, [1, 5]), (0, [3])]],
        [[(0, [1, 2])], [(1, [1])], [(2, [4]), (1, [2]), (0, [3])], [(3, [1, 5])]],
        [[(0, [1, 2])], [(1, [1]), (0, [3])], [(2, [4]), (1, [2])], [(3, [1, 5])]],
        [[(0, [1])], [(1, [1]), (0, [3])], [(2, [4]), (1, [2])], [(3, [5]), (0, [2])], [(4, [1]), (3, [1])]],
    ],
)
def test_patched_in_late_updates_give_the_bits_of_the_run_in_which_they_were_in_time(
    rule: ServerRule, late: list[Any]
) -> None:
    made = plan(rule)
    in_time = IN_TIME if len(late) == 4 else [*IN_TIME, [(4, [1])]]
    assert model(run(made, late)) == model(run(made, in_time))


def test_without_the_late_update_the_bits_are_others() -> None:
    made = plan(ServerRule())
    assert model(run(made, [[(0, [1, 2])], *IN_TIME[1:]])) != model(run(made, IN_TIME))


def test_over_many_versions_whatever_came_late_is_in_the_model() -> None:
    rng = np.random.default_rng(0)
    made, versions = plan(RULES[2]), 30
    in_time: list[dict[int, list[int]]] = [{version: []} for version in range(versions)]
    late: list[dict[int, list[int]]] = [{version: []} for version in range(versions)]
    for version in range(versions):
        for member in range(1, 5):
            age = int(rng.choice([0, 0, 1, 2, 3])) if member > 1 else 0
            age = min(age, versions - 1 - version)
            in_time[version][version].append(member)
            late[version + age].setdefault(version, []).append(member)
    scripts = [[list(commit.items()) for commit in script] for script in (in_time, late)]
    assert model(run(made, scripts[1])) == model(run(made, scripts[0]))
    store = run(made, scripts[1][:12])
    assert model(run(made, scripts[1][12:], store)) == model(run(made, scripts[0])), "a restart changes nothing"


def test_a_coordinator_that_starts_again_patches_all_the_same() -> None:
    made = plan(RULES[2])
    store = run(made, [[(0, [1, 2])], [(1, [1, 2])]])
    assert model(run(made, [[(2, [4]), (0, [3])], [(3, [1, 5])]], store)) == model(run(made, IN_TIME))


def test_groups_of_the_record_are_taken_in_by_the_next_commit() -> None:
    made = plan(ServerRule(), replace(POLICY, late=Late()))
    undisturbed, store = run(made, [[(0, [1, 2, 3])]]), run(made, [])
    edge = ScriptedEdge(made, [])
    edge.configuration = configure(made.manifest, run_seed=bytes(32), round=1, base_version=0)
    group = edge.group(0, [1, 3])
    kept = GroupRow(
        round=1, base_version=0, members=2, weight=group.sums.weight, sums_root=save_sums(store.blobs, group.sums)
    )
    store.add_group(RUN, kept, counted=group.counted)
    assert model(run(made, [[(0, [2])]], store)) == model(undisturbed)
    row = store.token(RUN, b"0-3")
    assert row is not None and row.version == 1, "told *counted* when its group was stored; now it is known in what"


def test_sums_are_forgotten_when_nothing_can_be_late_for_them() -> None:
    store = run(plan(ServerRule()), [[(version, [1, 2])] for version in range(8)])
    kept = [group.base_version for group in store.groups(RUN) if group.sums_root]
    assert kept == [5, 6, 7], "max_staleness 3: version 8 may still be patched back to 5"


@toy.in_loop
async def test_a_live_device_that_is_late_is_discounted() -> None:
    policy = RoundPolicy(
        goal=1, minimum_group=1, over_selection=2.0, selection_window_s=0.5, late=Late.discount(0.5, max_staleness=2)
    )
    made = toy.plan(policy)
    async with toy.fleet(made, rounds=2) as fleet:
        async with toy.peer(fleet.link, "slow") as slow, toy.peer(fleet.link, "quick") as quick:
            await slow.check_in()
            await quick.check_in()
            (_, late), (_, early) = await asyncio.gather(slow.hear(), quick.hear())
            await quick.say(report=toy.report(early.token, toy.update(made, 1.0)))
            assert (await quick.hear())[0] == "counted"
            await slow.say(report=toy.report(late.token, toy.update(made, 4.0)))
            told = asyncio.create_task(slow.hear())
            await quick.check_in()
            _, again = await quick.hear()
            await quick.say(report=toy.report(again.token, toy.update(made, 1.0)))
            assert (await quick.hear())[0] == "counted" and (await told)[0] == "counted"
            await fleet.tasks[0]
        assert fleet.model["params/w"][0] == pytest.approx(1.0 + (1.0 + 0.5 * 4.0) / 2)
        assert fleet.members == [0, 1, 2]


@toy.in_loop
async def test_an_addition_that_broke_off_is_in_no_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = RoundPolicy(goal=2, minimum_group=2, over_selection=1.0, reporting_window_s=0.4, selection_window_s=0.1)
    made = toy.plan(policy)
    real, broken = Accumulator.add_checked, []

    def break_once(self: Accumulator, pieces: Any, **settings: Any) -> None:
        real(self, pieces, **settings)
        if not broken:
            broken.append(True)
            raise RuntimeError("it broke off, with half of it added")

    monkeypatch.setattr(Accumulator, "add_checked", break_once)
    async with toy.fleet(made, rounds=1) as fleet:
        async with toy.peer(fleet.link, "a") as a, toy.peer(fleet.link, "b") as b:
            await a.check_in()
            await b.check_in()
            (_, first), (_, second) = await asyncio.gather(a.hear(), b.hear())
            await a.say(report=toy.report(first.token, toy.update(made, 100.0)))
            hearing = asyncio.create_task(a.hear())
            await asyncio.sleep(0.6)  # the round is abandoned, its group goes on
            await b.say(report=toy.report(second.token, toy.update(made, 1.0)))
            told = await asyncio.gather(hearing, b.hear())
            assert {kind for kind, _ in told} == {"refused"}, "half an update is nobody's"
        fleet.start(*(toy.device(name, fleet.link) for name in "ab"))
        await fleet.tasks[0]
        assert fleet.model["params/w"][0] == 1.0 and not fleet.host.edge._updates.sums._sums


@toy.in_loop
async def test_a_disk_that_fails_while_a_group_is_stored_loses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = RoundPolicy(goal=4, minimum_group=2, over_selection=1.0, group_size=2)
    made, store = toy.plan(policy), MemoryStore()
    real, failures = store.add_group, ["before", "after"]

    def full(*args: Any, **named: Any) -> int:
        when = failures.pop(0) if failures else ""
        if when == "before":
            raise StoreUnavailable("no space left")
        number = real(*args, **named)
        if when == "after":
            raise StoreUnavailable("it was written, but who knows")
        return number

    monkeypatch.setattr(store, "add_group", full)
    monkeypatch.setattr("shoal.fleet.durable.RETRY_S", (0.01, 0.02))
    async with toy.fleet(made, rounds=1, store=store) as fleet:
        fleet.start(*(toy.device(name, fleet.link) for name in "abcd"))
        await fleet.tasks[0]
        assert fleet.members == [0, 4] and not failures


@toy.in_loop
async def test_a_live_run_in_asynchronous_mode() -> None:
    policy = RoundPolicy(
        goal=2, minimum_group=2, buffer=2, concurrency=4, minimum_fraction=1.0, late=Late.discount(1.0, max_staleness=5)
    )
    made = toy.plan(policy)
    async with toy.fleet(made, rounds=6) as fleet:
        fleet.start(*(toy.device(f"d{i}", fleet.link, value=1.0) for i in range(6)))
        await fleet.tasks[0]
    assert len(fleet.members) == 7 and min(fleet.members[1:]) >= 2
    assert 0.0 < fleet.model["params/w"][0] <= 6.0


@toy.in_loop
async def test_a_live_device_is_counted_before_the_commit_when_its_group_is_stored() -> None:
    policy = RoundPolicy(goal=4, minimum_group=2, over_selection=1.0, group_size=2)
    made = toy.plan(policy)
    async with toy.fleet(made, rounds=1) as fleet, AsyncExitStack() as stack:
        peers = [await stack.enter_async_context(toy.peer(fleet.link, name)) for name in "abcd"]
        for peer in peers:
            await peer.check_in()
        tokens = [told.token for _, told in await asyncio.gather(*(peer.hear() for peer in peers))]
        for peer, token in zip(peers[:2], tokens, strict=False):
            await peer.say(report=toy.report(token, toy.update(made)))
        for peer in peers[:2]:
            kind, told = await peer.hear()
            assert kind == "counted" and told.version == 0, "durable, in a commit to come"
        assert len(fleet.store.groups(fleet.host.run_id, waiting=True)) == 1
        for peer, token in zip(peers[2:], tokens[2:], strict=True):
            await peer.say(report=toy.report(token, toy.update(made)))
        await fleet.tasks[0]
        assert fleet.members == [0, 4]


@toy.in_loop
async def test_who_may_be_late_may_still_fetch_its_model() -> None:
    policy = replace(ONE_IS_ENOUGH, late=Late.discount(0.5, max_staleness=1))
    async with (
        toy.fleet(toy.plan(policy), rounds=9) as fleet,
        toy.peer(fleet.link, "slow") as slow,
        toy.peer(fleet.link, "quick") as quick,
    ):
        held, assigned = await asyncio.gather(slow.assigned(), quick.assigned())
        token = assigned.token
        model = fleet.store.get_commit(fleet.host.run_id, 0).model
        request = pb.PullRequest(token=held.token, hash=model.entries[0].hash)
        for version in (1, 2):
            await quick.say(report=toy.report(token, toy.update(fleet.host.plan)))
            assert (await quick.hear())[0] == "counted"
            token = (await quick.assigned()).token
            if version == 1:
                assert sum([len(piece.data) async for piece in fleet.link.pull(request)]) == 4
        with pytest.raises(ProtocolError, match="no part of the plan"):
            [piece async for piece in fleet.link.pull(request)]
