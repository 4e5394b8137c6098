import dataclasses
import random
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shoal.errors import PlanError
from shoal.plan.build import Built, build
from shoal.plan.plan import Plan
from tests.plan.plan_tasks import replaced, tiny_task

KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
PUBLIC = KEY.public_key().public_bytes_raw()


@pytest.fixture(scope="module")
def signed(tiny: Built) -> Plan:
    return tiny.plan.sign(KEY)


@pytest.fixture(scope="module")
def data(signed: Plan) -> bytes:
    return signed.to_bytes()


def read(data: bytes) -> Plan:
    """What a device does with a file."""
    plan = Plan.parse(data)
    plan.verify(PUBLIC)
    return plan


def test_round_trip(signed: Plan, data: bytes, tmp_path: Path) -> None:
    signed.save(tmp_path / "tiny.plan")
    again = Plan.load(tmp_path / "tiny.plan")
    again.verify(PUBLIC)
    assert again == signed and again.to_bytes() == data and again.hash == signed.hash


def test_a_device_s_side_has_no_server_half(signed: Plan) -> None:
    device = dataclasses.replace(signed, manifest=dataclasses.replace(signed.manifest, half=None))
    again = read(device.to_bytes())
    assert again.hash == signed.hash and len(device.to_bytes()) < len(signed.to_bytes())
    with pytest.raises(PlanError, match="a device's side"):
        again.manifest.server


def test_building_again_gives_the_same_plan(tiny: Built) -> None:
    assert build(tiny_task()).plan.hash == tiny.plan.hash


def test_a_program_does_not_tell_where_its_source_lies(tiny: Built) -> None:
    for program in tiny.plan.programs.values():
        assert b".py" not in program and str(Path.home()).encode() not in program


def test_unsigned_or_signed_by_another_is_refused(tiny: Built, signed: Plan) -> None:
    with pytest.raises(PlanError, match="signed by nobody"):
        tiny.plan.verify(PUBLIC)
    with pytest.raises(PlanError, match="this device trusts"):
        signed.verify(bytes(32))


def test_a_signature_of_another_manifest_is_refused(signed: Plan) -> None:
    other = build(tiny_task(name="other")).plan
    forged = Plan(other.manifest, other.programs, signed.public_key, signed.signature)
    with pytest.raises(PlanError, match="signature"):
        forged.verify(PUBLIC)


def test_another_program_under_the_signed_hash_is_refused(signed: Plan) -> None:
    programs = {hash: data + b"\0" for hash, data in signed.programs.items()}
    plan = Plan(signed.manifest, programs, signed.public_key, signed.signature)
    with pytest.raises(PlanError, match="not the hash"):
        plan.verify(PUBLIC)
    with pytest.raises(PlanError, match="not the hash"):
        plan.program(plan.manifest.programs[0])


def test_a_program_that_is_not_at_hand_is_said_to_be(signed: Plan) -> None:
    with pytest.raises(PlanError, match="not at hand"):
        Plan(signed.manifest, {}).program(signed.manifest.programs[0])


def test_replacing_a_program_needs_a_new_signature(signed: Plan) -> None:
    changed = replaced(signed, "block", b"anything")
    with pytest.raises(PlanError):
        Plan(changed.manifest, changed.programs, PUBLIC, signed.signature).verify(PUBLIC)
    changed.sign(KEY).verify(PUBLIC)


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**32 - 1), count=st.integers(1, 3))
def test_any_changed_bytes_are_refused(data: bytes, seed: int, count: int) -> None:
    draw = random.Random(seed)
    damaged = bytearray(data)
    for position in draw.sample(range(len(data)), count):
        damaged[position] ^= draw.randrange(1, 256)
    with pytest.raises(PlanError):
        read(bytes(damaged))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(share=st.floats(0.0, 1.0, exclude_max=True))
def test_a_truncated_plan_is_refused(data: bytes, share: float) -> None:
    with pytest.raises(PlanError):
        read(data[: int(share * len(data))])


def test_more_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(PlanError):
        read(data + b"\0")
