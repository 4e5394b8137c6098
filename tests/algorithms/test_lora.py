"""Low-rank adapters: only they learn and travel; what is used is the merged model."""

import asyncio
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from safetensors.numpy import load_file

import shoal
from shoal.fleet.device import Device
from shoal.fleet.device_host import DeviceHost
from shoal.fleet.host import Host
from shoal.fleet.link import LocalLink
from shoal.local import local_rule, model_specs
from shoal.lora import merged_tensors, with_adapters
from shoal.plan.build import build
from shoal.plan.jax_runner import JaxRunner
from shoal.plan.run_plan import begin_run
from shoal.plan.stablehlo import this_runtime
from shoal.policy import RoundPolicy, Selection
from shoal.record.memory import MemoryStore
from shoal.task import Task
from tests.algorithms.problem import population, predict, task
from tests.algorithms.ways import KEYS

LORA = {"params/w": "lora(2)", "params/*": "frozen"}


def test_only_adapters_are_reported() -> None:
    rule = local_rule(task(leaves=LORA))
    assert [s.tensor.name for s in rule.sums if s.tensor.name.startswith("delta/")] == [
        "delta/params/w/lora_a",
        "delta/params/w/lora_b",
    ]


def test_the_first_model_is_the_one_that_is_adapted() -> None:
    plain, key = task().variables(jax.random.key(3)).params, jax.random.key(3)
    adapted = with_adapters(task(leaves=LORA))
    params, state = adapted.variables(key)
    batch = {"x": jnp.ones((2, 3))}
    assert adapted.predict is not None
    np.testing.assert_array_equal(adapted.predict(params, state, batch), predict(plain, {}, batch))


def test_predictions_and_files_have_the_merged_model(tmp_path: Path) -> None:
    shoal.simulate(task(leaves=LORA), population(), rounds=2, folder=tmp_path)
    model, first = shoal.load(tmp_path), build(task(leaves=LORA)).model
    np.testing.assert_array_equal(model.tensors["params/w"], first["params/w"])
    assert np.any(model.tensors["params/w/lora_b"]) and not np.any(first["params/w/lora_b"])
    model.save(tmp_path / "model.safetensors")
    saved = load_file(tmp_path / "model.safetensors")
    assert sorted(saved) == ["params/b", "params/w"]
    expected = model.tensors["params/w"] + model.tensors["params/w/lora_a"] @ model.tensors["params/w/lora_b"]
    np.testing.assert_allclose(saved["params/w"], expected, rtol=1e-6)
    x = np.ones((2, 3), np.float32)
    np.testing.assert_allclose(model.predict({"x": x}), x @ saved["params/w"] + saved["params/b"], rtol=1e-5)


def test_kernels_of_convolutions_have_adapters_too() -> None:
    class Net(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            self.conv = nnx.Conv(1, 4, (3, 3), rngs=rngs)
            self.out = nnx.Linear(4, 3, rngs=rngs)

        def __call__(self, image: Any) -> Any:
            return self.out(nnx.relu(self.conv(image)).mean(axis=(1, 2)))

    chosen = Task.from_flax(
        Net, name="net", loss="softmax_cross_entropy", batch={"image": ((5, 5, 1), "float32"), "label": ((), "int32")},
        leaves={"params/*/kernel": "lora(2)", "params/*": "frozen"},
    )  # fmt: skip
    specs = {spec.name: spec.shape for spec in model_specs(chosen)}
    assert specs["params/conv/kernel/lora_a"] == (9, 2) and specs["params/conv/kernel/lora_b"] == (2, 4)
    base = np.zeros((3, 3, 1, 4), np.float32)
    a, b = np.ones((9, 2), np.float32), np.ones((2, 4), np.float32)
    merged = merged_tensors({"params/k": base, "params/k/lora_a": a, "params/k/lora_b": b})
    np.testing.assert_array_equal(merged["params/k"], np.full((3, 3, 1, 4), 2.0, np.float32))


@pytest.mark.parametrize(
    ("leaves", "text"),
    [
        ({"params/v": "lora(2)"}, "'params/v', which matches none of params/b, params/w"),
        ({"params/b": "lora(1)"}, r"matrix of floats for lora\(1\)"),
        ({"params/w": "lora(3)"}, "rank from 1 to their smaller side"),
    ],
)
def test_what_cannot_be_adapted_is_refused(leaves: dict[str, str], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        model_specs(task(leaves=leaves))


def test_rules_are_words() -> None:
    for wrong in ("lora", "lora(0)", "lora(-1)", "mena"):
        with pytest.raises(ValueError, match=r"one of frozen \| lora\(rank\) \| mean \| private"):
            task(leaves={"params/w": wrong})


WIDE = 300


def wide() -> Task:
    """A model of 360 kB, of which the adapters are 5."""

    def init(key: jax.Array) -> dict[str, jax.Array]:
        return {"w": jax.random.normal(key, (WIDE, WIDE)) / 20.0}

    def loss(params: Any, state: Any, batch: Any, key: Any) -> jax.Array:
        return jnp.mean(jnp.square(batch["x"] @ params["w"]), axis=1)

    return Task(
        name="wide", init=init, loss=loss, batch={"x": ((WIDE,), "float32")}, leaves={"params/w": "lora(2)"},
        local=shoal.Local(optimizer=optax.sgd(0.1), batch_size=4),
        rounds=RoundPolicy(goal=1, minimum_group=1, selection=Selection.exact(["a"])),
    )  # fmt: skip


def test_a_frozen_base_travels_to_a_device_once() -> None:
    built = build(wide())
    plan, rounds = built.plan.sign(KEYS.signing), 4
    runner, store = JaxRunner(plan), MemoryStore()
    run_id = begin_run(store, plan, built.model, kind="host", rounds=rounds, seed=0)
    shared = DeviceHost(make_runner=lambda plan: runner, runtime=this_runtime())

    async def serve() -> None:
        host = Host(store, run_id, KEYS, call_program=runner.call)
        running = asyncio.create_task(host.run())
        examples = shoal.data.Examples({"x": np.ones((4, WIDE), np.float32)})
        device = Device("a", lambda: examples, link=LocalLink(host.edge), host=shared, rng=np.random.default_rng(0))
        await asyncio.wait_for(asyncio.gather(running, device.run()), timeout=40)
        await host.edge.close()

    asyncio.run(serve())
    base, programs = 4 * WIDE * WIDE, sum(program.size_bytes for program in plan.manifest.programs)
    most = base + programs + len(plan.manifest.data) + rounds * (4 * 2 * 2 * WIDE + 2000)
    assert 0.7 * base < shared.down_bytes < most
