"""Sums that two servers can open together and neither alone: additive sharing, in one message from each member. Pure.

A member takes its vector modulo 2^32 and a fresh seed of 32 bytes. The first server gets the vector less the seed's mask, which is as good as
uniform; and the seed, sealed for the second server (the *helper*), which gets nothing else. The first adds up what it holds; the helper adds up the
masks of the same members, adds noise and answers with that sum. The two sums together are the members' sum with noise.

Guarantees:
    * What the first server holds of a member is independent of its vector, unless the helper opens the seed. Assumes: X25519, HKDF-SHA-256, AES-256
      (CTR and GCM) are what they are held to be, and the members' random bytes cannot be foretold.
    * The helper sees no share of a vector, whatever it does.
    * A seed is good for one day and one form of vector: both are in what it is sealed with.

Not claimed: that a member's vector is within its bounds. A hostile member can make the sum of a batch absurd (then it is dropped) or wrong.

References:
    * Corrigan-Gibbs, Boneh 2017, "Prio: Private, Robust, and Scalable Computation of Aggregate Statistics". Departure: no proof that a
      vector is within its bounds.
    * Geoghegan, Patton, Pitman, Rescorla, Wood, "Distributed Aggregation Protocol for Privacy Preserving Measurement" (IETF ppm): one server
      carries the other's sealed share.
"""

from collections.abc import Callable, Sequence
from typing import Final

import numpy as np

from shoal.privacy import masks

SEED_BYTES: Final = 32
SEALED_BYTES: Final = masks.KEY_BYTES + SEED_BYTES + 16
"""A key of the member's for this one seed, the seed, and a tag."""


def context(schema: bytes, day: int) -> bytes:
    """What a seed is sealed with."""
    return b"shoal telemetry v1" + schema + day.to_bytes(8, "little")


def split(
    vector: np.ndarray, helper: bytes, *, context: bytes, random: Callable[[int], bytes]
) -> tuple[np.ndarray, bytes]:
    """A member's two shares.

    Args:
        vector: (n,) uint32.
        helper: the helper's X25519 public key.
        context: of the batch that it is for.
        random: the system's random bytes.

    Returns:
        The first server's share, (n,) uint32, and the seed sealed for the helper, `SEALED_BYTES`.

    Raises:
        ValueError: the helper's key is none.
    """
    seed, private = random(SEED_BYTES), random(masks.KEY_BYTES)
    public = masks.public_key(private)
    key = masks.agree(private, helper, _purpose(public, helper))
    share = vector.astype(np.uint32, order="C")
    masks.add_masks(share, [(seed, -1)])
    return share, public + masks.seal(key, seed, context)


def unseal(sealed: bytes, private: bytes, helper: bytes, *, context: bytes) -> bytes | None:
    """The seed; None where it was not sealed for this helper (its private and public key), or not with this context."""
    public = sealed[: masks.KEY_BYTES]
    if len(sealed) != SEALED_BYTES or not masks.are_keys(public):
        return None
    key = masks.agree(private, public, _purpose(public, helper))
    return masks.unseal(key, sealed[masks.KEY_BYTES :], context)


def mask_sum(seeds: Sequence[bytes], entries: int) -> np.ndarray:
    """The helper's sum of masks, (entries,) uint32."""
    total = np.zeros(entries, np.uint32)
    masks.add_masks(total, [(seed, 1) for seed in seeds])
    return total


def joined(share_sum: np.ndarray, mask_sum: np.ndarray) -> np.ndarray:
    """The members' sum, (n,) int64: what is from 2^31 on is below zero."""
    total: np.ndarray = np.add(share_sum, mask_sum, dtype=np.uint32)
    return total.view(np.int32).astype(np.int64)


def _purpose(public: bytes, helper: bytes) -> bytes:
    return b"shoal/telemetry/seed:" + public + helper
