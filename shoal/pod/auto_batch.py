"""How large a batch should be: large enough to keep the machine busy, and no larger than the gradient's noise makes worth while.

The *knee* of throughput is the smallest batch at which nearly as many examples a second go through as at any. The *noise scale* is the batch at which
the noise of a gradient is as large as the gradient itself, B = tr(covariance) / |gradient|^2 (McCandlish et al. 2018, "An empirical model of
large-batch training", equation 2.9, estimated from two batch sizes as in appendix A.1): far below it twice the batch makes twice the progress
of a step, far above it none. It grows as training goes on, so what is measured after a few steps is a lower estimate.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import jax
import jax.numpy as jnp
import numpy as np

from shoal.data.store import Examples
from shoal.pod.feed import filled_up, placed
from shoal.pod.placement import State
from shoal.pod.trainer import Trainer, conform

NEARLY: Final = 0.9
TIMED_S: Final = 0.5
NOISE_BATCHES: Final = 8


@dataclass(frozen=True, kw_only=True)
class BatchTrial:
    """What was measured."""

    rates: Mapping[int, float]
    """Batch size -> examples a second."""
    noise_scale: float
    """In examples; infinite where no gradient stands out of its noise."""

    @property
    def knee(self) -> int:
        """The smallest size with nearly the best rate."""
        best = max(self.rates.values())
        return min(size for size, rate in self.rates.items() if rate >= NEARLY * best)

    @property
    def chosen(self) -> int:
        """The knee; where the noise scale is below it, the largest size that is not above that."""
        worth = [size for size in self.rates if size <= self.noise_scale]
        return min(self.knee, max(worth, default=min(self.rates)))

    def lines(self) -> list[str]:
        """For people."""
        rates = ", ".join(f"{size:,}: {rate:,.0f}" for size, rate in self.rates.items())
        return [
            f"examples a second by batch size: {rates}; the knee is at {self.knee:,}",
            f"gradient noise scale: {self.noise_scale:,.0f} examples; chosen: batches of {self.chosen:,}",
        ]


def try_batches(
    make: Callable[[int], Trainer], examples: Examples, sizes: Sequence[int], *, seed: int = 0
) -> BatchTrial:
    """Takes steps with batches of several sizes, and measures.

    Args:
        make: a trainer for a batch size.
        examples: with the task's fields.
        sizes: in rising order; those larger than the data are left out.
        seed: of the initial model and the examples taken.
    """
    found = conform(examples, make(sizes[0]).task)
    rng = np.random.default_rng(seed)
    rates: dict[int, float] = {}
    smallest, state = make(sizes[0]), None
    for size in [size for size in sizes if size <= len(found)] or [sizes[0]]:
        trainer = smallest if size == sizes[0] else make(size)
        reached, rates[size] = _rate(trainer, found, rng, seed)
        state = state or reached
    assert state is not None
    return BatchTrial(rates=rates, noise_scale=_noise_scale(smallest, state, found, rng))


def noise_scale(small: float, large: float, *, batch: int, batches: int) -> float:
    """B = tr(covariance) / |gradient|^2.

    Args:
        small: mean squared norm of gradients of `batch` examples.
        large: squared norm of the mean of so many of them.
        batch: examples of each.
        batches: of them.
    """
    many = batch * batches
    gradient = (many * large - batch * small) / (many - batch)
    covariance = (small - large) / (1 / batch - 1 / many)
    return covariance / gradient if gradient > 0 and covariance >= 0 else float("inf")


def _rate(trainer: Trainer, examples: Examples, rng: np.random.Generator, seed: int) -> tuple[State, float]:
    """The state after some steps, and examples a second."""
    program = trainer.program
    state = program.begin(jax.random.key(seed))
    rows, mask = _rows(trainer, examples, rng, (trainer.steps_per_call,))
    arrays = placed(examples, rows, mask, program.row_shardings(1))
    fields = {name: array for name, array in arrays.items() if name != "mask"}
    run = jax.jit(program.steps, donate_argnums=0, out_shardings=(program.shardings, program.replicated))
    key = np.zeros(2, np.uint32)
    state, sums = jax.block_until_ready(run(state, fields, arrays["mask"], key))
    begun, calls = time.perf_counter(), 0
    while not calls or time.perf_counter() - begun < TIMED_S:
        state, sums = run(state, fields, arrays["mask"], key)
        jax.block_until_ready(sums)
        calls += 1
    return state, calls * int(np.sum(mask)) / (time.perf_counter() - begun)


def _noise_scale(trainer: Trainer, state: State, examples: Examples, rng: np.random.Generator) -> float:
    program = trainer.program
    params = program.whole(state["params"])
    plain = replace(program, update="replicated", scaling=None)
    state = {"params": params, "state": state["state"], "step": state["step"], "opt": plain.optimizer_init(params)}
    gradient_of = jax.jit(plain.gradient)
    total: Any = None
    squares = 0.0
    for number in range(NOISE_BATCHES):
        rows, mask = _rows(trainer, examples, rng, ())
        arrays = placed(examples, rows, mask, program.row_shardings(0))
        fields = {name: array for name, array in arrays.items() if name != "mask"}
        gradient = gradient_of(state, fields, arrays["mask"], np.array([0, number], np.uint32))
        squares += _square(gradient)
        total = gradient if total is None else jax.tree.map(jnp.add, total, gradient)
    mean = _square(total) / NOISE_BATCHES**2
    return noise_scale(squares / NOISE_BATCHES, mean, batch=trainer.batch_size, batches=NOISE_BATCHES)


def _rows(
    trainer: Trainer, examples: Examples, rng: np.random.Generator, before: tuple[int, ...]
) -> tuple[np.ndarray, np.ndarray]:
    rows = rng.integers(len(examples), size=(*before, trainer.batch_size))
    return filled_up(rows, np.ones(rows.shape, bool), trainer.spec.num_members * trainer.program.accumulate)


def _square(tensors: Mapping[str, Any]) -> float:
    return float(sum(jnp.sum(jnp.square(value.astype(jnp.float32))) for value in tensors.values()))
