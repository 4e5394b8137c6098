"""The helper: opens sums of telemetry for a host, with noise, and each report once. Run by somebody who does not join the host.

It holds a private key and, for a few days, hashes of the seeds that it has opened. It sees no share of any report, and no address of a device. What
it answers is a sum of masks over at least `minimum` reports with noise that it draws itself: against a host that puts in reports of its own, or
opens a day in many batches, the noise of each answer is what protects.

Guarantees:
    * A seed is in one answer at most, over restarts: it is written down before the answer leaves.
    * A batch is bounded (`MOST_REPORTS`), of one day within `DAYS_BACK`, and of one form.
    * Noise is of the stated multiplier, or there is no answer; nobody who asks can change it.
"""

import logging
import os
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import floor
from pathlib import Path
from typing import Final

import numpy as np

from shoal import validate
from shoal.errors import ProtocolError, StoreError
from shoal.fleet.append import append_for_good
from shoal.fleet.wire import telemetry_pb2 as pb
from shoal.privacy.masks import public_key
from shoal.privacy.noise import discrete_gaussian
from shoal.privacy.split_sums import context, mask_sum, unseal
from shoal.privacy.telemetry import DAY_S, NOISE, SCHEMA, UNITS
from shoal.tensors import sha256

log = logging.getLogger("shoal.helper")

MOST_REPORTS: Final = 16_384
MOST_A_DAY: Final = 1 << 18
"""Reports of a day, in all batches."""
ANSWERS: Final = 4
"""Last answers that are given again to who asks the same again: the first may have been lost on its way."""
DAYS_BACK: Final = 4
"""Of the days before today, those that are still opened."""
MINIMUM: Final = 64
_SEEN_BYTES: Final = 16


@dataclass(frozen=True, kw_only=True)
class Terms:
    """What a helper keeps to; its own, and nobody else's to change."""

    minimum: int = MINIMUM
    """Fewest reports in a sum."""
    noise: float = NOISE
    """Standard deviation of an entry's noise, in its units."""

    def __post_init__(self) -> None:
        validate.whole(1, minimum=self.minimum)
        validate.positive(noise=self.noise)
        if self.noise < 1.0:
            raise ValueError(f"Expected noise of at least 1 unit, got noise={self.noise!r}: less hides nobody's day.")


class OpenedSeeds:
    """Hashes of the seeds that were opened, in a file a day; those of days that are opened no more are forgotten."""

    def __init__(self, folder: Path | None) -> None:
        """
        Args:
            folder: for its files; None: in memory.

        Raises:
            StoreError: it cannot be read.
        """
        self._folder = folder
        self._of: dict[int, set[bytes]] = {}
        try:
            paths = [] if folder is None or not folder.exists() else sorted(folder.glob("*.opened"))
            for path in paths:
                data = path.read_bytes()
                whole = (
                    len(data) // _SEEN_BYTES * _SEEN_BYTES
                )  # what was being written when the helper fell was not answered
                if whole != len(data):
                    os.truncate(path, whole)
                self._of[int(path.stem)] = {data[at : at + _SEEN_BYTES] for at in range(0, whole, _SEEN_BYTES)}
        except (OSError, ValueError) as error:
            raise StoreError(f"What this helper has opened cannot be read from {folder}: {error}") from error

    @property
    def newest(self) -> int:
        """The last day on which, or of which, any were opened; 0: none were."""
        return max(self._of, default=0)

    def has(self, day: int, sealed: bytes) -> bool:
        return _name(sealed) in self._of.get(day, ())

    def count(self, day: int) -> int:
        return len(self._of.get(day, ()))

    def add(self, day: int, sealed: Sequence[bytes]) -> None:
        """Writes them down for good. Raises StoreError: they could not be; nothing may be answered then."""
        names = [_name(each) for each in sealed]
        if self._folder is not None:
            try:
                self._folder.mkdir(parents=True, exist_ok=True)
                append_for_good(self._folder / f"{day}.opened", b"".join(names))
            except OSError as error:
                raise StoreError(f"What this helper has opened cannot be written to {self._folder}: {error}") from error
        self._of.setdefault(day, set()).update(names)

    def forget(self, before: int) -> None:
        """Drops days before that one."""
        for day in [day for day in self._of if day < before]:
            del self._of[day]
            if self._folder is not None:
                (self._folder / f"{day}.opened").unlink(missing_ok=True)


