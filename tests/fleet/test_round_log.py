"""What a round's machine was told can be run again, and names nobody. Histories with crashes: `test_crash_histories.py`."""

import asyncio
import json
import zlib
from collections.abc import Callable
from dataclasses import fields
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.errors import StoreError
from shoal.fleet import round_events as r
from shoal.fleet.round import RoundMachine
from shoal.fleet.round_log import _FROM_JSON, _TO_JSON, RoundRecorder, replay
from shoal.policy import Late, RoundPolicy
from tests.fleet import toy

POLICY = RoundPolicy(goal=3, minimum_group=2, over_selection=1.4, selection_window_s=5.0, reporting_window_s=20.0)
POLICIES = [
    POLICY,
    RoundPolicy(goal=3, minimum_group=2, late=Late.discount(0.5, max_staleness=2), group_size=2),
    RoundPolicy(goal=2, minimum_group=2, buffer=2, concurrency=4, late=Late.discount(1.0, max_staleness=3)),
    toy.exact("device-0", "device-1", "device-2"),
]
EDGES = ["", "north"]
DEVICES = [f"device-{number}" for number in range(8)]


def nonce(version: int, device: str) -> bytes:
    return f"nonce of {device} in {version}".encode()


def recorder(policy: RoundPolicy = POLICY, **settings: Any) -> RoundRecorder:
    machine = RoundMachine(policy, last_version=6, nonce_of=nonce, rng=np.random.default_rng(7))
    return RoundRecorder(machine, **settings)


MOVES = st.lists(
    st.tuples(st.sampled_from(["arrive", "report", "lose", "leave", "wait", "fail", "stop"]), st.integers(0, 7)),
    max_size=60,
)


