"""Noise on examples in a fleet: a device's key is its own, and so is the account of what its examples have spent."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shoal.errors import DataError, PlanError, StoreError, StoreUnavailable
from shoal.fleet.configuration import round_seed
from shoal.fleet.device_file import DeviceFile
from shoal.fleet.device_host import DeviceHost
from shoal.fleet.example_ledger import ExampleBudget, cost, epsilon
from shoal.fleet.floor import Floor
from shoal.fleet.host import run_seed
from shoal.fleet.updates import Updates
from shoal.plan.train import member_randomness, program_key
from shoal.policy import ExamplePrivacy, Privacy
from tests.fleet import toy
from tests.fleet.toy import in_loop

HIDES = Privacy(examples=ExamplePrivacy(clip_norm=1.0, noise_multiplier=2.0))
ROUND = 1 / 8
"""What a round of one epoch spends: 1 / (2 * 2^2)."""


def plan(**changes: Any) -> Any:
    return toy.plan(toy.exact("a"), **{"privacy": HIDES, **changes})


class Keys(toy.ToyRunner):
    """Keeps the keys that it was fed."""

    fed: list[np.ndarray]

    def block(self, batches: Any, mask: np.ndarray, key: np.ndarray) -> None:
        self.fed.append(key)
        super().block(batches, mask, key)


async def keys_of_a_fleet(made: Any, random: Any, *, rounds: int) -> list[np.ndarray]:
    Keys.fed = []
    host = DeviceHost(make_runner=Keys, runtime=toy.RUNTIME, random=random)
    async with toy.fleet(made, rounds=rounds) as fleet:
        fleet.start(toy.device("a", fleet.link, host=host))
        await fleet.tasks[0]
    return Keys.fed


@in_loop
async def test_the_key_is_made_of_what_the_device_draws_and_of_nothing_that_the_server_knows() -> None:
    drawn: list[bytes] = []

    def random(size: int) -> bytes:
        drawn.append(os.urandom(size))
        return drawn[-1]

    keys = await keys_of_a_fleet(plan(), random, rounds=2)
    assert len(keys) == len(drawn) == 2 and drawn[0] != drawn[1], "each training has a secret of its own"
    for version, (key, secret) in enumerate(zip(keys, drawn, strict=True)):
        public = member_randomness(round_seed(run_seed(0), version), "a").key
        np.testing.assert_array_equal(key, program_key(HIDES, public, noise_seed=secret, member="a"))
        from_server = program_key(HIDES, public, noise_seed=round_seed(run_seed(0), version), member="a")
        assert not set(key.tolist()) & {*public.tolist(), *from_server.tolist()}


@in_loop
async def test_other_tasks_have_the_round_s_key() -> None:
    keys = await keys_of_a_fleet(plan(privacy=None), os.urandom, rounds=1)
    np.testing.assert_array_equal(keys[0], member_randomness(round_seed(run_seed(0), 0), "a").key)


def test_devices_draw_from_the_system() -> None:
    assert DeviceHost(make_runner=toy.ToyRunner, runtime=toy.RUNTIME).random is os.urandom


@in_loop
async def test_how_many_examples_a_device_has_is_not_told(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Any] = []
    hear = Updates.report
    monkeypatch.setattr(Updates, "report", lambda self, *given: (told.append(given), hear(self, *given))[1])
    async with toy.fleet(plan()) as fleet:
        fleet.start(toy.device("a", fleet.link))
        await fleet.tasks[0]
    (report,) = (part for given in told for part in given if hasattr(part, "costs"))
    assert report.costs.examples == 0 and report.costs.padding == 0


def device_host(folder: Path, **floor: Any) -> DeviceHost:
    return DeviceHost(
        make_runner=toy.ToyRunner, runtime=toy.RUNTIME, state_folder=folder, floor=Floor(**floor)
    )  # fmt: skip


@in_loop
async def test_every_update_is_written_down_over_restarts_and_runs(tmp_path: Path) -> None:
    for begun in range(2):
        host = device_host(tmp_path)
        assert host.example_ledger("a").rho == 2 * begun * ROUND
        async with toy.fleet(plan(), rounds=2) as fleet:
            fleet.start(toy.device("a", fleet.link, host=host))
            await fleet.tasks[0]
    assert device_host(tmp_path).example_ledger("a").rho == 4 * ROUND
    assert device_host(tmp_path).example_ledger("b").rho == 0


@in_loop
async def test_a_device_stops_where_its_budget_does(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    enough = ExampleBudget(epsilon=epsilon(2.5 * ROUND, 1e-6))
    async with toy.fleet(plan(), rounds=4) as fleet:
        device = toy.device("a", fleet.link, host=device_host(tmp_path, examples=enough))
        with pytest.raises(DataError, match="does not allow another update of task 'toy'") as raised:
            await device.run()
        assert device.progress.counted == 2
    assert "epsilon 3.54 at delta 1e-06; an update of task 'toy' would bring it to 4.44" in caplog.text
    assert not set("0123456789") & set(str(raised.value)), "the server is told, but no number"
    assert device_host(tmp_path).example_ledger("a").rho == 2 * ROUND


@pytest.mark.parametrize(
    ("budget", "made", "text"),
    [
        (ExampleBudget(epsilon=8.0), {"privacy": None}, "has no noise on single examples"),
        (ExampleBudget(epsilon=1.0), {}, r"spends epsilon 2\.42 of an example in one round.*allows 1 in all"),
    ],
)
@in_loop
async def test_a_device_asks_for_noise(tmp_path: Path, budget: ExampleBudget, made: dict[str, Any], text: str) -> None:
    async with toy.fleet(plan(**made)) as fleet:
        with pytest.raises(PlanError, match=text):
            await toy.device("a", fleet.link, host=device_host(tmp_path, examples=budget)).run()
    assert device_host(tmp_path).example_ledger("a").rho == 0


@in_loop
async def test_nothing_is_sent_that_cannot_be_written_down(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*given: Any) -> None:
        raise StoreUnavailable("the disk is full")

    monkeypatch.setattr(DeviceFile, "add_rho", full)
    async with toy.fleet(plan()) as fleet:
        device = toy.device("a", fleet.link, host=device_host(tmp_path))
        with pytest.raises(StoreError, match="the disk is full"):
            await device.run()
        assert device.progress.up_bytes == 0 and fleet.members[1:] == []


def test_what_an_update_costs() -> None:
    assert cost(plan().manifest) == ROUND
    assert cost(plan(privacy=None).manifest) == 0.0
    for wrong in ({"epsilon": 0.0}, {"epsilon": 1.0, "delta": 0.0}):
        with pytest.raises(ValueError, match="Expected"):
            ExampleBudget(**wrong)
