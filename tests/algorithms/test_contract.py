"""What every algorithm keeps, and the same test for all of them.

Each agrees with its readable reference (`reference.py`), has the same bits in simulation and on a fleet, changes nothing in a
masked step, and gives the same in blocks of any length. Its neutral setting is a method that is known.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import shoal
from shoal.clip_norm import LOG_SCALE, AdaptiveClip
from shoal.gradients import Objective, plain_gradient
from shoal.local import local_rule, sgd_rule
from shoal.policy import Privacy, ServerRule
from shoal.simulate import engine
from shoal.simulate.fused import Layout
from shoal.task import Task
from shoal.tensors import Tensors
from shoal.testing import random_examples
from tests.algorithms import reference
from tests.algorithms.problem import MEMBERS, held_out, task, uniform, with_momentum
from tests.algorithms.ways import Ways, close, cohorts, initial, same_bits, simulated
from tests.test_one_task import over_sockets

ROUNDS = 4


@dataclass(frozen=True)
class Case:
    """An algorithm as it is tested."""

    make: Callable[[], Task]
    reference: Callable[[reference.Model, reference.Cohorts], reference.Model]
    tolerance: float = 2e-5


LORA = {"params/w": "lora(2)", "params/*": "frozen"}
CASES = {
    "fedavg": Case(task, reference.fedavg),
    "fednova": Case(lambda: task(local=replace(task().local, partial="fednova")), reference.fednova),
    **{
        kind: Case(
            functools.partial(task, server=ServerRule(kind=kind, learning_rate=0.05)),
            functools.partial(reference.fedopt, kind=kind, rate=0.05),
            tolerance=2e-4,
        )
        for kind in ("adagrad", "adam", "yogi")
    },
    "private leaves": Case(lambda: task(leaves={"params/b": "private"}), reference.private_bias),
    "fedprox": Case(lambda: shoal.fedprox(task(), mu=0.5), lambda m, c: reference.fedprox(m, c, mu=0.5)),
    "scaffold": Case(
        lambda: shoal.scaffold(task(), devices=len(MEMBERS)),
        lambda m, c: reference.scaffold(m, c, devices=len(MEMBERS)),
    ),
    "reptile": Case(lambda: shoal.reptile(task(), step=0.5), lambda m, c: reference.reptile(m, c, step=0.5)),
    "per_fedavg, first order": Case(
        lambda: shoal.per_fedavg(task(), alpha=0.1), lambda m, c: reference.per_fedavg(m, c, alpha=0.1, delta=None)
    ),
    "per_fedavg, Hessian free": Case(
        lambda: shoal.per_fedavg(task(), alpha=0.1, variant="hessian_free", delta=1e-2),
        lambda m, c: reference.per_fedavg(m, c, alpha=0.1, delta=1e-2),
        tolerance=1e-3,  # a difference of gradients in float32
    ),
    "lora": Case(lambda: task(leaves=LORA), lambda m, c: reference.lora(task(leaves=LORA), c)),
    "diloco": Case(
        lambda: shoal.diloco(task(local=with_momentum())),
        lambda m, c: reference.diloco(m, c, momentum=0.9, outer_rate=0.7, outer_momentum=0.9),
    ),
    "streaming diloco": Case(
        lambda: shoal.diloco(task(local=with_momentum()), fragments=2),
        lambda m, c: reference.streaming_diloco(
            m, c, momentum=0.9, outer_rate=0.7, outer_momentum=0.9, fragment_of={"w": 0, "b": 1}
        ),
    ),
    "ditto": Case(lambda: shoal.ditto(task(), lam=0.5), reference.fedavg),
    "measured": Case(lambda: shoal.measured(task(local=held_out())), reference.fedavg_with_holdout),
    "clipped by tensor": Case(
        lambda: task(privacy=Privacy(clip_norm={"*/w": 0.6, "*": 0.3})),
        lambda m, c: reference.clipped_by_tensor(m, c, bounds={"w": 0.6, "b": 0.3}),
    ),
    "clipped adaptively": Case(
        lambda: task(privacy=Privacy(clip_norm=AdaptiveClip(initial=0.3, quantile=0.4, learning_rate=0.9))),
        lambda m, c: reference.clipped_adaptively(m, c, initial=0.3, quantile=0.4, rate=0.9),
    ),
    "top_k": Case(lambda: shoal.compressed(task(), "top_k", share=0.3), lambda m, c: reference.top_k(m, c, share=0.3)),
    "int8": Case(lambda: shoal.compressed(task(), "int8"), reference.int8),
}


SLOW = (
    "fedavg",
    "fednova",
    "adagrad",
    "adam",
    "yogi",
    "reptile",
    "diloco",
    "per_fedavg, Hessian free",
    "measured",
    "private leaves",
    "int8",
)
"""What has the code of another case."""


@pytest.fixture(
    scope="module", params=[pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in CASES], ids=list(CASES)
)
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


@pytest.fixture(scope="module")
def ways(case: Case) -> Ways:
    return Ways(case.make())


def test_it_agrees_with_its_reference(case: Case, ways: Ways) -> None:
    made = ways.simulate(rounds=ROUNDS)
    expected = case.reference(initial(task()), cohorts(made))
    close(made.model, {_name(name): value for name, value in expected.items()}, rtol=case.tolerance)


def _name(name: str) -> str:
    """`params/w` for `w`, `control/params/w` for `control/w`; `clip/log_scale` is that."""
    if name == LOG_SCALE:
        return name
    return name.replace("control/", "control/params/") if name.startswith("control/") else f"params/{name}"


def test_a_fleet_gives_the_bits_of_the_simulation(ways: Ways) -> None:
    same_bits(ways.on_a_fleet(rounds=2), ways.simulate(rounds=2, exactly=True).model)


@pytest.mark.slow
@pytest.mark.integration
def test_a_fleet_over_sockets_gives_the_bits_of_the_simulation(ways: Ways) -> None:
    same_bits(ways.on_a_fleet(rounds=2, linked=over_sockets), ways.simulate(rounds=2, exactly=True).model)


@pytest.mark.slow
def test_the_fused_engine_agrees(ways: Ways, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three members at once, in one program."""
    monkeypatch.setattr(engine, "cached", lambda key: Layout(devices=1, together=3))
    made, expected = ways.fused(rounds=3), ways.simulate(rounds=3)
    assert cohorts(made) == cohorts(expected)
    close(made.model, expected.model)


