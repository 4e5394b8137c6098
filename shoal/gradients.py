"""The gradient that a local step goes along: of the batch's mean loss, or of its examples' clipped gradients with noise.

The second is that of Abadi et al. 2016, "Deep learning with differential privacy" (arXiv:1607.00133), algorithm 1::

    g_i  = gradient of the loss of example i alone
    step = (sum over real i of g_i min(1, clip_norm / |g_i|) + normal(0, (noise_multiplier clip_norm)^2)) / batch size

|g_i| is over all learned tensors (flat clipping). Departures: batches are those of shuffled epochs, not a Poisson sample, so no
amplification by sampling may be counted; the divisor is the batch's size with its padding, which is public.

Examples are taken one after the other, so that a device needs the memory of one gradient, not of `batch_size`. Side by side (`vmap`) small
convolutions take less time on a CPU, and dense layers much more: their gradients are no products any more, but written out.

Guarantees:
    * One example changes the noise-free step by at most clip_norm / batch size in L2 norm, whatever its values are: a gradient that is
      not finite counts as zero. (But for float32, whose sums round.)
    * Padding adds nothing.
    * The noise says nothing of its key as long as threefry2x32 is a good generator: it is drawn from two streams added bit by bit, with
      a key of 64 bits each, which differ in each step.
"""

from collections.abc import Callable, Mapping
from typing import Any, Final

import jax
import jax.numpy as jnp

from shoal.policy import ExamplePrivacy
from shoal.task import Loss, Tree

Objective = Callable[[Tree, Mapping[str, Any]], tuple[Any, Loss]]
"""(learned parameters, batch with its mask) -> (mean loss over real examples, penalty included; what the loss returned)"""

Gradient = Callable[[Objective, Tree, Mapping[str, Any]], tuple[Tree, Loss, Any]]
"""(objective, learned parameters, batch) -> (gradient, what is reported, mask (n,) of the examples that is about)"""

OneLoss = Callable[[Tree, Mapping[str, Any], Any], Any]
"""(learned parameters, batch of one with its mask, its number) -> its loss, without penalty"""

_BELOW_NORM: Final = 1 - 2.0**-16
"""A little less than the norm allows, so that float32, which rounds sums and the norm itself, does not go above it."""


def plain_gradient(objective: Objective, params: Tree, batch: Mapping[str, Any]) -> tuple[Tree, Loss, Any]:
    """The gradient of the batch's mean loss."""
    gradient, result = jax.grad(objective, has_aux=True)(params, batch)
    return gradient, result, batch["mask"]


def noisy_gradient(
    loss_of: OneLoss, params: Tree, batch: Mapping[str, Any], privacy: ExamplePrivacy, *, key: Any, step: Any
) -> Tree:
    """Clipped gradients of the batch's examples, added up with noise and divided by its size.

    Args:
        loss_of: the loss of one example.
        params: learned ones.
        batch: field -> (B, …), and `mask` (B,).
        privacy: clip norm and noise.
        key: (4,) uint32, known to nobody else.
        step: () int32, which no other has of that key.

    Returns:
        Like `params`, in their types.
    """
    size = batch["mask"].shape[0]
    total = clipped_sum(loss_of, params, batch, privacy.clip_norm)
    leaves, tree = jax.tree.flatten(total)
    noise = normal(key, step, sum(leaf.size for leaf in leaves)) * (privacy.noise_multiplier * privacy.clip_norm)
    made, first = [], 0
    for leaf in leaves:
        made.append((leaf + noise[first : first + leaf.size].reshape(leaf.shape)) / size)
        first += leaf.size
    return jax.tree.map(lambda mean, like: mean.astype(like.dtype), jax.tree.unflatten(tree, made), params)


def clipped_sum(loss_of: OneLoss, params: Tree, batch: Mapping[str, Any], clip_norm: float) -> Tree:
    """Sum over real examples of their gradients, each scaled down to the norm. Like `params`, in float32."""
    zeros = jax.tree.map(lambda values: jnp.zeros(values.shape, jnp.float32), params)

    def added(total: Tree, example: tuple[Any, Mapping[str, Any]]) -> tuple[Tree, None]:
        number, fields = example
        alone = {name: values[None] for name, values in fields.items()} | {"mask": jnp.ones((1,), jnp.bool_)}
        gradient = _clipped(jax.grad(loss_of)(params, alone, number), clip_norm)
        counts = fields["mask"]
        return jax.tree.map(lambda t, g: t + jnp.where(counts, g, jnp.zeros_like(g)), total, gradient), None

    numbers = jnp.arange(batch["mask"].shape[0], dtype=jnp.int32)
    return jax.lax.scan(added, zeros, (numbers, dict(batch)))[0]


def _clipped(gradient: Tree, clip_norm: float) -> Tree:
    wide = jax.tree.map(lambda values: values.astype(jnp.float32), gradient)
    length = jnp.sqrt(sum(jnp.sum(jnp.square(values)) for values in jax.tree.leaves(wide)))
    most = clip_norm * _BELOW_NORM
    scale = most / jnp.maximum(length, most)
    is_sound = jnp.isfinite(
        length
    )  # else it would be in the sum without a bound: as NaN, or as what squares to infinity
    return jax.tree.map(lambda values: jnp.where(is_sound, values * scale, jnp.zeros_like(values)), wide)


def normal(key: Any, step: Any, size: int) -> Any:
    """(size,) float32, standard normal, of key (4,) uint32 and a step. By Box and Muller 1958, at most 6.8 in size."""
    half = -(-size // 2)
    streams = (jax.random.wrap_key_data(words, impl="threefry2x32") for words in (key[:2], key[2:]))
    one, other = (jax.random.bits(jax.random.fold_in(stream, step), (2, half), jnp.uint32) for stream in streams)
    radius, angle = (one ^ other).astype(jnp.float32) * 2.0**-32 + jnp.array([[2.0**-33], [0.0]], jnp.float32)
    length = jnp.sqrt(-2.0 * jnp.log(radius))
    turn = (2.0 * jnp.pi) * angle
    return jnp.concatenate([length * jnp.cos(turn), length * jnp.sin(turn)])[:size]
