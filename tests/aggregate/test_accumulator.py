"""Sums are the same bits in any order; what is refused changes nothing."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.aggregate.accumulator import Accumulator
from shoal.errors import UpdateRefused
from shoal.fixed import SumSpec
from shoal.tensors import TensorSpec

SUMS = (
    SumSpec(tensor=TensorSpec(name="delta/params/w", shape=(2, 3), dtype="float32"), bound=4.0, weighted=True),
    SumSpec(tensor=TensorSpec(name="metric/loss/denominator", shape=(), dtype="float32"), bound=10.0, weighted=False),
    SumSpec(tensor=TensorSpec(name="metric/loss/numerator", shape=(), dtype="float32"), bound=10.0, weighted=False),
)


def empty(most: int = 8) -> Accumulator:
    return Accumulator.finest(SUMS, max_weight=100, max_members=most)


def update(seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        "delta/params/w": rng.uniform(-4, 4, (2, 3)).astype(np.float32),
        "metric/loss/denominator": np.array(2.0, np.float32),
        "metric/loss/numerator": np.array(rng.uniform(0, 10), np.float32),
    }


members = st.lists(st.tuples(st.integers(0, 1000), st.integers(1, 100)), min_size=1, max_size=8)


def total(of: list[tuple[int, int]]) -> dict[str, bytes]:
    sums = empty()
    for seed, weight in of:
        sums.add(update(seed), weight=weight)
    return {name: value.tobytes() for name, value in sums.totals.items()} | {"weight": bytes([sums.members])}


@given(of=members, data=st.data())
def test_the_order_of_updates_changes_no_bit(of: list[tuple[int, int]], data: st.DataObject) -> None:
    assert total(of) == total(data.draw(st.permutations(of)))


@given(of=members, cut=st.integers(1, 5))
def test_pieces_add_up_to_the_whole(of: list[tuple[int, int]], cut: int) -> None:
    sums = empty()
    for seed, weight in of:
        flat = {name: value.reshape(-1) for name, value in update(seed).items()}
        sums.add_checked(
            [(name, at, v[at : at + cut]) for name, v in flat.items() for at in range(0, v.size, cut)], weight=weight
        )
    whole = total(of)
    assert all(value.tobytes() == whole[name] for name, value in sums.totals.items())


@pytest.mark.parametrize(
    ("change", "weight", "reason"),
    [
        ({"delta/params/w": np.full((2, 3), np.nan, np.float32)}, 1, "not finite"),
        ({"delta/params/w": np.full((2, 3), 4.1, np.float32)}, 1, "out of bounds"),
        ({"delta/params/w": np.zeros((3, 2), np.float32)}, 1, "wrong tensors"),
        ({"delta/params/w": np.zeros((2, 3), np.float64)}, 1, "wrong tensors"),
        ({"other": np.zeros(1, np.float32)}, 1, "wrong tensors"),
        ({}, 0, "bad weight"),
        ({}, 101, "bad weight"),
    ],
)
def test_what_is_refused_changes_nothing(change: dict[str, np.ndarray], weight: int, reason: str) -> None:
    sums = empty()
    with pytest.raises(UpdateRefused) as refused:
        sums.add({**update(0), **change}, weight=weight)
    assert refused.value.reason == reason
    assert sums.members == sums.weight == 0 and not any(value.any() for value in sums.totals.values())


def test_metrics_are_ratios_of_sums() -> None:
    sums = empty()
    for seed in (1, 2):
        sums.add(update(seed), weight=50)
    expected = sum(float(update(seed)["metric/loss/numerator"]) for seed in (1, 2)) / 4
    assert sums.metrics() == {"loss": pytest.approx(expected)}