class Helper:
    """See the module's text. One call at a time."""

    def __init__(
        self,
        private: bytes,
        opened: OpenedSeeds,
        *,
        terms: Terms | None = None,
        random: Callable[[int], bytes] = os.urandom,
    ) -> None:
        """
        Args:
            private: its X25519 key, 32 bytes.
            opened: what it has opened before.
            terms: what it keeps to.
            random: the system's random bytes.
        """
        self._private, self._public = private, public_key(private)
        self._opened, self.terms, self._random = opened, terms or Terms(), random
        self._answers: OrderedDict[str, pb.Opened] = OrderedDict()
        self._newest = opened.newest
        """Day of the newest answer, over restarts: a clock that is set back does not bring back what was forgotten."""

    def open(self, batch: pb.Batch, *, wall_s: float) -> pb.Opened:
        """The sum of the batch's masks, with noise; or which of its seeds are bad, and nothing is opened.

        Raises:
            ProtocolError: the batch breaks the terms.
            StoreError: what is opened cannot be written down.
        """
        today = max(self._newest, floor(wall_s / DAY_S))
        self._check(batch, today)
        asked = sha256(b"".join([batch.day.to_bytes(4, "little"), *batch.sealed]))
        if asked in self._answers:
            return self._answers[asked]
        seeds, bad = self._unsealed(batch)
        if bad:
            return pb.Opened(bad=bad)
        if today > self._opened.newest:
            self._opened.add(
                today, ()
            )  # what is forgotten now stays closed, also after a restart by a clock that was set right
        self._opened.forget(today - DAYS_BACK)
        self._opened.add(batch.day, batch.sealed)
        self._newest = today
        noisy = mask_sum(seeds, UNITS.size) + self._noise()
        answer = self._answers[asked] = pb.Opened(masks=noisy.astype("<u4").tobytes(), noise=self.terms.noise)
        while len(self._answers) > ANSWERS:
            self._answers.popitem(last=False)
        return answer

    def _unsealed(self, batch: pb.Batch) -> tuple[list[bytes], list[int]]:
        """The seeds, and the places of those that are bad."""
        bound = context(SCHEMA, batch.day)
        seeds, bad, held = list[bytes](), list[int](), set[bytes]()
        for place, sealed in enumerate(batch.sealed):
            seed = None
            if sealed not in held and not self._opened.has(batch.day, sealed):
                seed = unseal(sealed, self._private, self._public, context=bound)
            held.add(sealed)
            seeds.append(seed) if seed is not None else bad.append(place)
        return seeds, bad

    def _check(self, batch: pb.Batch, today: int) -> None:
        if batch.schema != SCHEMA:
            raise ProtocolError(
                f"Expected telemetry of form {SCHEMA.hex()}, got {batch.schema.hex()[:32]}. Host and helper are to run the same version of shoal."
            )
        if not today - DAYS_BACK <= batch.day <= today:
            raise ProtocolError(
                f"Expected a day from {today - DAYS_BACK} to {today}, got {batch.day}: others are not opened."
            )
        if not self.terms.minimum <= len(batch.sealed) <= MOST_REPORTS:
            raise ProtocolError(
                f"Expected {self.terms.minimum} to {MOST_REPORTS} reports in a sum, got {len(batch.sealed)}: fewer are not opened."
            )
        if self._opened.count(batch.day) + len(batch.sealed) > MOST_A_DAY:
            raise ProtocolError(
                f"Expected at most {MOST_A_DAY} reports of day {batch.day} in all: no more of them are opened."
            )

    def _noise(self) -> np.ndarray:
        """(entries,) uint32, modulo 2^32."""
        made = np.zeros(UNITS.size, np.int64)
        for unit in np.unique(UNITS):
            at = unit == UNITS
            made[at] = discrete_gaussian(self.terms.noise * float(unit), int(at.sum()), source=self._random)
        return made.astype(np.uint32)


def _name(sealed: bytes) -> bytes:
    # A seal names its seed: who makes another seal of the same seed knows the seed, and has nothing to learn from it.
    return bytes.fromhex(sha256(sealed))[:_SEEN_BYTES]
