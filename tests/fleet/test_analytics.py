"""What is seen of a fleet: shapes of sessions, errors, times; and that what few had is not told."""

import asyncio
import json
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.fleet.analytics import OTHER, Analytics, Errors, Folding, Seen, bin_of, quantile, total
from shoal.fleet.wire import fleet_pb2 as pb
from shoal.policy import Late, RoundPolicy
from shoal.simulate.virtual import virtual_fleet
from shoal.simulate.virtual_population import VirtualPopulation
from tests.fleet import toy

A, B = b"a", b"b"


def joined(*nonces: bytes) -> Analytics:
    made = Analytics()
    made.round_began(10.0)
    for nonce in nonces:
        made.joined(nonce)
        made.assigned(nonce, 11.0, waited_s=0.5)
    return made


def test_a_session_that_goes_well() -> None:
    made = joined(A)
    made.sending(A, 15.0)
    made.sending(A, 15.5)
    made.whole(A, 16.0)
    made.closed([A], 18.0)
    made.told(A, "counted", "", 18.1)
    seen = made.take()
    assert seen.shapes == {"-v[]+^": 1} and seen.counts == {"selected": 1} and seen.errors == {}
    expected = {"wait": 0.5, "train": 4.0, "upload": 1.0, "group": 2.0}
    assert seen.times == {phase: {bin_of(seconds): 1} for phase, seconds in expected.items()}
    assert made.num_open == 0 and made.take() == Seen()


def test_a_small_update_comes_with_its_report() -> None:
    made = joined(A)
    made.whole(A, 12.0)
    made.closed([A], 12.0)
    assert made.take().shapes == {"-v[]+^": 1}


@pytest.mark.parametrize(
    ("ends", "shape", "count", "error"),
    [
        (lambda a: a.told(A, "released", "enough", 14.0), "-vx", "released", None),
        (lambda a: (a.away(A, 14.0), a.told(A, "released", "late", 20.0)), "-v!", "lost", "stream broke"),
        (lambda a: (a.training(A), a.away(A, 14.0), a.gone(A)), "-v[!", "lost", "stream broke"),
        (lambda a: a.gone(A), "-v!", "lost", None),
        (lambda a: a.gave_up(A, "fetching", 14.0), "-*", "gave_up", "gave up fetching"),
        (lambda a: a.gave_up(A, "queued", 14.0), "-v*", "gave_up", "gave up queued"),
        (lambda a: a.gave_up(A, "training", 14.0), "-v[*", "gave_up", "gave up training"),
        (lambda a: a.gave_up(A, "my secret", 14.0), "-v*", "gave_up", "gave up other"),
        (lambda a: (a.sending(A, 13.0), a.gave_up(A, "reporting", 14.0)), "-v[]+*", "gave_up", "gave up reporting"),
        (lambda a: (a.whole(A, 13.0), a.told(A, "refused", "not finite", 14.0)), "-v[]+#", "refused",
         "refused: not finite"),
        (lambda a: (a.whole(A, 13.0), a.told(A, "refused", "late", 14.0)), "-v[]+#", "refused_late", None),
        (lambda a: (a.away(A, 12.0), a.sending(A, 13.0), a.told(A, "released", "late", 14.0)), "-v[]+x", "released",
         "stream broke"),
    ],
)  # fmt: skip
def test_how_a_session_ends(ends: Any, shape: str, count: str, error: str | None) -> None:
    made = joined(A)
    ends(made)
    seen = made.take()
    assert seen.shapes == {shape: 1} and seen.counts[count] == 1 and made.num_open == 0
    assert list(seen.errors) == ([] if error is None else [error])
    if error is not None and error.startswith("refused"):
        assert seen.errors[error] == Errors(1, 4.0)


def test_a_session_that_ended_is_told_nothing_more() -> None:
    made = joined(A)
    made.closed([A], 12.0)
    made.take()
    made.away(A, 13.0)
    made.gone(A)
    made.gave_up(A, "training", 13.0)
    made.told(A, "released", "", 13.0)
    assert made.take() == Seen()


def test_errors_between_two_rounds_are_at_the_beginning_of_the_next() -> None:
    made = joined(A)
    made.error("protocol", 14.0)
    assert made.take().errors == {"protocol": Errors(1, 4.0)}
    made.error("protocol", 15.0)
    made.round_began(20.0)
    made.error("protocol", 23.0)
    assert made.take().errors == {"protocol": Errors(2, 0.0)}


