"""Sums over members, taken in the way that was asked for, also where a gradient goes back through a gather."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import shoal
from shoal.pod.collectives import How, Members
from shoal.pod.mesh import MeshSpec
from shoal.pod.step import Program

SPEC = MeshSpec.parse("slow=2,data=4")


@pytest.mark.parametrize(
    ("how", "operation"), [("reduce_scatter", "reduce_scatter"), ("exchange", "all_to_all"), ("whole", "psum")]
)
def test_the_way_back_of_a_gather_is_a_scatter_of_the_same_kind(how: How, operation: str) -> None:
    members, factor = Members(SPEC, how=how), jnp.arange(16, dtype=jnp.float32)

    def inside(piece: Any) -> Any:
        weight = factor * (1.0 + members.index().astype(jnp.float32))
        return jax.grad(lambda piece: jnp.sum(members.gather(piece) * weight))(piece)

    slope = jax.shard_map(
        inside, mesh=SPEC.build(), in_specs=members.spec, out_specs=members.spec, check_vma=False
    )  # fmt: skip
    np.testing.assert_array_equal(slope(jnp.ones(16)), 36.0 * factor)
    trace = str(jax.make_jaxpr(slope)(jnp.ones(16)))
    others = {"reduce_scatter", "all_to_all", "psum"} - {operation}
    assert operation in trace and not any(f"{other}[" in trace for other in others)


def test_what_goes_back_is_rounded_as_sums_are() -> None:
    members = Members(SPEC, "bfloat16")
    mesh = SPEC.build()

    def inside(piece: Any) -> Any:
        return jax.grad(lambda piece: jnp.sum(members.gather(piece) * jnp.float32(1.001)))(piece)

    slope = jax.shard_map(inside, mesh=mesh, in_specs=members.spec, out_specs=members.spec, check_vma=False)
    np.testing.assert_array_equal(slope(jnp.ones(16)), 8 * jnp.full(16, 1.001).astype(jnp.bfloat16).astype(jnp.float32))


@pytest.mark.parametrize("how", ["reduce_scatter", "exchange"])
def test_where_pieces_are_exchanged_a_replicated_update_s_sum_is_too(how: How) -> None:
    spec = MeshSpec.parse("data=2")
    task = shoal.Task(
        name="line", init=lambda key: {"w": jnp.ones(3), "b": jnp.zeros(())}, batch={"x": ((3,), "float32")},
        loss=lambda params, state, batch, key: jnp.square(batch["x"] @ params["w"] + params["b"]),
        local=shoal.Local(optimizer=optax.sgd(0.1)),
    )  # fmt: skip
    program = Program(task, spec.build(jax.devices()[:2]), Members(spec, how=how), "replicated", {}, {})
    state = program.begin(jax.random.key(0))
    given = ({"x": np.ones((1, 4, 3), "f")}, np.ones((1, 4), bool), np.zeros(2, np.uint32))
    trace = str(jax.make_jaxpr(program.steps)(state, *given))
    assert ("all_to_all" in trace) == (how == "exchange")
    after, _ = jax.jit(program.steps)(state, *given)
    np.testing.assert_allclose(after["params"]["params/w"], np.full(3, 1 - 0.1 * 6), rtol=1e-6)
