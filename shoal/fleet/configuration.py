"""The round configuration: what changes from round to round, and follows from plan, run and version alone.

Because it follows from them, a Coordinator that was killed and started again configures the same round to the bit.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from shoal.aggregate.accumulator import Accumulator
from shoal.codec.packed import PACKED
from shoal.fixed import FixedPoint
from shoal.fleet.wire import fleet_pb2 as pb
from shoal.plan.manifest import Manifest


@dataclass(frozen=True, kw_only=True)
class Configuration:
    """One round's configuration."""

    round: int
    base_version: int
    seed: bytes
    """32 bytes; a member's key is made of it and the member's id."""
    max_members: int
    """Most updates in its sum."""
    reporting_window_s: float

    def fixed(self, manifest: Manifest) -> Mapping[str, FixedPoint]:
        """Name of a sum -> its fixed point."""
        return manifest.fixed_points(self.max_members)

    def accumulator(self, manifest: Manifest) -> Accumulator:
        """An empty sum for this round. Raises ValueError where the sums would not fit the task's bits."""
        return Accumulator(
            manifest.sums, self.fixed(manifest), max_weight=manifest.training.max_weight, max_members=self.max_members
        )

    def to_proto(self) -> pb.RoundConfiguration:
        return pb.RoundConfiguration(
            round=self.round,
            base_version=self.base_version,
            seed=self.seed,
            reporting_window_s=self.reporting_window_s,
            codec_down=PACKED,
            codec_up=PACKED,
        )

    def to_json(self) -> Mapping[str, Any]:
        return {
            "seed": self.seed.hex(), "max_members": self.max_members, "reporting_window_s": self.reporting_window_s,
        }  # fmt: skip


def configure(manifest: Manifest, *, run_seed: bytes, round: int, base_version: int) -> Configuration:
    """The configuration of the round that starts from `base_version`."""
    policy = manifest.server.rounds
    return Configuration(
        round=round,
        base_version=base_version,
        seed=round_seed(run_seed, base_version),
        max_members=policy.max_members,
        reporting_window_s=policy.reporting_window_s,
    )


def round_seed(run_seed: bytes, base_version: int) -> bytes:
    """32 bytes that the members' randomness in one round is made of."""
    return hashlib.sha256(b"shoal round\0" + run_seed + base_version.to_bytes(8, "big")).digest()
