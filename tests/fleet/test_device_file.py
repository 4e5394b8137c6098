"""What a device keeps in its file."""

import os
import sqlite3
import stat
import sys
from pathlib import Path

import numpy as np
import pytest

from shoal.errors import StoreError
from shoal.fleet import device_file
from shoal.fleet.device_file import Day, DeviceFile

STATE = {"control/w": np.arange(3.0, dtype=np.float32)}
WORK = {"assigned": np.arange(9, dtype=np.uint8)}


def counted(file: DeviceFile, run: str = "run", device: str = "anna", *, wall_s: float = 1.0, size: int = 3) -> None:
    state = {"control/w": np.arange(size, dtype=np.float32)}
    file.counted("default", device, run=run, state=state, wall_s=wall_s)


def test_all_of_it_outlives_the_process(tmp_path: Path) -> None:
    file = DeviceFile(tmp_path / "kept")
    file.keep_fact("key", b"public")
    file.spend("anna", b"d" * 32)
    file.add_rho("anna", 0.25)
    file.add_rho("anna", 0.5)
    file.keep_work("default", "bert", WORK, expires_s=10.0)
    counted(file, wall_s=7.0)
    file.keep_day(3, Day(cpu_s=1.5, moved_bytes=7, battery_percent=0.5, peak_bytes=1 << 40))
    file.close()
    again = DeviceFile(tmp_path / "kept")
    assert again.fact("key") == b"public" and again.fact("other") is None
    assert again.is_spent("anna", b"d" * 32) and not again.is_spent("bert", b"d" * 32)
    assert again.rhos("anna") == [0.25, 0.5] and again.rhos("bert") == []
    work = again.work("default", "bert", wall_s=9.0)
    assert work is not None
    np.testing.assert_array_equal(work["assigned"], WORK["assigned"])
    kept = again.state("run", "anna")
    assert kept is not None
    np.testing.assert_array_equal(kept["control/w"], STATE["control/w"])
    assert again.contributed_s("anna") == 7.0 and again.contributed_s("bert") is None
    assert again.day(3) == Day(cpu_s=1.5, moved_bytes=7, battery_percent=0.5, peak_bytes=1 << 40)
    assert again.day(4) == Day()


def test_without_a_folder_it_ends_with_the_process(tmp_path: Path) -> None:
    file = DeviceFile(None)
    counted(file)
    assert not file.is_durable and file.state("run", "anna") is not None
    assert DeviceFile(None).state("run", "anna") is None


def test_work_ends_when_it_is_counted_or_its_token_expires() -> None:
    file = DeviceFile(None)
    file.keep_work("default", "anna", WORK, expires_s=10.0)
    assert file.work("other", "anna", wall_s=0.0) is None and file.work("default", "anna", wall_s=10.0) is None
    counted(file)
    assert file.work("default", "anna", wall_s=0.0) is None
    file.keep_work("default", "anna", WORK, expires_s=10.0)
    file.drop_work("default", "anna")
    assert file.work("default", "anna", wall_s=0.0) is None


def test_states_are_bounded_and_the_oldest_goes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_file, "MOST_STATE_BYTES", 1000)
    file = DeviceFile(None)
    for number in range(4):
        counted(file, f"run {number}", wall_s=float(number), size=75)
    counted(file, "run 2", wall_s=9.0, size=75)
    assert [file.state(f"run {n}", "anna") is not None for n in range(4)] == [False, False, True, True]
    counted(file, "too large", wall_s=10.0, size=300)
    assert file.state("too large", "anna") is None


def test_work_that_is_too_large_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_file, "MOST_WORK_BYTES", 300)
    file = DeviceFile(None)
    file.keep_work("default", "anna", WORK, expires_s=10.0)
    file.keep_work("default", "anna", {"sum w": np.zeros(100)}, expires_s=10.0)
    assert file.work("default", "anna", wall_s=0.0) is None, "nor is what was in hand before it"


def test_days_long_gone_are_dropped() -> None:
    file = DeviceFile(None)
    for number in range(device_file.DAYS_KEPT + 5):
        file.keep_day(number, Day(cpu_s=1.0))
    assert file.day(4) == Day() and file.day(5) == Day(cpu_s=1.0)


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX permissions")
def test_nobody_else_may_read_it(tmp_path: Path) -> None:
    counted(DeviceFile(tmp_path))
    for path in tmp_path.iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o600, path


def test_one_who_only_looks_makes_nothing(tmp_path: Path) -> None:
    assert DeviceFile(tmp_path, read_only=True).state("run", "anna") is None
    assert not list(tmp_path.iterdir())
    counted(DeviceFile(tmp_path))
    looking = DeviceFile(tmp_path, read_only=True)
    assert looking.state("run", "anna") is not None
    with pytest.raises(StoreError, match="cannot be written"):
        counted(looking)


def test_a_file_of_a_newer_shoal_is_left_alone(tmp_path: Path) -> None:
    DeviceFile(tmp_path).close()
    with sqlite3.connect(tmp_path / device_file.FILE_NAME) as db:
        db.execute("PRAGMA user_version = 9")
    with pytest.raises(StoreError, match="has schema 9, this shoal reads 1"):
        DeviceFile(tmp_path)


@pytest.mark.parametrize("where", [0, 5000])
def test_a_damaged_file_is_said(tmp_path: Path, where: int) -> None:
    file = DeviceFile(tmp_path)
    for number in range(20):
        counted(file, f"run {number}", size=1000)
    file.close()
    path = tmp_path / device_file.FILE_NAME
    data = bytearray(path.read_bytes())
    data[where : where + 60_000] = os.urandom(60_000)
    path.write_bytes(data)
    with pytest.raises(StoreError, match="no database, or is damaged"):
        again = DeviceFile(tmp_path)
        for number in range(20):
            again.state(f"run {number}", "anna")
