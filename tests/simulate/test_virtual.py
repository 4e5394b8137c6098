"""The virtual fleet: the same machines, so the same rules; and what a population's numbers mean."""

from pathlib import Path

import numpy as np
import pytest

from shoal.data.store import Examples, Population
from shoal.errors import DataError
from shoal.policy import Late, RoundPolicy
from shoal.record.memory import MemoryStore
from shoal.simulate.virtual import DAY_S, virtual_fleet
from shoal.simulate.virtual_population import Network, VirtualPopulation
from shoal.simulate.virtual_training import VirtualTraining
from tests.fleet import toy

SMALL = VirtualPopulation(devices=3_000, window_hours=12.0)
PAPER = RoundPolicy(goal=50, over_selection=1.3, selection_window_s=60.0, reporting_window_s=200.0, adaptive=False)
PATCHED = RoundPolicy(
    goal=50, over_selection=1.3, selection_window_s=60.0, reporting_window_s=200.0, late=Late.patch(max_staleness=10)
)


def test_a_seed_is_a_history() -> None:
    def told(seed: int) -> object:
        fleet = virtual_fleet(VirtualPopulation(devices=500, window_hours=12.0, seed=seed), PAPER)
        fleet.run(until_s=600.0)
        return fleet.tally

    assert told(1) == told(1) != told(2)


def test_rounds_follow_one_another_without_gap() -> None:
    fleet = virtual_fleet(SMALL, PATCHED)
    fleet.run(until_s=1200.0)
    store = fleet.coordinator.store
    commits = list(store.commits("virtual"))
    assert [commit.version for commit in commits] == list(range(len(commits))) and len(commits) > 5
    assert [row.number for row in store.rounds("virtual")] == list(range(1, len(store.rounds("virtual")) + 1))
    assert sum(updates for _, updates, _ in fleet.tally.commits) == sum(commit.members for commit in commits)


@pytest.mark.slow
def test_static_windows_and_discarded_work_waste_what_the_paper_says_and_patching_does_not() -> None:
    wasted = {}
    for name, policy in {"paper": PAPER, "patched": PATCHED}.items():
        fleet = virtual_fleet(SMALL, policy)
        fleet.run(until_s=2400.0)
        wasted[name] = fleet.tally.wasted
    assert wasted["paper"] > 0.15, "a fifth of the work and more is for nothing"
    assert wasted["patched"] < 0.03


def test_every_second_of_training_is_accounted_for() -> None:
    fleet = virtual_fleet(SMALL, PAPER)
    fleet.run(until_s=1500.0)
    seconds = fleet.tally.seconds
    trained = sum(seconds[fate] for fate in ("used", "aborted", "unused", "dropped"))
    assert fleet.tally.assigned * 5.0 < trained < fleet.tally.assigned * 300.0
    assert seconds["dropped"] / trained == pytest.approx(0.08, abs=0.05)


def test_as_many_devices_may_serve_as_the_swing_says() -> None:
    fleet = virtual_fleet(VirtualPopulation(devices=50_000, daily_swing=4.0), PAPER)
    hours = np.arange(24) * 3600.0
    since = (hours[:, None] - fleet._start_s[None, :]) % DAY_S
    able = (since < fleet._window_s[None, :]).sum(axis=1)
    assert able.max() / able.min() == pytest.approx(4.0, rel=0.15)
    assert able.mean() == pytest.approx(50_000 * 3.0 / 24.0, rel=0.05)


def test_asynchronous_rounds_run_too() -> None:
    policy = RoundPolicy(goal=20, buffer=20, concurrency=60, late=Late.discount(1.0, max_staleness=20))
    fleet = virtual_fleet(SMALL, policy)
    fleet.run(until_s=900.0)
    assert len(fleet.tally.commits) > 10 and fleet.coordinator.snapshot().outstanding <= 60


