"""Optimizers on pieces: right for those that act on elements and sums, refused for others."""

import jax
import jax.numpy as jnp
import optax
import pytest

from shoal.pod.piecewise import check

GOOD = {
    "sgd": optax.sgd(0.1), "momentum": optax.sgd(0.1, momentum=0.9, nesterov=True), "adam": optax.adam(1e-3), "adamw": optax.adamw(1e-3),
    "lars": optax.lars(0.1), "lamb": optax.lamb(1e-3), "lion": optax.lion(1e-3), "rmsprop": optax.rmsprop(1e-2), "adagrad": optax.adagrad(0.1),
    "global norm": optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1)), "clip": optax.chain(optax.clip(0.1), optax.adam(1e-3)),
    "schedule": optax.adam(optax.warmup_cosine_decay_schedule(0.0, 1e-2, 2, 10)), "radam": optax.radam(1e-3),
"yogi": optax.yogi(1e-2), "novograd": optax.novograd(1e-2),
}  # fmt: skip


@pytest.mark.parametrize("name", list(GOOD))
def test_what_acts_on_elements_and_sums_is_right_on_pieces(name: str) -> None:
    params = {"kernel": jnp.ones((256, 300)), "bias": jnp.ones((300,))}
    check(GOOD[name], params, {"kernel": jnp.ones((9600, 1)), "bias": jnp.ones((38,))})


def centered(updates: object, state: object, params: object = None) -> tuple[object, object]:
    return jax.tree.map(lambda g: g - jnp.mean(g), updates), state


def sorted_(updates: object, state: object, params: object = None) -> tuple[object, object]:
    return jax.tree.map(lambda g: jnp.sort(g.reshape(-1)).reshape(g.shape), updates), state


@pytest.mark.parametrize(
    "optimizer",
    [
        optax.GradientTransformation(lambda params: (), centered),
        optax.GradientTransformation(lambda params: (), sorted_),
        optax.chain(optax.add_noise(0.1, 0.5, jax.random.key(0)), optax.sgd(0.1)),
        optax.adafactor(1e-2),
    ],
    ids=["mean of a tensor", "sort", "noise", "adafactor"],
)
def test_anything_else_is_refused(optimizer: optax.GradientTransformation) -> None:
    params = {"kernel": jnp.ones((256, 300)), "bias": jnp.ones((300,))}
    pieces = {"kernel": jnp.ones((9600, 1)), "bias": jnp.ones((38,))}
    with pytest.raises(ValueError, match="update='replicated'"):
        check(optimizer, params, pieces)


def test_lamb_takes_two_collectives_for_all_its_norms() -> None:
    from shoal.pod.piecewise import state_pieces, update

    optimizer = optax.lamb(1e-3)
    params = {str(n): jnp.ones((4,)) for n in range(10)}
    state = optimizer.init(params)
    calls = []

    def total(values: jax.Array) -> jax.Array:
        calls.append(values.shape)
        return 2 * values

    flags = jax.tree.map(lambda _: True, params)
    update(
        optimizer, params, state, params, is_piece=(flags, state_pieces(optimizer, params, flags), flags), total=total
    )
    assert calls == [(20,), (20,)], (
        "of ten tensors those of parameters and of updates; optax takes each norm twice, the second where the first is not zero"
    )
