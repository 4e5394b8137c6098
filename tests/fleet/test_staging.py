"""Where an update waits until it is whole: slices in any size, in memory or spooled; nothing readable on a disk."""

import os
import tempfile
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.errors import ProtocolError, StoreError, UpdateRefused
from shoal.fixed import FixedPoint
from shoal.fleet import staging
from shoal.fleet.staging import Limits, StagedUpdate, most_updates
from shoal.tensors import Index, TensorSpec, to_bytes

SPECS = (
    TensorSpec(name="a", shape=(700,), dtype="float32"),
    TensorSpec(name="b", shape=(), dtype="float32"),
    TensorSpec(name="c", shape=(0, 3), dtype="float32"),
)
FIXED = {s.name: FixedPoint.finest(bits=64, bound=10.0, max_weight=10, max_members=10) for s in SPECS}
IN_MEMORY, SPOOLED = Limits(), Limits(memory_bytes=0)
VALUES = {
    "a": np.linspace(-9, 9, 700, dtype=np.float32), "b": np.array(3.0, np.float32), "c": np.zeros((0, 3), np.float32),
}  # fmt: skip
ROOT = Index.of(VALUES).root


def staged(limits: Limits) -> StagedUpdate:
    return StagedUpdate(SPECS, FIXED, limits)


def whole(update: StagedUpdate) -> dict[str, bytes]:
    found = {name: b"" for name in VALUES}
    for name, first, values in update.pieces():
        assert first * 4 == len(found[name])
        found[name] += values.tobytes()
    return found


@pytest.mark.parametrize("limits", [IN_MEMORY, SPOOLED], ids=["memory", "spool"])
@given(cuts=st.lists(st.integers(0, 2800)), data=st.data())
def test_any_slices_that_leave_no_gap_make_the_update(limits: Limits, cuts: list[int], data: st.DataObject) -> None:
    with closing(staged(limits)) as update:
        bytes_a, at = to_bytes(VALUES["a"]), 0
        for end in [*sorted(cuts), 2800]:
            start = data.draw(st.integers(max(0, at - 50), at))  # some of it is sent again
            update.write("a", start, bytes_a[start:end])
            at = max(at, end)
        assert update.missing == ["b"]
        update.write("b", 0, to_bytes(VALUES["b"]))
        update.check(ROOT)
        assert whole(update) == {name: to_bytes(value) for name, value in VALUES.items()}


def test_a_slice_that_is_refused_changes_nothing() -> None:
    update = staged(IN_MEMORY)
    for name, offset, size in (("x", 0, 1), ("b", 1, 1), ("b", 0, 5), ("c", 0, 1), ("a", 2801, 1)):
        with pytest.raises(ProtocolError):
            update.write(name, offset, b"x" * size)
    assert update.received == {"a": 0, "b": 0, "c": 0}


def test_bad_values_are_seen_while_they_come_also_across_slices() -> None:
    update = staged(IN_MEMORY)
    nan = np.array([1.0, np.nan], np.float32).tobytes()
    update.write("a", 0, nan[:6])
    assert update.refusal is None
    update.write("a", 6, nan[6:])
    assert update.refusal is not None and update.refusal.reason == "not finite"


def test_an_update_that_is_not_whole_is_not_checked_good() -> None:
    with pytest.raises(UpdateRefused, match="Not whole: a, b"):
        staged(IN_MEMORY).check(ROOT)


def test_nothing_readable_stays_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    update = staged(SPOOLED)
    plain = to_bytes(VALUES["a"])
    update.write("a", 0, plain)
    assert list(tmp_path.iterdir()) == [], "the file has no name"
    on_disk = os.pread(update._store._file.fileno(), 2800, 0)  # type: ignore[union-attr]
    assert len(on_disk) == 2800 and not any(plain[i : i + 8] in on_disk for i in range(0, 2800, 8))
    assert whole(update)["a"] == plain
    update.close()


def test_a_full_disk_is_said_and_what_came_before_is_still_there(monkeypatch: pytest.MonkeyPatch) -> None:
    update = staged(SPOOLED)
    update.write("a", 0, to_bytes(VALUES["a"])[:100])
    with monkeypatch.context() as patch:
        patch.setattr(update._store, "write", _full)
        with pytest.raises(StoreError, match="No space left"):
            update.write("a", 100, to_bytes(VALUES["a"])[100:])
    update.write("a", 100, to_bytes(VALUES["a"])[100:])
    update.write("b", 0, to_bytes(VALUES["b"]))
    update.check(ROOT)
    update.close()


def _full(offset: int, data: bytes) -> None:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize(
    ("limits", "most"),
    [
        (Limits(updates=7), 7),
        (Limits(bytes_in_memory=3 * 2816 + 2815), 3),  # the scalar and the empty tensor take a block together
        (Limits(bytes_in_memory=1), 1),
        (Limits(memory_bytes=0, bytes_in_files=5 * 2816), 5),
        (Limits(memory_bytes=0, files=4), 4),
        (Limits(memory_bytes=0, updates=2, files=4), 2),
    ],
)
def test_updates_are_bounded_by_number_bytes_and_files(limits: Limits, most: int) -> None:
    assert most_updates(SPECS, limits) == most


@pytest.mark.parametrize(("allowed", "most"), [(1024, 100), (20_500, 300), (1 << 20, 10_000)])
def test_spooled_updates_leave_files_to_connections(monkeypatch: pytest.MonkeyPatch, allowed: int, most: int) -> None:
    monkeypatch.setattr(staging, "allowed_files", lambda: allowed)
    assert most_updates(SPECS, SPOOLED) == most
