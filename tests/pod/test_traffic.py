"""Collectives and their bytes, against what they are by hand; in lowered programs and in compiled ones."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P

from shoal.pod.mesh import MeshSpec
from shoal.pod.traffic import Traffic, along, beside, operand, readable
from shoal.pod.traffic_compiled import compiled_traffic, groups
from shoal.pod.traffic_lowered import lowered_traffic, product_type

TWO = MeshSpec.parse("slow=2,data=4")
FLOATS = jax.ShapeDtypeStruct((8, 4), jnp.float32)
"""Of one device: 128 bytes."""


def lowered(function: Callable[[Any], Any], like: Any = FLOATS, mesh: MeshSpec = TWO) -> Any:
    """A function of what one device has, by all devices of a mesh."""
    spec = P(tuple(mesh.sizes))
    given = jax.ShapeDtypeStruct((like.shape[0] * mesh.num_devices, *like.shape[1:]), like.dtype)
    made = jax.shard_map(function, mesh=mesh.build(), in_specs=spec, out_specs=spec, check_vma=False)
    return jax.jit(made).lower(given)


def read(function: Callable[[Any], Any], like: Any = FLOATS, mesh: MeshSpec = TWO) -> Traffic:
    return lowered_traffic(lowered(function, like, mesh), mesh.sizes)


ONE_EACH: dict[str, tuple[Callable[[Any], Any], str, float]] = {
    "psum over data": (lambda x: lax.psum(x, "data"), "data", 2 * 3 / 4 * 128),
    "psum over slow": (lambda x: lax.psum(x, "slow"), "slow", 2 * 1 / 2 * 128),
    "psum over both": (lambda x: lax.psum(x, ("data", "slow")), "slow+data", 2 * 7 / 8 * 128),
    "pmax": (lambda x: lax.pmax(x, "data"), "data", 192.0),
    "psum_scatter": (lambda x: lax.psum_scatter(x, "data", tiled=True), "data", 3 / 4 * 128),
    "all_gather": (lambda x: lax.all_gather(x, "data", tiled=True), "data", 3 / 4 * 4 * 128),
    "all_gather over slow": (lambda x: lax.all_gather(x, "slow", tiled=True), "slow", 128.0),
    "all_to_all": (lambda x: lax.all_to_all(x, "data", 0, 0, tiled=True), "data", 96.0),
    "ppermute": (lambda x: lax.ppermute(x, "data", [(i, (i + 1) % 4) for i in range(4)]), "data", 128.0),
    "ppermute to oneself": (lambda x: lax.ppermute(x, "data", [(i, i) for i in range(4)]), "none", 0.0),
    "groups inside an axis": (lambda x: lax.psum(x, "data", axis_index_groups=[[0, 1], [2, 3]]), "data", 128.0),
}  # fmt: skip


@pytest.mark.parametrize("name", ONE_EACH)
def test_bytes_of_one_collective_are_those_by_hand(name: str) -> None:
    function, axis, expected = ONE_EACH[name]
    (found,) = read(function).collectives
    assert found.along == axis
    assert found.total_bytes == expected


def test_bfloat16_is_half_and_integers_are_named() -> None:
    halves = read(lambda x: lax.psum(x, "data"), jax.ShapeDtypeStruct((8, 4), jnp.bfloat16))
    assert halves.total_bytes() == 96.0 and halves.collectives[0].operands[0].dtype == "bfloat16"
    numbers = read(lambda x: lax.psum(x, "data"), jax.ShapeDtypeStruct((8, 4), jnp.int8))
    assert numbers.total_bytes() == 48.0 and numbers.collectives[0].operands[0].dtype == "int8"


def test_a_mesh_of_one_axis_and_a_third_axis_between() -> None:
    one = MeshSpec.parse("data=8")
    assert read(lambda x: lax.psum(x, "data"), mesh=one).by_axis() == {"data": 2 * 7 / 8 * 128}
    three = MeshSpec.parse("slow=2,data=2,model=2")
    assert read(lambda x: lax.psum(x, ("slow", "model")), mesh=three).by_axis() == {"slow+model": 2 * 3 / 4 * 128}


def test_loops_count_times_their_turns() -> None:
    def looped(x: Any) -> Any:
        x = lax.scan(lambda c, _: (lax.psum(c, "data"), None), x, None, length=3)[0]
        inner = lambda c: lax.fori_loop(0, 5, lambda _, d: lax.psum(d, "slow"), c)  # noqa: E731
        return lax.fori_loop(0, 2, lambda _, c: inner(c), x)

    assert [each.times for each in read(looped).collectives] == [3, 10]
    assert read(looped).by_axis() == {"data": 3 * 192.0, "slow": 10 * 128.0}


def test_counting_by_another_step_and_down() -> None:
    def counted(first: int, end: int, by: int) -> int | None:
        keeps = (lambda i: i < end) if by > 0 else (lambda i: i >= end)

        def looped(x: Any) -> Any:
            start = (jnp.int32(first), x)
            return lax.while_loop(lambda c: keeps(c[0]), lambda c: (c[0] + by, lax.psum(c[1], "data")), start)[1]

        return read(looped).collectives[0].times

    assert [counted(0, 7, 2), counted(5, 1, -2), counted(3, 3, 1)] == [4, 3, 0]


def test_a_loop_that_depends_on_data_is_said_to_be_unknown() -> None:
    traffic = read(lambda x: lax.while_loop(lambda c: jnp.sum(c) < 3, lambda c: lax.psum(c, "data"), x))
    assert traffic.num_unknown == 1 and traffic.collectives[0].times is None
    assert traffic.total_bytes() == 192.0, "one turn"
    assert "1 of the lowered are in loops of unknown length" in "\n".join(beside(traffic, Traffic(())))


def test_called_functions_and_branches_are_gone_into() -> None:
    called = jax.jit(lambda x: lax.psum(x, "data"))

    def both(x: Any) -> Any:
        x = called(called(x))
        return lax.cond(jnp.sum(x) > 0, lambda y: lax.psum(y, "slow"), lambda y: y, x)

    found = read(both).collectives
    assert [(each.along, each.is_conditional) for each in found] == [("data", False), ("data", False), ("slow", True)]


def test_the_compiled_program_says_the_same_where_nothing_is_merged() -> None:
    def every(x: Any) -> Any:
        x = lax.scan(lambda c, _: (lax.psum(c, "data"), None), x, None, length=3)[0]
        y = lax.all_gather(lax.psum_scatter(x, "slow", tiled=True), "slow", tiled=True)
        y = lax.all_to_all(y, "data", 0, 0, tiled=True)
        y = lax.ppermute(y, "data", [(i, (i + 1) % 4) for i in range(4)])
        return lax.while_loop(lambda c: jnp.sum(c) < 3, lambda c: lax.psum(c, ("slow", "data")), y)

    program = lowered(every)
    ours = lowered_traffic(program, TWO.sizes)
    made = compiled_traffic(program.compile().as_text(), TWO.sizes)
    assert made.grouped() == ours.grouped() and made.num_unknown == 1
    assert [each.times for each in made.collectives].count(3) == 1


def test_what_only_the_compiler_puts_in_is_in_the_compiled_program() -> None:
    mesh = MeshSpec.parse("data=4,model=2")
    wide, tall = (jax.NamedSharding(mesh.build(), spec) for spec in (P("data", "model"), P("model", None)))
    x, w = (jax.ShapeDtypeStruct((8, 6), jnp.float32, sharding=wide), jax.ShapeDtypeStruct((6, 5), jnp.float32, sharding=tall))  # fmt: skip
    program = jax.jit(jnp.dot, out_shardings=jax.NamedSharding(mesh.build(), P("data"))).lower(x, w)
    assert lowered_traffic(program, mesh.sizes).collectives == ()
    made = compiled_traffic(program.compile().as_text(), mesh.sizes)
    assert made.by_axis() == {"model": 2 * 1 / 2 * (2 * 5 * 4)}


def test_groups_are_read_in_both_forms() -> None:
    assert groups("{{0,1},{2,3}}") == [[0, 1], [2, 3]]
    assert groups("{}") == [] and groups("{{0}}") == [[0]]
    assert groups("[2,4]<=[8]") == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert groups("[4,2]<=[2,4]T(1,0)") == [[0, 4], [1, 5], [2, 6], [3, 7]]
    assert groups("[2,4]<=[2,2,2]T(1,0,2)") == [[0, 1, 4, 5], [2, 3, 6, 7]]
    for wrong in ("{0,1}", "[2,4]", "0,1", "{{a}}"):
        with pytest.raises(ValueError, match="groups of devices such as"):
            groups(wrong)


TEXT = """
HloModule step, num_partitions=8

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %s = f32[] add(%a, %b)
}

