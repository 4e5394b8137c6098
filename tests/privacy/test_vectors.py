"""A secure group's sum, to the bit that of a clear group."""

import random as stdlib_random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.aggregate.accumulator import Accumulator
from shoal.errors import UpdateRefused
from shoal.fixed import SumSpec
from shoal.privacy.neighbours import Assumptions
from shoal.privacy.played import play
from shoal.privacy.secure_terms import Terms
from shoal.privacy.vectors import VectorLayout
from shoal.tensors import TensorSpec

SUMS = (
    SumSpec(tensor=TensorSpec(name="delta/params/w", shape=(3, 4), dtype="float32"), bound=2.0, weighted=True),
    SumSpec(tensor=TensorSpec(name="delta/params/b", shape=(), dtype="float32"), bound=0.5, weighted=True),
    SumSpec(tensor=TensorSpec(name="metric/loss/numerator", shape=(), dtype="float32"), bound=100.0, weighted=False),
)
MAX_WEIGHT, MAX_MEMBERS = 7, 20


def layout(bits: int = 32) -> VectorLayout:
    fixed = {spec.tensor.name: spec.fixed(bits=bits, max_weight=MAX_WEIGHT, max_members=MAX_MEMBERS) for spec in SUMS}
    return VectorLayout(SUMS, fixed, max_weight=MAX_WEIGHT, max_members=MAX_MEMBERS)


def update(rng: np.random.Generator) -> dict[str, np.ndarray]:
    return {
        spec.tensor.name: np.asarray(rng.uniform(-spec.bound, spec.bound, spec.tensor.shape), np.float32)
        for spec in SUMS
    }


def clear(bits: int, updates: list[tuple[dict[str, np.ndarray], int]]) -> Accumulator:
    made = Accumulator.finest(SUMS, bits=bits, max_weight=MAX_WEIGHT, max_members=MAX_MEMBERS)
    for values, weight in updates:
        made.add(values, weight=weight)
    return made


def assert_same(vector: np.ndarray, bits: int, expected: Accumulator) -> None:
    pieces, weight = layout(bits).totals(vector)
    made = Accumulator.finest(SUMS, bits=bits, max_weight=MAX_WEIGHT, max_members=MAX_MEMBERS)
    made.merge(pieces, weight=weight, members=expected.members)
    assert made.weight == expected.weight
    for name, total in expected.totals.items():
        np.testing.assert_array_equal(made.totals[name], total)


@settings(max_examples=50, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    members=st.integers(1, MAX_MEMBERS),
    bits=st.sampled_from([16, 32]),
    extreme=st.booleans(),
)
def test_the_sum_of_vectors_is_the_sum_of_updates(seed: int, members: int, bits: int, extreme: bool) -> None:
    rng = np.random.default_rng(seed)
    updates = [(update(rng), int(rng.integers(1, MAX_WEIGHT + 1))) for _ in range(members)]
    if extreme:  # all at a bound, all as heavy as may be: the largest sum of all
        sign = rng.choice([-1.0, 1.0])
        full = {spec.tensor.name: np.full(spec.tensor.shape, sign * spec.bound, np.float32) for spec in SUMS}
        updates = [(full, MAX_WEIGHT)] * members
    made = layout(bits)
    total = np.zeros(sum(segment.size for segment in made.segments), np.uint32)
    for values, weight in updates:
        vector = made.vector(values, weight=weight)
        assert all(np.all(part >> np.uint32(segment.bits - 1) <= 1) for part, segment in zip(
            np.split(vector, np.cumsum([s.size for s in made.segments])[:-1]), made.segments, strict=True))  # fmt: skip
        total += vector
    terms = Terms(purpose=bytes(32), segments=made.segments)
    assert_same(terms.reduced(total), bits, clear(bits, updates))


def test_through_a_secure_group_that_loses_members() -> None:
    rng = np.random.default_rng(3)
    updates = [(update(rng), int(rng.integers(1, MAX_WEIGHT + 1))) for _ in range(14)]
    made = layout()
    terms = Terms(
        purpose=bytes(32), segments=made.segments, minimum=3, assumptions=Assumptions(colluders=0.1, dropouts=0.25)
    )
    played = play(
        terms, lambda place: made.vector(updates[place][0], weight=updates[place][1]), 14,
        random=stdlib_random.Random(1).randbytes, lost={2: "shares", 5: "masked", 9: "unmask"},
    )  # fmt: skip
    assert_same(played.total, 32, clear(32, [updates[place] for place in played.survivors]))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"delta/params/b": np.float32(np.nan)}, "not finite"),
        ({"delta/params/b": np.float32(0.6)}, "out of bounds"),
        ({"delta/params/b": np.zeros(2, np.float32)}, "wrong tensors"),
    ],
)
def test_what_a_clear_group_refuses_is_never_masked(change: dict[str, np.ndarray], reason: str) -> None:
    with pytest.raises(UpdateRefused) as refused:
        layout().vector(update(np.random.default_rng(1)) | change, weight=1)
    assert refused.value.reason == reason


def test_sums_of_more_than_32_bits_are_refused_with_what_to_do() -> None:
    with pytest.raises(ValueError, match="at most 32 bits in a secure group"):
        layout(64)
