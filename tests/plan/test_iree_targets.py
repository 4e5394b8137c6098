"""What a device without JAX says that it is, and which variant of a plan it takes. Needs no IREE."""

import dataclasses
import sys
from pathlib import Path

import pytest

from shoal.errors import MissingExtra, PlanError
from shoal.plan import iree_targets
from shoal.plan.build import Built
from shoal.plan.iree_targets import TARGETS, find_target, levels_of, numbers, this_runtime
from shoal.plan.manifest import IREE, Manifest, Runtime

V3 = frozenset("avx avx2 bmi1 bmi2 f16c fma abm movbe xsave sse4_2".split())  # noqa: SIM905  as /proc/cpuinfo has them
V4 = V3 | frozenset("avx512f avx512bw avx512cd avx512dq avx512vl".split())  # noqa: SIM905


def device(*levels: str, version: tuple[int, int, int] = (3, 13, 0), family: str = "x86_64-linux") -> Runtime:
    return Runtime(kind=IREE + family, version=version, calling_convention=1, platforms=levels)


def with_variants(manifest: Manifest, *targets: str) -> Manifest:
    """The manifest with variants (of no bytes) beside its programs."""
    made = [
        dataclasses.replace(program, needs=TARGETS[name].needs((3, 13, 0)), hash=f"{at:064x}")
        for at, name in enumerate(targets)
        for program in manifest.programs
    ]
    return dataclasses.replace(manifest, programs=(*manifest.programs, *made))


def test_levels_follow_from_the_instructions() -> None:
    assert levels_of(frozenset()) == ("x86-64",)
    assert levels_of(V3) == ("x86-64", "x86-64-v3")
    assert levels_of(V3 - {"fma"}) == ("x86-64",)
    assert levels_of(V4) == ("x86-64", "x86-64-v3", "x86-64-v4")
    assert levels_of(V4 - {"avx512vl"}) == ("x86-64", "x86-64-v3")


def test_the_best_variant_that_the_processor_can_run_is_taken(tiny: Built) -> None:
    manifest = with_variants(tiny.plan.manifest, "x86_64-linux-avx512", "x86_64-linux", "aarch64-linux")
    for levels, expected in ((levels_of(V4), "x86-64-v4"), (levels_of(V3), "x86-64-v3")):
        assert manifest.pick(device(*levels))["block"].needs.platforms == (expected,)
    assert manifest.pick(device("generic", family="aarch64-linux"))["block"].needs.kind == "iree-aarch64-linux"
    jax = Runtime(kind="stablehlo", version=(1, 17, 0))
    assert manifest.pick(jax) == tiny.plan.manifest.pick(jax)
    assert Manifest.parse(manifest.data).pick(device(*levels_of(V3))) == manifest.pick(device(*levels_of(V3)))


def test_a_processor_without_the_instructions_is_refused_in_words(tiny: Built) -> None:
    manifest = with_variants(tiny.plan.manifest, "x86_64-linux")
    with pytest.raises(PlanError, match=r"x86-64-v3\).*this runtime is iree-x86_64-linux 3\.13\.0 .*x86-64\)"):
        manifest.pick(device(*levels_of(frozenset())))
    with pytest.raises(PlanError, match="iree-aarch64-linux-android"):
        manifest.pick(device("generic", family="aarch64-linux-android"))


@pytest.mark.parametrize(
    ("version", "is_run"), [((3, 13, 0), True), ((3, 13, 4), True), ((3, 12, 9), False), ((3, 14, 0), False)]
)
def test_native_code_is_for_one_minor_version(version: tuple[int, int, int], is_run: bool) -> None:
    assert device("x86-64-v3", version=version).runs(TARGETS["x86_64-linux"].needs((3, 13, 0))) == is_run


def test_versions_are_three_numbers() -> None:
    assert [numbers(text) for text in ("3.13.0", "3.13.0rc20261016", "4.1", "3.2.1+local")] == [
        (3, 13, 0), (3, 13, 0), (4, 1, 0), (3, 2, 1),
    ]  # fmt: skip


def test_the_version_is_that_of_what_is_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "iree_base_runtime-3.13.0rc1.dist-info").mkdir()
    monkeypatch.setattr(sys, "path", ["", str(tmp_path / "none"), str(tmp_path)])
    assert this_runtime().version == (3, 13, 0)


def test_an_unknown_target_is_refused_with_those_there_are() -> None:
    with pytest.raises(ValueError, match="aarch64-linux-android, got 'pdp11'"):
        find_target("pdp11")


def test_a_machine_that_nothing_is_compiled_for_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(iree_targets, "installed_version", lambda: "3.13.0")
    monkeypatch.setattr(iree_targets.platform, "machine", lambda: "riscv64")
    with pytest.raises(PlanError, match="riscv64"):
        this_runtime()


def test_without_the_runtime_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [])
    with pytest.raises(MissingExtra, match="iree-runtime"):
        this_runtime()
