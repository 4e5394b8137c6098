"""Files that only grow, on a disk that is full."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from shoal.errors import StoreError
from shoal.fleet.append import append_for_good
from shoal.fleet.device_secret import credential
from shoal.fleet.members import Members, invite
from shoal.fleet.telemetry_helper import OpenedSeeds
from shoal.fleet.wire import fleet_pb2 as pb

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="the limit stands for a full disk")


@contextmanager
def full(size_bytes: int) -> Iterator[None]:
    """Files have room for so much: what is beyond is cut off, as on a full disk."""
    import resource

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("size", [100, 100_000])
def test_what_does_not_fit_leaves_nothing(tmp_path: Path, size: int) -> None:
    path = tmp_path / "grows"
    append_for_good(path, b"first")
    with full(size // 2), pytest.raises(OSError, match="too large"):
        append_for_good(path, os.urandom(size))
    append_for_good(path, b" second")
    assert path.read_bytes() == b"first second"


def test_members_go_on_after_one_that_did_not_fit(tmp_path: Path) -> None:
    members = Members.begin(tmp_path)
    invite(tmp_path, b"t" * 16, population="default", expires_s=2_000, uses=2)
    a, b = (pb.CheckIn(device_id=name, credential=credential(b"t" * 16, b"s" * 32)) for name in "ab")
    with full(100), pytest.raises(StoreError, match="cannot be written down"):
        members.refusal(a, 0.0)
    assert members.refusal(b, 0.0) == ""
    again = Members(tmp_path)
    assert len(again) == 1 and again.refusal(b, 5_000.0) == "", "who was told that it is one stays one"


def test_a_helper_remembers_what_it_opened_after_what_did_not_fit(tmp_path: Path) -> None:
    opened = OpenedSeeds(tmp_path)
    with full(100), pytest.raises(StoreError, match="cannot be written"):
        opened.add(7, [bytes([number]) for number in range(10)])
    opened.add(7, [b"x"])
    assert OpenedSeeds(tmp_path).has(7, b"x") and OpenedSeeds(tmp_path).count(7) == 1
