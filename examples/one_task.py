"""One task with one of each: a convolution, batch norm, dropout, an embedding table, a leaf that stays on the device.

It is small enough to train in seconds, and the tests run it four ways: as a plain loop, in simulation, on a fleet in one
process, and on a fleet over sockets. That the results hold together is the mission of shoal as a test.

Every member has a camera (`sensor`, one of 8) and takes 12 x 12 pictures of one of 4 shapes, as its camera sees them.
"""

import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import shoal

NUM_SENSORS = 8
CLASSES = ("stripes", "bars", "checks", "noise")


class Net(nnx.Module):
    """Picture and sensor in, a score for each class out."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.conv = nnx.Conv(1, 8, (3, 3), strides=2, rngs=rngs)
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.sensors = nnx.Embed(NUM_SENSORS, 8, rngs=rngs)
        self.dropout = nnx.Dropout(0.1, rngs=rngs)
        self.head = nnx.Linear(6 * 6 * 8 + 8, len(CLASSES), rngs=rngs)

    def __call__(self, inputs, mask):  # type: ignore[no-untyped-def]
        image, sensor = inputs
        hidden = nnx.relu(self.norm(self.conv(image), mask=mask[:, None, None, None]))
        flat = hidden.reshape(hidden.shape[0], -1)
        joined = nnx.relu(self.sensors(sensor))
        return self.head(self.dropout(jnp.concatenate([flat, joined], axis=1)))


task = shoal.Task.from_flax(
    Net,
    name="one-task",
    loss="softmax_cross_entropy",
    batch={"image": ((12, 12, 1), "uint8"), "sensor": ((), "int32"), "label": ((), "int32")},
    inputs=lambda batch: (batch["image"].astype("float32") / 255.0, batch["sensor"]),
    local=shoal.Local(optimizer=optax.sgd(0.05, momentum=0.9), batch_size=8, epochs=2, steps_per_block=3),
    rounds=shoal.RoundPolicy(goal=4, minimum_group=4),
    leaves={"params/head/bias": "private"},
    tables={"sensors": "params/sensors/embedding"},
    keys=lambda batch: {"sensors": batch["sensor"]},
    about=shoal.About(
        purpose="Show that one task gives the same result wherever it runs.",
        data="Made pictures of four patterns; no person is in them.",
        licence="Apache-2.0, like shoal.",
        limits="Good for nothing else.",
    ),
)


def population(num_members: int = 6, *, seed: int = 0) -> shoal.data.Population:
    """Members with 9, 13, 17, … examples: none of them fills its last batch."""
    rng = np.random.default_rng(seed)
    members = {f"member-{i}": _pictures(9 + 4 * i, sensor=i % NUM_SENSORS, rng=rng) for i in range(num_members)}
    return shoal.data.Population.from_arrays(members)


def _pictures(num: int, *, sensor: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
    label = rng.integers(0, len(CLASSES), num).astype(np.int32)
    row, column = np.indices((12, 12))
    patterns = np.stack([row % 4 < 2, column % 4 < 2, (row + column) % 4 < 2, rng.random((12, 12)) < 0.5])
    light = 90 + 10 * sensor
    image = patterns[label] * light + rng.integers(0, 60, (num, 12, 12))
    return {
        "image": image[..., None].astype(np.uint8),
        "sensor": np.full(num, sensor, np.int32),
        "label": label,
    }


if __name__ == "__main__":
    result = shoal.simulate(task, population(), rounds=10, held_out=population(seed=1)["member-5"])
    print(f"accuracy after {result.version} rounds: {result.history[-1].metrics['accuracy']:.2f}")
