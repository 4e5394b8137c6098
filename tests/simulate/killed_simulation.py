"""A simulation whose members keep state, in a process that is killed at its n-th write of states: FOLDER N."""

import os
import signal
import sys
from pathlib import Path
from typing import BinaryIO

import shoal
from shoal.record.sqlite import open_store
from shoal.simulate import device_states
from shoal.simulate.engine import go_on, simulate
from tests.algorithms.problem import MEMBERS, population, task

ROUNDS, SEED = 5, 4


def chosen() -> shoal.Task:
    return shoal.compressed(shoal.scaffold(task(), devices=len(MEMBERS)), "top_k", share=0.4)


def main(folder: Path, writes: int) -> None:
    sync = device_states._sync

    def killing(file: BinaryIO) -> None:
        nonlocal writes
        writes -= 1
        if not writes:
            os.kill(os.getpid(), signal.SIGKILL)
        sync(file)

    device_states._sync = killing
    store = open_store(folder)
    if runs := store.runs():
        go_on(store, runs[0].id, population(), folder=folder)
    else:
        simulate(
            chosen(), population(), rounds=ROUNDS, store=store, seed=SEED, folder=folder, backend="sequential"
        )  # fmt: skip
    store.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
