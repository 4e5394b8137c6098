"""What every algorithm keeps, and the same test for all of them.

Each agrees with its readable reference (`reference.py`), has the same bits in simulation and on a fleet, changes nothing in a
masked step, and gives the same in blocks of any length. Its neutral setting is a method that is known.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import shoal
from shoal.local import Named, local_rule
from shoal.task import Task
from shoal.testing import random_examples
from tests.algorithms import reference
from tests.algorithms.problem import MEMBERS, task, uniform
from tests.algorithms.ways import Ways, close, cohorts, initial, same_bits, simulated

ROUNDS = 4


@dataclass(frozen=True)
class Case:
    """An algorithm as it is tested."""

    make: Callable[[], Task]
    reference: Callable[[reference.Model, reference.Cohorts], reference.Model]


CASES = {
    "fedavg": Case(task, reference.fedavg),
    "fedprox": Case(lambda: shoal.fedprox(task(), mu=0.5), lambda m, c: reference.fedprox(m, c, mu=0.5)),
    "scaffold": Case(
        lambda: shoal.scaffold(task(), devices=len(MEMBERS)),
        lambda m, c: reference.scaffold(m, c, devices=len(MEMBERS)),
    ),
}


@pytest.fixture(scope="module", params=list(CASES))
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


@pytest.fixture(scope="module")
def ways(case: Case) -> Ways:
    return Ways(case.make())


def test_it_agrees_with_its_reference(case: Case, ways: Ways) -> None:
    made = ways.simulate(rounds=ROUNDS)
    expected = case.reference(initial(task()), cohorts(made))
    close(made.model, {_name(name): value for name, value in expected.items()})


def _name(name: str) -> str:
    """`params/w` for `w`, `control/params/w` for `control/w`."""
    return "/".join([*name.split("/")[:-1], "params", name.split("/")[-1]])


def test_a_fleet_gives_the_bits_of_the_simulation(ways: Ways) -> None:
    same_bits(ways.on_a_fleet(rounds=2), ways.simulate(rounds=2, exactly=True).model)


def feed(chosen: Task, steps: int) -> tuple[dict[str, jax.Array], np.ndarray, jax.Array]:
    size = chosen.local.batch_size
    examples = random_examples(chosen, num=steps * size).fields
    batches = {name: jnp.asarray(value).reshape(steps, size, *value.shape[1:]) for name, value in examples.items()}
    return batches, np.ones((steps, size), bool), jnp.asarray([3, 7], jnp.uint32)


def begin(ways: Ways) -> tuple[Any, Named, Named]:
    """The rule, what it is sent, and the carry that it begins with, of a device that has taken part before."""
    rule = local_rule(ways.task)
    broadcast = {name: jnp.asarray(value) + 0.25 for name, value in ways.built.model.items()}
    kept = {
        spec.name: jnp.ones(spec.shape, spec.numpy_dtype) * jnp.asarray(0.5 if "float" in spec.dtype else 1, spec.dtype)
        for spec in rule.device_state
    }
    return rule, broadcast, jax.jit(rule.begin)(broadcast, kept)


def test_a_wholly_masked_step_changes_nothing(ways: Ways) -> None:
    rule, _, carry = begin(ways)
    batches, mask, key = feed(ways.task, 2)
    block = jax.jit(rule.block)
    before = block(carry, batches, jnp.asarray(mask), key)
    same_bits(before, block(before, batches, jnp.zeros_like(mask), key))


def test_blocks_of_any_length_give_the_same(ways: Ways) -> None:
    rule, broadcast, carry = begin(ways)
    batches, mask, key = feed(ways.task, 6)
    mask[4, 2:], mask[5] = False, False
    reports = []
    for k in (6, 2, 1):
        after, block = carry, jax.jit(rule.block)
        for first in range(0, 6, k):
            part = {name: value[first : first + k] for name, value in batches.items()}
            after = block(after, part, jnp.asarray(mask[first : first + k]), key)
        made = jax.jit(rule.finish)(after, broadcast)
        reports.append({**made.device_state, **{f"{k}/{n}": v for k, s in made.sums.items() for n, v in s.items()}})
    for other in reports[1:]:
        close(other, reports[0], rtol=1e-6)


NEUTRAL: dict[str, tuple[Callable[[], Task], Callable[[], Task], int]] = {
    "fedprox without a term is FedAvg": (lambda: shoal.fedprox(task(), mu=0.0), task, 3),
    "the first round of scaffold is that of FedAvg": (
        lambda: shoal.scaffold(task(), devices=5),
        lambda: uniform(task()),
        1,
    ),
}


@pytest.mark.parametrize("name", list(NEUTRAL))
def test_a_neutral_setting_has_the_bits_of_a_known_method(name: str) -> None:
    neutral, known, rounds = NEUTRAL[name]
    same_bits(simulated(neutral(), rounds=rounds), simulated(known(), rounds=rounds), names=("params/w", "params/b"))
