"""Rounds of shoal: the nets of the `simulation` benchmark in Flax, trained by `shoal.simulate`."""

import argparse
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import shoal
from benchmarks import simulation_common as common
from shoal.policy import RoundPolicy
from shoal.task import Loss, Sum, Variables


class Image(nnx.Module):
    """Convolutions, then dense layers."""

    def __init__(self, config: str, rngs: nnx.Rngs) -> None:
        self.net = common.NETS[config]
        channels = 3
        for number, (kernel, out) in enumerate(self.net.convolutions):
            made = nnx.Conv(channels, out, (kernel, kernel), padding="VALID", rngs=rngs)
            setattr(self, f"conv{number}", made)
            channels = out
        side, channels = common.sides(self.net)
        wide = side * side * channels
        for number, out in enumerate((*self.net.hidden, common.CLASSES)):
            setattr(self, f"dense{number}", nnx.Linear(wide, out, rngs=rngs))
            wide = out
        if self.net.dropout:
            self.first, self.last = (nnx.Dropout(rate, rngs=rngs) for rate in self.net.dropout)

    def __call__(self, x: jax.Array) -> jax.Array:
        for number in range(len(self.net.convolutions)):
            x = nnx.relu(getattr(self, f"conv{number}")(x))
            if self.net.pool_each or number == len(self.net.convolutions) - 1:
                x = nnx.max_pool(x, (2, 2), (2, 2))
        if self.net.dropout:
            x = self.first(x)
        x = x.reshape(x.shape[0], -1)
        for number in range(len(self.net.hidden)):
            x = nnx.relu(getattr(self, f"dense{number}")(x))
        if self.net.dropout:
            x = self.last(x)
        made: jax.Array = getattr(self, f"dense{len(self.net.hidden)}")(x)
        return made


def task(config: str, weights: common.Weights) -> shoal.Task:
    """The task of one configuration, from the given weights."""
    settings: dict[str, Any] = {
        "name": config,
        "local": shoal.Local(
            optimizer=optax.sgd(common.local_rate(config)), batch_size=common.BATCH, steps_per_block=common.STEPS,
            weighting="uniform",
        ),
        "server": shoal.server.sgd(common.SERVER_RATE),
        "rounds": RoundPolicy(goal=common.COHORT, over_selection=1.0),
    }  # fmt: skip
    if config == common.NO_OP:
        return shoal.Task(
            init=lambda key: {"w": jnp.asarray(weights["w"])}, loss=_loss, evaluate=_evaluate,
            batch={"x": ((), "float32")}, **settings,
        )  # fmt: skip
    made = shoal.Task.from_flax(
        lambda rngs: Image(config, rngs), loss="softmax_cross_entropy",
        batch={"image": ((32, 32, 3), "float32"), "label": ((), "int32")}, **settings,
    )  # fmt: skip
    return made.replace(init=lambda key: _given(made.variables(key), weights))


def _loss(params: Any, state: Any, batch: Any, key: Any) -> Loss:
    per_example = jnp.square(params["w"] - batch["x"])
    return Loss(per_example, state, {"loss": Sum(per_example, jnp.ones_like(per_example), (0.0, 1000.0))})


def _evaluate(params: Any, state: Any, batch: Any) -> dict[str, Sum]:
    return _loss(params, state, batch, None).metrics


def _given(variables: Variables, weights: common.Weights) -> Variables:
    """The variables with the given weights for their parameters."""

    def take(path: Any, leaf: Any) -> jax.Array:
        value = weights[jax.tree_util.keystr(path, simple=True, separator="/")]
        if value.shape != leaf.shape:
            raise ValueError(f"Expected weights of shape {leaf.shape} at {path}, got {value.shape}.")
        return jnp.asarray(value)

    return Variables(jax.tree_util.tree_map_with_path(take, variables.params), variables.state)


def fields(config: str, x: np.ndarray, y: np.ndarray) -> dict[str, np.ndarray]:
    """Examples by field."""
    return {"x": x} if config == common.NO_OP else {"image": x, "label": y}


def main(given: argparse.Namespace) -> None:
    config, data = given.config, common.load_data(given.data, given.config)
    examples = shoal.data.Examples(fields(config, data.x.reshape(-1, *data.x.shape[2:]), data.y.reshape(-1)))
    held = np.arange(len(examples)).reshape(common.USERS, common.EACH)
    population = shoal.data.Population.from_split(examples, {f"{user:04d}": held[user] for user in range(common.USERS)})
    pace = common.Pace(given)
    pace.begin()
    shoal.simulate(
        task(config, data.weights), population, rounds=given.rounds, seed=given.seed,
        held_out=fields(config, data.central_x, data.central_y), evaluate_every=given.evaluate_every,
        on_round=lambda result: _ended(pace, result.metrics),
    )  # fmt: skip
    pace.finish()


def _ended(pace: common.Pace, metrics: Any) -> None:
    pace.round(lambda: float(metrics["loss"]))


if __name__ == "__main__":
    main(common.parse())
