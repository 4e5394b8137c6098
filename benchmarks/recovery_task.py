"""Eight devices, all of them in every version: so that each version's bits are known whatever dies meanwhile."""

import jax.numpy as jnp
import optax

import shoal

DEVICES = tuple(f"device-{number}" for number in range(8))

task = shoal.Task(
    name="recovery",
    init=lambda key: {"w": jnp.zeros((64,)), "b": jnp.zeros(())},
    loss=lambda params, state, batch, key: jnp.square(batch["x"] @ params["w"] + params["b"] - batch["y"]),
    batch={"x": ((64,), "float32"), "y": ((), "float32")},
    local=shoal.Local(optimizer=optax.sgd(0.001), batch_size=4),
    rounds=shoal.RoundPolicy(
        goal=len(DEVICES), minimum_group=1, selection=shoal.Selection.exact(DEVICES), selection_window_s=2.0,
        reporting_window_s=5.0,
    ),
)  # fmt: skip
