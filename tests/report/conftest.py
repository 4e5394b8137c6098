"""One tiny run, simulated once, that every report of this folder is made of."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

import shoal
from shoal.report.facts import Facts, read_facts


def _loss(params, state, batch, key):  # type: ignore[no-untyped-def]
    error = batch["x"] @ params["w"] - batch["y"]
    return jnp.square(error)


def _evaluate(params, state, batch):  # type: ignore[no-untyped-def]
    near = (jnp.abs(batch["x"] @ params["w"] - batch["y"]) < 0.5).astype(jnp.float32)
    return {"accuracy": shoal.Sum(near, jnp.ones_like(near), (0.0, 1.0))}


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of three rounds."""
    made = tmp_path_factory.mktemp("run")
    task = shoal.Task(
        name="line",
        init=lambda key: {"w": jnp.zeros((2,))},
        loss=_loss,
        evaluate=_evaluate,
        batch={"x": ((2,), "float32"), "y": ((), "float32")},
        local=shoal.Local(batch_size=4, steps_per_block=1),
        rounds=shoal.RoundPolicy(goal=2, minimum_group=2),
        about=shoal.About(purpose="Fit a line.", data="Made up.", limits="Good for nothing else."),
    )
    x = np.random.default_rng(0).normal(size=(6, 2)).astype(np.float32)
    members = {name: {"x": x, "y": x @ np.array([1, 2], np.float32)} for name in ("ann", "ben", "eve")}
    shoal.simulate(task, members, rounds=3, held_out=members["ann"], folder=made)
    return made


@pytest.fixture(scope="session")
def facts(folder: Path) -> Facts:
    """Of that run."""
    return read_facts(folder)
