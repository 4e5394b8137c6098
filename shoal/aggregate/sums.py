"""Sums of groups in the record: integers, one blob a group, added up when a commit takes them in.

Format: a frame (`tensors.pack`) of int64 tensors, one for each sum of the task, in the manifest's order. Weight and number
of members are in the group's row.
"""

from collections.abc import Iterator

import numpy as np

from shoal.aggregate.accumulator import Accumulator
from shoal.fixed import CHUNK
from shoal.record.store import Blobs, GroupRow
from shoal.tensors import frame_parts, read_head


def save_sums(blobs: Blobs, sums: Accumulator) -> str:
    """Makes a group's sums durable; returns the hash of their blob."""
    writer = blobs.writer()
    try:
        for part in frame_parts(sums.totals):
            writer.write(part)
        return writer.finish()
    except BaseException:
        writer.discard()
        raise


def merge_saved(sums: Accumulator, group: GroupRow, blobs: Blobs) -> None:
    """Adds the sums of a group of the record, piece by piece.

    Raises:
        StoreError: they are missing or damaged.
        ValueError: they are of another task.
        RoundError: too many members come together.
    """
    sums.merge(_pieces(group.sums_root, blobs), weight=group.weight, members=group.members)


def _pieces(hash: str, blobs: Blobs) -> Iterator[tuple[str, int, np.ndarray]]:
    at = 0

    def fill(view: memoryview) -> None:
        nonlocal at
        view[:] = blobs.read(hash, at, len(view))
        at += len(view)

    specs, _ = read_head(fill)
    for spec in specs:
        size = spec.size_bytes // 8
        for first in range(0, size, CHUNK):
            count = min(CHUNK, size - first)
            yield spec.name, first, np.frombuffer(blobs.read(hash, at, 8 * count), np.int64)
            at += 8 * count
