"""Statistics over groups of members are those of the group's real examples."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from shoal.pod.batch_norm import batch_moments, group_mean, group_sum, groups
from shoal.pod.collectives import Members
from shoal.pod.mesh import MeshSpec

SPEC = MeshSpec.parse("slow=2,data=4")
MEMBERS = Members(SPEC)
B, C = 16, 3


def data() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    mask = np.arange(B) % 3 != 0
    mask[:2] = False  # the first member has no real example at all
    return np.asarray(rng.normal(2.0, 1.0, (B, 5, C)), np.float32), mask


def of_members(function: Any, *arrays: np.ndarray) -> np.ndarray:
    """What each member makes of its rows, (members, …), in the order of rows."""
    rows = jax.sharding.PartitionSpec(SPEC.member_axes)
    mapped = jax.shard_map(
        lambda *own: jax.tree.map(lambda value: value[None], function(*own)),
        mesh=SPEC.build(), in_specs=rows, out_specs=rows, check_vma=False,
    )  # fmt: skip
    return jax.tree.map(np.asarray, jax.jit(mapped)(*arrays))


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_moments_are_of_the_group_s_real_examples(size: int) -> None:
    x, mask = data()

    def inside(x: Any, mask: Any) -> Any:
        with groups(MEMBERS, size):
            return batch_moments(x, mask)

    means, variances = of_members(inside, x, mask)
    rows = B // 8 * size
    for member in range(8):
        first = member // size * rows
        real = x[first : first + rows][mask[first : first + rows]].reshape(-1, C)
        expected = (real.mean(0), real.var(0)) if len(real) else (np.zeros(C), np.zeros(C))
        np.testing.assert_allclose(means[member], expected[0], rtol=1e-5)
        np.testing.assert_allclose(variances[member], expected[1], rtol=1e-4, atol=1e-6)


def test_the_gradient_goes_through_the_whole_group() -> None:
    x, mask = data()

    def normed(x: Any, mask: Any) -> Any:
        mean, variance = batch_moments(x, mask)
        out = jnp.square((x - mean[None, None]) * jax.lax.rsqrt(variance + 1e-3)[None, None] + 0.5) ** 2
        return jnp.sum(jnp.where(mask[:, None, None], out, 0.0 * out))

    def inside(x: Any, mask: Any) -> Any:
        with groups(MEMBERS, 8):
            return jax.grad(normed)(x, mask)

    found = of_members(inside, x, mask).reshape(x.shape)
    np.testing.assert_allclose(found, jax.grad(normed)(x, mask), rtol=1e-4, atol=1e-5)


def test_without_groups_a_value_is_itself() -> None:
    value = jnp.asarray([1.0, 2.0])
    assert group_sum(value) is value and group_mean(value, 3.0) is value
    with groups(MEMBERS, 1):
        np.testing.assert_array_equal(group_mean(value, 3.0), value)


def test_a_mean_counts_by_weight() -> None:
    def inside(value: Any, weight: Any) -> Any:
        with groups(MEMBERS, 2):
            return group_mean(value[0], weight[0])

    found = of_members(inside, np.arange(8, dtype="f"), np.asarray([1, 3, 0, 0, 2, 2, 1, 0], "f"))
    np.testing.assert_allclose(found, [0.75, 0.75, 0, 0, 4.5, 4.5, 6, 6])


@pytest.mark.parametrize("size", [0, 3, 16])
def test_a_group_that_members_cannot_form(size: int) -> None:
    with (
        pytest.raises(ValueError, match=r"group of 1 \| 2 \| 4 \| 8 members on the mesh slow=2,data=4, got"),
        groups(MEMBERS, size),
    ):
        pass
