"""Tiny tasks and feeds that the tests of plans share."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from shoal.plan.build import Built
from shoal.plan.manifest import Manifest, Program
from shoal.plan.plan import Plan
from shoal.plan.stablehlo import export_program
from shoal.task import Local, Loss, Sum, Task
from shoal.tensors import Tensors

B, K, D, C = 4, 2, 3, 2  # batch, steps per block, features, classes


def linear_loss(params: Any, state: Any, batch: Any, key: Any) -> Any:
    out = batch["x"] @ params["w"] + params["b"][None, :]
    return optax.softmax_cross_entropy_with_integer_labels(out, batch["y"])


def linear_init(key: Any) -> Any:
    return {"w": jax.random.normal(key, (D, C)), "b": jnp.zeros((C,))}


def linear_evaluate(params: Any, state: Any, batch: Any) -> dict[str, Sum]:
    loss = linear_loss(params, state, batch, None)
    return {"loss": Sum(loss, jnp.ones_like(loss), (0.0, 100.0))}


def linear_predict(params: Any, state: Any, batch: Any) -> Any:
    return batch["x"] @ params["w"] + params["b"][None, :]


def tiny_task(**changes: Any) -> Task:
    """Softmax regression of 3 features onto 2 classes."""
    settings: dict[str, Any] = {
        "name": "tiny",
        "init": linear_init,
        "loss": linear_loss,
        "batch": {"x": ((D,), "float32"), "y": ((), "int32")},
        "local": Local(batch_size=B, steps_per_block=K),
    }
    return Task(**{**settings, **changes})


def noisy_task(**changes: Any) -> Task:
    """The same with a step's own randomness, a metric, a state, and all programs."""

    def loss(params: Any, state: Any, batch: Any, key: Any) -> Loss:
        noise = 0.1 * jax.random.normal(key, batch["x"].shape)
        per_example = linear_loss(params, state, {**batch, "x": batch["x"] + noise}, key)
        ones = jnp.ones_like(per_example)
        return Loss(per_example, {"seen": state["seen"] + 1.0}, {"ones": Sum(ones, ones, (0.0, 1.0))})

    def init(key: Any) -> Any:
        from shoal.task import Variables

        return Variables(linear_init(key), {"seen": jnp.zeros(())})

    settings = {
        "name": "noisy", "init": init, "loss": loss, "evaluate": linear_evaluate, "predict": linear_predict,
        "leaves": {"params/b": "private"}, "local": Local(batch_size=B, steps_per_block=K, optimizer=optax.adam(0.1)),
    }  # fmt: skip
    return tiny_task(**{**settings, **changes})


def feed(rng: np.random.Generator, *, k: int = K, size: int = B) -> tuple[Tensors, np.ndarray, np.ndarray]:
    """Batches, mask (all real), key."""
    batches = {
        "x": rng.normal(size=(k, size, D)).astype(np.float32),
        "y": rng.integers(0, C, size=(k, size)).astype(np.int32),
    }
    return batches, np.ones((k, size), bool), np.array([3, 7], np.uint32)


def evaluate_feed(rng: np.random.Generator, size: int) -> tuple[Tensors, np.ndarray]:
    batches, mask, _ = feed(rng, k=1, size=size)
    return {name: value[0] for name, value in batches.items()}, mask[0]


def zero_state(manifest: Manifest) -> Tensors:
    """The device state of a device that has none."""
    return {spec.name: np.zeros(spec.shape, spec.numpy_dtype) for spec in manifest.device_state}


def replaced(plan: Plan, name: str, data: bytes, program: Program | None = None) -> Plan:
    """The plan with one program's bytes replaced, and all hashes right again."""
    from shoal.tensors import sha256

    old = program or plan.manifest.variants(name)[0]
    new = dataclasses.replace(old, hash=sha256(data), size_bytes=len(data))
    programs = tuple(new if p.name == name else p for p in plan.manifest.programs)
    kept = {p.hash: plan.programs[p.hash] for p in programs if p is not new}
    return Plan(dataclasses.replace(plan.manifest, programs=programs), {**kept, new.hash: data})


def with_function(built: Built, name: str, function: Any) -> Plan:
    """The plan with a program of the same signature that computes `function(inputs) -> outputs` instead."""
    old = built.plan.manifest.variants(name)[0]
    inputs = {s.name: jax.ShapeDtypeStruct(s.shape, s.numpy_dtype) for s in old.inputs}
    program, data = export_program(name, function, inputs, outputs=lambda result: result)
    assert [s.name for s in program.outputs] == [s.name for s in old.outputs]
    return replaced(built.plan, name, data, program)


def artifact(text: str, version: str = "1.9.0") -> bytes:
    """StableHLO text as a portable artifact."""
    from jax._src.interpreters import mlir
    from jax._src.lib import _jax

    with mlir.make_ir_context():
        return bytes(_jax.mlir.serialize_portable_artifact(text, version, False))