def test_there_are_never_more_than_so_many_kinds_of_error() -> None:
    made = Analytics()
    for number in range(1000):
        made.error(f"kind {number}", 0.0)
    errors = made.take().errors
    assert len(errors) == 65 and errors[OTHER].count == 936


def test_edges_are_added_up_and_the_first_error_is_known() -> None:
    one, other = Analytics(), Analytics()
    one.error("protocol", 5.0)
    other.error("protocol", 3.0)
    one.count("check_ins", 4)
    other.count("check_ins", 1)
    sum_ = one.take()
    said = Seen.from_json(json.loads(json.dumps(other.take().to_json())))
    said.errors["protocol"].edge = "south"
    sum_.merge(said)
    assert sum_.errors == {"protocol": Errors(2, 3.0, "south")} and sum_.counts == {"check_ins": 5}


def test_bins_and_quantiles() -> None:
    assert [bin_of(s) for s in (-1.0, 0.0, 0.001, 0.0014, 0.0015, 0.002, 1.024)] == [0, 0, 0, 0, 1, 2, 20]
    seconds = np.random.default_rng(0).lognormal(1.0, 0.8, 4000)
    bins = dict(Counter(bin_of(float(s)) for s in seconds))
    for share in (0.1, 0.5, 0.9):
        assert quantile(bins, share) == pytest.approx(float(np.quantile(seconds, share)), rel=0.06)
    assert quantile({3: 1}, 1.0) <= 0.001 * 2**2
    with pytest.raises(ValueError, match="got none"):
        quantile({}, 0.5)


# What few had.


def test_what_few_had_is_told_once_there_are_enough() -> None:
    folding = Folding(3)
    first = folding.fold(Seen(shapes={"-v[]+^": 3, "-v!": 1, "-vx": 1}, errors={"protocol": Errors(1, 2.0)},
                              times={"train": {4: 2}, "wait": {0: 3}}))  # fmt: skip
    assert first["shapes"] == {"-v[]+^": 3, OTHER: 2} and "named" not in first
    assert first["errors"] == {OTHER: {"count": 1, "first_s": None, "edge": ""}}
    assert first["times"] == {"wait": {"0": 3}}
    second = folding.fold(Seen(shapes={"-v!": 2}, errors={"protocol": Errors(2, 1.0)}, times={"train": {5: 1}}))
    assert second["shapes"] == {OTHER: 2} and second["times"] == {"train": {"4": 2, "5": 1}}
    assert second["named"] == {"shapes": {"-v!": 3}, "errors": {"protocol": 3}}
    sum_ = total([{}, first, second])
    assert sum_.shapes == {"-v[]+^": 3, "-v!": 3, OTHER: 1}
    assert {kind: errors.count for kind, errors in sum_.errors.items()} == {"protocol": 3}


def test_what_one_device_has_again_and_again_is_named_once() -> None:
    made = joined(b"a", b"b")
    for at_s in range(5):
        made.away(b"a", float(at_s))
        made.sending(b"a", float(at_s))  # it is back
    for _ in range(4):
        made.gave_up(b"b", "training", 9.0)
        made.joined(b"b")
    seen = made.take()
    assert {kind: errors.count for kind, errors in seen.errors.items()} == {
        "stream broke": 1, "gave up training": 1, OTHER: 7,
    }  # fmt: skip
    assert seen.shapes == {"-v[*": 1, OTHER: 3}
    told = Folding(3).fold(seen)
    assert told["shapes"] == {OTHER: 4} and set(told["errors"]) == {OTHER}
    made.gave_up(b"b", "training", 10.0)
    assert made.take().shapes == {"-v[*": 1}, "another round"


def test_of_what_few_had_neither_time_nor_edge_is_told() -> None:
    told = Folding(3).fold(Seen(errors={"protocol": Errors(1, 2.0, "north"), "stream broke": Errors(1, 3.0, "south")}))
    assert told["errors"] == {OTHER: {"count": 2, "first_s": None, "edge": ""}}
    enough = Folding(2).fold(
        Seen(errors={"protocol": Errors(1, 2.0, "north"), "stream broke": Errors(1, 3.0, "south")})
    )
    assert enough["errors"] == {OTHER: {"count": 2, "first_s": 2.0, "edge": "north"}}
    assert total([told, enough]).errors[OTHER].count == 4


