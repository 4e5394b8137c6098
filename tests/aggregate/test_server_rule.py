"""The server rules against the paper's pseudocode, written with plain floats one element at a time."""

import math

import numpy as np
import pytest

from shoal import server
from shoal.aggregate.server_rule import initial_slot, slots, step
from shoal.policy import ServerRule


def algorithm_2(rule: ServerRule, x: float, deltas: list[float]) -> float:
    """Reddi et al. 2021, algorithm 2: FedAdagrad, FedYogi, FedAdam."""
    tau, eta, b1, b2 = rule.eps, rule.learning_rate, rule.b1, rule.b2
    m, v = 0.0, tau**2
    for delta in deltas:
        m = b1 * m + (1 - b1) * delta
        if rule.kind == "adagrad":
            v = v + delta**2
        if rule.kind == "yogi":
            v = v - (1 - b2) * delta**2 * math.copysign(1.0, v - delta**2) * (v != delta**2)
        if rule.kind == "adam":
            v = b2 * v + (1 - b2) * delta**2
        x = x + eta * m / (math.sqrt(v) + tau)
    return x


@pytest.mark.parametrize(
    "rule", [server.adagrad(0.1), server.yogi(0.05, b1=0.5), server.adam(0.02, b2=0.9)], ids=lambda rule: rule.kind
)
def test_a_rule_is_the_papers(rule: ServerRule) -> None:
    deltas = np.random.default_rng(0).normal(size=(10, 4))
    value, kept = np.zeros(4), {slot: np.full(4, initial_slot(rule, slot)) for slot in slots(rule)}
    for delta in deltas:
        after = step(rule, value, delta, kept)
        value, kept = after["value"], {slot: after[slot] for slot in slots(rule)}
    expected = [algorithm_2(rule, 0.0, deltas[:, i].tolist()) for i in range(4)]
    np.testing.assert_allclose(value, expected, rtol=1e-12)


def test_sgd_at_rate_1_is_federated_averaging() -> None:
    np.testing.assert_array_equal(step(server.sgd(), np.ones(2), np.array([0.5, -1.0]), {})["value"], [1.5, 0.0])


def test_no_momentum_is_sgd_and_momentum_heaps_up() -> None:
    assert slots(server.sgd()) == () and slots(server.sgd(momentum=0.9)) == ("m",)
    value, kept = np.zeros(1), {"m": np.zeros(1)}
    for _ in range(3):
        after = step(server.sgd(1.0, momentum=0.5), value, np.ones(1), kept)
        value, kept = after["value"], {"m": after["m"]}
    assert value[0] == 1.0 + 1.5 + 1.75
