"""A task with one parameter: what is left of a round when there is nothing to compute and nothing to carry."""

from dataclasses import replace

import jax.numpy as jnp
import optax

import shoal

task = shoal.Task(
    name="one-parameter",
    init=lambda key: {"w": jnp.zeros(())},
    loss=lambda params, state, batch, key: jnp.square(params["w"] - batch["x"]),
    batch={"x": ((), "float32")},
    local=shoal.Local(optimizer=optax.sgd(0.1), batch_size=4, steps_per_block=1),
    rounds=shoal.RoundPolicy(goal=20, over_selection=1.0),
)

quickly_forgotten = task.replace(rounds=replace(task.rounds, reporting_window_s=30.0, token_life_s=60.0))
"""Its assignments are remembered for a minute, not for a day: how many a record holds is settled after a minute."""