COUNTS = st.dictionaries(st.sampled_from(["-v[]+^", "-v!", "-vx", "-v*"]), st.integers(1, 12), max_size=4)
ERRORS = st.dictionaries(st.sampled_from(["protocol", "stream broke", "late"]), st.integers(1, 12), max_size=3)
BINS = st.dictionaries(st.sampled_from(["wait", "train"]), st.dictionaries(st.integers(0, 40), st.integers(1, 9)))


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(COUNTS, ERRORS, BINS), max_size=8), st.integers(1, 10))
def test_no_round_names_what_fewer_than_the_minimum_had(
    rounds: list[tuple[dict[str, int], dict[str, int], dict[str, dict[int, int]]]], minimum: int
) -> None:
    folding = Folding(minimum)
    written = []
    for shapes, errors, times in rounds:
        seen = Seen(shapes=dict(shapes), errors={k: Errors(n) for k, n in errors.items()}, times=times)
        data = json.loads(json.dumps(folding.fold(seen)))
        for named in (data["shapes"], data.get("named", {"shapes": {}})["shapes"]):
            assert all(count >= minimum for shape, count in named.items() if shape != OTHER)
        assert all(e["count"] >= minimum for kind, e in data["errors"].items() if kind != OTHER)
        assert all(sum(bins.values()) >= minimum for bins in data["times"].values())
        assert sum(data["shapes"].values()) == sum(shapes.values())
        assert sum(e["count"] for e in data["errors"].values()) == sum(errors.values())
        written.append(data)
    sum_, really = total(written), Counter[str]()
    for shapes, _, _ in rounds:
        really.update(shapes)
    assert sum(sum_.shapes.values()) == sum(really.values()), "what is folded is summed over the run"
    for shape, count in really.items():
        told = sum_.shapes.get(shape, 0)
        assert count - minimum < told <= count and (told == 0 or told >= minimum), "only the last few are kept back"


# Arbitrary sessions.

CALLS = st.lists(
    st.tuples(
        st.sampled_from(
            ["joined", "assigned", "training", "sending", "whole", "away", "closed", "counted", "refused", "late",
             "released", "gave_up", "gone"]
        ),
        st.integers(0, 3),
    ),
    max_size=60,
)  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(CALLS, st.integers(0, 60))
def test_every_session_has_one_shape_whatever_happens(calls: list[tuple[str, int]], taken_at: int) -> None:
    made, opened, open_now = Analytics(), 0, set[bytes]()
    seen = Seen()
    for number, (what, device) in enumerate(calls):
        nonce, now_s = bytes([device]), float(number)
        opened += what == "joined" and nonce not in open_now
        _call(made, what, nonce, now_s)
        if what == "joined":
            open_now.add(nonce)
        elif what in ("closed", "refused", "late", "released", "gave_up", "gone"):
            open_now.discard(nonce)
        if number == taken_at:
            seen.merge(made.take())
        assert made.num_open == len(open_now)
    seen.merge(made.take())
    assert sum(seen.shapes.values()) + made.num_open == opened
    ways = seen.shapes.keys() - {OTHER}  # what one device had twice is no shape of its own
    assert all(shape[0] == "-" and shape[-1] in "^#x!*" and shape[1:-1] in "v[]+" for shape in ways)
    assert Seen.from_json(json.loads(json.dumps(seen.to_json()))) == seen


def _call(made: Analytics, what: str, nonce: bytes, now_s: float) -> None:
    match what:
        case "assigned":
            made.assigned(nonce, now_s, waited_s=1.0)
        case "joined" | "training" | "gone":
            getattr(made, what)(nonce)
        case "closed":
            made.closed([nonce], now_s)
        case "counted" | "refused" | "released":
            made.told(nonce, what, "bad weight", now_s)
        case "late":
            made.told(nonce, "refused", "late", now_s)
        case "gave_up":
            made.gave_up(nonce, "training", now_s)
        case _:
            getattr(made, what)(nonce, now_s)


# A live host.


async def until(fleet: toy.Fleet, members: int) -> None:
    """Until so many train or are counted."""
    while (now := fleet.host.coordinator.snapshot()).outstanding + now.counted != members:
        await asyncio.sleep(0.002)


