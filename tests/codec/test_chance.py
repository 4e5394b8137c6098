"""Numbers by chance: alike in JAX and NumPy, even, of no two keys the same."""

import jax.numpy as jnp
import numpy as np

from shoal.codec.chance import uniform

SIZE = 1 << 17


def test_they_are_even_and_of_no_two_keys_the_same() -> None:
    keys = [np.array(key, np.uint32) for key in ((0, 0), (0, 1), (1, 0), (12345, 99))]
    drawn = [uniform(SIZE, key, np) for key in keys]
    for key, values in zip(keys, drawn, strict=True):
        assert np.array_equal(values, uniform(SIZE, jnp.asarray(key), jnp))
        counts = np.histogram(values, 256, (0.0, 1.0))[0]
        chi_square = float(np.sum((counts - counts.mean()) ** 2) / counts.mean())
        assert 150 < chi_square < 400, "255 expected"
        assert abs(np.corrcoef(values[:-1], values[1:])[0, 1]) < 0.015
    for at, values in enumerate(drawn):
        for other in drawn[:at]:
            assert abs(np.corrcoef(values, other)[0, 1]) < 0.015
