"""Plans compiled for devices without JAX: the same results, in a child that imports no JAX and goes when it is idle."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import optax
import pytest
from flax import nnx

pytest.importorskip("iree.runtime", reason="needs iree-base-runtime: pip install 'shoal[iree]'")
pytest.importorskip("iree.compiler", reason="needs iree-base-compiler: pip install 'shoal[iree]'")

from shoal.errors import PlanError, ProgramError
from shoal.plan import iree_compiler
from shoal.plan.build import EVALUATE_BATCH_SIZE, Built, build
from shoal.plan.check import check_plan
from shoal.plan.child import ChildRunner
from shoal.plan.iree_compiler import compile_for
from shoal.plan.iree_runner import IreeRunner, open_device
from shoal.plan.iree_targets import TARGETS, this_runtime
from shoal.plan.jax_runner import JaxRunner
from shoal.plan.plan import Plan
from shoal.plan.runner import Limits, Runner, Update
from shoal.task import Local, Task
from shoal.tensors import Tensors, sha256
from tests.plan.plan_tasks import artifact, evaluate_feed, feed, noisy_task, zero_state
from tests.plan.test_paused import ROOT as PAUSED_ROOT
from tests.plan.test_paused import interrupted, trained, with_model

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]

HERE = this_runtime().kind.removeprefix("iree-")
ROOT = "a" * 64
DOUBLED = """
module {
  func.func public @main(%x: tensor<4xf32>) -> tensor<4xf32> {
    %y = stablehlo.add %x, %x : tensor<4xf32>
    return %y : tensor<4xf32>
  }
}
"""


class Cnn(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.conv = nnx.Conv(1, 4, (3, 3), rngs=rngs)
        self.out = nnx.Linear(4 * 4 * 4, 10, rngs=rngs)

    def __call__(self, image: Any) -> Any:
        pooled = nnx.max_pool(nnx.relu(self.conv(image)), (2, 2), (2, 2))
        return self.out(pooled.reshape(pooled.shape[0], -1))


class Mlp(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.hidden, self.out = nnx.Linear(64, 32, rngs=rngs), nnx.Linear(32, 10, rngs=rngs)

    def __call__(self, image: Any) -> Any:
        return self.out(nnx.relu(self.hidden(image.reshape(image.shape[0], -1))))


def image_task(module: Any) -> Task:
    return Task.from_flax(
        module, name="images", loss="softmax_cross_entropy",
        batch={"image": ((8, 8, 1), "uint8"), "label": ((), "int32")},
        local=Local(optimizer=optax.sgd(0.1, momentum=0.9), batch_size=8, steps_per_block=2),
    )  # fmt: skip


@pytest.fixture(scope="module")
def noisy() -> Built:
    """A state, a private leaf, Adam, randomness of its own; `tests.plan.conftest`'s, and compiled."""
    return build(noisy_task(), iree=[HERE])


@pytest.fixture(scope="module")
def child(noisy: Built) -> Iterator[ChildRunner]:
    with ChildRunner(noisy.plan, threads=1, engine="iree", idle_s=1.0) as made:
        yield made


def train(runner: Runner, built: Built, *, blocks: int = 2) -> Update:
    runner.set_model(ROOT, built.model)
    runner.begin(ROOT, zero_state(built.plan.manifest))
    rng = np.random.default_rng(0)
    for _ in range(blocks):
        runner.block(*feed(rng))
    return runner.finish()


def train_images(runner: Runner, built: Built) -> Update:
    runner.set_model(ROOT, built.model)
    runner.begin(ROOT, {})
    rng = np.random.default_rng(0)
    for real in (8, 3):
        images = rng.integers(0, 256, (2, 8, 8, 8, 1)).astype(np.uint8)
        labels = rng.integers(0, 10, (2, 8)).astype(np.int32)
        mask = np.broadcast_to(np.arange(8) < real, (2, 8)).copy()
        runner.block({"image": images, "label": labels}, mask, np.array([1, 2], np.uint32))
    return runner.finish()


def assert_alike(one: Tensors, other: Tensors) -> None:
    assert list(one) == list(other)
    for name in one:
        assert one[name].dtype == other[name].dtype
        np.testing.assert_allclose(one[name], other[name], rtol=1e-5, atol=2e-6, err_msg=name)


@pytest.mark.parametrize("module", [Mlp, Cnn])
def test_an_update_is_that_of_jax(module: Any) -> None:
    built = build(image_task(module), iree=[HERE])
    check_plan(built.plan.manifest, Limits())
    ours, jaxs = (train_images(made, built) for made in (IreeRunner(built.plan, threads=1), JaxRunner(built.plan)))
    assert_alike(ours.sums, jaxs.sums)
    assert (ours.weight, ours.padding) == (jaxs.weight, jaxs.padding)


def test_state_randomness_and_private_leaves_are_those_of_jax(noisy: Built) -> None:
    one, other = (made(noisy.plan) for made in (IreeRunner, JaxRunner))
    ours, jaxs = train(one, noisy), train(other, noisy)
    assert_alike(ours.sums, jaxs.sums)
    assert_alike(ours.device_state, jaxs.device_state)
    batch, mask = evaluate_feed(np.random.default_rng(1), EVALUATE_BATCH_SIZE)
    np.testing.assert_allclose(one.predict(ROOT, batch, mask), other.predict(ROOT, batch, mask), rtol=1e-5)


