"""A disk that is full while a host serves: it says so, loses nothing, and goes on when there is space again."""

import asyncio
import errno
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shoal.errors import StoreUnavailable
from shoal.fleet import durable
from shoal.fleet.host import Host
from shoal.plan.run_plan import begin_run
from shoal.policy import RoundPolicy
from shoal.record.memory import MemoryStore
from shoal.record.sqlite import open_store
from shoal.record.store import RunStatus
from tests.fleet import toy
from tests.fleet.test_fleet import until

pytestmark = pytest.mark.integration

ROUNDS = 3
WRITES = ["open_round", "close_round", "add_group", "commit", "blobs.put", "blobs.put_all", "blobs.writer"]
GROUPED = RoundPolicy(goal=2, minimum_group=1, over_selection=1.0, group_size=1)


class Full:
    """A store of which every so manyth write fails, once: before anything is written, or after all of it is."""

    def __init__(self, inner: Any, state: "State", path: str = "") -> None:
        self._inner, self._state, self._path = inner, state, path

    def __getattr__(self, name: str) -> Any:
        found, path = getattr(self._inner, name), f"{self._path}{name}"
        if path == "blobs":
            return Full(found, self._state, "blobs.")
        return self._state.failing(path, found) if path in WRITES else found


class State:
    def __init__(self, fails_at: int, *, late: bool) -> None:
        self.fails_at, self.late, self.writes, self.failed = fails_at, late, 0, ""
        self.is_on = False

    def failing(self, path: str, write: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **named: Any) -> Any:
            self.writes += self.is_on
            fails = self.is_on and self.writes == self.fails_at
            if fails and not self.late:
                self.failed = path
                raise StoreUnavailable("No space left to write it. Nothing was lost; free space and try again.")
            made = write(*args, **named)
            if fails:
                self.failed = path
                if path == "blobs.writer":
                    made.discard()
                raise StoreUnavailable("It was written, but nobody heard so.")
            return made

        return call


@pytest.mark.parametrize("late", [False, True], ids=["before", "after"])
def test_a_disk_that_is_full_at_any_write_loses_nothing(
    late: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(durable, "RETRY_S", (0.005, 0.01))
    failed, at = set(), 0
    while True:
        at += 1
        state = State(at, late=late)
        with caplog.at_level(logging.ERROR, "shoal.host"):
            asyncio.run(asyncio.wait_for(_rounds(tmp_path / str(at), state), timeout=20))
        if not state.failed:
            break
        failed.add(state.failed)
        assert "trying again" in caplog.text
        caplog.clear()
    assert {"open_round", "commit", "add_group"} <= failed and at > 5


async def _rounds(folder: Path, state: State) -> None:
    """Two devices of value 1 and 3: the model is 2, whatever the disk does."""
    store = open_store(folder)
    try:
        async with toy.fleet(toy.plan(GROUPED), rounds=1, store=Full(store, state)) as fleet:  # type: ignore[arg-type]
            state.is_on = True
            fleet.start(toy.device("a", fleet.link, value=1.0), toy.device("b", fleet.link, value=3.0))
            await asyncio.gather(*fleet.tasks)
            assert fleet.members == [0, 2]
            np.testing.assert_array_equal(fleet.model["params/w"], [2.0])
    finally:
        store.close()


@toy.in_loop
async def test_a_run_that_is_over_says_so_as_soon_as_there_is_space(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(durable, "RETRY_S", (0.005, 0.01))
    refused: list[str] = []

    def full(store: MemoryStore, run_id: str, status: RunStatus, *, time_s: float | None) -> None:
        if status == "finished" and len(refused) < 2:
            refused.append(status)
            raise StoreUnavailable("No space left.")
        write(store, run_id, status, time_s=time_s)

    write = MemoryStore.set_status
    monkeypatch.setattr(MemoryStore, "set_status", full)
    async with toy.fleet(toy.plan(GROUPED), rounds=1) as fleet:
        fleet.start(toy.device("a", fleet.link), toy.device("b", fleet.link))
        await asyncio.gather(*fleet.tasks)
        await until(lambda: fleet.store.run(fleet.host.run_id).status == "finished")
    assert len(refused) == 2


@toy.in_loop
async def test_a_run_that_is_stopped_on_a_full_disk_ends_all_the_same(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(store: MemoryStore, run_id: str, status: RunStatus, *, time_s: float | None) -> None:
        if status != "running":
            raise StoreUnavailable("No space left.")

    monkeypatch.setattr(MemoryStore, "set_status", full)
    store = MemoryStore()
    run_id = begin_run(store, toy.plan(GROUPED), {"params/w": np.zeros(1, np.float32)}, kind="host", rounds=1, seed=0)
    running = asyncio.create_task(Host(store, run_id, toy.KEYS).run())
    await asyncio.sleep(0.02)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert "stopped cannot be written" in caplog.text


# A real disk.


@contextmanager
def small_disk(folder: Path, kilobytes: int) -> Iterator[Path]:
    folder.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(folder)], capture_output=True, check=False
    )
    if made.returncode:
        pytest.skip("no file system can be mounted here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.skipif(sys.platform != "linux", reason="mounts a file system")
@toy.in_loop
async def test_a_host_on_a_disk_that_is_full_goes_on_when_there_is_space(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(durable, "RETRY_S", (0.01, 0.05))
    with small_disk(tmp_path / "disk", 2048) as disk:
        store = open_store(disk / "run")
        try:
            async with toy.fleet(toy.plan(GROUPED), rounds=ROUNDS, store=store) as fleet:
                fleet.start(toy.device("a", fleet.link, value=1.0))
                await until(lambda: fleet.host.coordinator.snapshot().waiting == 1)
                filled = disk / "filled"
                _fill(filled)
                fleet.start(toy.device("b", fleet.link, value=3.0))
                with caplog.at_level(logging.ERROR, "shoal.host"):
                    while "trying again" not in caplog.text:
                        await asyncio.sleep(0.01)
                assert "free space" in caplog.text
                before = fleet.members
                filled.unlink()
                await asyncio.gather(*fleet.tasks)
                assert fleet.members == [0] + [2] * ROUNDS and len(before) < len(fleet.members)
                np.testing.assert_array_equal(fleet.model["params/w"], [2.0 * ROUNDS])
        finally:
            store.close()


def _fill(path: Path) -> None:
    with path.open("wb", buffering=0) as file:
        for size in (1 << 16, 1 << 12):
            try:
                while True:
                    file.write(b"x" * size)
            except OSError as error:
                assert error.errno == errno.ENOSPC
        os.fsync(file.fileno())