@toy.in_loop
async def test_a_round_of_a_host_is_in_the_record() -> None:
    policy = RoundPolicy(goal=2, minimum_group=1, minimum_fraction=1.0, over_selection=1.5)
    made = toy.plan(policy)
    async with toy.fleet(made) as fleet, toy.peer(fleet.link) as peer, toy.peer(fleet.link, "broken") as broken:
        await broken.check_in(runtime=pb.RuntimeInfo(kind="abacus", version=[1, 0, 0]))
        assert (await broken.hear())[0] == "incompatible"
        fleet.start(toy.device("a", fleet.link))
        assigning = asyncio.create_task(peer.assigned())
        async with toy.peer(fleet.link, "lost") as lost:
            await lost.assigned()
            token = (await assigning).token
            await until(fleet, 3)
        await until(fleet, 2)
        await peer.say(gave_up=pb.GaveUp(token=token, stage="training", why="a device's own words"))
        await until(fleet, 1)
        fleet.start(toy.device("b", fleet.link))
        await asyncio.wait_for(fleet.tasks[0], timeout=15)
        (row,) = fleet.store.rounds(fleet.host.run_id)
        seen = Seen.from_json(row.analytics)
        assert seen.counts["selected"] == row.selected and seen.counts["counted"] == 2 == seen.shapes["-v[]+^"]
        assert seen.shapes["-v[*"] == 1 and seen.counts["lost"] == 1 and "own words" not in json.dumps(row.analytics)
        assert {k: e.count for k, e in seen.errors.items()} == {
            "incompatible": 1, "gave up training": 1, "stream broke": 1,
        }  # fmt: skip
        assert sum(seen.times["train"].values()) == 2 and row.analytics["seconds"]["selecting"] >= 0.0


@toy.in_loop
async def test_a_round_that_is_abandoned_says_what_was_seen() -> None:
    policy = RoundPolicy(goal=2, minimum_group=1, minimum_fraction=1.0, over_selection=1.0)
    async with toy.fleet(toy.plan(policy)) as fleet, toy.peer(fleet.link) as peer:
        fleet.start(toy.device("a", fleet.link))
        token = (await peer.assigned()).token
        while fleet.host.coordinator.snapshot().counted != 1:
            await asyncio.sleep(0.002)
        fleet.host.coordinator.stop()
        await peer.say(gave_up=pb.GaveUp(token=token, stage="fetching"))
        await asyncio.wait_for(fleet.tasks[0], timeout=15)
        (row,) = fleet.store.rounds(fleet.host.run_id)
        assert row.state == "abandoned" and row.reason.startswith("1 of at least 2")
        assert row.analytics["counts"] == {"check_ins": 2, "selected": 2, "gave_up": 1}
        assert row.analytics["shapes"] == {"-*": 1}, "the group of the other goes on"
        assert row.analytics["errors"]["gave up fetching"]["count"] == 1


def test_a_virtual_fleet_sees_the_shapes_of_the_paper() -> None:
    policy = RoundPolicy(
        goal=100, over_selection=1.3, selection_window_s=60.0, reporting_window_s=240.0, minimum_group=8
    )
    fleet = virtual_fleet(VirtualPopulation(devices=20_000, seed=1), policy, rounds=5)
    fleet.run(until_s=6 * 3600.0)
    rows = fleet.coordinator.store.rounds("virtual")
    assert len(rows) == 5 and all(row.state == "committed" for row in rows)
    seen = total(row.analytics for row in rows)
    assert seen.shapes["-v[]+^"] == sum(row.counted for row in rows) == seen.counts["counted"]
    assert seen.shapes["-v[!"] > 0 and seen.shapes["-vx"] > 0 and seen.errors["stream broke"].count > 0
    assert seen.counts["selected"] <= seen.counts["check_ins"] <= fleet.tally.num_check_ins
    assert 20.0 < quantile(seen.times["train"], 0.5) < 120.0


def test_patched_updates_are_counted_as_such() -> None:
    policy = RoundPolicy(goal=50, over_selection=1.3, late=Late.patch(max_staleness=3))
    fleet = virtual_fleet(VirtualPopulation(devices=20_000, seed=1), policy, rounds=6)
    fleet.run(until_s=6 * 3600.0)
    seen = total(row.analytics for row in fleet.coordinator.store.rounds("virtual"))
    assert 0 < seen.counts["patched"] < seen.counts["counted"] and "discounted" not in seen.counts
