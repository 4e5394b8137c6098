"""A step of the pod on one accelerator beside plain JAX: BERT-base and ResNet-50, the recipes of `examples/pod/`.

Both do the same from the same weights to the same batches, which are on the device: ours is the trainer's compiled program, the rival one `jax.jit` of
`value_and_grad` and optax's update, with donated buffers. They take turns at some steps, forwards and backwards by cycles; the ratio is
the median of the pairs, and counts only where the losses agree.

U1: steps a second over plain JAX's, the worse of the two models, on a GPU or TPU. On a CPU the small recipes are measured, and nothing is judged.
`torch.compile` is not among the rivals.
"""

import runpy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.frame import Goal, percentile_interval, run, table
from shoal.pod.trainer import Trainer
from shoal.task import Task
from shoal.testing import random_examples

RECIPES: Final = Path("examples/pod")
SIZES: Final = {"bert": ("base", 64), "resnet": ("full", 128)}
"""Of a model on an accelerator: the recipe's size, and examples of a step."""
SMALL: Final = {"bert": ("small", 16), "resnet": ("small", 32)}
CYCLES, STEPS, POOL = 30, 10, 4
SAME: Final = 0.01

Step = Callable[[int], Any]
"""Number of a batch -> the loss, which need not be there yet."""


@dataclass
class Way:
    """One of the two."""

    step: Step
    examples: int
    """That its loss is the sum of."""
    compile_s: float
    seconds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)

    def turn(self, steps: int) -> None:
        begun = time.perf_counter()
        for number in range(steps):
            loss = self.step(number % POOL)
        jax.block_until_ready(loss)
        self.seconds.append((time.perf_counter() - begun) / steps)
        self.losses.append(float(np.sum(loss)) / self.examples)


def ours(task: Task, pool: Sequence[dict[str, np.ndarray]], size: int) -> Way:
    """The step of `shoal.pod`, one a call."""
    program = Trainer(task, mesh="data=1", batch_size=size, steps_per_call=1, devices=jax.devices()[:1]).program
    placed = [{name: jax.device_put(value[None]) for name, value in batch.items()} for batch in pool]
    mask, key = jax.device_put(np.ones((1, size), bool)), jax.device_put(np.array([1, 2], np.uint32))
    state, begun = program.begin(jax.random.key(0)), time.perf_counter()
    compiled = jax.jit(program.steps, donate_argnums=0).lower(state, placed[0], mask, key).compile()

    def step(number: int) -> Any:
        nonlocal state
        state, metrics = compiled(state, placed[number], mask, key)
        return metrics["loss/numerator"]

    return Way(step, size, time.perf_counter() - begun)


def plain(task: Task, pool: Sequence[dict[str, np.ndarray]], size: int) -> Way:
    """The rival: what anybody would write."""
    rule, variables = task.local.optimizer, task.variables(jax.random.key(0))
    params, state, key = variables.params, variables.state, jax.random.key(1)
    placed = [jax.device_put(batch | {"mask": np.ones(size, bool)}) for batch in pool]

    def advanced(params: Any, state: Any, opt: Any, batch: Any) -> Any:
        def objective(params: Any) -> tuple[Any, Any]:
            result = task.losses(params, state, batch, key)
            return jnp.mean(result.per_example), result.state

        (loss, state), gradient = jax.value_and_grad(objective, has_aux=True)(params)
        updates, opt = rule.update(gradient, opt, params)
        return optax.apply_updates(params, updates), state, opt, loss

    opt, begun = jax.jit(rule.init)(params), time.perf_counter()
    compiled = jax.jit(advanced, donate_argnums=(0, 1, 2)).lower(params, state, opt, placed[0]).compile()

    def step(number: int) -> Any:
        nonlocal params, state, opt
        params, state, opt, loss = compiled(params, state, opt, placed[number])
        return loss

    return Way(step, 1, time.perf_counter() - begun)


def measured(model: str, recipe: str, size: int, cycles: int, steps: int) -> dict[str, Way]:
    task: Task = runpy.run_path(str(RECIPES / f"{model}.py"))["make"](recipe)
    examples = random_examples(task, num=size * POOL)
    pool = [dict(examples.take(slice(n * size, (n + 1) * size))) for n in range(POOL)]
    ways = {"ours": ours(task, pool, size), "plain": plain(task, pool, size)}
    for way in ways.values():
        way.turn(2)  # the first are not like the others
        way.seconds.clear()
        way.losses.clear()
    for number in range(cycles):
        for way in list(ways.values())[:: 1 if number % 2 == 0 else -1]:
            way.turn(steps)
    return ways


def measure(quick: bool) -> tuple[Sequence[Goal], dict[str, Any]]:
    device = jax.devices()[0]
    is_accelerated = device.platform != "cpu"
    sizes, cycles = (SIZES, CYCLES) if is_accelerated else (SMALL, 4 if quick else 10)
    rows, ratios = [], {}
    for model, (recipe, size) in sizes.items():
        ways = measured(model, recipe, size, cycles, STEPS if is_accelerated else 3)
        for one, other in zip(ways["ours"].losses, ways["plain"].losses, strict=True):
            if not abs(one - other) <= SAME * max(1.0, abs(other)):
                raise ValueError(f"Expected the same losses of {model}, got {one:.5f} and {other:.5f}.")
        pairs = [p / o for o, p in zip(ways["ours"].seconds, ways["plain"].seconds, strict=True)]
        ratios[f"{model}-{recipe}"] = percentile_interval(pairs, 50)
        for name, way in ways.items():
            rows.append([f"{model}-{recipe}", size, name, 1e3 * float(np.median(way.seconds)), way.compile_s])
    table(["model", "examples", "way", "ms a step", "compiled in, s"], rows)
    for name, (value, low, high) in ratios.items():
        print(f"{name}: ours is {value:.3f} as fast as plain JAX ({low:.3f} to {high:.3f}), on {device.device_kind}")
    worst = min(ratios.values())
    why = "" if is_accelerated and not quick else "a GPU or TPU is needed, and the full run"
    goal = Goal(
        "U1", "steps a second over plain JAX's, the worse of BERT-base and ResNet-50", worst[0], ">= 1", why=why
    )
    return [goal], {"device": device.device_kind, "ratios": ratios, "rows": rows}


if __name__ == "__main__":
    run("pod_gpu", measure, __doc__ or "")
