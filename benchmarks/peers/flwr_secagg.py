"""One group of Flower's SecAgg+ by its own functions, in its own environment: seconds of a client and of the server.

The steps are those of its `secaggplus_mod` and `SecAggPlusWorkflow`, without the runtime around them: what its library computes for
keys, shares, masks, sums and their opening. Drop-outs come after the shares, which is what costs the server. Prints one JSON line.
"""

import argparse
import json
import os
import time
from typing import Any

import numpy as np
from flwr.common.secure_aggregation.crypto.shamir import combine_shares, create_shares
from flwr.common.secure_aggregation.crypto.symmetric_encryption import (
    decrypt,
    encrypt,
    generate_shared_key,
)
from flwr.common.secure_aggregation.ndarrays_arithmetic import (
    parameters_addition,
    parameters_mod,
    parameters_subtraction,
)
from flwr.common.secure_aggregation.secaggplus_utils import (
    pseudo_rand_gen,
    share_keys_plaintext_concat,
    share_keys_plaintext_separate,
)
from flwr.supercore.primitives.asymmetric import (  # type: ignore[import-not-found]
    bytes_to_private_key,
    bytes_to_public_key,
    generate_key_pairs,
    private_key_to_bytes,
    public_key_to_bytes,
)

MOD_RANGE = 1 << 32


def measure(members: int, neighbours: int, threshold: int, lost: int, size: int) -> dict[str, Any]:
    """The seconds, and the bytes of a masked vector as Flower sends it."""
    keys = [generate_key_pairs() for _ in range(members)]
    private = [private_key_to_bytes(key[0]) for key in keys]
    public = [public_key_to_bytes(key[1]) for key in keys]
    near = [
        [(at + step) % members for step in range(-neighbours // 2, neighbours // 2 + 1) if step]
        for at in range(members)
    ]
    seeds = [os.urandom(32) for _ in range(members)]
    rng = np.random.default_rng(0)
    values = rng.integers(0, 1 << 16, size)

    begun = time.process_time()
    masked, seed_shares, key_shares = client(0, near[0], private, public, seeds[0], threshold, values)
    client_s = time.process_time() - begun

    # What the server gets of all: shares of their secrets, and vectors (their content does not change the cost).
    shares = [create_shares(seed, threshold, neighbours) for seed in seeds[lost:]]
    of_lost = [create_shares(private[at], threshold, neighbours) for at in range(lost)]
    begun = time.process_time()
    total = [np.zeros(size, np.int64)]
    for _ in range(members - lost):
        total = parameters_addition(total, masked)
    adding_s = time.process_time() - begun
    begun = time.process_time()
    for given in shares:
        total = parameters_subtraction(total, pseudo_rand_gen(combine_shares(given), MOD_RANGE, [(size,)]))
    for at, given in enumerate(of_lost):
        secret = combine_shares(given)
        for other in near[at]:
            key = generate_shared_key(bytes_to_private_key(secret), bytes_to_public_key(public[other]))
            mask = pseudo_rand_gen(key, MOD_RANGE, [(size,)])
            total = parameters_addition(total, mask) if at > other else parameters_subtraction(total, mask)
    parameters_mod(total, MOD_RANGE)
    opening_s = time.process_time() - begun
    del seed_shares, key_shares
    return {
        "client_s": client_s,
        "server_s": adding_s + opening_s,
        "opening_s": opening_s,
        "up_bytes": masked[0].nbytes,
    }


def client(
    at: int, near: list[int], private: list[bytes], public: list[bytes], seed: bytes, threshold: int, values: np.ndarray
) -> tuple[list[np.ndarray], list[bytes], list[bytes]]:
    """All that one client computes: shares, sealed and opened, and its masked vector."""
    generate_key_pairs(), generate_key_pairs()
    seed_shares, key_shares = (
        create_shares(seed, threshold, len(near)),
        create_shares(private[at], threshold, len(near)),
    )
    for place, other in enumerate(near):
        key = generate_shared_key(bytes_to_private_key(private[at]), bytes_to_public_key(public[other]))
        sealed = encrypt(key, share_keys_plaintext_concat(at, other, seed_shares[place], key_shares[place]))
        share_keys_plaintext_separate(decrypt(key, sealed))  # a neighbour's for this one, which costs the same
    made = parameters_addition([values], pseudo_rand_gen(seed, MOD_RANGE, [values.shape]))
    for other in near:
        key = generate_shared_key(bytes_to_private_key(private[at]), bytes_to_public_key(public[other]))
        mask = pseudo_rand_gen(key, MOD_RANGE, [values.shape])
        made = parameters_addition(made, mask) if at > other else parameters_subtraction(made, mask)
    return parameters_mod(made, MOD_RANGE), seed_shares, key_shares


def main() -> None:
    parser = argparse.ArgumentParser(description="Times one group of Flower's SecAgg+ and prints one JSON line.")
    for name in ("members", "neighbours", "threshold", "lost", "size"):
        parser.add_argument(f"--{name}", type=int, required=True)
    print(json.dumps(measure(**vars(parser.parse_args()))))


if __name__ == "__main__":
    main()
