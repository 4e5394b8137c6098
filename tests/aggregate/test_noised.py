"""Noise on a round's sum: as much as was said, on the grid, over a public number, the same when it is made again."""

import numpy as np
import pytest

from shoal.aggregate.accumulator import Accumulator
from shoal.aggregate.commit import WeightedMean
from shoal.aggregate.noised import Noised, noise_stddevs
from shoal.clip_norm import AdaptiveClip
from shoal.fixed import SumSpec
from shoal.policy import Privacy, ServerRule
from shoal.privacy.accounting import gaussian_zcdp
from shoal.record.memory import MemoryStore
from shoal.tensors import Entry, Index, TensorSpec

SIZE = 40_000
SPECS = tuple(
    SumSpec(tensor=TensorSpec(name=name, shape=shape, dtype="float32"), bound=bound, weighted=weighted)
    for name, shape, bound, weighted in (
        ("delta/params/w", (200, 200), 0.5, True), ("delta/params/c", (3,), 4.0, False),
    )
)  # fmt: skip
PRIVACY = Privacy(clip_norm=0.5, noise_multiplier=2.0)


def sums(value: float = 0.0, members: int = 10) -> Accumulator:
    made = Accumulator.finest(SPECS, bits=32, max_weight=1, max_members=100)
    update = {spec.tensor.name: np.full(spec.tensor.shape, value, np.float32) for spec in SPECS}
    for _ in range(members):
        made.add(update, weight=1)
    return made


def noised(secret: bytes = b"s" * 32, divisor: int = 8) -> Noised:
    return Noised(WeightedMean(ServerRule()), PRIVACY, divisor, secret)


def test_the_noise_is_as_large_as_was_said() -> None:
    before = sums(0.001)
    kept = {name: total.copy() for name, total in before.totals.items()}
    after = noised().noised(before, "base")
    stddevs = noise_stddevs(PRIVACY, SPECS, before.fixed, goal=8)
    stddev = stddevs["delta/params/w"]
    assert stddevs == {name: stddev for name in stddevs}
    rounding = (
        np.sqrt(SIZE * before.fixed["delta/params/w"].unit ** 2 + 3 * before.fixed["delta/params/c"].unit ** 2) / 2
    )
    assert stddev == pytest.approx(2.0 * (0.5 + rounding), rel=1e-12) and rounding < 1e-4
    noise = (after.totals["delta/params/w"] - before.totals["delta/params/w"]) * before.fixed["delta/params/w"].unit
    assert np.std(noise) == pytest.approx(stddev, rel=4 / np.sqrt(2 * SIZE))
    assert abs(np.mean(noise)) < 4 * stddev / np.sqrt(SIZE)
    assert all(np.array_equal(before.totals[name], kept[name]) for name in kept)


def test_every_sum_has_noise_of_that_size_whatever_its_grid() -> None:
    found = [
        (
            noised(bytes([i]) * 32).noised(sums(), "base").totals["delta/params/c"]
            * sums(members=0).fixed["delta/params/c"].unit
        )
        for i in range(200)
    ]
    assert np.std(found) == pytest.approx(1.0, rel=0.15)


def test_noise_made_again_is_the_same_and_another_sum_never_has_it() -> None:
    before = sums(0.001)
    again = noised().noised(sums(0.001), "base").totals["delta/params/w"]
    first = noised().noised(before, "base").totals["delta/params/w"]
    np.testing.assert_array_equal(first, again)
    others = [
        noised().noised(before, "another base"), noised(b"t" * 32).noised(before, "base"), noised().noised(sums(0.001, 9), "base"),
    ]  # fmt: skip
    for other, total in zip(others, [before, before, sums(0.001, 9)], strict=True):
        one, two = (
            first - before.totals["delta/params/w"],
            other.totals["delta/params/w"] - total.totals["delta/params/w"],
        )
        assert abs(np.corrcoef(one.reshape(-1), two.reshape(-1))[0, 1]) < 5 / np.sqrt(SIZE)


