"""Correlated noise: what is published of strategies, sensitivities against every device there could be, streams that come back."""

from collections.abc import Callable, Iterator
from math import log, sqrt
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from shoal.privacy import accounting, correlated
from shoal.privacy.correlated import Blt, BltNoise, Schedule, State, TreeNoise
from shoal.privacy.noise import discrete_gaussian, seeded

SEED = bytes(range(32))
ANCHOR = Schedule(steps=512, min_separation=64, participations=8)
BLT = Blt(scales=(0.2353, 0.2582, 0.0126), decays=(0.5247, 0.9696, 0.99999))


def anchor(sensitivity: float, errors: np.ndarray) -> tuple[float, float]:
    """Largest and root mean square noise of the prefix sums, by the noise multiplier."""
    return sensitivity * errors.max(), sensitivity * sqrt(np.mean(errors**2))


def schedules(most_steps: int) -> st.SearchStrategy[Schedule]:
    def of(steps: int, separation: int) -> st.SearchStrategy[Schedule]:
        return st.integers(1, -(-steps // separation)).map(
            lambda number: Schedule(steps=steps, min_separation=separation, participations=number)
        )

    pairs = st.integers(1, most_steps).flatmap(lambda n: st.tuples(st.just(n), st.integers(1, n)))
    return pairs.flatmap(lambda pair: of(*pair))


def devices(schedule: Schedule, start: int = 0, left: int | None = None) -> Iterator[tuple[int, ...]]:
    """Every set of steps that one device can take part in."""
    left = schedule.participations if left is None else left
    yield ()
    for step in range(start, schedule.steps if left else 0):
        for others in devices(schedule, step + schedule.min_separation, left - 1):
            yield (step, *others)


def test_published_noise_of_strategies() -> None:
    independent, root = np.eye(512)[0], correlated.square_root(512)
    found = [
        anchor(correlated.toeplitz_sensitivity(c, ANCHOR), correlated.toeplitz_errors(c)) for c in (independent, root)
    ]
    blt = correlated.fit_blt(ANCHOR, buffers=3)
    found.append(anchor(blt.sensitivity(ANCHOR), blt.errors(512)))
    assert found == [
        pytest.approx((64.0, 45.3), abs=0.05),
        pytest.approx((13.0, 12.3), abs=0.05),
        pytest.approx((12.0, 10.4), abs=0.05),
    ]


def test_the_tree_lies_between() -> None:
    """Worked out here; what it is made of is held by the tests below."""
    found = anchor(correlated.tree_sensitivity(ANCHOR), correlated.tree_errors(512))
    assert found == pytest.approx((29.8, 21.1), abs=0.05)


def test_the_square_root_sums_up_when_applied_twice() -> None:
    root = correlated.square_root(40)
    assert np.convolve(root, root)[:40] == pytest.approx(np.ones(40))


@settings(deadline=None)
@given(
    scales=st.lists(st.floats(0.001, 0.3), min_size=3, max_size=3),
    decays=st.lists(st.floats(0.01, 0.9999), min_size=3, max_size=3),
    steps=st.integers(1, 300),
)
def test_the_inverse_of_a_blt_is_its_inverse(scales: list[float], decays: list[float], steps: int) -> None:
    blt = Blt(scales=tuple(scales), decays=tuple(decays))
    product = np.convolve(blt.coefficients(steps), blt.inverse(steps))[:steps]
    assert product == pytest.approx(np.eye(steps)[0], abs=1e-9)
    assert blt.errors(steps) == pytest.approx(correlated.toeplitz_errors(blt.coefficients(steps)))


@settings(deadline=None, max_examples=40)
@given(schedule=schedules(10))
def test_sensitivities_are_those_of_the_worst_device(schedule: Schedule) -> None:
    coefficients = BLT.coefficients(schedule.steps)
    columns = [np.concatenate([np.zeros(s), coefficients[: schedule.steps - s]]) for s in range(schedule.steps)]
    worst = max(
        float(np.linalg.norm(sum((columns[s] for s in device), np.zeros(schedule.steps))))
        for device in devices(schedule)
    )
    assert BLT.sensitivity(schedule) == pytest.approx(worst)
    nodes = [
        range(start, start + (1 << height))
        for height in range(schedule.steps.bit_length())
        for start in range(0, schedule.steps - (1 << height) + 1, 1 << height)
    ]
    of_tree = max(sqrt(sum(len(set(node) & set(device)) ** 2 for node in nodes)) for device in devices(schedule))
    assert of_tree <= correlated.tree_sensitivity(schedule) + 1e-12


@pytest.mark.parametrize(("steps", "separation"), [(1, 1), (16, 1), (16, 4), (16, 16), (8, 2)])
def test_the_bound_of_the_tree_is_reached_at_powers_of_two(steps: int, separation: int) -> None:
    schedule = Schedule(steps=steps, min_separation=separation, participations=steps // separation)
    square = sum(
        sum(len(range(start, start + width, separation) if separation < width else [1] * (start % separation == 0)) ** 2
            for start in range(0, steps, width))
        for width in (1 << height for height in range(steps.bit_length()))
    )  # fmt: skip
    assert correlated.tree_sensitivity(schedule) == pytest.approx(sqrt(square))


@settings(deadline=None, max_examples=8)
@example(
    schedule=Schedule(steps=4, min_separation=1, participations=3), buffers=3
)  # its decays go to the ends of float64
@given(schedule=schedules(60), buffers=st.integers(1, 3))
def test_a_fit_is_no_worse_than_independent_noise(schedule: Schedule, buffers: int) -> None:
    blt = correlated.fit_blt(schedule, buffers=buffers)
    found = blt.sensitivity(schedule) * blt.errors(schedule.steps)[-1]
    assert log(found) <= log(schedule.steps * schedule.participations) / 2 + 1e-6


STREAMS: list[tuple[str, Callable[..., BltNoise | TreeNoise], np.ndarray]] = [
    ("blt", lambda **settings: BltNoise(blt=BLT, **settings), BLT.errors(100)),
    ("tree", lambda **settings: TreeNoise(steps=100, **settings), correlated.tree_errors(100)),
]


def played(stream: BltNoise | TreeNoise, steps: int) -> tuple[np.ndarray, list[State]]:
    states, noise = [stream.begin()], []
    for _ in range(steps):
        drawn, state = stream.step(states[-1])
        noise.append(drawn)
        states.append(state)
    return np.array(noise), states


@pytest.mark.parametrize(("name", "make", "errors"), STREAMS)
def test_prefix_sums_have_the_noise_that_is_said(
    name: str, make: Callable[..., BltNoise | TreeNoise], errors: np.ndarray
) -> None:
    noise, _ = played(make(stddev=500.0, elements=2000, seed=SEED), 100)
    assert noise.dtype == np.int64
    found = np.cumsum(noise, axis=0).std(axis=1) / 500
    assert np.max(np.abs(found / errors - 1)) < 0.08  # five standard errors


@pytest.mark.parametrize(("name", "make", "errors"), STREAMS)
def test_after_a_crash_the_same_noise_is_drawn_again(
    name: str, make: Callable[..., BltNoise | TreeNoise], errors: np.ndarray
) -> None:
    noise, states = played(make(stddev=500.0, elements=20, seed=SEED), 40)
    for step in (0, 1, 7, 8, 39):
        stream = make(stddev=500.0, elements=20, seed=SEED)  # another process
        state = stream.at(step)
        assert state.step == step
        assert all(np.array_equal(a, b) for a, b in zip(state.arrays, states[step].arrays, strict=True))
        assert np.array_equal(stream.step(state)[0], noise[step])
    for stddev, seed in ((500.0, SEED[::-1]), (1000.0, SEED)):
        other, _ = played(make(stddev=stddev, elements=20, seed=seed), 40)
        assert abs(np.corrcoef(other.ravel(), noise.ravel())[0, 1]) < 0.2, "another stream"


@pytest.mark.parametrize(("name", "make", "errors"), STREAMS)
def test_a_seed_is_not_shown(name: str, make: Callable[..., BltNoise | TreeNoise], errors: np.ndarray) -> None:
    assert "seed" not in repr(make(stddev=500.0, elements=20, seed=SEED))


def test_a_tree_releases_what_follows_from_its_nodes() -> None:
    """Guarantee: x + noise is the estimate that a release of every node, its sum with its own noise, would give."""
    stream, rng = TreeNoise(stddev=3.0, elements=50, steps=64, seed=SEED), np.random.default_rng(0)
    x = rng.integers(-1000, 1000, (64, 50))
    released = np.cumsum(x + played(stream, 64)[0], axis=0)

    def estimate(height: int, end: int) -> np.ndarray:
        """From noisy nodes alone."""
        own = discrete_gaussian(3.0, 50, source=seeded(SEED, f"tree/{height}/{end}/{(3.0).hex()}/50/".encode()))
        node = x[end - (1 << height) : end].sum(axis=0) + own
        if height == 0:
            return np.asarray(node)
        halves = estimate(height - 1, end - (1 << height - 1)) + estimate(height - 1, end)
        whole = 2 ** (height + 1) - 1
        return np.asarray((2**height * node + (2**height - 1) * halves + whole // 2) // whole)

    for step in range(1, 65):
        total, end = np.zeros(50, np.int64), 0
        for height in reversed(range(7)):
            if step >> height & 1:
                end += 1 << height
                total += estimate(height, end)
        assert np.array_equal(released[step - 1], total)


@pytest.mark.parametrize("l2", [3.0, 1000.0])
def test_what_a_device_changes_in_z_is_covered_with_its_rounding(l2: float) -> None:
    """Guarantee: with and without a device the same release comes from z that differ by at most stddev / noise multiplier."""
    steps, elements = 60, 30
    schedule = Schedule(steps=steps, min_separation=20, participations=3)
    stddev = BLT.stddev(2.0, schedule, l2=l2, elements=elements)
    noise, _ = played(BltNoise(blt=BLT, stddev=stddev, elements=elements, seed=SEED), steps)
    device = np.zeros((steps, elements))
    device[::20] = int(l2 / sqrt(elements)) if l2 > sqrt(elements) else np.eye(elements)[0] * l2

    def z_of(noise: np.ndarray) -> np.ndarray:
        buffers, z = [np.zeros(elements) for _ in BLT.decays], []
        for row in noise:
            z.append(row + np.rint(sum(scale * buffer for scale, buffer in zip(BLT.scales, buffers, strict=True))))
            buffers = [decay * buffer + row for decay, buffer in zip(BLT.decays, buffers, strict=True)]
        return np.array(z)

    changed = np.linalg.norm(z_of(noise) - z_of(noise - device))
    assert changed <= stddev / 2.0
    assert changed >= 0.8 * BLT.sensitivity(schedule) * np.linalg.norm(device[0]), "the device is there"


def test_rounding_costs_nothing_on_a_fine_grid() -> None:
    fine = BLT.stddev(1.0, ANCHOR, l2=2.0**30, elements=10**6)
    assert fine == pytest.approx(BLT.sensitivity(ANCHOR) * 2.0**30, rel=1e-4)
    assert fine > BLT.sensitivity(ANCHOR) * 2.0**30


def test_from_a_target_to_noise_as_the_readme_says() -> None:
    readme = (Path(correlated.__file__).parent / "README.md").read_text(encoding="utf-8")
    names: dict[str, Any] = {"secret": SEED}
    exec(readme.split("```python\n")[1].split("```")[0], names)
    rho = accounting.gaussian_zcdp(names["noise_multiplier"])
    assert 7.99 < accounting.epsilon_of_zcdp(rho, 1e-10) <= 8.0
    sensitivity = names["blt"].sensitivity(names["schedule"]) * 2.0**24
    assert names["noise"].std() == pytest.approx(names["noise_multiplier"] * sensitivity, rel=0.01)


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        (lambda: Schedule(steps=10, min_separation=5, participations=3), "at most 2 participations"),
        (lambda: Schedule(steps=0, min_separation=1, participations=1), "steps"),
        (lambda: Blt(scales=(0.6, 0.5), decays=(0.5, 0.9)), "sum <= 1"),
        (lambda: Blt(scales=(0.5,), decays=(1.0,)), r"decays in \(0, 1\)"),
        (lambda: Blt(scales=(0.5,), decays=(0.5, 0.9)), "got 1 and 2"),
        (lambda: correlated.toeplitz_sensitivity(np.ones(3), ANCHOR), "Expected 512 coefficients"),
        (lambda: correlated.toeplitz_sensitivity(np.arange(512.0), ANCHOR), "do not increase"),
        (lambda: BltNoise(blt=BLT, stddev=1.0, elements=1, seed=b""), "32 bytes"),
        (lambda: TreeNoise(stddev=2.0**40, elements=1, steps=2**20, seed=SEED), "coarser grid"),
        (
            lambda: TreeNoise(stddev=2.0, elements=1, steps=2, seed=SEED).step(State(step=2, arrays=())),
            "at most 2 steps",
        ),
        (lambda: correlated.fit_blt(ANCHOR, buffers=7), "buffers"),
    ],
)
def test_what_is_wrong_is_refused(wrong: Callable[[], object], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        wrong()
