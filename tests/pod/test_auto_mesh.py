"""Layouts are proposed by arithmetic: it agrees with what programs hold and send, and each that is not taken has its reason."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest
from jax import lax

import shoal
from shoal.pod.auto_mesh import Proposal, best, layouts, lines, proposals
from shoal.pod.describe import lower, state_bytes
from shoal.pod.machine import Machine
from shoal.pod.mesh import MeshSpec
from shoal.pod.placement import Update
from shoal.pod.traffic_lowered import lowered_traffic
from shoal.pod.work import products, work

from .test_describe import FIELDS, RULES, SIMPLE, program
from .test_step import task

TASK = task(optax.adam(1e-2))


def test_layouts_have_all_sizes_of_the_axes_that_rules_name() -> None:
    assert [str(mesh) for mesh in layouts(8, ["model"])] == ["data=8,model=1", "data=4,model=2", "data=2,model=4", "data=1,model=8"]  # fmt: skip
    assert [str(mesh) for mesh in layouts(8, [], num_processes=2)] == ["slow=2,data=4"]
    assert [str(mesh) for mesh in layouts(12, ["model"], num_processes=2)][-1] == "slow=2,data=1,model=6"
    assert len(list(layouts(4, ["model", "space"]))) == 6
    assert all(mesh.num_devices == 12 for mesh in layouts(12, ["model", "space"]))


def found(mesh: str, update: Update, **how: Any) -> Proposal:
    spec = MeshSpec.parse(mesh)
    made = proposals(
        TASK, spec.num_devices, SIMPLE, rules=RULES if "model" in mesh else None, num_processes=spec.sizes.get("slow", 1), **how
    )  # fmt: skip
    return next(each for each in made if str(each.mesh) == mesh and each.update == update)


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("mesh", "update"),
    [
        ("data=4,model=2", "sharded"), ("data=4,model=2", "fully_sharded"), pytest.param("data=8", "sharded", marks=SLOW),
        pytest.param("data=8", "replicated", marks=SLOW), pytest.param("data=8", "fully_sharded", marks=SLOW),
        pytest.param("slow=2,data=4", "sharded", marks=SLOW), pytest.param("slow=2,data=4", "fully_sharded", marks=SLOW),
        pytest.param("data=4,model=2", "replicated", marks=SLOW),
    ],
)  # fmt: skip
def test_what_a_device_holds_is_what_the_program_lays_out(mesh: str, update: Update) -> None:
    rules = RULES if "model" in mesh else None
    said, real = found(mesh, update).device_bytes, state_bytes(program(mesh, update, rules))
    assert {kind: said[kind] for kind in real} == real


@pytest.mark.parametrize(
    ("mesh", "update", "sum_type"),
    [
        ("slow=2,data=4", "sharded", "bfloat16"), ("slow=2,data=4", "fully_sharded", "float32"),
        *(
            pytest.param(mesh, update, sum_type, marks=SLOW)
            for mesh, update, sum_type in [
                ("data=8", "replicated", "float32"), ("data=8", "replicated", "bfloat16"), ("data=8", "sharded", "float32"), ("data=8", "sharded", "bfloat16"),
                ("data=8", "fully_sharded", "float32"), ("data=8", "fully_sharded", "bfloat16"), ("slow=2,data=4", "replicated", "float32"),
                ("slow=2,data=4", "replicated", "bfloat16"), ("slow=2,data=4", "sharded", "float32"), ("slow=2,data=4", "fully_sharded", "bfloat16"),
            ]
        ),
    ],
)  # fmt: skip
def test_what_a_device_sends_is_what_the_lowered_program_says(mesh: str, update: Update, sum_type: Any) -> None:
    chosen = program(mesh, update, sum_type=sum_type)
    traffic = lowered_traffic(lower(chosen, FIELDS), chosen.members.mesh.sizes)
    along = set(chosen.members.axes)
    small = 64  # metrics, the count and the model's state go over all members
    sums = [
        each
        for each in traffic.collectives
        if each.kind != "all_reduce" or each.whole_bytes >= small or update == "replicated"
    ]
    sent = {axis: sum(each.total_bytes for each in sums if each.along == axis) for axis in along}
    said = found(mesh, update, sum_type=sum_type).wire_bytes
    for axis in along:
        assert said[axis] == pytest.approx(
            sent[axis], abs=2 * small if update == "replicated" and mesh == "data=8" else 0
        ), axis


def test_the_best_fits_and_each_other_has_its_reason() -> None:
    made = proposals(TASK, 8, SIMPLE, rules=RULES)
    taken = best(made)
    assert taken is made[0] and taken.rejected == "" and all(each.rejected for each in made[1:])
    assert len({(str(each.mesh), each.update) for each in made}) == len(made) == 12
    assert all(each.times and taken.times and each.times.most_s >= taken.times.most_s for each in made)
    text = "\n".join(lines(made))
    assert text.count("taken") == 1 and "slower: " in text and str(taken.mesh) in text


def test_what_does_not_fit_says_by_how_much() -> None:
    sizes = sorted(each.total_bytes for each in proposals(TASK, 8, SIMPLE))
    small = replace(SIMPLE, memory_bytes=(sizes[0] + sizes[1]) / 2)
    made = proposals(TASK, 8, small)
    assert best(made).total_bytes == sizes[0]
    over = made[-1].total_bytes - small.memory_bytes
    assert made[-1].rejected.startswith(f"does not fit: {over:.0f} B more than the") and made[-1].times is not None
    with pytest.raises(ValueError, match=r"got none of 3\. Nearest is data=8 .* does not fit"):
        best(proposals(TASK, 8, replace(SIMPLE, memory_bytes=10)))


def test_a_batch_that_members_do_not_divide_and_a_rule_that_does_not_fit_are_rejected() -> None:
    made = proposals(TASK, 6, SIMPLE, rules={"params/first/kernel": "-,model"}, batch_size=14)
    why = {str(each.mesh): each.rejected for each in made if each.update == "sharded"}
    assert why["data=6,model=1"] == "a batch of 14 is no multiple of 6 members"
    assert "8 is no multiple of model=3" in why["data=2,model=3"]
    with pytest.raises(ValueError, match="a batch of 14 is no multiple of 6 members"):
        best(made)
    assert str(best(proposals(TASK, 6, SIMPLE, batch_size=12)).mesh) == "data=6"


def test_rules_and_numbers_that_suit_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match="matches none of"):
        proposals(TASK, 8, SIMPLE, rules={"params/third/*": "model"})
    with pytest.raises(ValueError, match="num_devices=8 in num_processes=3"):
        proposals(TASK, 8, SIMPLE, num_processes=3)
    with pytest.raises(ValueError, match="num_devices > 0"):
        proposals(TASK, 0, SIMPLE)


def test_a_larger_optimizer_is_better_sharded_and_slow_links_are_seen() -> None:
    memory = Machine("memory", {"float32": 1e15}, 1e6, 1e9, 1e12, 1e12)
    assert best(proposals(TASK, 8, memory, updates=("replicated", "sharded"))).update == "sharded"
    fast = found("data=8", "sharded").times
    slow = found("slow=2,data=4", "sharded").times
    assert fast and slow and slow.links_s["slow"] > 0 and "slow" not in fast.links_s


def test_work_is_counted_by_hand() -> None:
    """Forwards 48 + 24 products of numbers (the mean's are not learned from, and counted), backwards those of kernels and of the hidden layer."""
    counted = work(TASK)
    assert (
        counted.flops == {"float32": 2.0 * (48 + 24 + 48 + 24 + 24) + 2.0 * 48 + 2.0 * 8} and counted.dtype == "float32"
    )
    assert 8 * 4 <= counted.kept_bytes <= 4 * (6 + 3 * 8 + 3 * 3 + 4)


def test_products_in_loops_branches_and_convolutions_are_counted() -> None:
    x, w = jax.ShapeDtypeStruct((4, 8), jnp.float32), jax.ShapeDtypeStruct((8, 8), jnp.float32)

    def looped(x: Any, w: Any) -> Any:
        x = lax.scan(lambda c, _: (c @ w, None), x, None, length=5)[0]
        return lax.cond(jnp.sum(x) > 0, lambda: x @ w @ w, lambda: x)

    assert products(jax.make_jaxpr(looped)(x, w).jaxpr) == {"float32": 7 * 2.0 * 4 * 8 * 8}
    image, kernel = jax.ShapeDtypeStruct((2, 8, 8, 3), jnp.bfloat16), jax.ShapeDtypeStruct((3, 3, 3, 16), jnp.bfloat16)

    def convolved(image: Any, kernel: Any) -> Any:
        names = ("NHWC", "HWIO", "NHWC")
        return lax.conv_general_dilated(image, kernel, (1, 1), "SAME", dimension_numbers=names)

    assert products(jax.make_jaxpr(convolved)(image, kernel).jaxpr) == {"bfloat16": 2.0 * 2 * 8 * 8 * 16 * 27}


def test_a_task_without_products_has_a_type_and_no_work() -> None:
    plain = shoal.Task(name="plain", init=lambda key: {"w": jnp.zeros(3)}, loss=lambda p, s, b, k: jnp.sum(p["w"][None] - b["x"], -1), batch={"x": ((3,), "float32")})  # fmt: skip
    assert (work(plain).total_flops, work(plain).dtype) == (0.0, "float32")
