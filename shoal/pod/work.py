"""What one step of a task computes and keeps, from shapes alone: no device, no compilation.

Products of matrices and convolutions are counted in the trace of loss and gradient, loops times their turns; what else is computed is small beside
them. What the way back needs of the way forward is what `jax.vjp` keeps; a compiler may keep less. Both are measured with two sizes of batch and taken
as a straight line, so that parameters (which are kept, too) do not count as examples.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from shoal.flops import products
from shoal.local import Named, Shape, model_shape
from shoal.lora import with_adapters
from shoal.task import Task


@dataclass(frozen=True)
class Work:
    """Of one step, for each example of the batch."""

    flops: Mapping[str, float]
    """Type -> operations in products, forwards and backwards, an example."""
    kept_bytes: float
    """From the way forward for the way back, an example."""

    @property
    def total_flops(self) -> float:
        """Of all types, an example."""
        return sum(self.flops.values())

    @property
    def dtype(self) -> str:
        """Of most operations; float32 where there are none."""
        return max(self.flops, key=lambda name: self.flops[name], default="float32")


def work(task: Task, size: int = 8) -> Work:
    """What a step of the task takes.

    Args:
        task: any.
        size: examples in the smaller of the two batches that are traced.
    """
    task = with_adapters(task)
    like = model_shape(task)
    shape = Shape(like.params, "params")
    flat = dict(zip(shape.names, jax.tree.leaves(like.params), strict=True))
    learned = {name: leaf for name, leaf in flat.items() if task.leaf_rule(name) != "frozen"}
    frozen = {name: leaf for name, leaf in flat.items() if name not in learned}

    def stepped(learned: Named, frozen: Named, state: Any, batch: Named, key: Any) -> tuple[Named, Any]:
        def total(given: Named) -> Any:
            return jnp.sum(task.losses(shape.tree(frozen | given), state, batch, key).per_example)

        loss, back = jax.vjp(total, learned)
        return back(jnp.ones_like(loss))[0], back

    def traced(size: int) -> tuple[dict[str, float], float]:
        given = (learned, frozen, like.state, task.batch_spec(size), jax.eval_shape(lambda: jax.random.key(0)))
        closed, (_, back) = jax.make_jaxpr(stepped, return_shape=True)(*given)
        return products(closed.jaxpr), sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(back))

    (few, kept), (many, kept_more) = traced(size), traced(2 * size)
    flops = {name: (many[name] - few.get(name, 0.0)) / size for name in many}
    return Work({name: count for name, count in flops.items() if count > 0}, max(0.0, (kept_more - kept) / size))
