"""Which blocks to read for a set of missing vectors, where some of them have replicas. Compiled; replays and stores use this.

A greedy set cover, fewest copies first: a vector with one copy forces its home block; each further vector that no chosen block
holds takes, of the blocks that do, the one that most such vectors want. What a chosen block holds comes from there. As in
MaxEmbed (Fan et al., 2024, ASPLOS; Ksitta/MaxEmbed), which looks at 10 copies at most; so does this.

Time O(copies log copies) for all missing vectors together.
"""

from typing import Final, NamedTuple

import numpy as np

from shoal.embed._compiled import compiled
from shoal.embed._sorted import distinct, order_of
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
def cover(starts: np.ndarray, blocks: np.ndarray, chosen: np.ndarray) -> None:
    """The greedy cover.

    Args:
        starts: (n + 1,) int64: vector i lies in `blocks[starts[i]:starts[i + 1]]`, one or more, its home first.
        blocks: (starts[n],) int64.
        chosen: (n,) int64, written: the place in `blocks` that vector i is read from.
    """
    size, num = int(starts[-1]), len(starts) - 1
    order = order_of(blocks[:size])
    group, first, count = np.empty(size, np.int64), np.empty(size + 1, np.int64), 0
    for at in range(size):  # groups: the places that name one block
        if at == 0 or blocks[order[at]] != blocks[order[at - 1]]:
            first[count] = at
            count += 1
        group[order[at]] = count - 1
    first[count] = size
    wanted, owner = np.zeros(count, np.int64), np.empty(size, np.int64)
    for place in range(size):
        wanted[group[place]] += 1
    most = 0
    for i in range(num):
        owner[starts[i] : starts[i + 1]] = i
        most = max(most, starts[i + 1] - starts[i])
    chosen[:num] = -1
    for copies in range(1, most + 1):
        for i in range(num):
            if chosen[i] >= 0 or starts[i + 1] - starts[i] != copies:
                continue
            best = starts[i]
            for place in range(starts[i] + 1, starts[i + 1]):
                if wanted[group[place]] > wanted[group[best]]:
                    best = place
            for at in range(first[group[best]], first[group[best] + 1]):
                other = owner[order[at]]
                if chosen[other] < 0:
                    chosen[other] = order[at]
                    for place in range(starts[other], starts[other + 1]):
                        wanted[group[place]] -= 1


@compiled
def choose_blocks(copies: Copies, missing: np.ndarray, num_missing: int, chosen: np.ndarray) -> int:
    """Chooses the blocks to read.

    Args:
        missing: (>= num_missing,) int64 ids, distinct; the first `num_missing` count.
        chosen: (>= num_missing,) int64, written: `chosen[i]` is the block that `missing[i]` is read from.

    Returns:
        The number of distinct blocks among `chosen`.
    """
    total = num_missing
    for i in range(num_missing):
        chosen[i] = copies.block_of[missing[i]]
        total += _num_replicas(copies, missing[i])
    if total > num_missing:
        starts, blocks, end = np.empty(num_missing + 1, np.int64), np.empty(total, np.int64), 0
        for i in range(num_missing):
            starts[i], blocks[end] = end, chosen[i]
            end += 1
            for copy in range(_num_replicas(copies, missing[i])):
                blocks[end] = copies.blocks[copies.bounds[missing[i]] + copy]
                end += 1
        starts[num_missing] = end
        cover(starts, blocks, chosen)
        for i in range(num_missing):
            chosen[i] = blocks[chosen[i]]
    return len(distinct(chosen[:num_missing]))


@compiled
def is_read(copies: Copies, id: int, chosen: np.ndarray, num_missing: int) -> bool:
    """Whether a block that holds the vector is among those chosen."""
    for i in range(num_missing):
        if chosen[i] == copies.block_of[id]:
            return True
        for copy in range(_num_replicas(copies, id)):
            if chosen[i] == copies.blocks[copies.bounds[id] + copy]:
                return True
    return False


@compiled
def _num_replicas(copies: Copies, id: int) -> int:
    if len(copies.bounds) == 1:
        return 0
    return int(min(MOST_COPIES - 1, copies.bounds[id + 1] - copies.bounds[id]))
