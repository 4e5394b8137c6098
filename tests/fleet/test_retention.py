"""A host whose run keeps little: what it sweeps while it runs, and that it can be taken up again."""

import asyncio
from collections.abc import Mapping
from typing import Any

import pytest

from shoal.fleet import coordinator
from shoal.policy import Late, RoundPolicy
from shoal.record.retention import SETTING, Retention
from shoal.simulate.virtual import virtual_fleet
from shoal.simulate.virtual_population import VirtualPopulation
from tests.fleet import toy

ALWAYS = VirtualPopulation(devices=200, window_hours=24.0, daily_swing=1.0, train_s=10.0)
PATCHED = RoundPolicy(
    goal=10, selection_window_s=10.0, reporting_window_s=40.0, late=Late.patch(max_staleness=3), minimum_group=1
)


def test_expired_tokens_and_old_finals_go_while_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coordinator, "SWEEP_EVERY", 5)
    fleet = virtual_fleet(ALWAYS, PATCHED, rounds=40)
    fleet.run(until_s=1e6)
    store, finals = fleet.coordinator.store, range(40)
    kept = [version for version in finals if store.final("virtual", version) is not None]
    assert kept and kept[0] >= 40 - 5 - PATCHED.max_staleness
    assert not any(commit.is_swept for commit in store.commits("virtual")), "nobody asked for it"


@toy.in_loop
async def test_old_versions_go_while_it_runs() -> None:
    config = {SETTING: Retention(recent=2, every=4).to_json()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(coordinator, "SWEEP_EVERY", 3)
        await grown(config)


async def grown(config: Mapping[str, Any]) -> None:
    async with toy.fleet(toy.plan(toy.exact("a")), rounds=9, config=config) as fleet:
        fleet.start(toy.device("a", fleet.link))
        await asyncio.wait_for(asyncio.gather(*fleet.tasks), timeout=20)
        whole = [commit.version for commit in fleet.store.commits(fleet.host.run_id) if not commit.is_swept]
        assert whole == [0, 4, 8, 9]
        assert fleet.model["params/w"][0] == 9.0


@pytest.mark.parametrize("text", ["", "x", "0", "3:-1", "1:2:3"])
def test_what_is_no_retention_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="Expected RECENT or RECENT:EVERY"):
        Retention.parse(text)


def test_a_retention_reads_back() -> None:
    kept = Retention.parse("100:1000")
    assert Retention.of({"retention": kept.to_json()}) == kept == Retention(recent=100, every=1000)
    assert Retention.of({}) is None