def test_two_runs_are_bit_identical(noisy: Built, child: ChildRunner) -> None:
    here, there = train(IreeRunner(noisy.plan, threads=1), noisy), train(child, noisy)
    for name in here.sums:
        np.testing.assert_array_equal(here.sums[name], there.sums[name])


def test_a_training_that_was_put_aside_goes_on_bit_for_bit(noisy: Built, child: ChildRunner) -> None:
    whole = trained(with_model(lambda: IreeRunner(noisy.plan, threads=1), noisy), noisy)
    first, other = (with_model(lambda: IreeRunner(noisy.plan, threads=1), noisy) for _ in range(2))
    paused = interrupted(first, noisy, after=2)
    assert paused is not None
    child.set_model(PAUSED_ROOT, noisy.model)
    for runner in (other, child):
        made = trained(runner, noisy, paused=paused)
        for name in whole.sums:
            np.testing.assert_array_equal(made.sums[name], whole.sums[name])


def test_more_threads_change_no_bit(noisy: Built) -> None:
    one, two = (IreeRunner(noisy.plan, threads=threads) for threads in (1, 2))
    two._device = open_device(2)  # whichever is faster
    updates = [train(runner, noisy) for runner in (one, two)]
    for name in updates[0].sums:
        np.testing.assert_array_equal(updates[0].sums[name], updates[1].sums[name])
    assert IreeRunner(noisy.plan, threads=2)._device in (open_device(1), open_device(2))


def test_the_child_imports_no_jax(child: ChildRunner) -> None:
    assert child.runtime == this_runtime()
    libraries = Path(f"/proc/{child.pid}/maps").read_text()
    assert "_runtime" in libraries and "jaxlib" not in libraries


def test_an_idle_child_goes_and_comes_again(noisy: Built, child: ChildRunner) -> None:
    before = train(child, noisy)
    assert child.has_model(ROOT)
    deadline = time.monotonic() + 20.0
    while child.pid is not None and time.monotonic() < deadline:
        time.sleep(0.1)
    assert child.pid is None and not child.has_model(ROOT)
    assert_alike(train(child, noisy).sums, before.sums)


def test_an_idle_child_is_there_while_a_training_goes_on(noisy: Built, child: ChildRunner) -> None:
    child.set_model(ROOT, noisy.model)
    child.begin(ROOT, zero_state(noisy.plan.manifest))
    time.sleep(2.5)
    child.block(*feed(np.random.default_rng(0)))
    assert child.finish().weight == 8


def test_what_is_not_in_the_plan_for_this_machine_is_refused(noisy: Built) -> None:
    runner = IreeRunner(noisy.plan, threads=1)
    batch, mask = evaluate_feed(np.random.default_rng(1), EVALUATE_BATCH_SIZE)
    with pytest.raises(PlanError, match="no program 'evaluate' for iree-"):
        runner.evaluate(ROOT, batch, mask)
    only_jax = build(noisy_task())
    with pytest.raises(PlanError, match="this runtime is iree-"):
        IreeRunner(only_jax.plan)


def test_broken_code_is_an_error_and_not_an_update(noisy: Built) -> None:
    chosen = noisy.plan.manifest.pick(this_runtime())
    broken = {**noisy.plan.programs, chosen["block"].hash: b"no code"}
    with pytest.raises(PlanError, match="has not the hash"):
        IreeRunner(Plan(noisy.plan.manifest, broken))

    def swapped(name: str, data: bytes) -> Plan:
        from dataclasses import replace

        programs = tuple(
            replace(p, hash=sha256(data), size_bytes=len(data)) if p == chosen[name] else p
            for p in noisy.plan.manifest.programs
        )
        return Plan(replace(noisy.plan.manifest, programs=programs), {**noisy.plan.programs, sha256(data): data})

    with pytest.raises(ProgramError, match="Program 'block' failed"):
        IreeRunner(swapped("block", b"no code")).compile()
    runner = IreeRunner(swapped("begin", noisy.plan.program(chosen["predict"])))
    runner.set_model(ROOT, noisy.model)
    with pytest.raises(ProgramError, match="Program 'begin'"):
        runner.begin(ROOT, zero_state(noisy.plan.manifest))


def test_each_target_has_its_code_and_nothing_is_compiled_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    data = artifact(DOUBLED)
    made = {name: compile_for(data, target, name="block") for name, target in TARGETS.items()}
    assert len(set(made.values())) >= 3, "Linux and Android differ in name only"
    monkeypatch.setattr(iree_compiler, "_compiled", lambda *_: pytest.fail("it was in the cache"))
    assert compile_for(data, TARGETS[HERE], name="block") == made[HERE]


def test_what_cannot_be_compiled_is_told_with_the_reason() -> None:
    with pytest.raises(PlanError, match=r"Program 'block' cannot be compiled for aarch64-linux: IREE's compiler says"):
        compile_for(b"ML\xefRno module", TARGETS["aarch64-linux"], name="block")


def test_progress_names_what_is_compiled() -> None:
    said: list[str] = []
    build(noisy_task(), iree=[HERE], progress=said.append)
    assert [text.split()[1] for text in said] == ["begin", "block", "finish", "predict"]
    assert said[-1].endswith(f"for {HERE} (4 of 4)")
