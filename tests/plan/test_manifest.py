import dataclasses
import json
from typing import Any

import pytest

from shoal.errors import PlanError
from shoal.plan.build import Built
from shoal.plan.manifest import MAX_MANIFEST_BYTES, Manifest, Runtime
from shoal.tensors import canonical_json


def changed(manifest: Manifest, **fields: Any) -> bytes:
    return canonical_json({**json.loads(manifest.data), **fields})


def test_round_trip(noisy: Built) -> None:
    manifest = noisy.plan.manifest
    again = Manifest.parse(manifest.data)
    assert again == manifest and again.hash == manifest.hash
    assert [spec.name for spec in again.device_state] == ["private/params/b", "rounds"]


@pytest.mark.parametrize(
    "data",
    [b"", b"{}", b"[]", b"null", b"\xff", b'{"format":"shoal-plan/2"}', b"[" * 100_000],
    ids=["empty", "object", "list", "null", "no text", "other format", "deep"],
)
def test_anything_else_is_refused(data: bytes) -> None:
    with pytest.raises(PlanError, match="Expected the manifest of a plan"):
        Manifest.parse(data)


def test_too_long_is_refused() -> None:
    with pytest.raises(PlanError, match="at most"):
        Manifest.parse(b" " * (MAX_MANIFEST_BYTES + 1))


@pytest.mark.parametrize(
    "fields",
    [{"more": 1}, {"training": {}}, {"sums": [{}]}, {"programs": 3}, {"task": 7}, {"server": {"needs": "updates"}}],
    ids=lambda fields: next(iter(fields)),
)
def test_a_wrong_field_is_refused(tiny: Built, fields: dict[str, Any]) -> None:
    with pytest.raises(PlanError):
        Manifest.parse(changed(tiny.plan.manifest, **fields))


def test_only_the_canonical_form_is_read(tiny: Built) -> None:
    data = json.dumps(json.loads(tiny.plan.manifest.data), indent=1).encode()
    with pytest.raises(PlanError, match="canonical"):
        Manifest.parse(data)


def test_the_newest_variant_that_runs_is_picked(tiny: Built) -> None:
    manifest = tiny.plan.manifest
    newer = [
        dataclasses.replace(p, needs=dataclasses.replace(p.needs, version=(1, 9, 0)), hash="0" * 64)
        for p in manifest.programs
    ]
    both = dataclasses.replace(manifest, programs=(*manifest.programs, *newer))
    old = Runtime(kind="stablehlo", version=(1, 8, 0))
    assert both.pick(old)["block"].needs.version == (1, 0, 0)
    assert both.pick(dataclasses.replace(old, version=(1, 17, 0)))["block"].needs.version == (1, 9, 0)


@pytest.mark.parametrize(
    "runtime",
    [
        Runtime(kind="stablehlo", version=(0, 9, 0)),
        Runtime(kind="stablehlo", version=(1, 9, 0), calling_convention=8),
        Runtime(kind="stablehlo", version=(1, 9, 0), platforms=("mps",)),
        Runtime(kind="iree-vmvx", version=(3, 0, 0)),
    ],
    ids=["too old", "convention", "platform", "kind"],
)
def test_a_runtime_that_cannot_is_told_what_is_needed(tiny: Built, runtime: Runtime) -> None:
    with pytest.raises(PlanError, match=r"needs stablehlo 1\.\d+\.0 .*; this runtime is") as caught:
        tiny.plan.manifest.pick(runtime)
    assert str(runtime) in str(caught.value)


def test_sizes(tiny: Built) -> None:
    manifest = tiny.plan.manifest
    assert manifest.model_bytes == (3 * 2 + 2) * 4
    assert manifest.update_bytes == (3 * 2 + 2) * 4 + 2 * 4
