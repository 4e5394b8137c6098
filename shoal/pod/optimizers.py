"""Optimizers for large batches, with the schedules that they are used with; all of them act on pieces (`piecewise.py`).

Biases and the scales of norms (tensors of fewer than two dimensions) have neither weight decay nor a trust ratio, as in the published
submissions to MLPerf v0.7 of ResNet-50 (LARS) and BERT (LAMB).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from shoal import validate


def warmed_up(peak: float, *, steps: int, warmup: int, power: float) -> optax.Schedule:
    """A rate that rises linearly to `peak` in `warmup` steps, and falls as (1 - t)^power to 0 at `steps`.

    Power 2 is that of LARS with ResNet-50, power 1 that of LAMB with BERT (Kumar et al. 2020).
    """
    validate.whole(1, steps=steps)
    if not 0 <= warmup < steps:
        raise ValueError(f"Expected 0 <= warmup < steps={steps}, got warmup={warmup}.")
    rise = optax.linear_schedule(0.0, peak, max(warmup, 1))
    fall = optax.polynomial_schedule(peak, 0.0, power, steps - warmup)
    made: optax.Schedule = optax.join_schedules([rise, fall], [warmup]) if warmup else fall
    return made


def lars(
    rate: optax.ScalarOrSchedule, *, momentum: float = 0.9, weight_decay: float = 1e-4, trust: float = 1e-3
) -> optax.GradientTransformation:
    """LARS (You et al. 2017, "Large batch training of convolutional networks")."""
    return optax.lars(
        rate, weight_decay=weight_decay, weight_decay_mask=_matrices, trust_coefficient=trust, trust_ratio_mask=_matrices, momentum=momentum
    )  # fmt: skip


def lamb(
    rate: optax.ScalarOrSchedule, *, b1: float = 0.9, b2: float = 0.999, eps: float = 1e-6, weight_decay: float = 0.01
) -> optax.GradientTransformation:
    """LAMB (You et al. 2020, "Large batch optimization for deep learning: training BERT in 76 minutes", algorithm 2)."""
    return optax.chain(
        optax.scale_by_adam(b1=b1, b2=b2, eps=eps),
        optax.add_decayed_weights(weight_decay, mask=_matrices),
        optax.masked(optax.scale_by_trust_ratio(), _matrices),
        optax.scale_by_learning_rate(rate),
    )


def ranger(
    rate: optax.ScalarOrSchedule, *, slow_step: float = 0.5, period: int = 6, weight_decay: float = 0.0
) -> optax.GradientTransformation:
    """RAdam (Liu et al. 2020) within `lookahead`; both as in Wright's Ranger."""
    fast = optax.chain(
        optax.scale_by_radam(b1=0.95, eps=1e-5),
        optax.add_decayed_weights(weight_decay, mask=_matrices),
        optax.scale_by_learning_rate(rate),
    )
    return lookahead(fast, slow_step=slow_step, period=period)


class LookaheadState(NamedTuple):
    """Of `lookahead`."""

    fast: Any
    slow: Any
    """Parameters, as they were at the last step of a period."""
    count: Any


def lookahead(fast: optax.GradientTransformation, *, slow_step: float, period: int) -> optax.GradientTransformation:
    """After each `period` steps of `fast`, goes back to `slow_step` of the way that they went (Zhang et al. 2019, "Lookahead optimizer",
    algorithm 1). It is a transformation like any other: parameters are those of `fast`, and at the end of a period the slow ones."""
    validate.whole(1, period=period)

    def init(params: Any) -> LookaheadState:
        return LookaheadState(fast.init(params), jax.tree.map(jnp.copy, params), jnp.zeros((), jnp.int32))

    def update(gradient: Any, state: LookaheadState, params: Any = None) -> tuple[Any, LookaheadState]:
        updates, inner = fast.update(gradient, state.fast, params)
        count = state.count + 1
        is_due = count % period == 0

        def reached(p: Any, u: Any, slow: Any) -> Any:
            return jnp.where(is_due, slow + slow_step * (p + u - slow), p + u)

        after = jax.tree.map(reached, params, updates, state.slow)
        slow = jax.tree.map(lambda kept, now: jnp.where(is_due, now, kept), state.slow, after)
        return jax.tree.map(jnp.subtract, after, params), LookaheadState(inner, slow, count)

    return optax.GradientTransformation(init, update)


def _matrices(params: Any) -> Any:
    return jax.tree.map(lambda leaf: jnp.ndim(leaf) > 1, params)
