"""Golden files: every format that leaves a process, byte for byte.

A change here is a change of a contract: a commit of its own, in which the golden file is made anew with
``SHOAL_GOLDEN=write pytest tests/test_golden.py`` and the format's number goes up where old readers would fail.
"""

import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from google.protobuf import json_format
from sqlalchemy.dialects import sqlite
from sqlalchemy.schema import CreateIndex, CreateTable

from shoal.clip_norm import AdaptiveClip
from shoal.codec.packed import pack as pack_slice
from shoal.codec.packed import unpack as unpack_slice
from shoal.codec.rounding import rounded
from shoal.data.store import Spec
from shoal.fixed import FixedPoint, SumSpec
from shoal.fleet.configuration import configure, round_seed
from shoal.fleet.device_secret import DeviceSecret, Pseudonyms, credential
from shoal.fleet.distribution import Distribution, Shard
from shoal.fleet.host import run_seed
from shoal.fleet.invitation import Invitation
from shoal.fleet.telemetry_device import report_of
from shoal.fleet.telemetry_diary import Tell
from shoal.fleet.token import TokenKey
from shoal.fleet.wire import data_pb2, edges_pb2, telemetry_pb2
from shoal.fleet.wire import fleet_pb2 as pb
from shoal.plan.manifest import Manifest, Program, Promises, Runtime, ServerHalf, Training
from shoal.plan.plan import Plan
from shoal.plan.train import member_randomness
from shoal.policy import About, ExamplePrivacy, Privacy, RoundPolicy, Secure, ServerRule
from shoal.privacy.masks import public_key
from shoal.privacy.noise import seeded
from shoal.privacy.split_sums import context, joined, mask_sum, unseal
from shoal.privacy.telemetry import ENTRIES, Day, slot_s
from shoal.record.schema import METADATA
from shoal.tensors import Index, TensorSpec, pack, sha256, unpack

GOLDEN = Path(__file__).parent / "golden"


def hold(name: str, data: bytes) -> None:
    """Compares with the golden file, or writes it when asked to."""
    path = GOLDEN / name
    if os.environ.get("SHOAL_GOLDEN") == "write":
        path.write_bytes(data)
    assert path.read_bytes() == data, f"{name} has changed: see the text of this module"


def small_tensors() -> dict[str, np.ndarray]:
    return {
        "params/w": np.arange(6, dtype=np.float32).reshape(2, 3),
        "state/count": np.array(7, np.int32),
        "state/on": np.array([True, False]),
    }


def small_manifest(privacy: Privacy | None = None) -> Manifest:
    weight = TensorSpec(name="params/w", shape=(2, 3), dtype="float32")
    delta = TensorSpec(name="delta/params/w", shape=(2, 3), dtype="float32")
    needs = Runtime(kind="stablehlo", version=(1, 0, 0), platforms=("cpu", "cuda"))
    half = ServerHalf(rounds=RoundPolicy(goal=20), rule=ServerRule(), about=About(purpose="a golden file"))
    program = Program(
        name="begin", needs=needs, inputs=(weight,), outputs=(weight,), hash=sha256(b"program"), size_bytes=7
    )
    return Manifest(
        task="golden",
        programs=(program,),
        broadcast=(weight,),
        device_state=(),
        sums=(SumSpec(tensor=delta, bound=256.0, weighted=True),),
        metrics=(),
        batch=(TensorSpec(name="x", shape=(3,), dtype="float32"),),
        training=Training(
            batch_size=4, steps_per_block=2, epochs=1, max_examples=64, max_weight=64, whole_batches=False,
            drop_remainder=False, evaluate_batch_size=8,
        ),
        promises=Promises.of(privacy or Privacy(), minimum_group=8),
        server_hash=sha256(half.data),
        half=half,
    )  # fmt: skip


def test_index() -> None:
    index = Index.of(small_tensors())
    hold("index.json", index.data)
    assert Index.parse(index.data) == index


def test_frame_of_tensors() -> None:
    data = pack(small_tensors(), {"note": "golden"})
    hold("frame.bin", data)
    assert unpack(data)[1] == {"note": "golden"}


def test_manifest_and_server_half() -> None:
    manifest = small_manifest()
    hold("manifest.json", manifest.data)
    hold("server_half.json", manifest.server.data)
    assert Manifest.parse(manifest.data, server=manifest.server.data) == manifest