%wrapped (p: f32[8,128]) -> f32[1,128] {
  %p = f32[8,128]{1,0:T(8,128)} parameter(0)
  ROOT %rs = f32[1,128]{1,0:T(8,128)} reduce-scatter(%p), channel_id=3, replica_groups=[1,8]<=[8], dimensions={0}, to_apply=%add
}

ENTRY %main (x: f32[8,128], y: bf16[4]) -> f32[8,128] {
  %x = f32[8,128]{1,0:T(8,128)S(1)} parameter(0)
  %y = bf16[4]{0} parameter(1)
  %ar = (f32[8,128]{1,0}, bf16[4]{0}) all-reduce-start(%x, bf16[4]{0} %y), channel_id=1, replica_groups=[4,2]<=[2,4]T(1,0), to_apply=%add
  %ard = (f32[8,128]{1,0}, bf16[4]{0}) all-reduce-done(%ar)
  %ag = (bf16[4]{0}, bf16[16]{0}) all-gather-start(%y), channel_id=2, replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}
  %agd = bf16[16]{0} all-gather-done(%ag)
  %rs = ((f32[8,128]{1,0}), f32[1,128]{1,0}) async-start(%x), calls=%wrapped
  %rsd = f32[1,128]{1,0} async-done(%rs), calls=%wrapped
  %cp = (bf16[4]{0}, bf16[4]{0}, u32[], u32[]) collective-permute-start(%y), source_target_pairs={{0,4},{4,0}}
  %all = bf16[4]{0} all-reduce(%y), replica_groups={}, to_apply=%add
  ROOT %copy = f32[8,128]{1,0} copy(%x)
}
"""


def test_halves_that_start_layouts_and_merged_ones_are_read() -> None:
    found = compiled_traffic(TEXT, TWO.sizes).collectives
    kinds = [(each.kind, each.along, each.group_size, each.wire_bytes) for each in found]
    assert kinds == [
        ("all_reduce", "slow", 2, 2 * 1 / 2 * (4096 + 8)),
        ("all_gather", "data", 4, 3 / 4 * 32),
        ("reduce_scatter", "slow+data", 8, 7 / 8 * 4096),
        ("collective_permute", "slow", 2, 8.0),
        ("all_reduce", "slow+data", 8, 2 * 7 / 8 * 8),
    ]
    assert [each.dtype for each in found[0].operands] == ["float32", "bfloat16"]


def test_what_cannot_be_read_is_said() -> None:
    with pytest.raises(ValueError, match="with an ENTRY, got 'nothing'"):
        compiled_traffic("nothing", TWO.sizes)
    with pytest.raises(ValueError, match="got device 7"):
        along([[0, 7]], {"data": 4})
    with pytest.raises(ValueError, match="got 'token'"):
        operand("token", ())
    assert [operand(name, (2,)).dtype for name in ("ui8", "u32", "s16", "i64", "pred", "f8E4M3FN", "f8e5m2")] == [
        "uint8", "uint32", "int16", "int64", "bool", "float8_e4m3fn", "float8_e5m2",
    ]  # fmt: skip


def test_tables_are_for_people_and_json_for_machines() -> None:
    traffic = read(lambda x: lax.psum(lax.psum(x, "data"), "data"))
    assert beside(traffic, Traffic(()))[1].split() == ["data", "all_reduce", "float32", "2", "x,", "384", "B", "-"]
    rows = traffic.to_json()["collectives"]
    assert rows == [{"axis": "data", "kind": "all_reduce", "types": "float32", "number": 2, "wire_bytes": 384.0}]
    assert [readable(size) for size in (12, 1500, 2.5e6, 3e9, 4e12)] == [
        "12 B",
        "1.50 kB",
        "2.50 MB",
        "3.00 GB",
        "4.00 TB",
    ]


def test_the_type_of_products_is_found() -> None:
    half = jax.ShapeDtypeStruct((8, 8), jnp.bfloat16)
    whole = jax.ShapeDtypeStruct((2, 2), jnp.float32)
    assert product_type(jax.jit(lambda a, b: (a @ a, b @ b)).lower(half, whole)) == "bfloat16"
    assert product_type(jax.jit(lambda a: a + a).lower(half)) == "float32"
