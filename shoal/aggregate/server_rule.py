"""The server's step along the mean update, element by element, in NumPy: the same bits on every machine.

Only additions, products, quotients and square roots of float64 are used, each rounded once as IEEE 754 says, and never
contracted into one another as a compiler might. Reference: Reddi et al. 2021, "Adaptive federated optimization",
algorithm 2 (FedAdagrad, FedAdam, FedYogi); McMahan et al. 2017 for sgd at rate 1. Departures: none; the second moment
starts at tau^2 and there is no bias correction, as in the paper.
"""

from collections.abc import Mapping
from typing import Final

import numpy as np

from shoal.policy import ServerRule

SLOTS: Final[Mapping[str, tuple[str, ...]]] = {
    "sgd": (),
    "adagrad": ("m", "v"),
    "adam": ("m", "v"),
    "yogi": ("m", "v"),
}
"""Rule -> names of what it keeps for each tensor, float32 of the tensor's shape."""


def slots(rule: ServerRule) -> tuple[str, ...]:
    """What the rule keeps for each tensor."""
    return ("m",) if rule.kind == "sgd" and rule.momentum else SLOTS[rule.kind]


def initial_slot(rule: ServerRule, slot: str) -> float:
    """The value that a slot starts from."""
    return rule.eps**2 if slot == "v" else 0.0


def step(
    rule: ServerRule, value: np.ndarray, mean: np.ndarray, kept: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """One step.

    Args:
        rule: the rule.
        value: any shape, float64; the tensor before.
        mean: the same shape, float64; the mean update (its direction is down the loss).
        kept: slot -> the same shape, float64.

    Returns:
        "value" and the slots after the step, float64.
    """
    if rule.kind == "sgd":
        if not rule.momentum:
            return {"value": value + rule.learning_rate * mean}
        m = rule.momentum * kept["m"] + mean
        return {"value": value + rule.learning_rate * m, "m": m}
    m = rule.b1 * kept["m"] + (1.0 - rule.b1) * mean
    v = _second_moment(rule, kept["v"], mean * mean)
    return {"value": value + rule.learning_rate * (m / (np.sqrt(v) + rule.eps)), "m": m, "v": v}


def _second_moment(rule: ServerRule, v: np.ndarray, square: np.ndarray) -> np.ndarray:
    if rule.kind == "adagrad":
        return np.asarray(v + square)
    if rule.kind == "adam":
        return np.asarray(rule.b2 * v + (1.0 - rule.b2) * square)
    assert rule.kind == "yogi", rule.kind
    return np.asarray(v - (1.0 - rule.b2) * square * np.sign(v - square))
