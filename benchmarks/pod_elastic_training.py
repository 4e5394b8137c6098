"""What our workers in `pod_elastic` train: a perceptron by the trainer, members joined by `shoal.pod.worker`. No record, no evaluation."""

import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import shoal
from benchmarks.pod_elastic_common import BATCH, CALL, RATE, SAVE_EVERY, WIDTHS, batches, weights
from shoal.data.store import Examples
from shoal.pod import worker
from shoal.pod.self_check import keep_way, kept_way
from shoal.pod.trainer import Trainer
from shoal.pod.training import Progress, Watch

STEPS = 1 << 30
"""Nobody waits for the end."""


def loss(params: Any, state: Any, batch: Any, key: jax.Array) -> shoal.Loss:
    hidden = batch["x"]
    for number in range(len(WIDTHS) - 1):
        hidden = hidden @ params[f"kernel{number}"] + params[f"bias{number}"][None]
        hidden = jax.nn.relu(hidden) if number < len(WIDTHS) - 2 else hidden
    return shoal.Loss(optax.losses.softmax_cross_entropy_with_integer_labels(hidden, batch["y"]), {}, {})


def train(pod: worker.Worker, folder: Path) -> None:
    members = jax.process_count()
    task = shoal.Task(
        name="mlp", init=lambda key: shoal.Variables({n: jnp.asarray(w) for n, w in weights().items()}, {}), loss=loss,
        batch={"x": ((WIDTHS[0],), "float32"), "y": ((), "int32")},
        local=shoal.Local(optimizer=optax.adam(RATE), batch_size=BATCH * members),
    )  # fmt: skip
    # As with the rival, every member has all of the parameters and of the optimizer's state.
    checkpoints = folder / "checkpoints"
    trainer = Trainer(
        task, mesh=f"data={members}", update="replicated", steps_per_call=CALL, sums_by=kept_way(checkpoints)
    )
    if jax.process_index() == 0:
        keep_way(checkpoints, trainer.program.members.how)
    pools = [batch for member in range(members) for batch in batches(member)]
    examples = Examples({name: np.concatenate([batch[name] for batch in pools]) for name in ("x", "y")})
    reached = os.open(folder / f"reached-{jax.process_index()}", os.O_RDWR | os.O_CREAT)

    def told(progress: Progress) -> None:
        done = progress.step - CALL  # the last call has only been begun
        os.pwrite(reached, b"%10d %20d\n" % (pod.life, done * BATCH * members), 0)

    trainer.train(
        examples, steps=STEPS, commit_every=STEPS, checkpoint_every=SAVE_EVERY, folder=checkpoints, watch=Watch(pod=pod, on_call=told)
    )  # fmt: skip
