"""Whether an Ed25519 signature is good: in this process, or in one that ends.

The library for that takes 9 MB once it is loaded. A device that waits for hours and is sent a plan now and then has it
loaded, and gone, elsewhere: `python -m shoal.plan.signature` reads key, signature and message from standard input.
"""

import os
import subprocess
import sys
from typing import Final

from shoal.errors import DeviceError

KEY_BYTES: Final = 32
SIGNATURE_BYTES: Final = 64
APART_S: Final = 60.0
_GOOD, _BAD = 4, 3
"""How the process ends: neither as one does that did something else, nor as Python when it fails (1, 2)."""


def is_good(key: bytes, signature: bytes, message: bytes) -> bool:
    """Whether the holder of the key has signed the message."""
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    try:
        Ed25519PublicKey.from_public_bytes(key).verify(signature, message)
    except (InvalidSignature, ValueError):
        return False
    return True


def is_good_apart(key: bytes, signature: bytes, message: bytes) -> bool:
    """As `is_good`, in a process of its own. Raises DeviceError where there can be none."""
    if (len(key), len(signature)) != (KEY_BYTES, SIGNATURE_BYTES):
        return False
    from shoal.plan.child_process import python_path  # not in the process that checks

    # -P: no module of the working directory says what is signed.
    command = [sys.executable, "-P", "-m", "shoal.plan.signature"]
    environment = {**os.environ, "PYTHONPATH": python_path(os.environ.get("PYTHONPATH", ""))}
    try:
        done = subprocess.run(
            command, input=key + signature + message, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
            timeout=APART_S, check=False, env=environment,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        raise DeviceError(f"The plan's signature could not be checked: {error}.", stage="fetch") from error
    if done.returncode not in (_GOOD, _BAD):
        last = (
            done.stderr.decode(errors="replace").strip().rpartition("\n")[2]
            or f"its process ended with {done.returncode}"
        )
        raise DeviceError(f"The plan's signature could not be checked: {last[:300]}.", stage="fetch")
    return done.returncode == _GOOD


def _main() -> int:
    data = sys.stdin.buffer.read()
    signed = KEY_BYTES + SIGNATURE_BYTES
    return _GOOD if is_good(data[:KEY_BYTES], data[KEY_BYTES:signed], data[signed:]) else _BAD


if __name__ == "__main__":
    sys.exit(_main())
