"""Further copies of some vectors, in blocks of their own, within a space budget.

A vector that is asked for in two kinds of company can lie beside one only. `replicate_residual` is ours: what a layout and
a cache leave alone, vectors that were read from a block for themselves only, makes a hypergraph again; the
vectors that are alone most often are partitioned by it into further blocks. These save reads; often they are few. `with_copies` adds
others until the space is used: a copy also serves where a block is late or damaged. `replicate_seeds` is the way of MaxEmbed (Fan
et al., 2024, ASPLOS; Ksitta/MaxEmbed): the vectors whose queries touch most blocks are seeds, and each gets a block
of those that came with it most often and are not at its home.
"""

from dataclasses import replace

import numpy as np

from shoal import validate
from shoal.embed._compiled import compiled
from shoal.embed._sorted import order_of
from shoal.embed.choose import Copies, choose_blocks, copies_of
from shoal.embed.layout import Layout
from shoal.embed.partition import Settings, partition
from shoal.embed.trace import Trace


def num_copies(num_rows: int, vectors_per_block: int, space: float) -> int:
    """Copies that fill `space` times the blocks of a table; at most one of each vector."""
    return min(num_rows, int(space * -(-num_rows // vectors_per_block)) * vectors_per_block)


def with_copies(layout: Layout, missed: Trace, heat: np.ndarray, space: float, settings: Settings) -> Layout:
    """The layout with `num_copies` copies: of vectors first that save reads, then of those that are missed and asked for most.

    The latter lie in order of their homes, so one block has the copies of neighbours, and one read stands in for another.

    Args:
        missed: as of `replicate_residual`.
        heat: (rows,) how often each vector was asked for.
        space: blocks of copies over the table's, 0 to 1; 1 is a copy of every vector.
    """
    validate.between(0, 1, space=space)
    made, size = replicate_residual(layout, missed, space, settings), layout.vectors_per_block
    has_none = np.ones(layout.num_rows, bool)
    has_none[made.replica_ids] = False
    order = np.lexsort((-heat, -missed.counts()))
    others = order[has_none[order]][: num_copies(layout.num_rows, size, space) - len(made.replica_ids)]
    blocks = np.full((-(-len(others) // size), size), -1, np.int64)
    blocks.reshape(-1)[: len(others)] = others[np.argsort(layout.slot_of[others])]
    return with_blocks(made, blocks)


def replicate_residual(
    layout: Layout, missed: Trace, space: float, settings: Settings | None = None, *, rounds: int = 1
) -> Layout:
    """The layout with further copies.

    Args:
        missed: queries as a cache leaves them: only what it missed (`simulate.misses`).
        space: further slots over the rows, for example 0.2.
        rounds: the budget is spent in as many parts; each sees what the ones before have left alone.
    """
    validate.not_negative(space=space)
    settings = settings or Settings(multilevel=True)
    size = layout.vectors_per_block
    for number in range(rounds):
        budget = int(space * layout.num_rows / size * (number + 1) / rounds) - int(
            space * layout.num_rows / size * number / rounds
        )
        alone = lonely(layout, missed)
        heat = alone.counts()
        chosen = np.argsort(-heat, kind="stable")[: budget * size]
        chosen = chosen[heat[chosen] > 1]
        chosen = chosen[: len(chosen) // size * size]
        if not len(chosen):
            break
        is_chosen = np.zeros(layout.num_rows, bool)
        is_chosen[chosen] = True
        order = partition(alone.only(is_chosen[alone.ids]), size, replace(settings, seed=settings.seed + number + 1))
        layout = with_blocks(layout, order[is_chosen[order]].reshape(-1, size))
    return layout


def replicate_seeds(layout: Layout, trace: Trace, space: float) -> Layout:
    """The layout with MaxEmbed's replicas: `space` times the rows, in further blocks."""
    validate.not_negative(space=space)
    block_of, size = layout.block_of, layout.vectors_per_block
    queries = np.repeat(np.arange(len(trace)), np.diff(trace.indptr))
    pairs = np.unique(queries * layout.num_blocks + block_of[trace.ids])
    pages = np.bincount(pairs // layout.num_blocks, minlength=len(trace))
    score = np.bincount(trace.ids, weights=(pages[queries] - 1.0), minlength=layout.num_rows)
    seeds = np.argsort(-score, kind="stable")[: int(space * layout.num_rows / size)]
    starts, asked = trace.transposed()
    blocks = np.full((len(seeds), size), -1, np.int64)
    _fill(trace.indptr, trace.ids, starts, asked, block_of, seeds, blocks)
    return with_blocks(layout, blocks)


def with_blocks(layout: Layout, blocks: np.ndarray) -> Layout:
    """The layout with further blocks of copies, (blocks, vectors_per_block), -1 where empty."""
    if not len(blocks):
        return layout
    ids = np.concatenate([layout.ids_of(), blocks])
    return Layout.from_blocks(ids, layout.num_rows, homes=layout.block_of)


def lonely(layout: Layout, missed: Trace) -> Trace:
    """Of each query's misses, those that no other of its misses shares a chosen block with."""
    is_alone = np.zeros(missed.num_lookups, np.bool_)
    _lonely(copies_of(layout), missed.indptr, missed.ids, is_alone)
    return missed.only(is_alone)


@compiled
def _lonely(copies: Copies, indptr: np.ndarray, ids: np.ndarray, is_alone: np.ndarray) -> None:
    chosen = np.empty(len(ids) + 1, np.int64)
    for query in range(len(indptr) - 1):
        begin, end = indptr[query], indptr[query + 1]
        size = end - begin
        choose_blocks(copies, ids[begin:end], size, chosen)
        for i in range(size):
            is_alone[begin + i] = True
            for j in range(size):
                if i != j and chosen[i] == chosen[j]:
                    is_alone[begin + i] = False
                    break


@compiled
def _fill(
    indptr: np.ndarray,
    ids: np.ndarray,
    starts: np.ndarray,
    asked: np.ndarray,
    block_of: np.ndarray,
    seeds: np.ndarray,
    blocks: np.ndarray,
) -> None:
    """Each seed's block: itself and what came with it most often, at most 10,000 queries looked at."""
    together, touched = np.zeros(len(block_of), np.int64), np.empty(len(block_of), np.int64)
    for number in range(len(seeds)):
        seed, num_touched = seeds[number], 0
        for at in range(starts[seed], min(starts[seed + 1], starts[seed] + 10_000)):
            for other in ids[indptr[asked[at]] : indptr[asked[at] + 1]]:
                if block_of[other] != block_of[seed]:
                    if together[other] == 0:
                        touched[num_touched] = other
                        num_touched += 1
                    together[other] += 1
        found = touched[:num_touched][order_of(-together[touched[:num_touched]])]
        together[touched[:num_touched]] = 0
        blocks[number, 0] = seed
        for i in range(min(len(found), blocks.shape[1] - 1)):
            blocks[number, i + 1] = found[i]
