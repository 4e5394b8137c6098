"""A member of `pod_time_to_target`: trains until the target is reached, by `shoal.pod` or by plain JAX.

Says {"how"} when all have found one another. Then it reads a line of JSON for each training, {"way", "seed"}, and answers with {"initialisation",
"seconds", "steps", "accuracy"}. Before the clock starts all programs are compiled and run once on zeros; it starts before the data is read from disk.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Any, Final

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec

import shoal
from benchmarks.pod_step_common import MEMBERS
from shoal.pod import MeshSpec, Trainer, Version, Watch
from shoal.pod.order import Order

DEVICES: Final = 2
"""Of each member."""
WIDTHS: Final = (784, 1024, 1024, 10)
BATCH: Final = 600
"""Divides the 60,000 examples, and is shared evenly."""
TARGET: Final = 0.86
"""Accuracy on the 10,000 images of the test set."""
EVERY: Final = 20
"""Steps between evaluations: five in a pass."""
MOST: Final = 50 * EVERY
WAYS: Final[dict[str, dict[str, Any]]] = {
    "sharded": {"mesh": "data=4", "update": "sharded"},
    "two levels": {"mesh": "slow=2,data=2", "update": "sharded"},
    "bfloat16 sums": {"mesh": "slow=2,data=2", "update": "sharded", "sum_type": "bfloat16"},
}
OPTIMIZER: Final = optax.adam(1e-3)


def init(key: jax.Array) -> Any:
    keys = jax.random.split(key, len(WIDTHS) - 1)
    return {
        f"layer{n}": {"kernel": jax.random.normal(keys[n], pair) * pair[0] ** -0.5, "bias": jnp.zeros(pair[1])}
        for n, pair in enumerate(pairwise(WIDTHS))
    }


def scores(params: Any, batch: Any) -> jax.Array:
    """(B, 10)."""
    hidden: jax.Array = (batch["image"].astype(jnp.float32) / 255).reshape(batch["image"].shape[0], -1)
    for number in range(len(params)):
        hidden = jax.nn.relu(hidden) if number else hidden
        hidden = hidden @ params[f"layer{number}"]["kernel"] + params[f"layer{number}"]["bias"][None]
    return hidden


def losses(params: Any, batch: Any) -> jax.Array:
    """(B,)."""
    made: jax.Array = optax.softmax_cross_entropy_with_integer_labels(scores(params, batch), batch["label"])
    return made


def right(params: Any, batch: Any) -> jax.Array:
    """(B,), 1 where the label is found."""
    made: jax.Array = (jnp.argmax(scores(params, batch), axis=-1) == batch["label"]).astype(jnp.float32)
    return made


TASK: Final = shoal.Task(
    name="mlp", init=init, loss=lambda params, state, batch, key: losses(params, batch),
    evaluate=lambda params, state, batch: {"accuracy": shoal.Sum(right(params, batch), jnp.ones(batch["label"].shape[0]), (0.0, 1.0))},
    batch={"image": ((28, 28, 1), "uint8"), "label": ((), "int32")},
    local=shoal.Local(optimizer=OPTIMIZER, batch_size=BATCH, steps_per_block=1),
)  # fmt: skip


@dataclass(frozen=True)
class Reached:
    """Where a training ended."""

    steps: int
    accuracy: float
    at_s: float
    """By `time.perf_counter`."""


Train = Callable[[shoal.data.Examples, shoal.data.Examples, int, int], Reached]
"""Images to learn, images to judge by, seed, most steps."""


@cache
def ours(way: str) -> Train:
    trainer = Trainer(TASK, **WAYS[way])

    def train(learned: shoal.data.Examples, judged: shoal.data.Examples, seed: int, most: int) -> Reached:
        found: list[Reached] = []

        def on_version(version: Version) -> None:
            found.append(Reached(version.step, version.metrics["accuracy"], time.perf_counter()))

        watch = Watch(on_version=on_version, should_stop=lambda step: bool(found) and found[-1].accuracy >= TARGET)
        trainer.train(learned, steps=most, commit_every=EVERY, seed=seed, held_out=judged, watch=watch)
        return next((each for each in found if each.accuracy >= TARGET), found[-1])

    return train


@cache
def plain() -> Train:
    """One `jax.jit` with shardings, parameters whole on each device, batches split, all else the compiler's. Dispatch runs ahead of the devices."""
    mesh = MeshSpec.parse(f"data={MEMBERS * DEVICES}").build()
    everywhere, split = NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec("data"))
    rank = jax.process_index()

    def advanced(params: Any, opt: Any, batch: Any) -> Any:
        gradient = jax.grad(lambda p: jnp.mean(losses(p, batch)))(params)
        updates, opt = OPTIMIZER.update(gradient, opt, params)
        return optax.apply_updates(params, updates), opt

    begin = jax.jit(init, out_shardings=everywhere)
    begin_optimizer = jax.jit(OPTIMIZER.init, out_shardings=everywhere)
    step = jax.jit(advanced, donate_argnums=(0, 1), out_shardings=everywhere)
    count = jax.jit(lambda params, batch: jnp.sum(right(params, batch)), out_shardings=everywhere)

    def here(examples: shoal.data.Examples, indices: np.ndarray) -> Any:
        """The batch on the devices: each process has a consecutive part of it."""
        rows = np.split(indices, MEMBERS)[rank]
        return {
            name: jax.make_array_from_process_local_data(split, values[rows])
            for name, values in examples.fields.items()
        }

    def train(learned: shoal.data.Examples, judged: shoal.data.Examples, seed: int, most: int) -> Reached:
        order = Order(num_examples=len(learned), batch_size=BATCH, seed=seed)  # the same examples in each step
        tested = here(judged, np.arange(len(judged)))
        params = begin(jax.random.key(seed))
        opt = begin_optimizer(params)
        accuracy = 0.0
        for number, (indices, _) in zip(range(1, most + 1), order.steps(0), strict=False):
            params, opt = step(params, opt, here(learned, indices))
            if number % EVERY == 0 or number == most:
                accuracy = float(count(params, tested)) / len(judged)
                if accuracy >= TARGET:
                    break
        return Reached(number, accuracy, time.perf_counter())

    return train


def zeros(num: int) -> shoal.data.Examples:
    return shoal.data.Examples({"image": np.zeros((num, 28, 28, 1), np.uint8), "label": np.zeros(num, np.int32)})


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--rank", type=int, required=True)
    parser.add_argument("--port", type=int, required=True)
    given = parser.parse_args()
    jax.distributed.initialize(f"localhost:{given.port}", MEMBERS, given.rank)
    print(json.dumps({"how": "gloo"}), flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        begun = time.perf_counter()
        train = plain() if asked["way"] == "plain" else ours(asked["way"])
        train(zeros(60_000), zeros(10_000), 0, 2)
        between = time.perf_counter()
        data = shoal.data.load("fashion-mnist")
        reached = train(data.train, data.test, asked["seed"], MOST)
        times = {"initialisation": between - begun, "seconds": reached.at_s - between}
        print(json.dumps({**times, "steps": reached.steps, "accuracy": reached.accuracy}), flush=True)


if __name__ == "__main__":
    main()
