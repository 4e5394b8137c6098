"""A model of a given size for `server_memory`; nobody trains it."""

import os

import jax.numpy as jnp

import shoal

DEVICES = int(os.environ.get("SHOAL_BENCHMARK_DEVICES", "10"))
MEGABYTES = int(os.environ.get("SHOAL_BENCHMARK_MB", "20"))
LAYERS = 10

task = shoal.Task(
    name="large-model",
    init=lambda key: {f"layer{i}": jnp.zeros((MEGABYTES * 1_000_000 // 4 // LAYERS,)) for i in range(LAYERS)},
    loss=lambda params, state, batch, key: batch["x"] * sum(p[0] for p in params.values()),
    batch={"x": ((), "float32")},
    rounds=shoal.RoundPolicy(goal=DEVICES, over_selection=1.0, reporting_window_s=900),
)
