"""`computed_once`: the same bits, and what makes XLA compute an array once is still there when XLA has simplified the program."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from shoal.forms.computed_once import computed_once

VALUES = [0.0, -0.0, 1.5, -3.25, np.inf, -np.inf, np.nan, 1e-45, 3e4]


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "int32", "int8"])
def test_the_bits_are_the_same(dtype: str) -> None:
    given = jnp.asarray([0, 1, -7, 100] if "int" in dtype else VALUES, dtype)
    made = jax.jit(computed_once)(given)
    width = f"uint{8 * given.dtype.itemsize}"
    assert made.dtype == given.dtype
    np.testing.assert_array_equal(np.asarray(made).view(width), np.asarray(given).view(width))


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="how XLA compiles for a CPU")
@pytest.mark.parametrize("dtype", ["float32", "int32"])
def test_a_sum_that_many_elements_read_is_computed_once(dtype: str) -> None:
    def many_readers(x: jax.Array) -> jax.Array:
        total = sum(jnp.roll(x, shift) for shift in range(8))
        read = computed_once(total)
        return jnp.stack([read[at : at + 32] * jnp.asarray(2, dtype) for at in range(0, 32, 4)])

    text = jax.jit(many_readers).lower(jnp.zeros(64, dtype)).compile().as_text()
    assert sum("divide(" in part for part in text.split("\n\n")) == 1
