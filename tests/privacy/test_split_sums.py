"""Shares of a vector: together its sum to the last digit, apart nothing; and seals that are good for one purpose."""

import os

import numpy as np
import pytest

from shoal.privacy.masks import public_key
from shoal.privacy.split_sums import SEALED_BYTES, context, joined, mask_sum, split, unseal

PRIVATE = bytes(range(32))
HELPER = public_key(PRIVATE)
CONTEXT = context(b"formform", 20_000)


def test_the_two_sums_together_are_the_members_sum() -> None:
    rng = np.random.default_rng(0)
    vectors = rng.integers(0, 9, (50, 39)).astype(np.uint32)
    shares, sealed = zip(
        *(split(vector, HELPER, context=CONTEXT, random=os.urandom) for vector in vectors), strict=True
    )
    seeds = [unseal(each, PRIVATE, HELPER, context=CONTEXT) for each in sealed]
    masks = mask_sum([seed for seed in seeds if seed is not None], 39)
    np.testing.assert_array_equal(joined(np.sum(shares, axis=0, dtype=np.uint32), masks), vectors.sum(0))


def test_sums_below_zero_come_back_as_such() -> None:
    noise = np.array([-5, 3], np.int64).astype(np.uint32)
    np.testing.assert_array_equal(joined(np.array([2, 2], np.uint32), noise), [-3, 5])


def test_guarantee_a_share_alone_is_uniform_whatever_the_vector() -> None:
    """Bits of shares of a vector of nothing, and of one that is full: each is 1 half of the time, and the same seed hides either."""
    for vector in (np.zeros(39, np.uint32), np.full(39, 8, np.uint32)):
        shares = np.stack([split(vector, HELPER, context=CONTEXT, random=os.urandom)[0] for _ in range(400)])
        bits = np.unpackbits(shares.view(np.uint8), axis=1).mean(0)
        assert np.abs(bits - 0.5).max() < 6 * 0.5 / 400**0.5


def test_the_vector_is_not_changed_and_every_report_has_a_seed_of_its_own() -> None:
    vector = np.ones(39, np.uint32)
    one, other = (split(vector, HELPER, context=CONTEXT, random=os.urandom) for _ in range(2))
    assert (vector == 1).all() and (one[0] != other[0]).any() and one[1] != other[1]
    assert len(one[1]) == len(other[1]) == SEALED_BYTES


def test_a_seal_opens_for_its_helper_day_and_form_only() -> None:
    _, sealed = split(np.zeros(3, np.uint32), HELPER, context=CONTEXT, random=os.urandom)
    assert unseal(sealed, PRIVATE, HELPER, context=CONTEXT) is not None
    assert unseal(sealed, bytes(31) + b"\1", HELPER, context=CONTEXT) is None
    for other in (context(b"formform", 20_001), context(b"othrform", 20_000)):
        assert unseal(sealed, PRIVATE, HELPER, context=other) is None


def test_no_changed_seal_opens() -> None:
    """Not even one with another name for the same point: it would be the same seed under another hash."""
    _, sealed = split(np.zeros(3, np.uint32), HELPER, context=CONTEXT, random=os.urandom)
    for bit in range(0, 8 * SEALED_BYTES, 7):
        changed = bytearray(sealed)
        changed[bit // 8] ^= 1 << bit % 8
        assert unseal(bytes(changed), PRIVATE, HELPER, context=CONTEXT) is None
    high = bytearray(sealed)
    high[31] ^= 0x80  # X25519 does not look at this bit
    assert unseal(bytes(high), PRIVATE, HELPER, context=CONTEXT) is None
    assert unseal(bytes(SEALED_BYTES), PRIVATE, HELPER, context=CONTEXT) is None  # a point of low order
    assert unseal(sealed[:-1], PRIVATE, HELPER, context=CONTEXT) is None


def test_a_helper_key_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError):
        split(np.zeros(3, np.uint32), bytes(32), context=CONTEXT, random=os.urandom)
