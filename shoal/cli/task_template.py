"""What `shoal new` writes. NAME and FILE are replaced."""

TEMPLATE = '''"""NAME: recognises handwritten digits. Written by `shoal new`; every line is yours to change.

    shoal check FILE --data name:digits
    shoal simulate FILE --data name:digits --split dirichlet:0.3 --users 100 --rounds 10
    shoal host FILE --rounds 10 --port 8500 --run runs/NAME
    shoal device --server 127.0.0.1:8500 --data name:digits
"""

import jax
import numpy as np
import optax
from flax import nnx

import shoal


# The model. Change: layers, sizes. Batch norm and dropout are welcome; a layer that mixes the examples of a batch, as
# batch norm does, should get the mask: take `mask` as another argument of __call__ and pass it on.
class Net(nnx.Module):
    """An image in, a score for each class out."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.conv = nnx.Conv(1, 8, (3, 3), strides=2, rngs=rngs)
        self.head = nnx.Linear(4 * 4 * 8, 10, rngs=rngs)

    def __call__(self, image: jax.Array) -> jax.Array:
        hidden = nnx.relu(self.conv(image))
        return self.head(hidden.reshape(hidden.shape[0], -1))


task = shoal.Task.from_flax(
    lambda rngs: Net(rngs),
    name="NAME",
    # A name of shoal.task_supervised.LOSSES, or your own: (outputs, labels) -> one loss for each example.
    loss="softmax_cross_entropy",
    # The fields of one example: name -> (shape, type). uint8 images are divided by 255 for you.
    batch={"image": ((8, 8, 1), "uint8"), "label": ((), "int32")},
    # What one device does in a round: any optax optimizer.
    local=shoal.Local(optimizer=optax.sgd(0.1, momentum=0.9), batch_size=16, epochs=2),
    # What the server does with the mean of the updates; try shoal.server.adam(0.01).
    server=shoal.server.sgd(1.0),
    # Updates in a round. A sum of fewer than 8 updates is never looked at, unless minimum_group says so.
    rounds=shoal.RoundPolicy(goal=10),
    # What people are told of the model, on its card.
    about=shoal.About(
        purpose="Read single handwritten digits.",
        data="8x8 images of digits from the UCI repository.",
        licence="Say under what terms data and model may be used.",
        limits="Say where it should not be used.",
    ),
)


if __name__ == "__main__":
    # Your own data: shoal.data.open_population("folder of .npz files, one a user").
    digits = shoal.data.load("digits")
    users = shoal.data.iid(len(digits.train), 20, rng=np.random.default_rng(0))
    population = shoal.data.Population.from_split(digits.train, users)
    made = shoal.simulate(task, population, rounds=10, held_out=digits.test)
    print(f"accuracy after {made.version} rounds: {made.history[-1].metrics['accuracy']:.2f}")
'''
