"""Linear maps: the same in JAX and NumPy, undone on a sum, the same for all members."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from shoal.codec.linear import (
    SPREAD,
    block_length,
    chosen,
    rotate,
    rotate_back,
    rotated_size,
    seed_of,
    seed_of_version,
)

SIZES = [1, 7, 16, 64, 1000, 5000, 100_003]


def normal(size: int, *, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=size).astype(np.float32)


@pytest.mark.parametrize("size", SIZES)
def test_a_rotation_keeps_the_norm_and_is_undone(size: int) -> None:
    block, values = block_length(size), normal(size)
    assert rotated_size(size, block) <= size * 9 / 8
    turned = jax.jit(lambda x: rotate(x, block, seed=9, xp=jnp))(values)
    np.testing.assert_allclose(turned, rotate(values, block, seed=9, xp=np), atol=1e-5)
    assert np.linalg.norm(turned) == pytest.approx(np.linalg.norm(values), rel=1e-5)
    back = rotate_back(np.asarray(turned, np.float64), block, seed=9)
    np.testing.assert_allclose(back[:size], values, atol=1e-5)
    np.testing.assert_allclose(back[size:], 0.0, atol=1e-5)


@pytest.mark.parametrize("block", [8, 16, 128, 2048])
def test_a_rotation_is_by_the_hadamard_matrix(block: int) -> None:
    signs = np.sign(rotate_back(np.eye(block)[0] * block**0.5, block, seed=3))
    bits = np.arange(block)
    parity = np.array([[bin(i & j).count("1") & 1 for j in bits] for i in bits])
    turned = rotate(np.eye(block, dtype=np.float32).reshape(-1), block, seed=3, xp=np).reshape(block, block)
    own = rotate_back(np.ones(block), block, seed=3)  # the first column: only element 0, times its sign
    assert abs(own[0]) == pytest.approx(block**0.5) and np.allclose(own[1:], 0.0, atol=1e-9)
    first = np.abs(turned[0]) * block**0.5
    np.testing.assert_allclose(first, 1.0, rtol=1e-5)
    np.testing.assert_allclose(np.abs(turned[0] - turned[0, 0] * (1 - 2 * parity[0])), 0.0, atol=1e-5)
    assert set(signs) <= {-1.0, 1.0}


def test_pieces_of_whole_blocks_are_undone_as_the_whole() -> None:
    turned = rotate(normal(1000), 64, seed=1, xp=np).astype(np.float64)
    pieces = [rotate_back(turned[at : at + 256], 64, seed=1, start=at) for at in range(0, turned.size, 256)]
    assert np.array_equal(np.concatenate(pieces), rotate_back(turned, 64, seed=1))


def test_no_rotated_element_stands_out() -> None:
    """The worst that there is: all in one element, and all alike."""
    for values in (np.eye(1, 1 << 17, 5, dtype=np.float32)[0], np.full(1 << 17, 2.0**-8.5, np.float32)):
        block = block_length(values.size)
        turned = rotate(values, block, seed=seed_of("params/w"), xp=np)
        rows = turned.reshape(-1, block)
        norms = np.linalg.norm(values[: rows.size].reshape(-1, block), axis=1)
        assert np.all(np.abs(rows).max(axis=1) <= SPREAD * norms / block**0.5 + 1e-12)


@pytest.mark.parametrize("one_of", [2, 16, 64])
def test_all_draw_the_same_one_of_each_group_and_others_for_another_version(one_of: int) -> None:
    size = 64_000
    versions = [np.array([version], np.uint32) for version in (7, 8)]
    drawn = [chosen(size, one_of, seed=seed_of_version(version, "w", np), xp=np) for version in versions]
    there = chosen(size, one_of, seed=seed_of_version(jnp.asarray(versions[0]), "w", jnp), xp=jnp)
    assert np.array_equal(there, drawn[0])
    assert np.array_equal(drawn[0] // one_of, np.arange(-(-size // one_of)))
    assert np.mean(drawn[0] == drawn[1]) < 3 / one_of
    part = chosen(size - 30 * one_of, one_of, seed=seed_of_version(versions[0], "w", np), xp=np, start=30)
    assert np.array_equal(part, drawn[0][30:])
    counts = np.bincount(drawn[0] % one_of, minlength=one_of)
    assert counts.min() > 0.3 * counts.mean(), "every place has its turn"
