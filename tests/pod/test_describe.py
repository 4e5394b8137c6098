"""What is said of a run before it starts, against what is there when it has begun."""

import json
from math import prod
from typing import Any

import jax
import numpy as np
import optax
import pytest

import shoal
from shoal.pod.collectives import Members
from shoal.pod.describe import Description, Made, describe, gradient_bytes, make, state_bytes
from shoal.pod.machine import MACHINES, Machine, Times
from shoal.pod.mesh import MeshSpec
from shoal.pod.placement import Update
from shoal.pod.rules import specs
from shoal.pod.step import Program

from .test_step import B, task

SIMPLE = Machine("simple", {"float32": 1e9, "bfloat16": 4e9}, 1e8, 1e6, 1e7, 1e6)
FIELDS = {"x": jax.ShapeDtypeStruct((1, B, 6), np.float32), "y": jax.ShapeDtypeStruct((1, B, 3), np.float32)}
RULES = {"params/first/kernel": "-,model", "params/second/kernel": "model,-"}


def program(text: str, update: Update, rules: dict[str, str] | None = None, **how: Any) -> Program:
    spec, made = MeshSpec.parse(text), task(optax.adam(1e-2))
    shapes = {name: leaf.shape for name, leaf in shoal.local.named(shoal.local.model_shape(made).params, "params").items()}  # fmt: skip
    return Program(
        made, spec.build(jax.devices()[: spec.num_devices]), Members(spec, **how), update, specs(rules or {}, shapes, spec, what="rules"), {}
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mesh", "update"),
    [
        ("data=8", "replicated"),
        ("slow=2,data=2", "sharded"),
        ("data=4", "fully_sharded"),
        ("data=2,model=2", "sharded"),
    ],
)
def test_bytes_of_the_state_are_those_on_a_device_when_it_has_begun(mesh: str, update: Update) -> None:
    made = program(mesh, update, RULES if "model" in mesh else {})
    state = made.begin(jax.random.key(0))
    said = state_bytes(made)
    for key, kind in (("params", "parameters"), ("opt", "optimizer"), ("state", "model state")):
        held = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(state[key]))
        assert said[kind] == held, kind


def test_gradients_are_those_of_learned_tensors_as_rules_split_them() -> None:
    learned = {"first/kernel": 48, "first/bias": 8, "second/kernel": 24, "second/bias": 3, "second/scale": 1}
    assert gradient_bytes(program("data=2", "sharded")) == 4 * sum(learned.values())
    halved = sum(learned.values()) - learned["first/kernel"] // 2 - learned["second/kernel"] // 2
    assert gradient_bytes(program("data=2,model=2", "sharded", RULES)) == 4 * halved


@pytest.fixture(scope="module")
def compiled() -> tuple[Program, Made]:
    ticks = iter([0.0, 1.0, 3.0])
    chosen = program("slow=2,data=4", "sharded")
    return chosen, make(chosen, FIELDS, clock=lambda: next(ticks))


@pytest.fixture(scope="module")
def sharded(compiled: tuple[Program, Made]) -> Description:
    chosen, made = compiled
    return describe(chosen, FIELDS, SIMPLE, made=made)


