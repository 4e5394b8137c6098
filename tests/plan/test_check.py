import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from shoal.errors import PlanError
from shoal.plan.build import Built, build
from shoal.plan.check import MAX_PROGRAMS, check_plan, memory_bytes, readable
from shoal.plan.manifest import Manifest, Program
from shoal.plan.operations import check_operations, operations
from shoal.plan.runner import Limits
from shoal.plan.stablehlo import module_text
from shoal.tensors import TensorSpec
from tests.plan.plan_tasks import artifact, linear_loss, linear_predict, tiny_task

LIMITS = Limits()


def with_program(manifest: Manifest, name: str, **changes: Any) -> Manifest:
    """The manifest with one program's description changed."""
    programs = tuple(dataclasses.replace(p, **changes) if p.name == name else p for p in manifest.programs)
    return dataclasses.replace(manifest, programs=programs)


def test_what_build_makes_passes(tiny: Built, noisy: Built) -> None:
    check_plan(tiny.plan.manifest, LIMITS)
    check_plan(noisy.plan.manifest, LIMITS)


def test_a_tebibyte_is_refused(tiny: Built) -> None:
    manifest = tiny.plan.manifest
    big = TensorSpec(name="params/big", shape=(1 << 37,), dtype="float32")
    huge = dataclasses.replace(manifest, broadcast=(*manifest.broadcast, big))
    with pytest.raises(PlanError) as caught:
        check_plan(huge, Limits(memory_bytes=8 << 30))
    assert str(caught.value) == "The plan of task 'tiny' asks for 1.5 TiB of memory, this device allows 8.0 GiB."


def test_the_limit_is_exact(tiny: Built) -> None:
    needed = memory_bytes(tiny.plan.manifest)
    check_plan(tiny.plan.manifest, Limits(memory_bytes=needed))
    with pytest.raises(PlanError, match="asks for"):
        check_plan(tiny.plan.manifest, Limits(memory_bytes=needed - 1))


def test_the_estimate_counts_the_model_twice_and_more(tiny: Built) -> None:
    manifest = tiny.plan.manifest
    assert memory_bytes(manifest) > 4 * manifest.model_bytes


def test_a_large_program_is_refused(tiny: Built) -> None:
    with pytest.raises(PlanError, match=r"Program 'begin' of task 'tiny' has .*, this device allows 100 B"):
        check_plan(tiny.plan.manifest, Limits(program_bytes=100))


