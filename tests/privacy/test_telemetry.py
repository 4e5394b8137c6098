"""What is told of a day: within its bounds, of one size, at a slot of its own; and what its noise is worth, by the law itself."""

from itertools import pairwise
from math import log

import numpy as np
import pytest

from shoal.privacy.accounting import epsilon_of_zcdp
from shoal.privacy.telemetry import (
    BOUNDS,
    COUNTS,
    DAY_S,
    DISTANCE,
    ENTRIES,
    HISTOGRAMS,
    NOISE,
    UNITS,
    Day,
    rho,
    slot_s,
    totals,
)


def named(day: Day) -> dict[str, int]:
    return {entry.name: int(value) for entry, value in zip(ENTRIES, day.vector(), strict=True) if value}


def test_a_day_of_nothing_is_told_as_zeros() -> None:
    vector = Day().vector()
    assert vector.dtype == np.uint32 and vector.shape == (len(ENTRIES),) and not vector.any()


def test_a_day_is_told_by_hours_counts_and_bins() -> None:
    day = Day(hours=frozenset({0, 23}), amounts={"sessions": 3, "trained": 2.0, "train_s": 20.5, "up_bytes": 2**20})
    assert named(day) == {
        "hour/00": 1,
        "hour/23": 1,
        "sessions": 3,
        "trained": 2,
        "train_s/16": 1,
        "up_bytes/1.04858e+06": 1,
    }


@pytest.mark.parametrize(("seconds", "told"), [(0.0, None), (0.99, None), (1.0, 0), (3.9, 0), (4.0, 1), (1e9, 5)])
def test_what_is_below_the_first_bin_is_in_none_and_the_last_has_no_end(seconds: float, told: int | None) -> None:
    bins = [
        value
        for entry, value in zip(ENTRIES, Day(amounts={"train_s": seconds}).vector(), strict=True)
        if entry.name.startswith("train_s/")
    ]
    assert [int(value) for value in bins] == [int(number == told) for number in range(6)]


def test_whatever_happened_is_within_the_bounds() -> None:
    most = Day(hours=frozenset(range(24)), amounts=dict.fromkeys([*COUNTS, *HISTOGRAMS], 1e12))
    assert (most.vector() <= BOUNDS).all() and (Day(amounts=dict.fromkeys(COUNTS, -5.0)).vector() == 0).all()


def test_guarantee_any_two_days_are_within_the_distance() -> None:
    """The two that are furthest apart, exactly; others at random are nearer."""
    most = Day(
        hours=frozenset(range(24)), amounts={**dict.fromkeys(COUNTS, 99), "train_s": 1e9, "up_bytes": 1e12}
    ).vector()
    none = Day(amounts={"train_s": 1.0, "up_bytes": 1.0}).vector()
    assert np.linalg.norm((most.astype(float) - none) / UNITS) == pytest.approx(DISTANCE)
    rng = np.random.default_rng(0)
    for _ in range(200):
        one, other = (
            Day(hours=frozenset(np.flatnonzero(rng.random(24) < 0.5).tolist()), amounts={name: float(rng.integers(0, 40)) for name in [*COUNTS, *HISTOGRAMS]})
            for _ in range(2)
        )  # fmt: skip
        assert np.linalg.norm((one.vector().astype(float) - other.vector()) / UNITS) <= DISTANCE


@pytest.mark.parametrize(("bound", "unit"), sorted(set(zip(BOUNDS.tolist(), UNITS.tolist(), strict=True))))
def test_guarantee_the_noise_is_worth_what_is_said__by_enumerating_the_law(bound: int, unit: int) -> None:
    """Rényi divergence between outputs with and without a device whose entry is at its bound, summed over all that is likely.

    That of all entries is their sum, and `rho` its bound: `DISTANCE` is what it adds up.
    """
    stddev = NOISE * unit
    x = np.arange(-int(16 * stddev), int(16 * stddev) + 1)
    log_law = -(x**2) / (2 * stddev**2)
    log_law -= log(np.exp(log_law).sum())
    for order in (1.5, 2.0, 8.0, 64.0):
        with_it, without = (
            log_law[:-bound],
            log_law[bound:],
        )  # at x the one has probability P(x), the other P(x + bound)
        divergence = log(np.exp(order * with_it + (1 - order) * without).sum()) / (order - 1)
        assert divergence <= order * (bound / unit) ** 2 / (2 * NOISE**2) * (1 + 1e-6)


def test_a_day_costs_epsilon_one_point_one_and_days_add_up() -> None:
    assert epsilon_of_zcdp(rho(NOISE), 1e-6) == pytest.approx(1.1, abs=0.05)
    assert rho(NOISE, reports=30) == pytest.approx(30 * rho(NOISE))
    assert rho(NOISE) == pytest.approx(DISTANCE**2 / (2 * NOISE**2))
    with pytest.raises(ValueError, match="noise"):
        rho(0.0)


def test_slots_are_even_over_the_day_and_follow_from_secret_and_day_alone() -> None:
    slots = np.array([slot_s(number.to_bytes(32, "little"), 20_000) for number in range(4000)])
    assert slots.min() >= 0 and slots.max() < DAY_S
    counts = np.histogram(slots, bins=24, range=(0, DAY_S))[0]
    assert ((counts - 4000 / 24) ** 2 / (4000 / 24)).sum() < 60  # chi squared with 23 degrees: 1 in 30,000
    days = np.array([slot_s(bytes(32), day) for day in range(4000)])
    assert abs(np.corrcoef(days[:-1], days[1:])[0, 1]) < 0.07
    assert slot_s(bytes(32), 7) == slot_s(bytes(32), 7)


def test_totals_have_the_error_of_their_noise() -> None:
    found = totals(np.arange(len(ENTRIES)), variance=2 * NOISE**2)
    assert [total.value for total in found] == list(range(len(ENTRIES)))
    assert all(
        total.error == pytest.approx(2**0.5 * NOISE * entry.unit) for total, entry in zip(found, ENTRIES, strict=True)
    )


def test_bins_rise() -> None:
    for ends in HISTOGRAMS.values():
        assert all(low < high for low, high in pairwise(ends))
