"""Compiled once: by one process of several, and not again by the next. In one process here; see also test_child."""

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from shoal.plan.build import Built
from shoal.plan.child import ChildRunner
from shoal.plan.compile_cache import cache_folder, compiled_once


def test_the_second_waits_for_the_first_and_takes_no_lock(tmp_path: Path) -> None:
    order: list[str] = []
    inside = threading.Event()

    def first() -> None:
        with compiled_once(tmp_path, "key", wait_s=5.0):
            inside.set()
            time.sleep(0.1)
            order.append("first")

    thread = threading.Thread(target=first)
    thread.start()
    inside.wait()
    with compiled_once(tmp_path, "key", wait_s=5.0):
        order.append("second")
    thread.join()
    assert order == ["first", "second"]
    assert {path.name for path in tmp_path.iterdir()} == {"key.lock", "key.done"}
    with compiled_once(tmp_path, "key", wait_s=0.0), compiled_once(tmp_path, "key", wait_s=0.0):
        pass


def test_the_wait_is_bounded(tmp_path: Path) -> None:
    with compiled_once(tmp_path, "key", wait_s=0.0):
        start = time.monotonic()
        with compiled_once(tmp_path, "key", wait_s=0.2):
            assert 0.2 <= time.monotonic() - start < 1.0


def test_a_failure_leaves_no_mark_and_no_lock(tmp_path: Path) -> None:
    with pytest.raises(KeyError), compiled_once(tmp_path, "key", wait_s=0.0):
        raise KeyError
    assert not (tmp_path / "key.done").exists()
    with compiled_once(tmp_path, "key", wait_s=0.0):
        pass
    assert (tmp_path / "key.done").exists()


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_a_lock_dies_with_its_process(tmp_path: Path) -> None:
    code = (
        "import sys, os; from pathlib import Path; from shoal.plan.compile_cache import compiled_once\n"
        "with compiled_once(Path(sys.argv[1]), 'key', wait_s=0): os.kill(os.getpid(), 9)"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    subprocess.run([sys.executable, "-c", code, tmp_path], env=environment, check=False, timeout=30)
    assert (tmp_path / "key.lock").exists() and not (tmp_path / "key.done").exists()
    start = time.monotonic()
    with compiled_once(tmp_path, "key", wait_s=5.0):
        assert time.monotonic() - start < 1.0


def test_a_folder_that_cannot_be_written_does_no_harm(tmp_path: Path) -> None:
    with compiled_once(tmp_path / "missing", "key", wait_s=5.0):
        pass


def test_the_folder_can_be_chosen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SHOAL_CACHE", str(tmp_path))
    assert cache_folder().parent == tmp_path / "programs"


@pytest.mark.slow
def test_processes_that_start_together_and_torn_entries(noisy: Built, tmp_path: Path) -> None:
    def predict() -> np.ndarray:
        with ChildRunner(noisy.plan, threads=1, cache=tmp_path) as runner:
            runner.compile()
            runner.set_model("a", noisy.model)
            batch = {"x": np.ones((200, 3), np.float32), "y": np.zeros(200, np.int32)}
            return runner.predict("a", batch, np.ones(200, bool))

    results: list[np.ndarray] = []
    threads = [threading.Thread(target=lambda: results.append(predict())) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    entries = list(tmp_path.glob("*-cache"))
    assert len(results) == 3 and entries and list(tmp_path.glob("*-train-*.done"))
    for entry in entries:
        entry.write_bytes(entry.read_bytes()[: entry.stat().st_size // 2])
    assert np.array_equal(predict(), results[0])  # notices, compiles, removes what is torn
    assert np.array_equal(predict(), results[0])
    assert all(len(entry.read_bytes()) > 1000 for entry in tmp_path.glob("*-cache"))