def test_too_many_programs_are_refused(tiny: Built) -> None:
    manifest = tiny.plan.manifest
    many = dataclasses.replace(manifest, programs=manifest.programs * (MAX_PROGRAMS // 3 + 1))
    with pytest.raises(PlanError, match="at most 256 programs"):
        check_plan(many, LIMITS)


@pytest.mark.parametrize("name", ["begin", "block", "finish"])
def test_a_missing_program_is_named(tiny: Built, name: str) -> None:
    manifest = tiny.plan.manifest
    rest = tuple(p for p in manifest.programs if p.name != name)
    with pytest.raises(PlanError, match=f"no program '{name}'"):
        check_plan(dataclasses.replace(manifest, programs=rest), LIMITS)


@pytest.mark.parametrize("name", ["begin", "block", "finish", "evaluate", "predict"])
@pytest.mark.parametrize("side", ["inputs", "outputs"])
@pytest.mark.parametrize("how", ["missing", "extra", "shape", "dtype", "order"])
def test_a_program_that_does_not_fit_is_refused(noisy: Built, name: str, side: str, how: str) -> None:
    manifest = noisy.plan.manifest
    specs: tuple[TensorSpec, ...] = getattr(manifest.variants(name)[0], side)
    first = specs[0]
    changed = {
        "missing": specs[1:],
        "extra": (*specs, TensorSpec(name="more", shape=(), dtype="float32")),
        "shape": (dataclasses.replace(first, shape=(9, *first.shape)), *specs[1:]),
        "dtype": (dataclasses.replace(first, dtype="int8"), *specs[1:]),
        "order": specs[::-1],
    }[how]
    if changed == specs:  # one output has only one order
        return
    if name == "predict" and side == "outputs" and how == "dtype":
        return  # a prediction may be of any type
    with pytest.raises(PlanError, match=r"Expected"):
        check_plan(with_program(manifest, name, **{side: changed}), LIMITS)


def test_the_rows_that_a_batch_needs_are_integers() -> None:
    def init(key: jax.Array) -> Any:
        return {"rows": jnp.zeros((50, 2))}

    def loss(params: Any, state: Any, batch: Any, key: Any) -> Any:
        return params["rows"][batch["id"]].sum(axis=-1)

    task = tiny_task(
        init=init, loss=loss, batch={"id": ((), "int32")}, tables={"words": "params/rows"},
        keys=lambda batch: {"words": batch["id"]},
    )  # fmt: skip
    manifest = build(task).plan.manifest
    check_plan(manifest, LIMITS)
    (rows,) = manifest.variants("keys")[0].outputs
    for changed in (dataclasses.replace(rows, dtype="float32"), dataclasses.replace(rows, shape=())):
        with pytest.raises(PlanError, match="of an integer type"):
            check_plan(with_program(manifest, "keys", outputs=(changed,)), LIMITS)


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 B"), (1023, "1023 B"), (8 << 30, "8.0 GiB"), (1 << 40, "1.0 TiB"), (1 << 52, "4096.0 TiB")],
)
def test_readable(size: int, text: str) -> None:
    assert readable(size) == text


def any_program(tiny: Built) -> Program:
    return tiny.plan.manifest.variants("block")[0]


def test_operations_of_a_real_program_pass(noisy: Built) -> None:
    for program in noisy.plan.manifest.programs:
        data = noisy.plan.program(program)
        check_operations(program, data)
        assert ("builtin.module", "") in operations(data)
        assert module_text(data).startswith("module @")


def test_linear_algebra_and_top_k_pass() -> None:
    def loss(params: Any, state: Any, batch: Any, key: Any) -> Any:
        gram = params["w"].T @ params["w"] + 2.0 * jnp.eye(2)
        largest, _ = jax.lax.top_k(batch["x"], 1)
        return linear_loss(params, state, batch, key) + jnp.linalg.cholesky(gram)[0, 0] + largest[:, 0]

    plan = build(tiny_task(loss=loss)).plan
    block = plan.manifest.variants("block")[0]
    targets = {target for name, target in operations(plan.program(block)) if name == "stablehlo.custom_call"}
    assert any("potrf" in target for target in targets)
    check_operations(block, plan.program(block))


CALL = """
func.func public @main(%arg0: tensor<i32>, %arg1: tensor<4xf32>) -> tensor<4xf32> {
  %0 = stablehlo.custom_call @TARGET(%arg1) {api_version = 4 : i32} : (tensor<4xf32>) -> tensor<4xf32>
  return %0 : tensor<4xf32>
}
"""


@pytest.mark.parametrize(
    "target",
    [
        "xla_python_cpu_callback",
        "xla_ffi_python_cpu_callback",
        "xla_ffi_python_gpu_callback",
        "xla_ffi_partitioned_python",
    ],
)
def test_a_callback_into_python_is_refused_on_the_device(tiny: Built, target: str) -> None:
    with pytest.raises(PlanError, match=f"calls '{target}'.*calls back into Python"):
        check_operations(any_program(tiny), artifact(CALL.replace("TARGET", target)))


@pytest.mark.parametrize("target", ["tpu_custom_call", "mosaic_gpu_v2", "dlopen"])
def test_any_other_function_is_refused_too(tiny: Built, target: str) -> None:
    with pytest.raises(PlanError, match=f"Program 'block' calls '{target}', which is not among"):
        check_operations(any_program(tiny), artifact(CALL.replace("TARGET", target)))


def test_a_call_is_found_inside_a_region(tiny: Built) -> None:
    text = """
    func.func public @main(%arg0: tensor<i32>) -> tensor<f32> {
      %0 = "stablehlo.case"(%arg0) ({
        %1 = stablehlo.custom_call @hidden() {api_version = 4 : i32} : () -> tensor<f32>
        stablehlo.return %1 : tensor<f32>
      }) : (tensor<i32>) -> tensor<f32>
      return %0 : tensor<f32>
    }"""
    with pytest.raises(PlanError, match="hidden"):
        check_operations(any_program(tiny), artifact(text))


def test_what_speaks_to_the_outside_is_refused(tiny: Built) -> None:
    text = """
    func.func public @main(%arg0: tensor<f32>) -> tensor<f32> {
      %0 = stablehlo.create_token : !stablehlo.token
      %1 = "stablehlo.outfeed"(%arg0, %0) {outfeed_config = ""} : (tensor<f32>, !stablehlo.token) -> !stablehlo.token
      return %arg0 : tensor<f32>
    }"""
    with pytest.raises(PlanError, match=r"stablehlo\.outfeed"):
        check_operations(any_program(tiny), artifact(text))


@pytest.mark.parametrize("data", [b"", b"ML\xefR", b"module {}", bytes(1000)])
def test_what_is_no_program_is_refused(tiny: Built, data: bytes) -> None:
    with pytest.raises(PlanError, match="no StableHLO artifact"):
        check_operations(any_program(tiny), data)


def prints(params: Any, state: Any, batch: Any, key: Any) -> Any:
    made = linear_loss(params, state, batch, key)
    jax.debug.print("loss {}", made)
    return made


def calls(params: Any, state: Any, batch: Any, key: Any) -> Any:
    made = linear_loss(params, state, batch, key)
    inside = jax.jit(lambda x: jax.pure_callback(lambda y: y, x, x, vmap_method="sequential"))
    return inside(made)


@pytest.mark.parametrize(("loss", "primitive"), [(prints, "debug"), (calls, "pure_callback")], ids=["print", "call"])
def test_a_loss_that_calls_back_into_python_cannot_be_built(loss: Any, primitive: str) -> None:
    with pytest.raises(ValueError, match=f"the loss of task 'tiny' .* calls back into Python .{primitive}"):
        build(tiny_task(loss=loss))


def test_so_does_predict() -> None:
    def predict(params: Any, state: Any, batch: Any) -> Any:
        jax.debug.print("here")
        return linear_predict(params, state, batch)

    with pytest.raises(ValueError, match="the predict of task 'tiny'"):
        build(tiny_task(predict=predict))
