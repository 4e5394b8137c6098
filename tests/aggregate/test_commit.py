"""A commit: piece by piece or whole the same bits; what is not averaged keeps its blob; memory does not grow with it."""

import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from shoal import server
from shoal.aggregate import commit as module
from shoal.aggregate.accumulator import Accumulator
from shoal.aggregate.commit import WeightedMean
from shoal.aggregate.patch import replay
from shoal.errors import QuorumNotReached
from shoal.fixed import SumSpec
from shoal.policy import ServerRule
from shoal.record.memory import MemoryStore
from shoal.record.sqlite import open_store
from shoal.record.store import Blobs
from shoal.record.tensor_blobs import put_tensors, view_tensors
from shoal.tensors import Index, TensorSpec

RULES = [server.sgd(), server.sgd(0.5, momentum=0.9), server.adagrad(0.1), server.adam(0.1), server.yogi(0.1)]


def specs(size: int) -> tuple[TensorSpec, ...]:
    return (
        TensorSpec(name="params/frozen", shape=(3,), dtype="float32"),
        TensorSpec(name="params/w", shape=(size,), dtype="float32"),
        TensorSpec(name="state/mean", shape=(2,), dtype="float32"),
    )


def summed(size: int) -> Accumulator:
    sums = [
        SumSpec(tensor=TensorSpec(name=f"delta/{s.name}", shape=s.shape, dtype="float32"), bound=8.0, weighted=True)
        for s in specs(size)[1:]
    ]
    made = Accumulator.finest(sums, max_weight=16, max_members=4)
    rng = np.random.default_rng(3)
    for weight in (3, 5):
        update = {s.tensor.name: rng.normal(size=s.tensor.shape).astype(np.float32) for s in sums}
        made.add(update, weight=weight)
    return made


def initial(blobs: Blobs, size: int) -> Index:
    return put_tensors(blobs, {s.name: np.ones(s.shape, np.float32) for s in specs(size)}, specs(size))


def two_commits(rule: ServerRule, size: int = 1000) -> list[str]:
    blobs = MemoryStore().blobs
    model, state, sums = initial(blobs, size), Index(()), summed(size)
    for _ in range(2):
        model, state = WeightedMean(rule).commit(sums, model, state, blobs)
    return [model.root, state.root]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: f"{rule.kind}-{rule.momentum}")
def test_piece_by_piece_gives_the_bits_of_the_whole(rule: ServerRule, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = two_commits(rule)
    monkeypatch.setattr(module, "CHUNK", 7)
    assert two_commits(rule) == whole


def test_statistics_take_the_mean_and_what_is_not_averaged_stays() -> None:
    blobs, sums = MemoryStore().blobs, summed(10)
    before = initial(blobs, 10)
    after, _ = WeightedMean(server.adam(0.1)).commit(sums, before, Index(()), blobs)
    model = view_tensors(blobs, after)
    fixed = sums.fixed["delta/state/mean"]
    mean = sums.totals["delta/state/mean"] * fixed.unit / sums.weight
    np.testing.assert_allclose(model["state/mean"], 1.0 + mean, rtol=1e-6)
    assert [e.hash for e in after if e.spec.name == "params/frozen"] == [
        e.hash for e in before if e.spec.name == "params/frozen"
    ]


def added(updates: list[tuple[float, int, float]]) -> Accumulator:
    """Sums of a mean and of an added tensor, of (value, weight, discount)."""
    sums = [
        SumSpec(tensor=TensorSpec(name=f"delta/{name}", shape=(2,), dtype="float32"), bound=8.0, weighted=is_weighted)
        for name, is_weighted in (("control/w", False), ("params/w", True))
    ]
    made = Accumulator.finest(sums, max_weight=16, max_members=8)
    for value, weight, discount in updates:
        pieces = ((spec.tensor.name, 0, np.full(2, value, np.float32)) for spec in sums)
        made.add_checked(pieces, weight=weight, discount=discount)
    return made


ADDED = tuple(TensorSpec(name=name, shape=(2,), dtype="float32") for name in ("control/w", "params/w"))


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: f"{rule.kind}-{rule.momentum}")
def test_a_sum_without_weights_is_added_as_it_is(rule: ServerRule) -> None:
    """Whatever the rule, the weights, and the age of an update."""
    blobs, sums = MemoryStore().blobs, added([(0.5, 3, 1.0), (0.25, 5, 0.5)])
    model = put_tensors(blobs, {spec.name: np.ones(2, np.float32) for spec in ADDED}, ADDED)
    after, state = WeightedMean(rule).commit(sums, model, Index(()), blobs)
    np.testing.assert_array_equal(view_tensors(blobs, after)["control/w"], np.full(2, 1.75, np.float32))
    assert not any(entry.spec.name.endswith("control/w") for entry in state)


def test_late_updates_of_added_tensors_are_patched_in_with_the_bits_of_a_run_in_time() -> None:
    blobs = MemoryStore().blobs
    model = put_tensors(blobs, {spec.name: np.ones(2, np.float32) for spec in ADDED}, ADDED)
    rounds = [[(0.3, 3, 1.0), (0.1, 2, 1.0)], [(0.7, 1, 1.0)]]
    late = added(rounds[0][:1])
    late.merge_all(added(rounds[0][1:]))
    rule = WeightedMean(server.adam(0.1))
    patched = replay(rule, (model, Index(())), [late, added(rounds[1])], blobs)
    in_time = (model, Index(()))
    for updates in rounds:
        in_time = rule.commit(added(updates), *in_time, blobs)
    assert [index.root for index in patched] == [index.root for index in in_time]


def test_no_update_is_no_commit() -> None:
    blobs = MemoryStore().blobs
    sums = Accumulator.finest((), max_weight=16, max_members=4)
    with pytest.raises(QuorumNotReached):
        WeightedMean(server.sgd()).commit(sums, initial(blobs, 3), Index(()), blobs)


def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    size = 4_000_000
    store = open_store(tmp_path)
    model, sums = initial(store.blobs, size), summed(size)
    tracemalloc.start()
    WeightedMean(server.adam(0.1)).commit(sums, model, Index(()), store.blobs)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    store.close()
    assert peak < 30e6, "the model has 16 MB, its moments 32, in float64 twice that"
