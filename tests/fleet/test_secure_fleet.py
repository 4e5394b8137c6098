"""Secure groups in a live fleet: sums that are exact, of which the Edge sees no part, whoever goes away, whatever stream breaks."""

from typing import Any

import numpy as np
import pytest

from shoal.fleet.device import Device
from shoal.plan.plan import Plan
from shoal.policy import Privacy, RoundPolicy, Secure
from tests.fleet import toy
from tests.fleet.toy import in_loop

SECURE = Privacy(delta_bound=8.0, clip_norm=1000.0, secure=Secure(members=16, colluders=0.0, dropouts=0.3))
NUM = 12


def policy(**changes: Any) -> RoundPolicy:
    return RoundPolicy(**{"goal": NUM, "minimum_group": 4, "over_selection": 1.0, "selection_window_s": 5.0, **changes})


def plan(shapes: dict[str, tuple[int, ...]] | None = None, **changes: Any) -> Plan:
    made = policy(**changes.pop("rounds", {}))
    return toy.plan(made, shapes or toy.ONE, **{"privacy": SECURE, "max_weight": 16, **changes})


def devices(link: Any, num: int = NUM, **named: Any) -> list[Device]:
    return [toy.device(f"device-{i}", link, value=0.25 * i - 1.0, num=1 + i % 4, **named) for i in range(num)]


def mean(num: int = NUM) -> float:
    weights = np.array([1 + i % 4 for i in range(num)])
    return float(np.sum(weights * (0.25 * np.arange(num) - 1.0)) / np.sum(weights))


@in_loop
async def test_a_round_in_a_secure_group_is_the_exact_mean_with_weights() -> None:
    async with toy.fleet(plan()) as fleet:
        fleet.start(*devices(fleet.link))
        await fleet.tasks[0]
        assert fleet.members == [0, NUM]
        assert fleet.model["params/w"] == pytest.approx(mean(), abs=1e-6)


@in_loop
async def test_large_vectors_are_pushed(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = {"params/w": (300, 100), "params/b": (7,)}
    async with toy.fleet(plan(shapes)) as fleet:
        fleet.start(*devices(fleet.link))
        await fleet.tasks[0]
        assert np.allclose(fleet.model["params/w"], mean(), atol=1e-6)
        assert fleet.host.edge.statistics().staged_now == 0


@in_loop
async def test_several_rounds_and_groups() -> None:
    secure = Privacy(delta_bound=8.0, clip_norm=1000.0, secure=Secure(members=6, colluders=0.0, dropouts=0.2))
    async with toy.fleet(plan(privacy=secure), rounds=3) as fleet:
        fleet.start(*devices(fleet.link))
        await fleet.tasks[0]
        assert fleet.members == [0, NUM, NUM, NUM]
        assert fleet.model["params/w"] == pytest.approx(3 * mean(), abs=1e-5)
