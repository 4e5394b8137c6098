"""A writer is killed at random moments: all that it had said was done is there, and nothing is half done."""

import random
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import pytest

from shoal.record import SqliteStore, open_store, take_up
from tests.record.builders import open_row, with_initial

_WRITER = """
import sys
sys.path.insert(0, sys.argv[2])
from pathlib import Path
from tests.record.builders import *
from shoal.record import open_store, take_up
store = open_store(Path(sys.argv[1]))
taken = take_up(store, "run", time_s=1.0)
version, waiting, number = taken.last.version, list(taken.waiting), taken.next_round
print("ready", flush=True)
while True:
    version += 1
    nonces = [number.to_bytes(8, "big") + bytes([i]) for i in range(4)]
    store.open_round("run", open_row(number, base_version=version - 1))
    group = group_row(round=number, base_version=version - 1, members=2)
    group = group_row(round=number, base_version=version - 1, members=2,
                      number=store.add_group("run", group, counted=[(n, 9.0) for n in nonces[:2]]))
    print("group", nonces[0].hex(), nonces[1].hex(), flush=True)
    store.commit("run", commit_row(store, version, round=number), round=round_row(number, base_version=version - 1),
                 groups=[*waiting, group], counted=[(n, 9.0) for n in nonces[2:]], metrics=[metric_row(version=version)])
    print("commit", version, nonces[2].hex(), nonces[3].hex(), flush=True)
    waiting, number = [], number + 1
"""


def run_and_kill(folder: Path, after_s: float) -> list[list[str]]:
    """What a writer reported before it was killed."""
    command = [sys.executable, "-c", _WRITER, str(folder), str(Path(__file__).parents[2])]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "ready\n"
        time.sleep(after_s)  # the moment must be random: a wait for an event would choose it
        assert writer.poll() is None, "the writer ended by itself"
        writer.kill()
        return [line.split() for line in writer.stdout if line.endswith("\n")]


def check_invariants(store: SqliteStore) -> None:
    commits = list(store.commits("run"))
    assert [commit.version for commit in commits] == list(range(len(commits)))
    for commit in commits:
        for entry in commit.model:
            store.blobs.get(entry.hash)  # checks the hash
    held = sum(group.members for group in store.groups("run"))
    with store._database.read() as connection:
        tokens = connection.exec_driver_sql("SELECT count(*) FROM tokens").scalar()
        damage = connection.exec_driver_sql("PRAGMA integrity_check").scalar()
    assert tokens == held + 2 * (len(commits) - 1) and damage == "ok"
    committed = [row for row in store.rounds("run") if row.state == "committed"]
    assert len(committed) == len(store.metrics("run")) == len(commits) - 1
    assert len(store.groups("run", waiting=True)) <= 1


@pytest.mark.slow
@pytest.mark.integration
@pytest.mark.skipif(sys.platform == "win32", reason="kills by signal")
def test_what_was_reported_is_there_after_a_kill__invariants_1_to_5(tmp_path: Path) -> None:
    with closing(open_store(tmp_path)) as store:
        with_initial(store)
    rng = random.Random(7)
    reported = 0
    for _ in range(10):
        lines = run_and_kill(tmp_path, rng.uniform(0.01, 0.25))
        with closing(open_store(tmp_path, read_only=True)) as store:
            check_invariants(store)
            for what, *rest in lines:
                nonces = rest if what == "group" else rest[1:]
                for nonce in nonces:
                    token = store.token("run", bytes.fromhex(nonce))
                    assert token is not None and token.state == "counted"
                if what == "commit":
                    assert store.get_commit("run", int(rest[0])).version == int(rest[0])
        reported += len(lines)
    assert reported > 10
    with closing(open_store(tmp_path)) as store:
        taken = take_up(store, "run", time_s=2.0)
        assert all(row.state != "open" for row in store.rounds("run"))
        store.open_round("run", open_row(taken.next_round, base_version=0))