def test_what_a_fleet_does_without_is_seen() -> None:
    whole, unsteered, not_told = (
        virtual_fleet(SMALL, PAPER, **settings) for settings in ({}, {"steers": False}, {"aborts": False})
    )
    for fleet in (whole, unsteered, not_told):
        fleet.run(until_s=900.0)
    assert unsteered.tally.num_check_ins > 2 * whole.tally.num_check_ins, "all come every minute"
    assert whole.tally.seconds["aborted"] > 0.0 and not_told.tally.seconds["aborted"] == 0.0
    assert not_told.tally.seconds["unused"] > 0.0, "they train to the end, for nothing"


def test_interrupted_devices_report_the_blocks_they_did() -> None:
    short = VirtualPopulation(devices=3_000, window_hours=1.0, daily_swing=1.0, drop_out=0.2, interrupted=1.0)
    dropped = {}
    for name, blocks_of in {"drop": None, "partial": lambda device: 10}.items():
        fleet = virtual_fleet(short, PAPER, blocks_of=blocks_of)
        fleet.run(until_s=1200.0)
        seconds = fleet.tally.seconds
        dropped[name] = seconds["dropped"] / sum(seconds[fate] for fate in ("used", "aborted", "unused", "dropped"))
    assert dropped["drop"] > 0.1
    assert dropped["partial"] < 0.01, "only those that had not done a block"


def test_the_population_of_the_examples_is_one() -> None:
    path = Path(__file__).parents[2] / "examples" / "population.toml"
    assert VirtualPopulation.read(path).devices == 20_000


def test_a_population_comes_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "population.toml"
    path.write_text(
        'devices = 500\ntrain_s = 30\n\n[[networks]]\nname = "lte"\nshare = 1\nup_mbit_s = 5.0\ndown_mbit_s = 20\n'
    )
    read = VirtualPopulation.read(path)
    assert read == VirtualPopulation(
        devices=500, train_s=30.0, networks=(Network(name="lte", up_mbit_s=5.0, down_mbit_s=20.0),)
    )


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("devices = 0", "1 <= devices"),
        ("seed = -1", "seed >= 0"),
        ("device = 10", "expected settings among devices, "),
        ("drop_out = 1.5", "drop_out <= 0.9"),
        ('devices = "many"', "Expected devices"),
        ("devices =", "no TOML"),
        ("[[networks]]\nspeed = 1", "speed"),
        ("networks = 3", "networks"),
    ],
)
def test_a_bad_file_is_refused_with_one_clear_line(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "population.toml"
    path.write_text(text)
    with pytest.raises(DataError, match=said) as error:
        VirtualPopulation.read(path)
    assert "\n" not in str(error.value)


def test_users_without_examples_can_play_no_device() -> None:
    none = Population.from_arrays({"a": Examples({"x": np.zeros(0, np.float32)})})
    plan = toy.plan(RoundPolicy(goal=8))
    with pytest.raises(DataError, match="got 1 with none"):
        VirtualTraining(plan, none, MemoryStore(), "run", seed=0, runner=toy.ToyRunner(plan))


def test_devices_that_rest_keep_nobody_out() -> None:
    policy = RoundPolicy(
        goal=20, over_selection=1.0, selection_window_s=30.0, reporting_window_s=200.0, min_separation=8
    )
    fleet = virtual_fleet(VirtualPopulation(devices=200, window_hours=24.0), policy)
    fleet.run(until_s=2 * 3600.0, commits=20)
    assert len(fleet.tally.commits) >= 20, "160 are enough, as those who rest do not fill the places of those who wait"


def test_too_few_devices_to_rest_are_told(caplog: pytest.LogCaptureFixture) -> None:
    policy = RoundPolicy(
        goal=20, over_selection=1.0, selection_window_s=30.0, reporting_window_s=200.0, min_separation=8
    )
    fleet = virtual_fleet(VirtualPopulation(devices=100, window_hours=24.0), policy)
    fleet.run(until_s=3600.0)
    assert len(fleet.tally.commits) == 5
    told = [record.getMessage() for record in caplog.records if "rest (min_separation=8" in record.getMessage()]
    assert len(told) == 1 and "takes 160 devices or more" in told[0], told