def test_manifest_of_secure_groups() -> None:
    manifest = small_manifest(Privacy(clip_norm=1.0, secure=Secure(members=20, authority="ab" * 32)))
    hold("manifest_secure.json", manifest.data)
    assert Manifest.parse(manifest.data, server=manifest.server.data) == manifest


@pytest.mark.parametrize(
    ("name", "privacy"),
    [
        ("manifest_clip_by_tensor.json", Privacy(clip_norm={"params/w": 0.1, "*": 1.0})),
        (
            "manifest_clip_adaptive.json",
            Privacy(clip_norm=AdaptiveClip(initial=0.1), noise_multiplier=2.0, epsilon=8.0),
        ),
    ],
)
def test_manifest_of_clip_norms(name: str, privacy: Privacy) -> None:
    manifest = small_manifest(privacy)
    hold(name, manifest.data)
    assert Manifest.parse(manifest.data, server=manifest.server.data) == manifest


def test_manifest_with_noise_on_examples() -> None:
    manifest = small_manifest(Privacy(examples=ExamplePrivacy(clip_norm=0.5, noise_multiplier=2.0)))
    hold("manifest_examples.json", manifest.data)
    assert Manifest.parse(manifest.data, server=manifest.server.data) == manifest


def test_plan() -> None:
    key = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
    plan = Plan(small_manifest(), {sha256(b"program"): b"program"}).sign(key)
    hold("plan.bin", plan.to_bytes())
    Plan.parse(plan.to_bytes()).verify(key.public_key().public_bytes_raw())


def test_token() -> None:
    key = TokenKey(private=Ed25519PrivateKey.from_private_bytes(bytes(range(32))), secret=bytes(32))
    nonce = key.nonce("run", 3, "device-1")
    token = key.sign(pb.Assignment(run="run", task="golden", base_version=3, nonce=nonce, expires_s=1.5, round=4))
    hold("token.json", json_format.MessageToJson(token, sort_keys=True).encode())


def test_round_configuration_and_randomness() -> None:
    made = configure(small_manifest(), run_seed=run_seed(0), round=1, base_version=0)
    randomness = member_randomness(round_seed(run_seed(0), 0), "device-1")
    accumulator = made.accumulator(small_manifest())
    told = {
        "configuration": json_format.MessageToDict(made.to_proto()),
        "record": dict(made.to_json()),
        "fixed": {name: fixed.to_json() for name, fixed in accumulator.fixed.items()},
        "key": randomness.key.tolist(),
        "order": randomness.rng.permutation(8).tolist(),
    }
    hold("round_configuration.json", json.dumps(told, indent=1, sort_keys=True).encode())


def test_packed_slices_are_read_for_ever() -> None:
    """What was packed once; packing anew may find another way."""
    path = GOLDEN / "packed_slices.json"
    if os.environ.get("SHOAL_GOLDEN") == "write":
        values = np.random.default_rng(0).normal(size=300).astype(np.float32)
        few = np.where(np.arange(300) % 7 == 0, values, np.float32(0))
        cases: list[tuple[np.ndarray, np.ndarray | None]] = [
            (values, None), (rounded(values, "int8"), None), (rounded(values, "bfloat16"), None), (few, None),
            (values + np.float32(1e-4), values), (rounded(values + np.float32(1e-2), "bfloat16"), rounded(values, "bfloat16")),
            (np.frombuffer(b"programs are bytes " * 9, np.uint8), None), (values.astype(np.float16), None),
        ]  # fmt: skip
        made = [
            {
                "dtype": value.dtype.name, "data": value.tobytes().hex(), "base": None if base is None else base.tobytes().hex(),
                "packed": pack_slice(value.tobytes(), value.dtype.name, None if base is None else base.tobytes()).hex(),
            }
            for value, base in cases
        ]  # fmt: skip
        path.write_text(json.dumps(made, indent=1))
    for case in json.loads(path.read_text()):
        data, base = bytes.fromhex(case["data"]), case["base"]
        held = None if base is None else bytes.fromhex(base)
        assert unpack_slice(bytes.fromhex(case["packed"]), case["dtype"], len(data), held) == data


def test_wire() -> None:
    hold("fleet_descriptor.bin", pb.DESCRIPTOR.serialized_pb)


