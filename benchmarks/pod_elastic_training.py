"""What our workers in `pod_elastic` train: a perceptron by `Program`, checkpoints by Orbax, members joined by `shoal.pod.worker`.

It stands in for the trainer: no record, no evaluation, the same batches again and again.
"""

import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp

import shoal
from benchmarks.pod_elastic_common import BATCH, CALL, POOL, RATE, SAVE_EVERY, WIDTHS, batches, weights
from shoal.local import model_shape, named
from shoal.pod import worker
from shoal.pod.collectives import Members
from shoal.pod.mesh import MeshSpec
from shoal.pod.placement import State
from shoal.pod.rules import specs
from shoal.pod.step import Program


def loss(params: Any, state: Any, batch: Any, key: jax.Array) -> shoal.Loss:
    hidden = batch["x"]
    for number in range(len(WIDTHS) - 1):
        hidden = hidden @ params[f"kernel{number}"] + params[f"bias{number}"][None]
        hidden = jax.nn.relu(hidden) if number < len(WIDTHS) - 2 else hidden
    return shoal.Loss(optax.losses.softmax_cross_entropy_with_integer_labels(hidden, batch["y"]), {}, {})


def train(pod: worker.Worker, folder: Path) -> None:
    program = make_program(jax.process_count())
    manager = ocp.CheckpointManager(folder / "checkpoints", options=ocp.CheckpointManagerOptions(max_to_keep=2))
    pod.marks.doing("compiling")
    state = program.begin(jax.random.key(0))
    if (latest := manager.latest_step()) is not None:
        state = manager.restore(latest, args=ocp.args.StandardRestore(state))
    first = 0 if latest is None else latest + CALL
    fields, mask = pool(program)
    step_fn = jax.jit(program.steps, donate_argnums=0).lower(state, fields[0], mask, key()).compile()
    reached = os.open(folder / f"reached-{jax.process_index()}", os.O_RDWR | os.O_CREAT)
    examples = BATCH * jax.process_count()
    pod.marks.doing("training")
    for step in range(first, 1 << 40, CALL):
        pod.marks.begin(step)
        state, metrics = step_fn(state, fields[step // CALL % POOL], mask, key())
        jax.block_until_ready(metrics)
        pod.marks.done(step)
        os.pwrite(reached, b"%10d %20d\n" % (pod.life, (step + CALL) * examples), 0)
        if step % SAVE_EVERY == 0 and step > first:
            manager.save(step, args=ocp.args.StandardSave(state))


def make_program(members: int) -> Program:
    spec = MeshSpec.parse(f"data={members}")
    task = shoal.Task(
        name="mlp", init=lambda key: shoal.Variables({n: jnp.asarray(w) for n, w in weights().items()}, {}), loss=loss,
        batch={"x": ((WIDTHS[0],), "float32"), "y": ((), "int32")},
        local=shoal.Local(optimizer=optax.adam(RATE), batch_size=BATCH * members),
    )  # fmt: skip
    shapes = {name: leaf.shape for name, leaf in named(model_shape(task).params, "params").items()}
    return Program(task, spec.build(), Members(spec), "sharded", specs({}, shapes, spec, what="rules"), {})


def pool(program: Program) -> tuple[list[State], jax.Array]:
    """Calls' batches, on the mesh; the mask of one."""
    mine = jax.process_index()

    def placed(field: str, values: np.ndarray) -> jax.Array:
        made: jax.Array = jax.make_array_from_process_local_data(program.row_shardings(1)[field], values)
        return made

    made = [{n: placed(n, np.stack([v] * CALL)) for n, v in batch.items()} for batch in batches(mine)]
    return made, placed("mask", np.ones((CALL, BATCH), bool))


def key() -> np.ndarray:
    return np.array([0, 1], np.uint32)
