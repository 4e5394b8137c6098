"""Long work tells how far it is: each piece from its beginning to its end, seldom enough, in order."""

import os
from collections.abc import Iterable
from itertools import groupby, pairwise
from pathlib import Path

import numpy as np
import pytest

from shoal.embed import Trace
from shoal.embed.partition import Settings, partition
from shoal.embed.progress import Meter, Progress, at_rate, parts, shown
from tests.embed.builders import ROWS, small_store, vectors

pytestmark = pytest.mark.timeout(240)  # the first test of a fresh checkout compiles


def clicks() -> Trace:
    """Queries of neighbours."""
    rng = np.random.default_rng(0)
    starts = (rng.random(300) ** 2 * (ROWS - 30)).astype(int)
    return Trace.of([(s + rng.choice(30, 12, replace=False)).tolist() for s in starts], ROWS)


def pieces(told: Iterable[Progress]) -> dict[str, list[Progress]]:
    """What was told of each piece; each is told of without another between."""
    made: dict[str, list[Progress]] = {}
    for what, group in groupby(told, key=lambda one: one.what):
        assert what not in made
        made[what] = list(group)
    return made


def test_a_meter_tells_of_its_beginning_of_its_end_and_seldom_between() -> None:
    told: list[Progress] = []
    meter = Meter(told.append, "writing", 10_000, "blocks")
    for _ in range(10_000):
        meter.advance()
    assert told[0].done == 0 and told[-1].done == told[-1].total == 10_000 and 100 < len(told) < 250
    assert all(before.done < after.done for before, after in pairwise(told))
    assert str(told[-1]) == "writing: 100 % of 10,000 blocks"
    empty: list[Progress] = []
    Meter(empty.append, "writing", 0, "blocks")
    assert [one.share for one in empty] == [0]


def test_parts_add_up_by_their_costs() -> None:
    told: list[float] = []
    first, _, last = parts(told.append, [1, 0, 3])
    first(0.5), first(1.0), last(0.0), last(1.0)
    assert told == [0.125, 0.25, 0.25, 1.0]


def test_a_partition_tells_of_splits_annealing_and_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shoal.embed.partition._TOGETHER", 1 << 12)
    told: list[float] = []
    settings = Settings(multilevel=True, anneal=20, passes=2, stop=0.0)
    order = partition(clicks(), 32, settings, progress=told.append)
    assert all(before <= after for before, after in pairwise(told)) and told[-1] == 1.0
    splits, annealed = 1 / sum(settings.costs), 1 - settings.costs[2] / sum(settings.costs)
    assert sum(share < splits for share in told) > 10 and sum(splits < share <= annealed for share in told) > 3
    monkeypatch.undo()
    np.testing.assert_array_equal(partition(clicks(), 32, settings), order)  # telling changes nothing


def test_the_pieces_of_retrain_load_and_verify(tmp_path: Path) -> None:
    with small_store(tmp_path) as store:
        told: list[Progress] = []
        store.load("items", vectors(), progress=told.append)
        assert [(one.what, one.done, one.total) for one in told] == [
            ("items: writing", 0, 63),
            ("items: writing", 63, 63),
        ]
        told.clear()
        shuffled = clicks().renamed(np.random.default_rng(1).permutation(ROWS))
        store.retrain(shuffled, effort="high", progress=told.append)
        made = pieces(told)
        assert list(made) == [
            "items: placing by 210 queries", "items: annealing", "items: trying caches by 90 queries", "items: writing",
        ]  # fmt: skip
        for piece in made.values():
            assert piece[0].done == 0 and piece[-1].done == pytest.approx(piece[-1].total)
            assert all(before.done <= after.done for before, after in pairwise(piece))
        assert len(made["items: placing by 210 queries"]) > 20
        told.clear()
        store.retrain(clicks(), most_blocks=3, progress=told.append)
        assert list(pieces(told)) == ["items: placing anew from where rows lie"]
        told.clear()
        assert store.verify(progress=told.append) == {"items": []}
        assert pieces(told)["items: checking"][-1].share == 1


def test_a_bar_is_for_terminals_only(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for wanted, on_terminal, seen in ((True, False, False), (False, True, False), (True, True, True)):
        monkeypatch.setattr("sys.stderr.isatty", lambda on=on_terminal: on, raising=False)
        monkeypatch.setitem(os.environ, "FORCE_COLOR", "1")
        with shown(wanted) as tell:
            meter = Meter(tell, "items: checking", 4, "blocks")
            for _ in range(4):
                meter.advance()
        assert ("items: checking" in capsys.readouterr().err) == seen


def test_rates_are_said_as_people_read_them() -> None:
    assert at_rate(1_234_567.8, "rows") == "1,234,568 rows/s" and at_rate(0.12345, "blocks") == "0.123 blocks/s"
