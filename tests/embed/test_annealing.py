"""Annealed swaps: what they count is what there is, nothing is lost, and they end lower than swaps that each gain."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.embed.annealing import anneal
from shoal.embed.generator import generate, tables
from shoal.embed.hypergraph import Edges, Named, by_vector
from shoal.embed.partition import Settings, fanout, partition
from shoal.embed.trace import Trace


def total(indptr: np.ndarray, pins: np.ndarray, weights: np.ndarray, slot_of: np.ndarray, per_block: int) -> float:
    """Weighted blocks of all queries, counted anew."""
    return float(
        sum(
            w * len(set((slot_of[pins[a:b]] // per_block).tolist()))
            for w, a, b in zip(weights, indptr, indptr[1:], strict=False)
        )
    )


def plainly(
    edges: Edges, named: Named, order: np.ndarray, per_block: int, proposals: int,
    temperature: float, rng: np.random.Generator,
) -> np.ndarray:  # fmt: skip
    """Each proposal counted anew: the order that it ends with."""
    (indptr, pins, weights), (starts, queries), order = edges, named, order.copy()
    for _ in range(proposals):
        slot_of = np.argsort(order)
        vector = int(rng.random() * len(order))
        if starts[vector] == starts[vector + 1]:
            continue
        query = queries[starts[vector] + int(rng.random() * (starts[vector + 1] - starts[vector]))]
        beside = pins[indptr[query] + int(rng.random() * (indptr[query + 1] - indptr[query]))]
        first = slot_of[beside] // per_block * per_block
        if first == slot_of[vector] // per_block * per_block:
            continue
        slots = [slot_of[vector], first + int(rng.random() * min(per_block, len(order) - first))]
        swapped = order.copy()
        swapped[slots] = swapped[slots[::-1]]
        now, then = (total(indptr, pins, weights, np.argsort(one), per_block) for one in (order, swapped))
        if then - now <= -temperature * np.log(1 - rng.random()):
            order = swapped
    return order


@settings(max_examples=40, deadline=None)
@given(
    data=st.data(), size=st.integers(2, 30), per_block=st.integers(1, 6), seed=st.integers(0, 99),
    temperature=st.sampled_from([1e-9, 0.3, 3.0]),
)  # fmt: skip
def test_what_is_not_looked_at_would_have_lost_too_much(
    data: st.DataObject, size: int, per_block: int, seed: int, temperature: float
) -> None:
    bags = data.draw(
        st.lists(st.lists(st.integers(0, size - 1), min_size=2, max_size=8, unique=True), min_size=2, max_size=20)
    )
    indptr = np.cumsum([0, *map(len, bags)]).astype(np.int64)
    pins, weights = np.concatenate(bags).astype(np.int32), (0.5 + np.arange(len(bags), dtype=np.float32) / 16)
    edges, named = (indptr, pins, weights), by_vector(indptr, pins, size)
    order = np.random.default_rng(seed).permutation(size)
    slot_of, before = np.argsort(order), total(indptr, pins, weights, np.argsort(order), per_block)
    expected = plainly(edges, named, order, per_block, 200, temperature, np.random.default_rng(seed))
    heat = (temperature, temperature)
    anneal(edges, named, order, slot_of, per_block, 1, 200, 200, *heat, np.random.default_rng(seed))
    np.testing.assert_array_equal(order, expected)
    np.testing.assert_array_equal(order[slot_of], np.arange(size))
    assert temperature > 0.1 or total(indptr, pins, weights, slot_of, per_block) <= before + 1e-6


def test_annealing_ends_lower_than_swaps_that_gain_the_same_each_time_and_in_any_half() -> None:
    trace = generate(tables(0.02)[0]).trace

    def mean_fanout(chosen: Settings) -> tuple[float, np.ndarray]:
        order = partition(trace, 32, chosen)
        block_of = np.empty(trace.num_rows, np.int64)
        block_of[order] = np.arange(trace.num_rows) // 32
        return fanout(trace, block_of), order

    plain, _ = mean_fanout(Settings(multilevel=True, passes=2))
    annealed, order = mean_fanout(Settings(multilevel=True, anneal=60, passes=2))
    np.testing.assert_array_equal(np.sort(order), np.arange(trace.num_rows))
    assert annealed < 0.97 * plain
    np.testing.assert_array_equal(mean_fanout(Settings(multilevel=True, anneal=60, passes=2))[1], order)


def test_queries_that_say_nothing_and_wrong_numbers() -> None:
    assert sorted(partition(Trace.of([[0], [1], [2]], 3), 2, Settings(anneal=5))) == [0, 1, 2]
    with pytest.raises(ValueError, match="anneal"):
        Settings(anneal=-1)
