"""A plan's programs on a mesh: the same as on one device, and each device has its part of a batch."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import shoal
from shoal.plan.build import build
from shoal.plan.jax_runner import JaxRunner


def task() -> shoal.Task:
    return shoal.Task(
        name="line", init=lambda key: {"w": jax.random.normal(key, (6, 4)), "b": jnp.zeros(4)}, batch={"x": ((6,), "float32"), "y": ((4,), "float32")},
        loss=lambda params, state, batch, key: jnp.mean(jnp.square(batch["x"] @ params["w"] + params["b"][None] - batch["y"]), axis=1),
        local=shoal.Local(optimizer=optax.adam(0.1), batch_size=8, steps_per_block=2),
    )  # fmt: skip


def trained(mesh: Any) -> Any:
    built = build(task(), seed=0)
    runner = JaxRunner(built.plan, mesh)
    rng = np.random.default_rng(0)
    runner.set_model("root", built.model)
    runner.begin("root", {})
    for number in range(3):
        batches = {name: rng.normal(size=(2, 8, size)).astype("f") for name, size in (("x", 6), ("y", 4))}
        mask = np.ones((2, 8), bool)
        mask[1, 5:] = number < 2
        runner.block(batches, mask, np.array([1, number], np.uint32))
    return runner, runner.finish()


def test_on_a_mesh_it_is_the_same() -> None:
    mesh = jax.make_mesh((4,), ("data",), devices=jax.devices()[:4])
    _, wanted = trained(None)
    runner, found = trained(mesh)
    assert found.weight == wanted.weight
    for name, value in wanted.sums.items():
        np.testing.assert_allclose(found.sums[name], value, rtol=1e-5, atol=1e-6)
    text = runner._ready["block"].as_text()
    assert "all-reduce" in text  # gradients of the parts are added up: the batch is split