def test_the_wire_between_coordinator_and_edges_is_held() -> None:
    hold("edges_descriptor.bin", edges_pb2.DESCRIPTOR.serialized_pb)


def test_the_wire_of_telemetry_is_held() -> None:
    hold("telemetry_descriptor.bin", telemetry_pb2.DESCRIPTOR.serialized_pb)


def test_telemetry_report() -> None:
    private = bytes(range(32))
    told = Tell(20_000, Day(hours=frozenset({7, 23}), amounts={"sessions": 3, "train_s": 5.0}))
    report = report_of(told, public_key(private), seeded(bytes(32), b"golden"))
    seed = unseal(report.sealed, private, public_key(private), context=context(report.schema, report.day))
    assert seed is not None
    opened = joined(np.frombuffer(report.share, "<u4"), mask_sum([seed], len(ENTRIES)))
    np.testing.assert_array_equal(opened, told.told.vector())
    made = {
        "report": report.SerializeToString().hex(),
        "slots_s": [slot_s(bytes(range(32)), day) for day in (0, 20_000, -1)],
        "entries": [[entry.name, entry.bound, entry.unit] for entry in ENTRIES],
    }
    hold("telemetry.json", json.dumps(made, indent=1).encode())


def test_the_proto_of_pushed_data() -> None:
    hold("data_descriptor.bin", data_pb2.DESCRIPTOR.serialized_pb)


def test_a_manifest_of_pushed_data() -> None:
    spec: Spec = {"image": ((8, 8, 1), "uint8"), "label": ((), "int32")}
    made = Distribution("digits", "default", spec, (Shard(sha256(b"a"), 3), Shard(sha256(b"b"), 2)))
    signature = made.sign(Ed25519PrivateKey.from_private_bytes(bytes(range(32))))
    hold("distribution.json", made.data + b"\n" + signature.hex().encode() + b"\n")


def test_record_schema() -> None:
    dialect = sqlite.dialect()
    parts = []
    for table in METADATA.sorted_tables:
        parts.append(str(CreateTable(table).compile(dialect=dialect)).strip())
        parts += [
            str(CreateIndex(index).compile(dialect=dialect))
            for index in sorted(table.indexes, key=lambda i: str(i.name))
        ]
    hold("record.sql", ("\n".join(parts) + "\n").replace(" \n", "\n").encode())


@pytest.mark.parametrize("bits", [32, 64])
def test_fixed_point(bits: int) -> None:
    made = FixedPoint.finest(bits=bits, bound=256.0, max_weight=65536 if bits == 64 else 1, max_members=21)
    hold(f"fixed_{bits}.json", json.dumps(made.to_json(), sort_keys=True).encode())


def test_plans_that_hold_examples_out_and_rules_with_options() -> None:
    manifest = small_manifest()
    half = replace(manifest.server, aggregator="evaluation", options={"follows": "golden", "every": 2})
    training = replace(manifest.training, holdout=0.2, part="held_out")
    made = replace(manifest, training=training, server_hash=sha256(half.data), half=half)
    hold("manifest_evaluation.json", made.data)
    both = replace(made, training=replace(training, part="both"))
    hold("manifest_both_parts.json", both.data)
    assert Manifest.parse(both.data) == both
    hold("server_half_evaluation.json", half.data)
    assert Manifest.parse(made.data, server=half.data) == made and made.server.metrics_prefix == "evaluate"


def test_what_a_device_comes_in_by() -> None:
    """The line of an invitation; what a member shows; what a device is called in which window."""
    secret = DeviceSecret(bytes(range(32)))
    pseudonyms = Pseudonyms(
        secret=secret, host="train.example.org:443", population="watches", device="anna", window_s=86_400.0
    )
    invitation = Invitation(
        address="train.example.org:443", server_name="host", population="watches", plan_key=bytes(32), pin=b"p" * 32, token=b"t" * 16,
        expires_s=2_000_000_000,
    )  # fmt: skip
    told = {
        "invitation": invitation.text,
        "credential": credential(invitation.token, secret.of_member(invitation.plan_key, "watches", "anna")).hex(),
        "pseudonyms": [pseudonyms.name(day * 86_400.0) for day in range(3)],
        "window_ends_s": pseudonyms.left_s(0.0),
    }
    hold("joining.json", json.dumps(told, indent=1).encode() + b"\n")
    assert Invitation.parse(told["invitation"]) == invitation  # type: ignore[arg-type]
