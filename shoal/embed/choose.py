"""Which blocks to read for a set of missing vectors, where some of them have replicas. Compiled.

Vectors with one copy force their home block; what else those blocks hold is covered with them. Each further vector
takes, of the blocks that hold it, the one that covers most of what is still missing; few copies first. A greedy set
cover, as in MaxEmbed (Fan et al., 2024, ASPLOS; Ksitta/MaxEmbed), which looks at 10 copies at most; so does this.
"""

from typing import Final, NamedTuple

import numpy as np

from shoal.embed._compiled import compiled
from shoal.embed.layout import Layout

MOST_COPIES: Final = 10


class Copies(NamedTuple):
    """A layout as compiled functions take it."""

    block_of: np.ndarray
    """(rows,) int32: home block."""
    bounds: np.ndarray
    """(rows + 1,) int32: bounds of each vector's replicas in `blocks`; (1,) where the layout has none."""
    blocks: np.ndarray
    """(replicas,) int32: the blocks of the replicas."""


def copies_of(layout: Layout) -> Copies:
    """The blocks of each vector, of a layout."""
    has_replicas = len(layout.replica_ids) > 0
    return Copies(
        layout.block_of.astype(np.int32),
        layout.replica_bounds().astype(np.int32) if has_replicas else np.zeros(1, np.int32),
        (layout.replica_slots // layout.vectors_per_block).astype(np.int32),
    )


@compiled
def choose_blocks(copies: Copies, missing: np.ndarray, num_missing: int, chosen: np.ndarray) -> int:
    """Chooses the blocks to read.

    Args:
        missing: (>= num_missing,) int64 ids, distinct; the first `num_missing` count.
        chosen: (>= num_missing,) int64, written: `chosen[i]` is the block that `missing[i]` is read from.

    Returns:
        The number of distinct blocks among `chosen`.
    """
    most = 0
    for i in range(num_missing):
        copies_here = _num_replicas(copies, missing[i])
        most = max(most, copies_here)
        chosen[i] = -1 if copies_here else copies.block_of[missing[i]]
    for number in range(1, most + 1):
        for i in range(num_missing):
            if chosen[i] < 0 and _num_replicas(copies, missing[i]) == number:
                _choose_one(copies, missing, num_missing, chosen, i)
    return _num_distinct(chosen, num_missing)


@compiled
def is_read(copies: Copies, id: int, chosen: np.ndarray, num_missing: int) -> bool:
    """Whether a block that holds the vector is among those chosen."""
    for i in range(num_missing):  # noqa: SIM110 (Numba compiles no generator expression)
        if _holds(copies, id, chosen[i]):
            return True
    return False


@compiled
def _num_replicas(copies: Copies, id: int) -> int:
    if len(copies.bounds) == 1:
        return 0
    return int(min(MOST_COPIES - 1, copies.bounds[id + 1] - copies.bounds[id]))


@compiled
def _choose_one(copies: Copies, missing: np.ndarray, num_missing: int, chosen: np.ndarray, i: int) -> None:
    """Gives missing vector i its best block: one that is read anyway, else the one that covers most."""
    best, best_cover = -1, 0
    for copy in range(-1, _num_replicas(copies, missing[i])):
        block = _block(copies, missing[i], copy)
        cover = 0
        for j in range(num_missing):
            if chosen[j] == block:
                cover += num_missing + 1
                break
            if chosen[j] < 0 and _holds(copies, missing[j], block):
                cover += 1
        if cover > best_cover:
            best, best_cover = block, cover
    for j in range(num_missing):
        if chosen[j] < 0 and _holds(copies, missing[j], best):
            chosen[j] = best


@compiled
def _block(copies: Copies, id: int, copy: int) -> int:
    """The block of copy -1 (home), 0, 1, …"""
    return int(copies.block_of[id] if copy < 0 else copies.blocks[copies.bounds[id] + copy])


@compiled
def _holds(copies: Copies, id: int, block: int) -> bool:
    for copy in range(-1, _num_replicas(copies, id)):  # noqa: SIM110 (Numba compiles no generator expression)
        if _block(copies, id, copy) == block:
            return True
    return False


@compiled
def _num_distinct(chosen: np.ndarray, size: int) -> int:
    return len(np.unique(chosen[:size])) if size else 0