def drive(recorder: RoundRecorder, moves: list[tuple[str, int]], on_close: Callable[[r.Command, bytes], None]) -> None:
    """Lets chosen things happen to a machine; its commands are carried out as a Coordinator would."""
    now_s, version, training = 0.0, 0, dict[bytes, int]()

    def step(event: r.Event, *, fails: bool = False, few: bool = False) -> None:
        nonlocal version
        for command in recorder.step(event, now_s):
            match command:
                case r.Assign(devices):
                    for device in devices:
                        training[nonce(version, device)] = version
                        step(r.Joined(nonce(version, device), version))
                case r.StoreGroup():
                    step(r.Stored(frozenset()))
                case r.CommitRound():
                    on_close(command, recorder.data())
                    if fails:
                        return step(r.Failed("the sum is broken"))
                    version += 1
                    return step(r.Committed(version, frozenset(list(training)[:1]) if few else None))
                case r.AbandonRound():
                    on_close(command, recorder.data())
                    return step(r.Abandoned())
        return None

    step(r.Started(0, 0))
    for what, number in moves:
        now_s += 0.7
        match what:
            case "arrive":
                step(r.Arrived((DEVICES[number], DEVICES[(number + 3) % 8]), EDGES[number % 3 // 2]))
            case "leave":
                step(r.Left(DEVICES[number]))
            case "report" | "lose" if training:
                member = sorted(training)[number % len(training)]
                trained_on = training.pop(member)
                staleness = version - trained_on
                if what == "lose":
                    step(r.Away(member))
                elif staleness <= recorder._machine.policy.max_staleness:
                    step(
                        r.Counted(member, version, staleness, EDGES[number % 5 // 4]),
                        fails=number == 7,
                        few=number == 6,
                    )
                else:
                    step(r.Released(member))
            case "wait":
                now_s += 6.0
                step(r.Tick())
            case "stop" if number == 0:
                step(r.Stop())


@settings(max_examples=150, deadline=None)
@given(moves=MOVES, policy=st.sampled_from(POLICIES))
def test_any_round_runs_again_as_it_ran(moves: list[tuple[str, int]], policy: RoundPolicy) -> None:
    closed: list[tuple[r.Command, bytes]] = []
    drive(recorder(policy), moves, lambda command, data: closed.append((command, data)))
    for command, data in closed:
        made = replay(data)
        assert made.close == command and made.left_out == 0
        assert b"device" not in zlib.decompress(data) and b"nonce-" not in zlib.decompress(data)
        assert all(step.time_s >= 0.0 for step in made.steps)


def a_log(**settings: Any) -> bytes:
    """Of a round with six that come, five that are taken, three that report."""
    logs: list[bytes] = []
    moves = [("arrive", 0), ("arrive", 1), ("arrive", 2), *[("report", 0)] * 3]
    drive(recorder(**settings), moves, lambda _, data: logs.append(data))
    return logs[0]


def test_a_round_is_told_step_by_step() -> None:
    made = replay(a_log())
    assert [type(step.event).__name__ for step in made.steps] == (
        ["Started", *["Arrived"] * 3, *["Joined"] * 5, *["Counted"] * 3]
    )
    assert made.steps[0].phase is r.Phase.IDLE and made.steps[-1].phase is r.Phase.REPORTING
    assert made.close == r.CommitRound(1, "goal") and made.end.phase is r.Phase.COMMITTING
    arrived = made.steps[1].event
    assert isinstance(arrived, r.Arrived) and set("".join(arrived.devices)) <= set("0123456789")


def test_numbers_begin_anew_in_every_round() -> None:
    logs: list[bytes] = []
    comes = [("arrive", 0), ("arrive", 1), ("arrive", 2), *[("report", 0)] * 3]
    moves = [*comes, ("arrive", 4), *comes]
    drive(recorder(), moves, lambda _, data: logs.append(data))
    first = [next(s.event for s in replay(data).steps if isinstance(s.event, r.Arrived)) for data in logs]
    assert len(first) == 2 and first[0].devices == ("1", "2")
    assert not set(first[0].devices) & set(first[1].devices), "the same two devices"


def test_what_comes_after_the_most_is_left_out_and_said() -> None:
    made = replay(a_log(most_events=5))
    assert made.left_out == 9 and len(made.steps) == 3 and made.close is None


def test_nothing_is_noted_where_it_is_not_wanted() -> None:
    silent = recorder(is_on=False)
    silent.step(r.Started(0, 0), 0.0)
    assert silent._steps == [] and silent._saved is None


def altered(change: Callable[[dict[str, Any]], object]) -> bytes:
    log = json.loads(zlib.decompress(a_log()))
    change(log)
    return zlib.compress(json.dumps(log).encode())


@pytest.mark.parametrize(
    ("data", "line"),
    [
        (b"", "damaged"),
        (b"nothing", "damaged"),
        (zlib.compress(b"{}"), "expected format shoal-round-log/1"),
        (a_log()[:-5], "does not end"),
        (altered(lambda log: log["steps"][1][1].__setitem__(0, "Vanished")), "Vanished"),
        (altered(lambda log: log["state"].pop("_round")), "_round"),
        (altered(lambda log: log["state"]["rng"].update(bit_generator="seterr")), "no generator seterr"),
        (altered(lambda log: log["policy"].update(goal=-1)), "goal"),
        (altered(lambda log: log["policy"].update(goal=4)), "run again it says"),
        (altered(lambda log: log["steps"].insert(1, [0.1, ["Committed", 9, None], []])), "refuses"),
    ],
)
def test_a_log_that_is_altered_is_refused_in_one_line(data: bytes, line: str) -> None:
    with pytest.raises(StoreError, match=line):
        replay(data)


def test_a_machine_of_whose_state_a_log_knows_nothing_is_a_bug() -> None:
    made = recorder()
    vars(made._machine)["_new"] = {"device-1"}
    made.step(r.Started(0, 0), 0.0)
    with pytest.raises(TypeError, match="_new"):
        made.data()


def test_no_field_of_an_event_or_command_names_somebody_unseen() -> None:
    plain = {"why", "reason", "edge", "version", "round", "base_version", "staleness", "time_s"}
    found = {field.name for cls in (*get_args(r.Event), *get_args(r.Command)) for field in fields(cls)}
    assert found - plain == set(_TO_JSON) == set(_FROM_JSON) | {"recent"}, (
        "of who was in a version before nothing is noted"
    )


@toy.in_loop
async def test_a_host_keeps_the_logs_of_its_newest_rounds() -> None:
    async with toy.fleet(toy.plan(toy.exact("a", "b")), rounds=4, events_kept=2) as fleet:
        fleet.start(toy.device("a", fleet.link), toy.device("b", fleet.link))
        await asyncio.gather(*fleet.tasks)
        logs = [fleet.store.round_log(fleet.host.run_id, number) for number in (1, 2, 3, 4)]
        assert logs[:2] == [None, None]
        for number, log in zip((3, 4), logs[2:], strict=True):
            assert log is not None
            close = replay(log).close
            assert close == r.CommitRound(number, "goal")
