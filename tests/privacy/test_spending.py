"""What releases come to, and that no more is spent than there is."""

from collections import Counter
from dataclasses import replace

import pytest

from shoal.errors import BudgetSpent
from shoal.policy import Correlated, Privacy, RoundPolicy
from shoal.privacy import accounting
from shoal.privacy.spending import Release, counted, epsilon, refuse_overspending, release_of, spend_of
from shoal.record.store import LedgerRow

PRIVACY = Privacy(clip_norm=1.0, noise_multiplier=2.0, epsilon=8.0, delta=1e-6)
RELEASE = Release(noise_multiplier=2.0)


def row(number: int, release: Release = RELEASE, **changes: object) -> LedgerRow:
    values: dict[str, object] = {
        "number": number, "population": "p", "budget": "privacy", "entry": "reservation", "amount": 1.0, "run_id": "r",
        "round": number, "time_s": 0.0, "data": release.data, **changes,
    }  # fmt: skip
    return LedgerRow(**values)  # type: ignore[arg-type]


def settled(number: int, reservation: int) -> LedgerRow:
    return row(number, entry="settlement", reservation=reservation)


def test_releases_add_up_as_one_with_less_noise() -> None:
    four = epsilon({RELEASE: 4}, 1e-6)
    assert four == pytest.approx(accounting.epsilon_of_rdp(accounting.gaussian_rdp(1.0), 1e-6))
    assert epsilon({RELEASE: 2, Release(noise_multiplier=2.0**0.5): 1}, 1e-6) == pytest.approx(four)
    assert epsilon({}, 1e-6) == 0.0


def test_sampling_amplifies() -> None:
    sampled = Release(noise_multiplier=2.0, sampling=0.01)
    assert epsilon({sampled: 100}, 1e-6) < epsilon({RELEASE: 1}, 1e-6)
    assert Release.of(row(1, sampled)) == sampled


def test_devices_that_rest_are_in_fewer_releases() -> None:
    release = release_of(PRIVACY, RoundPolicy(min_separation=4), run="r")
    assert Release.of(row(1, release)) == release
    assert epsilon({release: 9}, 1e-6) == epsilon({RELEASE: 3}, 1e-6)
    other = replace(release, run="another")
    assert epsilon({release: 1, other: 1}, 1e-6) == epsilon({RELEASE: 2}, 1e-6), "a device may be in both"
    rows = [row(1, release), row(2, release, run_id="another"), settled(3, 1), settled(4, 2)]
    assert counted(rows) == Counter([release, other])


def test_rounds_without_a_version_count_beside_those_that_made_devices_rest() -> None:
    release = release_of(PRIVACY, RoundPolicy(min_separation=64), run="r")
    rows = [row(number, release) for number in range(1, 11)] + [settled(10 + number, number) for number in range(1, 6)]
    assert counted(rows) == Counter({release: 5, RELEASE: 5})
    assert epsilon(counted(rows), 1e-6) == epsilon({RELEASE: 6}, 1e-6)
    stream = release_of(replace(PRIVACY, correlated=Correlated(rounds=100)), RoundPolicy(min_separation=64), run="r")
    assert epsilon(counted([row(1, stream), row(2, stream), settled(3, 1)]), 1e-6) == epsilon({RELEASE: 1}, 1e-6)


def test_rounds_with_correlated_noise_are_one_release() -> None:
    privacy = replace(PRIVACY, correlated=Correlated(rounds=100))
    release = release_of(privacy, RoundPolicy(min_separation=4), run="r")
    assert Release.of(row(1, release)) == release
    assert epsilon({release: 1}, 1e-6) == epsilon({release: 100}, 1e-6) == epsilon({RELEASE: 1}, 1e-6)
    refuse_overspending(privacy, counted([row(i, release) for i in range(60)]), release, rounds=40)
    assert epsilon({release: 1, replace(release, run="another"): 1}, 1e-6) == epsilon({RELEASE: 2}, 1e-6)


def test_what_was_given_back_is_not_counted() -> None:
    rows = [
        row(1),
        row(2),
        row(3, entry="release", reservation=2, round=2),
        row(4, entry="settlement", reservation=1, round=1),
    ]
    assert counted(rows) == Counter({RELEASE: 1})


def test_a_calibrated_run_keeps_to_its_budget_to_the_last_round() -> None:
    noise = accounting.calibrate(8.0, 1e-6, releases=50)
    release = Release(noise_multiplier=noise)
    refuse_overspending(PRIVACY, Counter(), release, rounds=50)
    with pytest.raises(BudgetSpent, match="It allows 50 more"):
        refuse_overspending(PRIVACY, Counter(), release, rounds=51)
    allows = spend_of(PRIVACY, release).allows
    allows([row(i, release) for i in range(49)])
    with pytest.raises(BudgetSpent, match=r"from 8; its budget is 8\. It allows 0 more"):
        allows([row(i, release) for i in range(50)])


def test_without_a_limit_all_is_allowed() -> None:
    refuse_overspending(Privacy(clip_norm=1.0, noise_multiplier=0.1), Counter(), RELEASE, rounds=10_000)
