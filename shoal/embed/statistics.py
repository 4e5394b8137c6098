"""What a store and its tables are and did, as values."""

from dataclasses import asdict, dataclass

import numpy as np

from shoal.embed.space import DELTA
from shoal.embed.table import Table


@dataclass(frozen=True, kw_only=True)
class TableStatistics:
    """What one table is and did."""

    rows: int
    tier: str
    """`dram` or `block`."""
    reason: str
    """Why it is there."""
    block_bytes: int
    slots_per_block: int
    num_blocks: int
    """Of its file, free ones included."""
    free_blocks: int
    delta_blocks: int
    resident_rows: int
    """Rows that rest in memory because they change often."""
    copies: int
    """Further copies of rows (`retrain(space=...)`) that have the rows' present values."""
    cache_capacity: int
    """Vectors."""
    cached: int
    policy: str
    dram_bytes: int
    """Its part of the memory: cache with index, rows that rest there, shadow, or the whole table."""
    map_bytes: int
    """Memory that says where each row is, beside the above."""
    is_direct: bool
    """Whether reads go past the page cache; where not, times say little."""
    engine: str
    """`aio` or `threads`."""
    most_worn: int
    """Writes of the most-written 1 % of blocks (the least of them)."""
    queries: int
    lookups: int
    hits: int
    resident_hits: int
    block_reads: int
    read_bytes: int
    prefetched: int
    """Rows that entered the cache because a neighbour was asked for."""
    prefetch_hits: int
    """Of these, how many were asked for before they left."""
    prefetches: bool
    """Whether neighbours enter; switched off where too few are used, until the rows are placed anew."""
    hedged_reads: int
    approximate: int
    damaged_blocks: int
    rescued_rows: int


@dataclass(frozen=True, kw_only=True)
class Statistics:
    """What a store is and did."""

    epoch: int
    """Rises with each new manifest."""
    dram_bytes: int
    journal_bytes: int
    written_bytes: int
    """To the device since the store was made: blocks, journal, states, manifests."""
    budget_bytes: float
    """What the store may write on its own account now; below zero, what users wrote beyond the budget."""
    postponed: int
    """Times since it was opened that tidying stopped at a full or failing disk; the next update tries again."""
    tables: dict[str, TableStatistics]


def statistics_of(table: Table) -> TableStatistics:
    """What a table is and did so far."""
    used = len(table.space.wear) - max(1, len(table.space.wear) // 100)
    mirror = table.mirror  # a writer may take it away meanwhile
    if mirror is not None:
        memory = mirror.nbytes
    else:
        memory = table.view.cached.nbytes + table.cache.size_bytes + table.view.resident.nbytes
    with table.lock:
        free, cached = table.space.num_free, len(table.cache) if table.capacity else 0
    return TableStatistics(
        rows=table.record.rows,
        tier=table.record.tier,
        reason=table.record.reason,
        block_bytes=table.record.block_bytes,
        slots_per_block=table.slots_per_block,
        num_blocks=table.space.num_blocks,
        free_blocks=free,
        delta_blocks=int((table.space.kind == DELTA).sum()),
        resident_rows=table.num_resident,
        copies=int((table.view.replica_valid > 0).sum()),
        cache_capacity=table.capacity,
        cached=cached,
        policy=table.record.policy,
        dram_bytes=memory + (0 if table.shadow is None else table.shadow.nbytes),
        map_bytes=table.map_bytes,
        is_direct=table.file.direct,
        engine=table.lanes.engine,
        prefetches=table.prefetches,
        most_worn=int(np.sort(table.space.wear)[used]) if len(table.space.wear) else 0,
        **asdict(table.counters),
    )
