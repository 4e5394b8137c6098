"""`shoal embed`: its four commands on a small store and a small trace."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from shoal.cli.main import app
from shoal.clock import SystemClock
from shoal.embed import EmbeddingStore, Layout, Trace
from tests.embed.builders import ROWS, small_store, vectors

Run = Callable[..., Result]


@pytest.fixture
def run() -> Run:
    return lambda *words: CliRunner().invoke(app, ["embed", *map(str, words)])


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    """Queries of neighbours in a random order of rows."""
    rng = np.random.default_rng(0)
    order = rng.permutation(ROWS)
    starts = (rng.random(400) ** 2 * (ROWS - 30)).astype(int)
    Trace.of([order[s + rng.choice(30, 12, replace=False)].tolist() for s in starts], ROWS).save(
        tmp_path / "clicks.npz"
    )
    return tmp_path / "clicks.npz"


def test_inspect_tells_and_verifies(tmp_path: Path, run: Run) -> None:
    small_store(tmp_path / "store").close()
    made = run("inspect", tmp_path / "store", "--verify")
    assert made.exit_code == 0 and "2,000" in made.stdout and "asked for" in made.stdout
    told = json.loads(run("inspect", tmp_path / "store", "--json").stdout)
    assert told["tables"]["items"]["rows"] == ROWS and told["damaged"] == {}


@pytest.mark.slow
def test_long_work_shows_how_far_it_is(tmp_path: Path, run: Run, trace: Path) -> None:
    small_store(tmp_path / "store").close()
    assert "items: checking: 63 blocks" in run("inspect", tmp_path / "store", "--verify").stderr
    said = run("place", tmp_path / "store", trace, "--effort", "high", "--space", "0.2").stderr
    for piece in (
        "placing by 280 queries: 2,000 rows",
        "annealing: 2,000 rows",
        "trying caches by 120 queries",
        "writing: 75 blocks",
    ):
        assert f"items: {piece}" in said
    with EmbeddingStore.open(tmp_path / "store") as store:
        assert store.statistics().tables["items"].copies == 12 * 32
    said = run("replay", trace, "--out", tmp_path / "curves.png").stderr
    assert "placing by 200 queries: 2,000 rows" in said and "replaying: 54 caches" in said


def test_inspect_of_a_damaged_store_ends_with_1(tmp_path: Path, run: Run) -> None:
    small_store(tmp_path / "store").close()
    with (tmp_path / "store" / "items.blocks").open("r+b") as file:
        file.seek(5 * 4096)
        file.write(b"\0\1\2\3")
    made = run("inspect", tmp_path / "store", "--verify")
    assert made.exit_code == 1 and "1 damaged block: [5]" in made.stdout


def test_place_learns_and_writes(tmp_path: Path, run: Run, trace: Path) -> None:
    with small_store(tmp_path / "store") as store:
        store.place("items", Layout.at_random(ROWS, 32, seed=5))
    told = json.loads(run("place", tmp_path / "store", trace, "--json").stdout)
    assert told["reads_after"] < 0.6 * told["reads_before"] and told["written_blocks"] > 50
    with EmbeddingStore.open(tmp_path / "store") as store:
        np.testing.assert_array_equal(store.lookup("items", np.arange(ROWS)), vectors())
    told = json.loads(run("place", tmp_path / "store", trace, "--most-blocks", 5, "--json").stdout)
    assert told["written_blocks"] <= 5
    said = run("place", tmp_path / "store", trace, "--most-blocks", 5).stdout
    assert "(replayed over the trace that it was learned from)" in said


def test_efforts_are_named(tmp_path: Path, run: Run, trace: Path) -> None:
    made = run("place", tmp_path, trace, "--effort", "most")
    assert made.exit_code == 2 and "'normal', 'high'" in made.stderr


def test_replay_draws(tmp_path: Path, run: Run, trace: Path) -> None:
    made = run("replay", trace, "--out", tmp_path / "curves.png")
    assert made.exit_code == 0 and f"wrote: {tmp_path / 'curves.png'}" in made.stdout
    assert (tmp_path / "curves.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize("words", [["replay"], ["tune", "--price", "dram=4,nvme=1"]])
def test_ids_that_are_hashes_are_refused_before_they_take_memory(tmp_path: Path, run: Run, words: list[str]) -> None:
    Trace.of([[k, 2**62 + k] for k in range(100)], 2**63 - 1).save(tmp_path / "hashes.npz")
    made = run(words[0], tmp_path / "hashes.npz", *words[1:])
    assert made.exit_code == 1 and "Number the ids anew" in made.stderr


def test_a_budget_that_is_overdrawn_is_called_so(tmp_path: Path, run: Run) -> None:
    small_store(tmp_path / "store", clock=SystemClock()).close()
    assert "may be written on the store's own account now" in run("inspect", tmp_path / "store").stdout
    with EmbeddingStore.open(tmp_path / "store") as store:
        store.load("items", vectors())
    assert "write budget: overdrawn by" in run("inspect", tmp_path / "store").stdout


def test_tune_names_the_cheapest_mix(run: Run, trace: Path) -> None:
    told: dict[str, Any] = json.loads(run("tune", trace, "--price", "dram=4,nvme=0.1", "--json").stdout)
    assert told["cheapest"]["money"] == min(one["money"] for one in told["mixes"])
    fast = json.loads(run("tune", trace, "--price", "dram=4,nvme=0.1", "--p99", "10us", "--json").stdout)
    assert fast["cheapest"]["eviction"] == "all in memory"


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["tune", "TRACE", "--price", "dram=4"], "Expected --price dram=MONEY,nvme=MONEY"),
        (["tune", "TRACE", "--price", "dram=4,nvme=1", "--p99", "fast"], "Expected --p99 like 500us"),
        (["tune", "TRACE", "--price", "dram=4,nvme=1", "--device", "tape"], "Expected --device to be one of"),
        (["replay", "TRACE", "--dtype", "int4"], "Expected --dtype to be one of"),
        (["replay", "TRACE", "--out", "curves"], "Expected --out to end in .png, .svg, .pdf, got 'curves'"),
        (["inspect", "nowhere"], "There is no embedding store in"),
        (["replay", "nowhere.npz"], "Expected a trace"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(run: Run, trace: Path, words: list[str], text: str) -> None:
    made = run(*[trace if word == "TRACE" else word for word in words])
    assert made.exit_code == 1
    assert text in made.stderr and len(made.stderr.strip().splitlines()[-1]) < 400