def test_a_run_taken_up_has_the_bits_of_one_that_was_not_interrupted(ways: Ways, tmp_path: Path) -> None:
    same_bits(ways.taken_up(tmp_path, rounds=4, halts_after=2).model, ways.simulate(rounds=4).model)


def feed(chosen: Task, steps: int) -> tuple[Tensors, np.ndarray, np.ndarray]:
    size = chosen.local.batch_size
    examples = random_examples(chosen, num=steps * size).fields
    batches = {name: value.reshape(steps, size, *value.shape[1:]) for name, value in examples.items()}
    return batches, np.ones((steps, size), bool), np.asarray([3, 7], np.uint32)


class Training:
    """The programs of a task, fed by hand, for a device that has taken part before."""

    def __init__(self, ways: Ways) -> None:
        self.runner, self.rule, self.k = ways.runner, local_rule(ways.task), ways.task.local.steps_per_block
        self.model = {
            f"broadcast/{name}": np.asarray(value + value.dtype.type(0.25)) for name, value in ways.built.model.items()
        }
        self.state = {
            f"device_state/{spec.name}": np.full(spec.shape, 0.5 if "float" in spec.dtype else 1, spec.numpy_dtype)
            for spec in self.rule.device_state
        }

    def begin(self) -> Tensors:
        return self.runner.call("begin", {**self.model, **self.state})

    def block(self, carry: Tensors, batches: Tensors, mask: np.ndarray, key: np.ndarray) -> Tensors:
        fields = {f"batch/{name}": value for name, value in sorted(batches.items())}
        return self.runner.call("block", {**carry, **fields, "mask": mask, "key": key})

    def finish(self, carry: Tensors) -> Tensors:
        return self.runner.call("finish", {**carry, **self.model})


