"""Products over few rows as sums of outer products: the same numbers, for each member too, and only where they are to be."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from shoal.forms.outer_products import LEAST_RESULT, MOST_ROWS, fused_outer_products


def operands(rows: int = 10, *, wide: int = 200, narrow: int = 96, members: int = 0) -> tuple[jax.Array, jax.Array]:
    rng, lead = np.random.default_rng(0), (members,) if members else ()
    x, y = (rng.standard_normal((*lead, rows, size)) for size in (wide, narrow))
    return jnp.asarray(x, jnp.float32), jnp.asarray(y, jnp.float32)


def product(x: jax.Array, y: jax.Array) -> jax.Array:
    return lax.dot_general(x, y, (((0,), (0,)), ((), ())))


def text(fn: Any, *arguments: Any) -> str:
    return str(jax.jit(fn).lower(*arguments).as_text())


def test_the_gradient_of_a_kernel_is_a_sum_and_what_it_was() -> None:
    x, y = operands()
    kernel = jnp.ones((200, 96))

    def step(kernel: jax.Array) -> jax.Array:
        return kernel - 0.1 * jax.grad(lambda k: jnp.sum(jnp.square(x @ k - y)))(kernel)

    assert text(step, kernel).count("dot_general") == 2
    assert text(fused_outer_products(step), kernel).count("dot_general") == 1
    np.testing.assert_allclose(jax.jit(fused_outer_products(step))(kernel), jax.jit(step)(kernel), rtol=2e-5, atol=1e-3)


@pytest.mark.parametrize("dims", [(0, 0), (0, None), (None, 0), (2, 1)])
def test_any_operand_may_be_mapped_over_members(dims: Any) -> None:
    x, y = operands(members=3)
    given = [each[0] if dim is None else jnp.moveaxis(each, 0, dim) for each, dim in zip((x, y), dims, strict=True)]
    made = jax.vmap(fused_outer_products(product), dims)
    assert "dot_general" not in text(made, *given)
    np.testing.assert_allclose(made(*given), jax.vmap(product, dims)(*given), rtol=1e-5, atol=1e-4)


def test_products_with_groups_of_their_own_are_left_alone_and_members_of_members_are_not() -> None:
    x, y = operands(members=3)

    def grouped(x: jax.Array, y: jax.Array) -> jax.Array:
        return lax.dot_general(x, y, (((1,), (1,)), ((0,), (0,))))

    assert "dot_general" in text(fused_outer_products(grouped), x, y)
    twice = jax.vmap(jax.vmap(fused_outer_products(product)))
    assert "dot_general" not in text(twice, x[None], y[None])
    np.testing.assert_allclose(twice(x[None], y[None])[0], grouped(x, y), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    "given",
    [
        operands(MOST_ROWS + 1),
        operands(wide=LEAST_RESULT // 96),
        tuple(each.astype(jnp.bfloat16) for each in operands()),
    ],
    ids=["many rows", "small result", "16 bits"],
)
def test_other_products_are_left_alone(given: Any) -> None:
    assert "dot_general" in text(fused_outer_products(product), *given)
