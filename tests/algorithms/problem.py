"""A problem small enough to be done by hand: two linear outputs, least squares, five devices with unlike data."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import shoal
from shoal.data.store import Population
from shoal.policy import RoundPolicy, Selection
from shoal.task import Sum, Task

D, E = 3, 2
RATE, BATCH, EPOCHS = 0.05, 4, 2
MEMBERS = tuple(f"m{i}" for i in range(5))
COHORT = MEMBERS[1:4]
SEED = 3


def init(key: jax.Array) -> dict[str, jax.Array]:
    return {"w": 0.3 * jax.random.normal(key, (D, E)), "b": jnp.zeros(E)}


def _losses(params: Any, batch: Any) -> jax.Array:
    rest = batch["x"] @ params["w"] + params["b"][None, :] - batch["y"]
    return 0.5 * jnp.sum(jnp.square(rest), axis=1)


def loss(params: Any, state: Any, batch: Any, key: Any) -> jax.Array:
    return _losses(params, batch)


def evaluate(params: Any, state: Any, batch: Any) -> dict[str, Sum]:
    made = _losses(params, batch)
    return {"loss": Sum(made, jnp.ones_like(made), (0.0, 1e6))}


def predict(params: Any, state: Any, batch: Any) -> jax.Array:
    return batch["x"] @ params["w"] + params["b"][None, :]


def task(**changes: Any) -> Task:
    """Three of the devices a round, drawn at random."""
    settings: dict[str, Any] = {
        "name": "linear", "init": init, "loss": loss, "evaluate": evaluate, "predict": predict,
        "batch": {"x": ((D,), "float32"), "y": ((E,), "float32")},
        "local": shoal.Local(
            optimizer=optax.sgd(RATE), batch_size=BATCH, epochs=EPOCHS, steps_per_block=2, max_examples=128
        ),
        "rounds": RoundPolicy(goal=3, minimum_group=3),
    }  # fmt: skip
    return Task(**{**settings, **changes})


def held_out() -> shoal.Local:
    """Local training that leaves a quarter of the examples out."""
    return replace(task().local, holdout=0.25)


def with_momentum() -> shoal.Local:
    """Local training by an optimizer that has a state."""
    return replace(task().local, optimizer=optax.sgd(RATE, momentum=0.9))


def exact(chosen: Task) -> Task:
    """Three devices that take part in every round."""
    return chosen.replace(rounds=replace(chosen.rounds, selection=Selection.exact(COHORT)))


def uniform(chosen: Task) -> Task:
    """Updates count alike."""
    return chosen.replace(local=replace(chosen.local, weighting="uniform"))


def population() -> Population:
    rng = np.random.default_rng(7)
    return Population.from_arrays(
        {
            member: {
                "x": rng.normal(size=(5 + 2 * i, D)).astype(np.float32),
                "y": (rng.normal(size=(5 + 2 * i, E)) + i).astype(np.float32),
            }
            for i, member in enumerate(MEMBERS)
        }
    )
