"""Sums over members on the way back: what is gathered on the way forward is added up as `scatter` adds up."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

import shoal
from shoal.pod.collectives import How, Members
from shoal.pod.mesh import MeshSpec
from shoal.pod.step import Program
from shoal.pod.traffic_lowered import lowered_traffic

SPEC = MeshSpec.parse("slow=2,data=4")


@pytest.mark.parametrize(
    ("how", "kinds", "types"),
    [
        ({}, {"all_gather", "reduce_scatter"}, {"float32"}),
        ({"how": "exchange"}, {"all_gather", "all_to_all"}, {"float32"}),
        ({"how": "permute"}, {"collective_permute"}, {"float32"}),
        ({"how": "permute", "sum_type": "bfloat16"}, {"collective_permute"}, {"float32", "bfloat16"}),
        ({"how": "whole"}, {"all_gather", "all_reduce"}, {"float32"}),
        ({"sum_type": "bfloat16"}, {"all_gather", "all_to_all"}, {"float32", "bfloat16"}),
    ],
)
def test_the_gradient_of_gathering_is_the_sum_as_members_take_it(how: Any, kinds: set[str], types: set[str]) -> None:
    members = Members(SPEC, **how)
    rng = np.random.default_rng(0)
    pieces, slopes = rng.normal(size=(8, 3)).astype("f"), rng.normal(size=(8, 8, 3)).astype("f")

    def slope(piece: Any, own: Any) -> Any:
        return jax.grad(lambda p: jnp.sum(jnp.square(members.gather(p)) * own[0]))(piece)

    specs = (members.spec, P(members.axes))
    made = jax.jit(jax.shard_map(slope, mesh=SPEC.build(), in_specs=specs, out_specs=members.spec, check_vma=False))
    np.testing.assert_allclose(made(pieces, slopes), 2 * pieces * slopes.sum(0), rtol=2e-2 if "sum_type" in how else 1e-5, atol=0.05 if "sum_type" in how else 1e-5)  # fmt: skip
    found = lowered_traffic(made.lower(pieces, slopes), SPEC.sizes).collectives
    assert {each.kind for each in found} == kinds
    assert {operand.dtype for each in found for operand in each.operands} == types


@pytest.mark.parametrize("how", ["reduce_scatter", "exchange", "permute"])
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
    assert ("all_to_all" in trace, "ppermute" in trace) == (how == "exchange", how == "permute")
    after, _ = jax.jit(program.steps)(state, *given)
    np.testing.assert_allclose(after["params"]["params/w"], np.full(3, 1 - 0.1 * 6), rtol=1e-6)


@pytest.mark.parametrize("text", ["data=2", "data=5", "slow=2,data=3"])
def test_what_is_told_to_all_is_the_same_on_each(text: str) -> None:
    spec = MeshSpec.parse(text)
    members = Members(spec, how="permute")
    values = np.random.default_rng(0).normal(size=(spec.num_members, 7)).astype("f")

    def told(own: Any) -> Any:
        made = members.total({"a": own[0, :3], "b": {"c": own[0, 3], "n": jnp.int32(2)}, "d": own[0, 4:].reshape(3, 1)})
        return jax.tree.map(lambda leaf: leaf[None], made)

    specs = members.spec
    mesh = spec.build(jax.devices()[: spec.num_devices])
    made = jax.jit(jax.shard_map(told, mesh=mesh, in_specs=specs, out_specs=specs, check_vma=False))(values)
    total = values.sum(0)
    for row in range(spec.num_members):
        np.testing.assert_allclose(made["a"][row], total[:3], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(made["d"][row, :, 0], total[4:], rtol=1e-5, atol=1e-6)
        assert made["b"]["n"][row] == 2 * spec.num_members
        np.testing.assert_array_equal(made["a"][row], made["a"][0])
