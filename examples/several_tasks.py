"""One host, three tasks: statistics of what devices hold, a model trained on it, and its evaluation on devices.

    shoal host examples/several_tasks.py:measured examples/several_tasks.py:train examples/several_tasks.py:evaluated \
        --rounds 10 --set measured.rounds=3 --weight train=3 --port 8500 --run runs/several
    shoal device --server 127.0.0.1:8500 --data name:digits --users 20
    shoal runs show runs/several

Each device serves all three, as they want it. Only sums leave the devices.
"""

import jax
import optax
from flax import nnx

import shoal

FIELDS = {"image": ((8, 8, 1), "uint8"), "label": ((), "int32")}
ROUNDS = shoal.RoundPolicy(goal=8, over_selection=1.0)

measured = shoal.statistics(
    FIELDS, {"label": shoal.Measure(bounds=(0.0, 9.0), histogram=10, quantiles=(0.5,))}, name="measured", rounds=ROUNDS
)


class Net(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.hidden = nnx.Linear(64, 32, rngs=rngs)
        self.out = nnx.Linear(32, 10, rngs=rngs)

    def __call__(self, image: jax.Array) -> jax.Array:
        return self.out(nnx.relu(self.hidden(image.reshape(image.shape[0], -1))))


train = shoal.Task.from_flax(
    Net,
    name="train",
    loss="softmax_cross_entropy",
    batch=FIELDS,
    local=shoal.Local(optimizer=optax.sgd(0.1), batch_size=16, holdout=0.2),
    rounds=ROUNDS,
)
evaluated = shoal.evaluation(train, every=3, name="evaluated")
