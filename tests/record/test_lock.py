"""One process writes a run at a time."""

import subprocess
import sys
import threading
from pathlib import Path

import pytest

from shoal.errors import StoreError
from shoal.record import find_runs, open_store
from shoal.record.lock import only_writer, was_left
from tests.record.builders import run_row

HOLD = """
import sys, time
from pathlib import Path
from shoal.record.lock import only_writer
with only_writer(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.mark.integration
def test_a_second_writer_is_refused_until_the_first_is_gone(tmp_path: Path) -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    try:
        assert holder.stdout.readline() == "held\n"
        assert not was_left(tmp_path)
        with pytest.raises(StoreError, match=f"another process \\(number {holder.pid}\\)"), only_writer(tmp_path):
            pass
    finally:
        holder.kill()
        holder.wait()
        holder.stdout.close()
    assert was_left(tmp_path)
    with only_writer(tmp_path):
        assert not was_left(tmp_path)


def test_a_folder_that_never_had_a_writer_was_not_left(tmp_path: Path) -> None:
    assert not was_left(tmp_path) and not was_left(tmp_path / "nowhere") and not list(tmp_path.iterdir())


def test_one_who_looks_does_not_turn_a_writer_away(tmp_path: Path) -> None:
    with only_writer(tmp_path):
        pass
    done = threading.Event()

    def look() -> None:
        while not done.is_set():
            was_left(tmp_path)

    looking = threading.Thread(target=look)
    looking.start()
    try:
        for _ in range(50):
            with only_writer(tmp_path):
                pass
    finally:
        done.set()
        looking.join()


def test_a_run_whose_writer_died_is_shown_as_stopped(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    store.create_run(run_row(status="running"))
    store.close()
    assert [run.status for run in find_runs(tmp_path)] == ["running"], "of a script that takes no lock nobody can tell"
    with only_writer(tmp_path):
        assert [run.status for run in find_runs(tmp_path)] == ["running"]
    assert [run.status for run in find_runs(tmp_path)] == ["stopped (died)"]
    store = open_store(tmp_path)
    store.set_status("run", "finished", time_s=1.0)
    store.close()
    assert [run.status for run in find_runs(tmp_path)] == ["finished"]
