"""Rounds of FedJAX."""

import argparse

import fedjax
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
from fedjax.algorithms import fed_avg

from benchmarks import simulation_common as common


def outputs(config: str, x: jax.Array, is_train: bool) -> jax.Array:
    """The net in Haiku; of one parameter, the losses themselves."""
    if config == common.NO_OP:
        return jnp.square(hk.get_parameter("w", (), init=jnp.zeros) - x)
    net = common.NETS[config]
    for number, (kernel, out) in enumerate(net.convolutions):
        x = jax.nn.relu(hk.Conv2D(out, kernel, padding="VALID", name=f"conv{number}")(x))
        if net.pool_each or number == len(net.convolutions) - 1:
            x = hk.max_pool(x, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
    rates = net.dropout if net.dropout and is_train else (0.0, 0.0)
    x = hk.Flatten()(dropped(x, rates[0]))
    for number, out in enumerate(net.hidden):
        x = jax.nn.relu(hk.Linear(out, name=f"dense{number}")(x))
    return hk.Linear(common.CLASSES, name=f"dense{len(net.hidden)}")(dropped(x, rates[1]))


def dropped(x: jax.Array, rate: float) -> jax.Array:
    return hk.dropout(hk.next_rng_key(), rate, x) if rate else x


def load(params: hk.Params, weights: common.Weights) -> hk.Params:
    """The initial weights in Haiku's names."""
    made = {}
    for layer, arrays in params.items():
        names = {"w": "kernel", "b": "bias"}
        made[layer] = {name: jnp.asarray(weights["w" if layer == "~" else f"{layer}/{names[name]}"]) for name in arrays}
        assert {n: a.shape for n, a in arrays.items()} == {n: a.shape for n, a in made[layer].items()}, layer
    return made


def main(given: argparse.Namespace) -> None:
    config, data = given.config, common.load_data(given.data, given.config)
    net = hk.transform(lambda batch, is_train=True: outputs(config, batch["x"], is_train))

    def losses(batch, predictions):
        if config == common.NO_OP:
            return predictions
        return fedjax.metrics.unreduced_cross_entropy_loss(batch["y"], predictions)

    example = {"x": np.asarray(data.x[0, :1]), "y": data.y[0, :1]}
    model = fedjax.create_model_from_haiku(
        net, example, losses, train_kwargs={"is_train": True}, eval_kwargs={"is_train": False}
    )
    users = {b"%04d" % u: {"x": np.asarray(data.x[u]), "y": data.y[u]} for u in range(common.USERS)}
    clients = fedjax.InMemoryFederatedData(users)
    algorithm = fed_avg.federated_averaging(
        fedjax.model_grad(model),
        fedjax.optimizers.sgd(common.local_rate(config)),
        fedjax.optimizers.sgd(common.SERVER_RATE),
        fedjax.ShuffleRepeatBatchHParams(batch_size=common.BATCH, num_epochs=1),
    )
    sampler = fedjax.client_samplers.UniformGetClientSampler(clients, common.COHORT, seed=given.seed)
    state = algorithm.init(load(model.init(jax.random.PRNGKey(0)), data.weights))
    central = {"x": jnp.asarray(data.central_x), "y": jnp.asarray(data.central_y)}
    central_loss = jax.jit(lambda params: losses(central, model.apply_for_eval(params, central)).mean())
    pace, over = common.Pace(given), False
    pace.begin(lambda: float(central_loss(state.params)))
    while not over:
        state, _ = algorithm.apply(state, sampler.sample())
        jax.block_until_ready(state.params)
        over = pace.round(lambda params=state.params: float(central_loss(params)))
    pace.finish()


if __name__ == "__main__":
    main(common.parse())
