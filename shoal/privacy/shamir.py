"""Secret sharing (Shamir 1979): any `threshold` shares give a secret back, fewer say nothing about it.

Over the field of integers modulo 2^256 + 297, so that a secret is any 32 bytes. A share is the value of a random polynomial at the
holder's number, which is public.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Final

PRIME: Final = (1 << 256) + 297
SECRET_BYTES: Final = 32
SHARE_BYTES: Final = 33


def split(secret: bytes, holders: Sequence[int], threshold: int, random: Callable[[int], bytes]) -> dict[int, bytes]:
    """Shares of a secret, by holder.

    Args:
        secret: 32 bytes.
        holders: their numbers, each at least 1, no two alike.
        threshold: shares that give the secret back.
        random: so many unpredictable bytes.
    """
    if (
        len(secret) != SECRET_BYTES
        or not 1 <= threshold <= len(holders)
        or min(holders) < 1
        or len(set(holders)) != len(holders)
    ):
        raise ValueError(
            f"Expected 32 bytes and 1 <= threshold <= holders, all different and from 1, got {len(secret)} bytes, "
            f"threshold {threshold}, {len(holders)} holders."
        )
    # 48 bytes modulo the prime: uniform to 2^-128.
    coefficients = [int.from_bytes(random(48), "big") % PRIME for _ in range(threshold - 1)]
    whole = [*coefficients, int.from_bytes(secret, "big")]
    return {holder: _at(whole, holder).to_bytes(SHARE_BYTES, "big") for holder in holders}


def join(shares: Mapping[int, bytes]) -> bytes | None:
    """The secret of shares by holder, by Lagrange's formula at 0; None where they are of no secret of 32 bytes."""
    values = {holder: int.from_bytes(share, "big") for holder, share in shares.items()}
    if any(value >= PRIME for value in values.values()):
        return None
    secret = 0
    for holder, value in values.items():
        above = below = 1
        for other in values:
            if other != holder:
                above = above * other % PRIME
                below = below * (other - holder) % PRIME
        secret = (secret + value * above * pow(below, -1, PRIME)) % PRIME
    return secret.to_bytes(SHARE_BYTES, "big")[1:] if secret < 1 << 256 else None


def _at(coefficients: Sequence[int], x: int) -> int:
    """The polynomial's value, by Horner's rule; the last coefficient is the constant one."""
    made = 0
    for coefficient in coefficients:
        made = (made * x + coefficient) % PRIME
    return made
