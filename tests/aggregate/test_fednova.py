"""FedNova: devices that take few steps draw the model to their data as strongly as those that take many."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from shoal.aggregate.accumulator import Accumulator
from shoal.aggregate.commit import WeightedMean
from shoal.data.store import Examples
from shoal.errors import DeviceError, UpdateRefused
from shoal.fixed import STEPS
from shoal.plan.build import build
from shoal.plan.jax_runner import JaxRunner
from shoal.plan.manifest import Manifest
from shoal.plan.runner import Update
from shoal.plan.train import train
from shoal.policy import RoundPolicy, ServerRule
from shoal.record.memory import MemoryStore
from shoal.record.tensor_blobs import put_tensors, view_tensors
from shoal.task import Local, Task
from shoal.tensors import Index, Tensors

EXAMPLES, BATCH = 40, 2
RATE = 0.01


def pull(params: Any, state: Any, batch: Any, key: Any) -> Any:
    """Half the squared distance to each example: the best model is the mean of all of them."""
    return 0.5 * jnp.square(params["x"] - batch["to"])


def quadratic(partial: str) -> Task:
    return Task(
        name="quadratic", init=lambda key: {"x": jnp.zeros(())}, loss=pull, batch={"to": ((), "float32")},
        local=Local(
            optimizer=optax.sgd(RATE), batch_size=BATCH, steps_per_block=2, max_examples=1000,
            partial=partial,  # type: ignore[arg-type]
        ),
        rounds=RoundPolicy(goal=2, minimum_group=1),
    )  # fmt: skip


def after(blocks: int) -> Callable[[], bool]:
    """Interrupts a training when it has done so many blocks."""
    asked = iter(range(1000))
    return lambda: next(asked) >= blocks


class Devices:
    """Two devices with as many examples each, at 0 and at 1; the first is interrupted after its first block."""

    def __init__(self, partial: str) -> None:
        built = build(quadratic(partial), seed=0)
        self.manifest: Manifest = built.plan.manifest
        self.runner, self.model = JaxRunner(built.plan), built.model

    def update(self, model: Tensors, at: float, *, is_interrupted: Callable[[], bool] = lambda: False) -> Update:
        self.runner.set_model("m", model)
        examples = Examples({"to": np.full(EXAMPLES, at, np.float32)})
        return train(
            self.runner, self.manifest, "m", examples, None, seed=bytes(32), member="a", is_interrupted=is_interrupted
        )

    def sums(self) -> Accumulator:
        return Accumulator.finest(self.manifest.sums, max_weight=1000, max_members=4)

    def settles_at(self) -> float:
        """Where rounds of the two come to rest."""
        blobs = MemoryStore().blobs
        rule, index, state = (
            WeightedMean(ServerRule()),
            put_tensors(blobs, self.model, self.manifest.broadcast),
            Index(()),
        )
        for _ in range(80):
            model = {name: np.array(value) for name, value in view_tensors(blobs, index).items()}
            sums = self.sums()
            for at, blocks in ((0.0, 1), (1.0, 100)):
                update = self.update(model, at, is_interrupted=after(blocks))
                sums.add(update.sums, weight=update.weight)
            index, state = rule.commit(sums, index, state, blobs)
        return float(view_tensors(blobs, index)["params/x"])


def plainly_added() -> float:
    """The same two devices where updates are not divided by their steps, each at the weight of its data."""
    x = 0.0
    for _ in range(400):
        deltas = []
        for at, steps in ((0.0, 2), (1.0, EXAMPLES // BATCH)):
            reached = x
            for _ in range(steps):
                reached += RATE * (at - reached)
            deltas.append(reached - x)
        x += sum(deltas) / 2
    return x


def test_interrupted_devices_do_not_move_where_the_model_comes_to_rest() -> None:
    """The mean of all examples is 0.5; plain averages of 2 and of 20 steps rest where the 20 steps pull to."""
    devices = Devices("fednova")
    # Of first order in the rate: the steps of a longer training are a little shorter each.
    assert devices.settles_at() == pytest.approx(0.5, abs=0.03)
    assert plainly_added() > 0.85


def test_an_interrupted_device_weighs_as_its_data_do() -> None:
    devices = Devices("fednova")
    update = devices.update(devices.model, 1.0, is_interrupted=after(2))
    assert (update.weight, float(update.sums[STEPS])) == (EXAMPLES, 4.0)
    assert float(update.sums["metric/loss/denominator"]) == 4 * BATCH, "metrics are of the examples that were seen"
    whole = devices.update(devices.model, 1.0)
    assert (whole.weight, float(whole.sums[STEPS])) == (EXAMPLES, EXAMPLES / BATCH)


def test_before_the_first_step_and_without_fednova_there_is_nothing_to_report() -> None:
    devices = Devices("fednova")
    with pytest.raises(DeviceError, match="interrupted"):
        devices.update(devices.model, 1.0, is_interrupted=after(0))
    devices = Devices("drop")
    assert not devices.manifest.takes_partial
    assert STEPS not in {spec.tensor.name for spec in devices.manifest.sums}
    with pytest.raises(DeviceError, match="interrupted"):
        devices.update(devices.model, 1.0, is_interrupted=after(3))


def committed(devices: Devices, sums: Accumulator) -> float:
    blobs = MemoryStore().blobs
    index = put_tensors(blobs, devices.model, devices.manifest.broadcast)
    made, _ = WeightedMean(ServerRule()).commit(sums, index, Index(()), blobs)
    return float(view_tensors(blobs, made)["params/x"])


def test_devices_of_equal_steps_make_the_plain_mean() -> None:
    reached = {}
    for partial in ("drop", "fednova"):
        devices = Devices(partial)
        sums = devices.sums()
        for at in (0.25, 1.0):
            update = devices.update(devices.model, at)
            sums.add(update.sums, weight=update.weight)
        reached[partial] = committed(devices, sums)
    assert reached["fednova"] == pytest.approx(reached["drop"], rel=1e-6)


def test_a_discount_makes_the_step_smaller_once() -> None:
    devices = Devices("fednova")
    update = devices.update(devices.model, 1.0)
    steps = []
    for discount in (1.0, 0.5):
        sums = devices.sums()
        pieces = ((name, 0, value.reshape(-1)) for name, value in update.sums.items())
        sums.add_checked(pieces, weight=update.weight, discount=discount)
        steps.append(committed(devices, sums))
    assert steps[1] == pytest.approx(steps[0] / 2, rel=1e-6)


@pytest.mark.parametrize("steps", [0.0, -3.0, np.nan, np.inf, 1e9])
def test_steps_that_turn_or_blow_up_the_mean_are_refused(steps: float) -> None:
    devices = Devices("fednova")
    update = devices.update(devices.model, 1.0)
    sums = devices.sums()
    with pytest.raises(UpdateRefused):
        sums.add({**update.sums, STEPS: np.asarray(steps, np.float32)}, weight=update.weight)
    assert not sums.members