def test_the_mean_is_over_what_was_said_not_over_who_came() -> None:
    store = MemoryStore()
    specs = [
        TensorSpec(name=s.tensor.name.removeprefix("delta/"), shape=s.tensor.shape, dtype="float32") for s in SPECS
    ]
    model = Index(tuple(Entry(spec, store.blobs.put(bytes(spec.size_bytes))) for spec in specs))
    after, _ = noised(divisor=20).commit(sums(0.1), model, Index(()), store.blobs)
    entry = next(entry for entry in after if entry.spec.name == "params/w")
    values = store.blobs.view(entry.hash, entry.spec)
    assert np.mean(values) == pytest.approx(10 * 0.1 / 20, abs=4 * 1.0 / 20 / np.sqrt(SIZE))
    assert np.std(values) == pytest.approx(1.0 / 20, rel=0.05)


def test_what_is_not_clipped_is_refused() -> None:
    metric = SumSpec(
        tensor=TensorSpec(name="metric/loss/numerator", shape=(), dtype="float32"), bound=1.0, weighted=False
    )
    made = Accumulator.finest((*SPECS, metric), bits=32, max_weight=1, max_members=10)
    with pytest.raises(ValueError, match="nothing clips"):
        noised().noised(made, "base")


def test_a_grid_that_noise_cannot_be_drawn_on_is_refused() -> None:
    made = Accumulator.finest(SPECS, bits=64, max_weight=1, max_members=10)
    with pytest.raises(ValueError, match="units of a sum's grid"):
        noised().noised(made, "base")


def followed(clip: AdaptiveClip) -> list[SumSpec]:
    """Sums of an update and of the step of its clip norm."""
    step = TensorSpec(name="delta/clip/log_scale", shape=(), dtype="float32")
    return [SPECS[1], SumSpec(tensor=step, bound=clip.largest_step, weighted=True)]


@pytest.mark.parametrize(
    ("clip", "goal", "on_devices"),
    [
        (AdaptiveClip(initial=0.5, quantile=0.5), 200, 10.0),
        (AdaptiveClip(initial=0.5, quantile=0.8), 20, 2.0 * 2.0 * 0.8),
        (AdaptiveClip(initial=0.5, quantile=0.3, learning_rate=0.01, bit_stddev=5.0), 20, 5.0),
    ],
    ids=["a twentieth of the goal", "a quarter of the release", "as it is said"],
)
def test_update_and_bit_have_noise_of_their_own_and_are_one_release(
    clip: AdaptiveClip, goal: int, on_devices: float
) -> None:
    specs, privacy = followed(clip), Privacy(clip_norm=clip, noise_multiplier=2.0)
    fixed = Accumulator.finest(specs, bits=32, max_weight=1, max_members=100).fixed
    made = noise_stddevs(privacy, specs, fixed, goal=goal)
    assert made["delta/clip/log_scale"] == pytest.approx(clip.learning_rate * on_devices, rel=1e-6)
    of_update, of_bit = made["delta/params/c"] / 0.5, on_devices / clip.largest_bit
    assert gaussian_zcdp(of_update) + gaussian_zcdp(of_bit) == pytest.approx(gaussian_zcdp(2.0), rel=1e-5)
    assert of_update <= 2.0 / np.sqrt(0.75) * (1 + 1e-6)


def test_the_bit_s_noise_is_as_large_as_was_said() -> None:
    clip = AdaptiveClip(initial=0.5, quantile=0.5, learning_rate=0.2)
    specs, privacy = followed(clip), Privacy(clip_norm=clip, noise_multiplier=2.0)
    sums = Accumulator.finest(specs, bits=32, max_weight=1, max_members=100)
    unit, name = sums.fixed["delta/clip/log_scale"].unit, "delta/clip/log_scale"
    found = [
        Noised(WeightedMean(ServerRule()), privacy, 200, i.to_bytes(32)).noised(sums, "base").totals[name] * unit
        for i in range(300)
    ]
    assert np.std(found) == pytest.approx(0.2 * 10, rel=0.15)
