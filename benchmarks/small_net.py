"""A small net for images of 28x28: what the benchmarks of a virtual fleet train, thousands of times."""

import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import shoal
from shoal.policy import RoundPolicy


class Net(nnx.Module):
    """One hidden layer."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.hidden = nnx.Linear(196, 32, rngs=rngs)
        self.out = nnx.Linear(32, 10, rngs=rngs)

    def __call__(self, image: jnp.ndarray) -> jnp.ndarray:
        small = image.reshape(-1, 14, 2, 14, 2).mean((2, 4)).reshape(-1, 196)
        return self.out(nnx.relu(self.hidden(small)))


class Digits(nnx.Module):
    """One hidden layer for images of 8x8."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.hidden = nnx.Linear(64, 32, rngs=rngs)
        self.out = nnx.Linear(32, 10, rngs=rngs)

    def __call__(self, image: jnp.ndarray) -> jnp.ndarray:
        return self.out(nnx.relu(self.hidden(image.reshape(-1, 64))))


def task(policy: RoundPolicy, *, server_rate: float = 1.0, rate: float = 0.1, steps_per_block: int = 6) -> shoal.Task:
    """The task with these rounds, and these learning rates at the server and on devices."""
    made = shoal.Task.from_flax(
        Net,
        name="small-net",
        loss="softmax_cross_entropy",
        batch={"image": ((28, 28, 1), "uint8"), "label": ((), "int32")},
        local=shoal.Local(optimizer=optax.sgd(rate), batch_size=10, steps_per_block=steps_per_block, epochs=1),
    )
    return made.replace(rounds=policy, server=shoal.server.sgd(server_rate))


def data(users: int = 1000, each: int = 60) -> tuple[shoal.data.Population, shoal.data.Examples]:
    """Fashion-MNIST over users by Dirichlet(0.3), and 2,000 test images."""
    loaded = shoal.data.load("fashion-mnist")
    rng = np.random.default_rng(0)
    whole = shoal.data.dirichlet(loaded.train.fields["label"], users, alpha=0.3, rng=rng, min_examples=10)
    split = {user: np.sort(rng.permutation(indices)[:each]) for user, indices in whole.items()}
    test = shoal.data.Examples(loaded.test.take(np.arange(2000)))
    return shoal.data.Population.from_split(loaded.train, split), test