def test_a_description_counts_what_is_learned_and_what_is_sent(sharded: Description) -> None:
    assert (sharded.num_params, sharded.num_learned, sharded.param_bytes) == (87, 84, 348)
    assert sharded.device_bytes["batch"] == 4 * (6 + 3) * B // 8
    padded = 8 * sum(-(-size // 8) for size in (48, 8, 24, 3, 1)) * 4
    moved = sharded.lowered.total_bytes(lambda each: each.kind in ("reduce_scatter", "all_gather"))
    assert moved == 2 * (3 / 4 * padded + 1 / 2 * padded / 4), (
        "there and back, over the fast axis and then over the slow one"
    )
    ours, theirs = sharded.lowered.by_axis(), sharded.compiled.by_axis()
    assert (theirs["data"], theirs["slow"]) == (ours["data"], ours["slow"])
    assert 0 < theirs["slow+data"] <= ours["slow+data"], "the compiler takes equal sums once"
    assert sharded.total_bytes == sum(sharded.device_bytes.values()) - sharded.device_bytes["gradients"]
    assert sharded.fits and sharded.flops > 0 and sharded.moved_bytes > 0


def test_times_are_a_roofline_of_what_is_said(sharded: Description) -> None:
    assert sharded.times.math_s == sharded.flops / 1e9 and sharded.times.memory_s == sharded.moved_bytes / 1e8
    sent = {axes: min(sharded.lowered.by_axis()[axes], size) for axes, size in sharded.compiled.by_axis().items()}
    assert sharded.times.links_s == {
        "data": sent["data"] / 1e7,
        "slow": sent["slow"] / 1e6,
        "slow+data": sent["slow+data"] / 1e6,
    }
    assert sharded.times.least_s == max(sharded.times.math_s, sharded.times.memory_s, *sharded.times.links_s.values())


def test_lines_are_few_and_json_is_whole(sharded: Description) -> None:
    lines = sharded.lines()
    assert len(lines) <= 20 and max(map(len, lines)) <= 160
    text = "\n".join(lines)
    for word in (
        "slow=2,data=4",
        "parameters: 87, learned 84",
        "optimizer",
        "reduce_scatter",
        "along slow",
        "fits in",
        "compiled in",
    ):
        assert word in text
    assert json.loads(json.dumps(sharded.to_json()))["times"]["most_s"] == sharded.times.most_s


@pytest.mark.slow
def test_of_many_steps_a_call_a_step_is_said() -> None:
    one_program = program("data=2", "replicated")
    one = describe(one_program, FIELDS, SIMPLE)
    twice = {name: jax.ShapeDtypeStruct((2, *leaf.shape[1:]), leaf.dtype) for name, leaf in FIELDS.items()}
    two = describe(one_program, twice, SIMPLE)
    assert two.steps_per_call == 2 and two.lowered.total_bytes() == 2 * one.lowered.total_bytes()
    assert two.times.links_s == pytest.approx(one.times.links_s)
    assert two.flops == pytest.approx(one.flops, rel=0.2)


def test_what_is_compiled_already_is_not_compiled_again(compiled: tuple[Program, Made]) -> None:
    chosen, made = compiled
    found = describe(chosen, FIELDS, Machine("small", {"float32": 1e9}, 1e8, 100, 1e7, 1e6), made=made)
    assert (found.lower_s, found.compile_s) == (1.0, 2.0)
    assert not found.fits and "DOES NOT FIT in 100 B" in "\n".join(found.lines())


def test_of_steps_in_a_loop_the_compiler_counts_one(
    compiled: tuple[Program, Made], monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen, made = compiled
    twice = {name: jax.ShapeDtypeStruct((2, *leaf.shape[1:]), leaf.dtype) for name, leaf in FIELDS.items()}
    written_out = describe(chosen, twice, SIMPLE, made=made)
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    assert describe(chosen, twice, SIMPLE, made=made).flops == 2 * written_out.flops


def test_a_batch_that_members_do_not_divide_is_refused() -> None:
    fields = {name: jax.ShapeDtypeStruct((1, 13, *leaf.shape[2:]), leaf.dtype) for name, leaf in FIELDS.items()}
    with pytest.raises(ValueError, match=r"got 13 examples\. Take 16"):
        make(program("data=8", "sharded"), fields)


def test_machines_have_names_and_rates() -> None:
    assert Machine.named("h100").math_s(989e12, "float16") == 1.0
    assert Machine.named("tpu-v5e").link_s("slow+data", 3.125e9) == 1.0 == MACHINES["tpu-v5e"].link_s("model", 100e9)
    with pytest.raises(ValueError, match=r"one of a100 \| h100"):
        Machine.named("abacus")
    with pytest.raises(ValueError, match="memory_bytes > 0"):
        Machine("none", {"float32": 1.0}, 1.0, 0.0, 1.0, 1.0)
    with pytest.raises(ValueError, match="a rate for float32, got odd with"):
        Machine("odd", {"int8": 1.0}, 1.0, 1.0, 1.0, 1.0).math_s(1.0, "float32")
    assert Times(1.0, 2.0, {"data": 4.0}).most_s == 7.0


def test_this_machine_is_measured() -> None:
    ticks = (0.25 * n for n in range(1000))
    made = Machine.measured(clock=lambda: next(ticks), slow_bytes_per_s=5.0)
    num = len(jax.local_devices())
    assert made.flops_per_s["float32"] == 2 * 768**3 / 0.25 / num
    assert made.memory_bytes_per_s == 2 * (64 << 20) / 0.25 / num
    assert made.fast_bytes_per_s == 2 * (num - 1) / num * (2 << 20) / 0.25 and made.slow_bytes_per_s == 5.0
    assert prod((made.memory_bytes, num)) > 1e8