def test_a_wholly_masked_step_changes_nothing(ways: Ways) -> None:
    training = Training(ways)
    batches, mask, key = feed(ways.task, training.k)
    before = training.block(training.begin(), batches, mask, key)
    same_bits(training.block(before, batches, np.zeros_like(mask), key), before)


def test_blocks_of_any_length_give_the_same(ways: Ways) -> None:
    """Blocks of k steps by the plan's program, and steps one by one."""
    training = Training(ways)
    batches, mask, key = feed(ways.task, 3 * training.k)
    mask[-2, 2:], mask[-1] = False, False
    step = jax.jit(training.rule.block)
    blockwise, stepwise = training.begin(), training.begin()
    for first in range(0, len(mask), training.k):
        where = slice(first, first + training.k)
        blockwise = training.block(blockwise, {n: v[where] for n, v in batches.items()}, mask[where], key)
    for at in range(len(mask)):
        carry = {name.removeprefix("carry/"): jnp.asarray(value) for name, value in stepwise.items()}
        made = step(
            carry, {n: jnp.asarray(v[at : at + 1]) for n, v in batches.items()}, jnp.asarray(mask[at : at + 1]), key
        )
        stepwise = {f"carry/{name}": np.asarray(value) for name, value in made.items()}
    close(training.finish(stepwise), training.finish(blockwise), rtol=1e-6)


def frozen_task() -> Task:
    return task(leaves={"params/w": "frozen"})


def task_with_holdout() -> Task:
    return task(local=held_out())


def uniform_task() -> Task:
    return uniform(task())


def sgd_on_second(chosen: Task) -> Task:
    """Plain local training, on every second example of a batch."""

    def second(objective: Objective, params: Any, batch: Any) -> Any:
        return plain_gradient(objective, params, {name: values[1::2] for name, values in batch.items()})

    return chosen.replace(rule=lambda made: sgd_rule(made, gradient_of=second))


KNOWN = functools.cache(lambda make: Ways(make()))
"""The known methods, built once."""

NEUTRAL: dict[str, tuple[Callable[[], Task], Callable[[], Task], int]] = {
    "fedprox without a term is FedAvg": (lambda: shoal.fedprox(task(), mu=0.0), task, 3),
    "the first round of scaffold is that of FedAvg": (
        lambda: shoal.scaffold(task(), devices=5),
        uniform_task,
        1,
    ),
    "reptile with a whole step is FedAvg": (lambda: shoal.reptile(task(), step=1.0), uniform_task, 2),
    "the global model of ditto is that of FedAvg": (lambda: shoal.ditto(task()), task, 2),
    "adapters that do not learn are a frozen leaf": (
        lambda: task(leaves={"params/w": "lora(1)", "params/w/lora_?": "frozen"}),
        frozen_task,
        2,
    ),
    "a clip norm that nothing reaches is none": (
        lambda: task(privacy=Privacy(clip_norm=AdaptiveClip(initial=200.0, quantile=0.5))),
        task,
        1,
    ),
    "measuring changes nothing": (lambda: shoal.measured(task(local=held_out())), task_with_holdout, 2),
    "top_k of all elements is no compression": (lambda: shoal.compressed(task(), "top_k", share=1.0), task, 2),
    "per_fedavg without a step is FedAvg on every second example": (
        lambda: shoal.per_fedavg(task(), alpha=0.0),
        lambda: sgd_on_second(task()),
        2,
    ),
}


@pytest.mark.parametrize("name", list(NEUTRAL))
def test_a_neutral_setting_has_the_bits_of_a_known_method(name: str) -> None:
    neutral, known, rounds = NEUTRAL[name]
    same_bits(
        simulated(neutral(), rounds=rounds), KNOWN(known).simulate(rounds=rounds).model, names=("params/w", "params/b")
    )
