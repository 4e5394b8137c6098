"""Published vectors of every primitive that secure groups are made of, and properties of what is our own."""

import random as stdlib_random

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from hypothesis import given
from hypothesis import strategies as st

from shoal.privacy import masks, packing, shamir
from shoal.privacy.identity import is_signed

ZERO = bytes(32)


def test_x25519_is_that_of_rfc_7748() -> None:  # section 6.1
    private = bytes.fromhex("5dab087e624a8a4b79e17f8b83800ee66f3bb1292618b6fd1c2f8b27ff88e0eb")
    assert masks.public_key(private).hex() == "de9edb7d7b7dc1b4d35b61c2ece435373f8343c85b78674dadfc7e146f882b4f"
    other = bytes.fromhex("8520f0098930a754748b7ddcb43ef75a0dbf3a0d26381af4eba4a98eaa9b4e6a")
    shared = X25519PrivateKey.from_private_bytes(private).exchange(X25519PublicKey.from_public_bytes(other))
    assert shared.hex() == "4a5d9d5ba4ce2de1728e3bf480350f25e07e21c947d19e3376f09b3c1e161742"
    assert masks.agree(private, other, b"what for") == masks.derive(shared, b"what for")


def test_a_key_of_low_order_is_no_key() -> None:
    with pytest.raises(ValueError, match=r"."):
        masks.agree(bytes(range(32)), ZERO, b"")


def test_hkdf_is_that_of_rfc_5869() -> None:  # appendix A.3, its first 32 bytes
    made = masks.derive(b"\x0b" * 22, b"")
    assert made.hex() == "8da4e775a563c18f715f802a063c5a31b8a11f5c5ee1879ec3454e5f3c738d2d"


def test_sealing_is_aes_256_gcm() -> None:  # McGrew and Viega, test cases 13 and 14
    assert masks.seal(ZERO, b"", b"").hex() == "530f8afbc74536b9a963b4f1c4cb738b"
    assert masks.seal(ZERO, bytes(16), b"").hex() == "cea7403d4d606b6e074ec5d3baf39d18d0d1c8a799996bf0265b98b5d48ab919"


def test_what_is_sealed_opens_in_its_context_only() -> None:
    sealed = masks.seal(ZERO, b"message", b"here")
    assert masks.unseal(ZERO, sealed, b"here") == b"message"
    assert masks.unseal(ZERO, sealed, b"there") is None
    assert masks.unseal(ZERO, sealed[:-1] + bytes([sealed[-1] ^ 1]), b"here") is None


def test_masks_are_the_key_stream_of_aes_256_ctr() -> None:  # blocks 0 and 1 of the key of zeros, FIPS 197
    total = np.zeros(8, np.uint32)
    masks.add_masks(total, [(ZERO, 1)])
    assert total.tobytes().hex() == "dc95c078a2408989ad48a21492842087530f8afbc74536b9a963b4f1c4cb738b"


def test_signatures_are_those_of_rfc_8032() -> None:  # section 7.1, test 1
    secret = bytes.fromhex("9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60")
    key = Ed25519PrivateKey.from_private_bytes(secret)
    signature = key.sign(b"")
    assert signature.hex() == (
        "e5564300c360ac729086e2cc806e828a84877f1eb8e5d974d873e065224901555fb8821590a33bacc61e39701cf9b46bd25bf5f0595bbe24655141438e7a100b"
    )
    assert is_signed(key.public_key(), signature, b"")
    assert not is_signed(key.public_key(), signature, b"other")


@given(size=st.integers(0, 3 * masks.CHUNK // 2), keys=st.lists(st.binary(min_size=32, max_size=32), max_size=3))
def test_a_mask_added_and_taken_off_leaves_nothing(size: int, keys: list[bytes]) -> None:
    total = np.arange(size, dtype=np.uint32)
    masks.add_masks(total, [(key, 1) for key in keys])
    masks.add_masks(total, [(key, -1) for key in reversed(keys)])
    np.testing.assert_array_equal(total, np.arange(size, dtype=np.uint32))


def test_a_long_mask_goes_on_from_chunk_to_chunk() -> None:
    whole, part = np.zeros(2 * masks.CHUNK, np.uint32), np.zeros(masks.CHUNK, np.uint32)
    masks.add_masks(whole, [(b"k" * 32, 1)])
    masks.add_masks(part, [(b"k" * 32, 1)])
    np.testing.assert_array_equal(whole[: masks.CHUNK], part)
    assert not np.array_equal(whole[masks.CHUNK :], part)


@given(bits=st.integers(1, 32), values=st.lists(st.integers(0, 2**32 - 1), max_size=70))
def test_packing_gives_back_what_was_packed_in_as_few_bytes(bits: int, values: list[int]) -> None:
    given_values = (np.array(values, np.uint64) % (1 << bits)).astype(np.uint32)
    data = packing.pack(given_values, bits)
    assert len(data) == packing.packed_bytes(len(values), bits) <= len(values) * bits / 8 + bits % 8 + 1
    np.testing.assert_array_equal(packing.unpack(data, len(values), bits), given_values)


def test_packed_data_of_another_length_is_refused() -> None:
    with pytest.raises(ValueError, match="Expected 8 bytes"):
        packing.unpack(bytes(7), 4, 16)


def test_the_field_is_one() -> None:  # Miller-Rabin: PRIME - 1 is 8 times an odd number
    odd, source = (shamir.PRIME - 1) // 8, stdlib_random.Random(0)
    assert odd % 2 == 1
    for base in [2, *(source.randrange(3, shamir.PRIME - 1) for _ in range(40))]:
        powers = [pow(base, odd << twice, shamir.PRIME) for twice in range(3)]
        assert powers[0] == 1 or shamir.PRIME - 1 in powers


@given(secret=st.binary(min_size=32, max_size=32), data=st.data(), count=st.integers(1, 12), seed=st.integers(0, 99))
def test_any_threshold_of_shares_gives_the_secret_back_and_fewer_do_not(
    secret: bytes, data: st.DataObject, count: int, seed: int
) -> None:
    holders = data.draw(st.lists(st.integers(1, 1000), min_size=count, max_size=count, unique=True))
    threshold = data.draw(st.integers(1, count))
    shares = shamir.split(secret, holders, threshold, stdlib_random.Random(seed).randbytes)
    some = data.draw(st.permutations(holders))
    assert shamir.join({holder: shares[holder] for holder in some[:threshold]}) == secret
    if threshold > 1:
        assert shamir.join({holder: shares[holder] for holder in some[: threshold - 1]}) != secret


def test_a_share_says_nothing_of_the_secret() -> None:
    """The shares of one holder are uniform for two secrets as different as can be: their means agree, and lie in the middle."""
    source = stdlib_random.Random(4).randbytes
    means = []
    for secret in (ZERO, b"\xff" * 32):
        values = [
            int.from_bytes(shamir.split(secret, [1, 2, 3], 2, source)[1], "big") / shamir.PRIME for _ in range(2000)
        ]
        means.append(np.mean(values))
    assert abs(means[0] - 0.5) < 0.03
    assert abs(means[1] - 0.5) < 0.03


@pytest.mark.parametrize(
    ("holders", "threshold"),
    [([1, 1], 1), ([0, 1], 1), ([1, 2], 3), ([1], 0)],
    ids=["twice", "zero", "too high", "none"],
)
def test_wrong_holders_are_refused(holders: list[int], threshold: int) -> None:
    with pytest.raises(ValueError, match="holders"):
        shamir.split(ZERO, holders, threshold, bytes)
