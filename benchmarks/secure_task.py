"""Tasks of 100,000 parameters and no work, in clear and in secure groups, for the live row of `secagg`."""

import jax.numpy as jnp
import optax

import shoal

DEVICES = 64

clear = shoal.Task(
    name="clear",
    init=lambda key: {"w": jnp.zeros(100_000)},
    loss=lambda params, state, batch, key: jnp.square(params["w"].mean() - batch["x"] / 1000.0),
    batch={"x": ((), "float32")},
    local=shoal.Local(optimizer=optax.sgd(0.1), batch_size=4, steps_per_block=1, weighting="uniform"),
    rounds=shoal.RoundPolicy(goal=DEVICES, over_selection=1.0),
    privacy=shoal.Privacy(clip_norm=1.0),
)
secure = clear.replace(
    name="secure",
    privacy=shoal.Privacy(clip_norm=1.0, secure=shoal.Secure(members=DEVICES, colluders=0.1, dropouts=0.2)),
)
