"""A store and processes that were forked from the one that opened it, as loaders of training data do."""

import os
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from shoal.embed import EmbeddingStore
from shoal.errors import StoreError
from tests.embed.builders import small_store, vectors


def said_in_a_fork(act: Callable[[], object]) -> str:
    """What `act` says in a process forked from this one: `done`, or its error's text."""
    read, write = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # other threads of this process hold nothing that `act` needs
        child = os.fork()
    if child == 0:
        try:
            act()
            text = "done"
        except BaseException as error:
            text = f"{type(error).__name__}: {error}"
        os.write(write, text.encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as told:
        text = told.read().decode()
    os.waitpid(child, 0)
    return text


def test_a_fork_of_the_writer_is_refused(tmp_path: Path) -> None:
    row = np.ones((1, 32), np.float32)
    with small_store(tmp_path) as store:
        for act in (lambda: store.update("items", [1], row), lambda: store.lookup("items", [1]), store.verify):
            said = said_in_a_fork(act)
            assert said.startswith("StoreError") and f"process {os.getpid()}, of which this one is a fork" in said
        store.update("items", [2], row)
    with EmbeddingStore.open(tmp_path) as store:
        np.testing.assert_array_equal(store.lookup("items", [1, 2]), np.stack([vectors()[1], row[0]]))


@pytest.mark.parametrize("engine", ["auto", "threads"])
def test_a_fork_of_a_reader_reads(tmp_path: Path, engine: str) -> None:
    small_store(tmp_path).close()
    with EmbeddingStore.open(tmp_path, read_only=True, engine=engine) as store:
        store.lookup("items", np.arange(100))

        def look() -> None:
            np.testing.assert_array_equal(store.lookup("items", np.arange(900)), vectors()[:900])

        assert said_in_a_fork(look) == "done"
        look()


def test_a_fork_that_lives_on_keeps_no_lock(tmp_path: Path) -> None:
    store = small_store(tmp_path)
    inherited = [os.dup(descriptor) for descriptor in store._lock._held]  # what a fork has
    store.close()
    EmbeddingStore.open(tmp_path).close()
    for descriptor in inherited:
        os.close(descriptor)


def test_a_fork_that_closes_leaves_the_lock(tmp_path: Path) -> None:
    with small_store(tmp_path) as store:
        assert said_in_a_fork(store._lock.close) == "done"
        with pytest.raises(StoreError, match="another process has it open"):
            EmbeddingStore.open(tmp_path)
