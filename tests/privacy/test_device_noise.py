"""Noise that devices add: enough whoever is missing, room for it in the sum, and what it is worth."""

from dataclasses import replace

import numpy as np
import pytest

from shoal.fixed import SumSpec, fixed_points
from shoal.policy import Privacy, RoundPolicy, Secure
from shoal.privacy import accounting
from shoal.privacy.device_noise import REACH, device_noise, graphs, noise_room
from shoal.privacy.noise import seeded
from shoal.privacy.spending import Release, epsilon, release_of
from shoal.privacy.vectors import VectorLayout
from shoal.tensors import TensorSpec

SPECS = tuple(
    SumSpec(tensor=TensorSpec(name=f"delta/params/{name}", shape=shape, dtype="float32"), bound=0.5, weighted=True)
    for name, shape in (("b", (7,)), ("w", (30, 20)))
)
SECURE = Secure(members=40, colluders=0.1, dropouts=0.3)
PRIVACY = Privacy(clip_norm=0.5, noise_multiplier=2.0, distributed=True, secure=SECURE)
NOISE = device_noise(PRIVACY, units={2.0**-16}, elements=4_000)
assert NOISE is not None


def test_those_who_are_sure_to_be_there_have_all_the_noise() -> None:
    found = graphs(SECURE, 8)
    assert len(found) > 20 and found[-1].members == 40
    for graph in found:
        honest = graph.least_survivors - graph.colluders
        assert honest >= 8 and honest * NOISE.share(graph) >= NOISE.variance
        assert (honest - 1) * NOISE.share(graph) < NOISE.variance, "and no more than that"
    assert np.sqrt(NOISE.variance) == pytest.approx(2.0 * NOISE.l2)
    assert NOISE.l2 >= 0.5 * 2**16


def test_a_sum_of_them_has_the_variance_that_it_is_said_to_have() -> None:
    graph = graphs(SECURE, 8)[0]
    source = seeded(b"s" * 32, b"test")
    drawn = sum(NOISE.draw(graph, source) for _ in range(12))
    assert np.std(drawn) * NOISE.unit == pytest.approx(NOISE.stddev(graph, 12), rel=5 / np.sqrt(2 * 4_000))


def test_the_sum_has_room_for_it_in_every_group() -> None:
    room = noise_room(PRIVACY, 8)
    for graph in graphs(SECURE, 8):
        largest = REACH * 2.0 * 2 * 0.5 * np.sqrt(graph.members * NOISE.share(graph) / NOISE.variance)
        assert room * SECURE.members >= largest * (1 - 1e-12), graph
    assert noise_room(replace(PRIVACY, distributed=False), 8) == 0.0


def test_noise_on_a_vector_is_on_its_sums_and_not_on_its_weight() -> None:
    fixed = fixed_points(SPECS, bits=32, max_weight=1, max_members=40)
    layout = VectorLayout(SPECS, fixed, max_weight=1, max_members=40)
    zeros = {spec.tensor.name: np.zeros(spec.tensor.shape, spec.tensor.numpy_dtype) for spec in SPECS}
    size = sum(value.size for value in zeros.values())
    noise = np.arange(size) - size // 2
    noisy = layout.with_noise(layout.vector(zeros, weight=1), noise)
    pieces, weight = layout.totals(noisy)
    np.testing.assert_array_equal(np.concatenate([totals for _, _, totals in pieces]), noise)
    assert weight == 1


def test_what_it_is_worth_is_nearly_the_gaussian_s_and_never_less_spent() -> None:
    release = release_of(PRIVACY, RoundPolicy(), run="r", devices=NOISE)
    assert (release.l2, release.elements, release.run) == (NOISE.l2, 4_000, "")
    gaussian = Release(noise_multiplier=2.0)
    for times in (1, 10):
        spent, least = epsilon({release: times}, 1e-6), epsilon({gaussian: times}, 1e-6)
        assert least <= spent < 1.01 * least
    coarse = replace(release, l2=4.0)
    assert epsilon({coarse: 1}, 1e-6) > 1.01 * epsilon({gaussian: 1}, 1e-6)
    rdp = accounting.skellam_rdp(NOISE.variance, l2=NOISE.l2, l1=NOISE.l2 * np.sqrt(4_000))
    assert epsilon({release: 1}, 1e-6) == pytest.approx(accounting.epsilon_of_rdp(rdp, 1e-6))


def test_grids_that_are_not_for_it_are_refused() -> None:
    with pytest.raises(ValueError, match="one bound for all tensors"):
        device_noise(PRIVACY, units={1.0, 0.5}, elements=3)
    with pytest.raises(ValueError, match=r"Raise Secure\(bits=…\)"):
        device_noise(PRIVACY, units={0.25}, elements=1000)
    assert device_noise(replace(PRIVACY, distributed=False), units={1.0, 0.5}, elements=3) is None
