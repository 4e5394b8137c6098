"""Any history of calls: both stores say the same, the invariants hold, and a copy is the store at the time of a crash."""

import tempfile
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shoal.errors import StoreError
from shoal.record import MemoryStore, RoundLog, Store, open_store, take_up
from tests.record.builders import (
    commit_row,
    contents,
    group_row,
    metric_row,
    open_row,
    round_row,
    usage_row,
    with_initial,
)

Call = tuple[str, int, tuple[int, ...], tuple[int, ...]]

NONCES = st.lists(st.integers(0, 7), max_size=3).map(tuple)
CALLS = st.tuples(
    st.sampled_from(["open", "close", "group", "commit", "refuse", "forget", "log", "take_up"]),
    st.integers(0, 4),
    NONCES,
    st.lists(st.integers(0, 3), max_size=2, unique=True).map(tuple),
)


def do(store: Store, call: Call) -> object:
    """Makes the call; a refusal's words are its result."""
    what, number, nonces, groups = call
    counted = [(bytes([nonce]), float(nonce)) for nonce in nonces]
    last = store.last_version("run") or 0
    made: dict[str, Callable[[], object]] = {
        "open": lambda: store.open_round("run", open_row(number + 1, base_version=last)),
        "close": lambda: store.close_round(
            "run",
            round_row(number + 1, state="abandoned"),
            usage=[usage_row()],
            log=RoundLog(round=number + 1, data=b"log", kept=2),
        ),
        "group": lambda: store.add_group("run", group_row(base_version=last), counted=counted),
        "commit": lambda: _commit(store, last + 1 + number // 4, number + 1, counted, groups),
        "refuse": lambda: store.refuse("run", bytes([number]), reason="late", expires_s=float(number)),
        "forget": lambda: store.forget_tokens("run", before_s=float(number), to_version=99),
        "log": lambda: store.log("run", [metric_row(version=number)]),
        "take_up": lambda: take_up(store, "run", time_s=3.0),
    }
    try:
        return made[what]()
    except StoreError as error:
        return str(error)


def _commit(
    store: Store, version: int, round: int, counted: list[tuple[bytes, float]], groups: tuple[int, ...]
) -> None:
    store.commit(
        "run",
        commit_row(store, version, round=round),
        round=round_row(round, base_version=version - 1),
        groups=[group_row(number=number, base_version=0) for number in groups],
        counted=counted,
        metrics=[metric_row(version=version)],
        log=RoundLog(round=round, data=bytes([round]), kept=1),
    )


def state(store: Store) -> Any:
    return contents(store), [store.token("run", bytes([nonce])) for nonce in range(8)]


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(calls=st.lists(CALLS, max_size=14))
def test_both_stores_tell_the_same_history(calls: list[Call]) -> None:
    memory = MemoryStore()
    with_initial(memory)
    with tempfile.TemporaryDirectory() as folder:
        with closing(open_store(Path(folder))) as disk:
            with_initial(disk)
            for call in calls:
                assert do(memory, call) == do(disk, call)
            assert state(memory) == state(disk)
        with closing(open_store(Path(folder))) as disk:
            assert state(memory) == state(disk)


@settings(max_examples=60, deadline=None)
@given(calls=st.lists(CALLS, max_size=14))
def test_a_refusal_changes_nothing_and_a_copy_stays__invariant_5(calls: list[Call]) -> None:
    store = MemoryStore()
    with_initial(store)
    history = []
    for call in calls:
        copy, before = store.copy(), state(store)
        told = do(store, call)
        if isinstance(told, str):
            assert state(store) == before
        history.append((copy, before, call, told))
    for copy, before, call, told in history:
        assert state(copy) == before  # what came later did not reach it
        assert do(copy, call) == told  # and it goes on from there as the store did
        assert state(copy) is not before


@settings(max_examples=60, deadline=None)
@given(calls=st.lists(CALLS, max_size=20))
def test_versions_nonces_and_blobs_hold__invariants_1_2_4(calls: list[Call]) -> None:
    store = MemoryStore()
    with_initial(store)
    counted: dict[int, int | None] = {}
    for call in calls:
        do(store, call)
        if call[0] == "forget":
            counted = {nonce: version for nonce, version in counted.items() if nonce >= call[1]}
        for nonce in range(8):
            token = store.token("run", bytes([nonce]))
            if token is not None and token.state == "counted":
                assert counted.get(nonce) in (None, token.version)  # a version once given stays
                counted[nonce] = token.version
        commits = list(store.commits("run"))
        assert [commit.version for commit in commits] == list(range(len(commits)))
        assert all(store.blobs.has(entry.hash) for commit in commits for entry in commit.model)
