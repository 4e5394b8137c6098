"""Keys, sealing, and masks: the primitives of secure groups, all of them from `cryptography`.

* Two members agree on a key by X25519 (RFC 7748), drawn out by HKDF-SHA-256 (RFC 5869) with what it is for.
* What one seals for another is AES-256-GCM (SP 800-38D). A key seals one message, so the nonce is zero.
* A mask is the key stream of AES-256-CTR (SP 800-38A) under a key that masks one vector, read as little-endian 32-bit words.
"""

from collections.abc import Iterable
from typing import Final

import numpy as np
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

KEY_BYTES: Final = 32
CHUNK: Final = 1 << 16
"""Words that are masked at a time: 256 KiB stay in a core's cache while all masks are added to them."""
_NONCE: Final = bytes(12)
_BLOCK: Final = 16
_ANY: Final = X25519PrivateKey.from_private_bytes(
    bytes(32)
)  # whether a point is of low order does not depend on the key


def public_key(private: bytes) -> bytes:
    """The X25519 public key of a private one; 32 bytes each."""
    return X25519PrivateKey.from_private_bytes(private).public_key().public_bytes_raw()


def are_keys(*publics: bytes) -> bool:
    """Whether one can agree on a key with each: none is a point of low order."""
    try:
        for public in publics:
            _ANY.exchange(X25519PublicKey.from_public_bytes(public))
    except ValueError:
        return False
    return True


def agree(private: bytes, public: bytes, purpose: bytes) -> bytes:
    """The key of two members, 32 bytes. Raises ValueError: the public key is a point of low order."""
    shared = X25519PrivateKey.from_private_bytes(private).exchange(X25519PublicKey.from_public_bytes(public))
    return derive(shared, purpose)


def derive(secret: bytes, purpose: bytes) -> bytes:
    """A key of 32 bytes for one purpose."""
    return HKDF(SHA256(), KEY_BYTES, salt=None, info=purpose).derive(secret)


def seal(key: bytes, message: bytes, context: bytes) -> bytes:
    """The message, encrypted and bound to its context; 16 bytes longer. The key is for this one message."""
    return AESGCM(key).encrypt(_NONCE, message, context)


def unseal(key: bytes, sealed: bytes, context: bytes) -> bytes | None:
    """The message; None where it is not what was sealed in that context."""
    try:
        return AESGCM(key).decrypt(_NONCE, sealed, context)
    except InvalidTag:
        return None


def add_masks(total: np.ndarray, masks: Iterable[tuple[bytes, int]]) -> None:
    """Adds masks to a vector in place, modulo 2^32.

    Args:
        total: (n,) uint32, C order.
        masks: (key, 1 or -1) each.
    """
    if total.dtype != np.uint32 or total.ndim != 1 or not total.flags.c_contiguous:
        raise ValueError(f"Expected total to be (n,) uint32 in C order, got {total.shape} {total.dtype}.")
    signed = list(masks)
    zeros = bytes(4 * min(CHUNK, -(-total.size // 4) * 4))
    stream = bytearray(len(zeros) + _BLOCK)
    all_words = np.frombuffer(stream, "<u4")
    for start in range(0, total.size, CHUNK):
        part = total[start : start + CHUNK]
        size = 4 * part.size
        words = all_words[: part.size]
        counter = (4 * start // _BLOCK).to_bytes(_BLOCK, "big")
        for key, sign in signed:
            Cipher(algorithms.AES(key), modes.CTR(counter)).encryptor().update_into(zeros[:size], stream)
            (np.add if sign > 0 else np.subtract)(part, words, out=part)
