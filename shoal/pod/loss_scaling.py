"""Loss scaling, so that small gradients do not become zero in float16 (Micikevicius et al. 2018, "Mixed precision training", section 3.2).

The loss is multiplied by a power of two, the gradient divided by it. A step whose gradient is not finite changes neither parameters nor the
optimizer's state, and halves the factor; so many good ones in a row double it.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from shoal import validate
from shoal.local import Named


@dataclass(frozen=True, kw_only=True)
class LossScaling:
    """How the factor changes."""

    initial: float = 2.0**15
    """The first factor."""
    patience: int = 2000
    """Good steps in a row after which it is doubled."""
    largest: float = 2.0**24

    def __post_init__(self) -> None:
        validate.positive(initial=self.initial, patience=self.patience, largest=self.largest)

    def begin(self) -> Named:
        """The state before the first step."""
        return {"factor": jnp.asarray(self.initial, jnp.float32), "good": jnp.zeros((), jnp.int32)}

    def factor(self, scale: Named) -> Any:
        """What the loss is multiplied by."""
        return scale["factor"]

    def unscaled(self, scale: Named, gradient: Named) -> Named:
        """The gradient of the loss itself."""
        return {name: value / scale["factor"].astype(value.dtype) for name, value in gradient.items()}

    def after(self, scale: Named, is_finite: Any) -> Named:
        """The state after a step."""
        good = jnp.where(is_finite, scale["good"] + 1, jnp.zeros_like(scale["good"]))
        is_due = good >= self.patience
        grown = jnp.where(is_due, jnp.minimum(2 * scale["factor"], self.largest), scale["factor"])
        factor = jnp.where(is_finite, grown, jnp.maximum(scale["factor"] / 2, 1.0))
        return {"factor": factor, "good": jnp.where(is_due, jnp.zeros_like(good), good)}


def all_finite(tensors: Named) -> Any:
    """Whether every element of all is finite."""
    return jnp.stack([jnp.all(jnp.isfinite(value)) for value in tensors.values()]).all()


def chosen(is_new: Any, new: Any, old: Any) -> Any:
    """One of two pytrees of one structure."""
    return jax.tree.map(lambda one, other: jnp.where(is_new, one, other), new, old)
