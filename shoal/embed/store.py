"""Embedding tables on block storage behind a little memory: the one class that users need.

    >>> from shoal.embed import EmbeddingStore, TableSpec
    >>> with EmbeddingStore.create(path, tables={"items": TableSpec(rows=10**6, dim=32)}, dram="16MB") as store:
    ...     store.load("items", vectors)
    ...     store.retrain({"items": trace})
    ...     store.lookup("items", [3, 1, 4])

A store is a folder (`README.md` has its formats), open in one process that writes or in several that read. Lookups may
come from many threads, also while one updates.

Guarantees:
    (1) When `update`, `load`, `retrain` or `compact` returns, what it did survives a kill or a power cut; before, none of
        it is visible, and after a kill either all or none of it is there.
    (2) A damaged block is found when it is read, named, and its rows are served from a copy where there is one.
    (3) What the store writes on its own account stays within its write budget.
"""

import os
import threading
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self, final

import numpy as np

from shoal import validate
from shoal.clock import Clock, SystemClock
from shoal.embed import deltas, lookups, rewrite
from shoal.embed.blockfile import BlockFile
from shoal.embed.budget import WriteBudget
from shoal.embed.changes import Change
from shoal.embed.deltas import Step
from shoal.embed.journal import Journal, Replay
from shoal.embed.layout import Layout
from shoal.embed.locks import FolderLock
from shoal.embed.manifest import NAME, Manifest, TableRecord, read_state, write_state
from shoal.embed.reads import Lanes
from shoal.embed.space import DELTA, FREE
from shoal.embed.spec import TableSpec, first_records, ids_of, offsets_of, parse_bytes, refuse_bad_update
from shoal.embed.table import Table
from shoal.embed.tail import Answer, Tail
from shoal.embed.trace import Trace
from shoal.errors import StoreError
from shoal.record.blobs import disk
from shoal.tensors import Tensors

_JOURNAL_BYTES: Final = 4 << 20
"""A journal is folded into the tables' states when it is larger than this and than twice the states."""
_MOST_CHANGED: Final = 1 / 8
"""A table in memory is written anew when so many of its rows changed; before, they go into its state."""
_TIDY_BLOCKS: Final = 1024
"""Most blocks that one update writes to tidy up."""


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
    tables: dict[str, TableStatistics]


@final
class EmbeddingStore:
    """Tables of vectors in a folder. Made by `create` and `open`."""

    def __init__(
        self, folder: Path, manifest: Manifest, lock: FolderLock, *, read_only: bool, options: dict[str, Any]
    ) -> None:
        self.folder, self.read_only = folder, read_only
        self._manifest, self._lock, self._options = manifest, lock, options
        self._clock: Clock = options["clock"]
        self._writing = threading.RLock()
        self._is_open = True
        self._pool_lock = threading.Lock()
        self._pool: ThreadPoolExecutor | None = None
        self._tables: dict[str, Table] = {}
        try:
            for record in manifest.tables:
                self._tables[record.name] = self._open_table(record)
            self._journal = self._replay()
            self._budget = WriteBudget(
                writes_per_day=manifest.writes_per_day,
                capacity_bytes=self._capacity(),
                balance=manifest.budget_bytes,
                now_s=manifest.budget_wall_s,
            )
            self._budget.spend(self._replayed_bytes)
            for table in self._tables.values():
                if table.record.shadow:
                    table.make_shadow()
            if not read_only:
                self._sweep()
        except BaseException:
            self._release()
            raise

    # Making and opening.

    @classmethod
    def create(
        cls,
        path: str | os.PathLike[str],
        tables: Mapping[str, TableSpec],
        *,
        dram: str | int = "512MB",
        writes_per_day: float = 1.0,
        capacity: str | int = 0,
        **options: Any,
    ) -> Self:
        """Makes a store whose rows are all zeros, and opens it.

        Args:
            path: a folder; it is made, and must hold no store.
            tables: name -> what it is.
            dram: memory for caches, rows that change often, tables kept whole; where rows are (about 13 bytes a row of tables
                in blocks) comes on top.
            writes_per_day: the write budget in capacities a day.
            capacity: of the drive; no more than the store's own blocks counts, which is also the default: only they wear.
            options: as of `open`.

        Raises:
            ValueError: what must be in memory does not fit, or a setting is out of range.
            StoreError: there is a store already.
            StoreUnavailable: the disk is full or fails.
        """
        folder, dram_bytes = Path(path), parse_bytes(dram, "dram")
        validate.positive(writes_per_day=writes_per_day)
        records = first_records(tables, dram_bytes)
        with disk(folder):
            folder.mkdir(parents=True, exist_ok=True)
        if (folder / NAME).exists():
            raise StoreError(f"There is an embedding store in {folder} already. Open it, or choose another folder.")
        with FolderLock(folder, write=True):
            for record in records:
                (folder / record.blocks).unlink(missing_ok=True)
                BlockFile.create(folder / record.blocks, record.block_bytes, 0).close()
            clock = options.get("clock") or SystemClock()
            blank = Manifest(
                epoch=0,
                dram_bytes=dram_bytes,
                writes_per_day=float(writes_per_day),
                capacity_bytes=parse_bytes(capacity, "capacity") if capacity else 0,
                written_bytes=0,
                budget_bytes=0.0,
                budget_wall_s=clock.wall_s(),
                journal="",
                tables=tuple(records),
            )
            _commit_files(folder, blank, {record.name: _empty_state(record) for record in records})
        return cls.open(folder, **options)

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        *,
        read_only: bool = False,
        direct: bool = True,
        engine: str = "auto",
        threads: int = 8,
        tail: Tail | None = None,
        tidy: bool = True,
        remember: int = 0,
        clock: Clock | None = None,
    ) -> Self:
        """Opens a store as it was last committed.

        Args:
            read_only: nothing is written; other processes may read too.
            direct: past the page cache, where the file system can.
            engine: aio | threads | auto: how many reads are in flight at once.
            threads: of the engine `threads`.
            tail: hedging of late reads; none by default.
            tidy: compact after updates, within the write budget. Off: only when `compact` is called.
            remember: the latest lookups of each table to remember, for `rebalance`; 5 bytes each. None by default.
            clock: whose seconds fill the write budget.

        Raises:
            StoreError: there is no store, it is damaged, or another process writes to it.
        """
        folder = Path(path)
        validate.one_of(("auto", "aio", "threads"), engine=engine)
        validate.not_negative(remember=remember)
        options = {
            "direct": direct, "engine": engine, "threads": threads, "tail": tail, "tidy": tidy, "remember": remember,
            "clock": clock or SystemClock(),
        }  # fmt: skip
        Manifest.read(folder)  # says that there is none, before a lock file is made
        lock = FolderLock(folder, write=not read_only)
        try:
            return cls(folder, Manifest.read(folder), lock, read_only=read_only, options=options)
        except BaseException:
            lock.close()
            raise

    def _open_table(self, record: TableRecord) -> Table:
        state, _ = read_state(self.folder / record.state, record.state_hash)
        lanes = Lanes(record.block_bytes, engine=self._options["engine"], threads=self._options["threads"])
        kept = {name: self._options[name] for name in ("direct", "tail", "remember")}
        table = Table(record, self.folder, state, lanes, read_only=self.read_only, **kept)
        table.restore_resident()
        return table

    def _replay(self) -> Journal | None:
        path = self.folder / self._manifest.journal
        replay = Replay(path)
        self._replayed_bytes = 0
        for payload in replay:
            change = Change.from_bytes(payload)
            if change.table not in self._tables:
                raise StoreError(
                    f"{path} changes a table {change.table!r} that the store has not. Restore it from a copy."
                )
            table = self._tables[change.table]
            table.apply(change)
            table.space.wrote(change.blocks)
            self._replayed_bytes += len(change.blocks) * table.record.block_bytes
        self._replayed_bytes += replay.end
        return None if self.read_only else Journal(path, sequence=replay.sequence, end=replay.end)

    def _sweep(self) -> None:
        """Deletes what a kill left of a state that was never committed, or of one before."""
        keep = {self._manifest.journal, *(record.state for record in self._manifest.tables)}
        for path in [*self.folder.glob("*.state"), *self.folder.glob("journal-*.log"), self.folder / f"{NAME}.new"]:
            if path.name not in keep:
                path.unlink(missing_ok=True)

    def _capacity(self) -> int:
        """What the budget counts by: no more than the store's own blocks, as wear spreads over these only."""
        own = sum(table.space.num_blocks * table.record.block_bytes for table in self._tables.values())
        return min(self._manifest.capacity_bytes or own, own) or 1

    # Reading.

    def lookup(self, table: str, ids: Any) -> np.ndarray:
        """The vectors of ids (n,) integers: (n, dim) float32. Ids may repeat.

        Raises:
            ValueError: an id is below 0 or not below the table's rows, or ids have more than one dimension.
            TypeError: ids are no integers.
            StoreError: a block is damaged and a row has no copy.
        """
        opened = self._table(table)
        rows, _ = opened.rows_of(ids_of(ids, table))
        return opened.codec.decode(rows)

    def lookup_within(self, table: str, ids: Any, *, deadline_s: float) -> Answer:
        """As `lookup`, but rows whose blocks take longer than `deadline_s` come in low precision, and are flagged."""
        validate.positive(deadline_s=deadline_s)
        opened = self._table(table)
        wanted = ids_of(ids, table)
        rows, late = opened.rows_of(wanted, deadline_s=deadline_s)
        return Answer(opened.codec.decode(rows), np.zeros(len(wanted), bool) if late is None else late)

    def lookup_bags(self, table: str, ids: Any, offsets: Any, mode: str = "sum") -> np.ndarray:
        """One vector a bag, (bags, dim) float32: bag b is ids[offsets[b]:offsets[b + 1]], an empty one is zeros.

        Args:
            ids: (n,) integers.
            offsets: (bags,) where bags begin, from 0, not falling.
            mode: sum | mean | max.
        """
        wanted = ids_of(ids, table)
        bounds = offsets_of(offsets, len(wanted))
        validate.one_of(lookups.MODES, mode=mode)
        return lookups.reduce_bags(self.lookup(table, wanted), bounds, mode)

    def lookup_many(self, ids: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """The vectors of several tables, their reads in flight together: {table: ids (n,)} -> {table: (n, dim)}."""
        wanted = {name: ids_of(some, name) for name, some in ids.items()}
        for name in wanted:
            self._table(name)
        if len(wanted) < 2:
            return {name: self.lookup(name, some) for name, some in wanted.items()}
        with self._pool_lock:
            if self._pool is None:
                self._pool = ThreadPoolExecutor(max(2, len(self._tables)), "shoal-lookup")
        waiting = {name: self._pool.submit(self.lookup, name, some) for name, some in wanted.items()}
        return {name: one.result() for name, one in waiting.items()}

    def _table(self, name: str) -> Table:
        self._check_open()
        if name not in self._tables:
            raise ValueError(f"Expected a table of {', '.join(sorted(self._tables))}, got {name!r}.")
        return self._tables[name]

    @property
    def tables(self) -> dict[str, TableRecord]:
        """Name -> what the manifest says of it."""
        return {name: table.record for name, table in self._tables.items()}

    def layout(self, table: str) -> Layout:
        """Where the rows of a table lie, as it is now (rows that rest in memory at their old place); rows never written
        have no place, so the table must have been loaded."""
        opened = self._table(table)
        where = opened.state()["where"].astype(np.int64)
        valid = opened.view.replica_valid > 0
        ids, slots = opened.view.replica_ids[valid].astype(np.int64), opened.view.replica_slots[valid].astype(np.int64)
        return Layout(where, opened.slots_per_block, ids, slots)

    # Writing.

    def update(self, table: str, ids: Any, vectors: Any) -> None:
        """Gives rows new vectors, durably.

        Args:
            ids: (n,) integers, each once.
            vectors: (n, dim) floats.

        Raises:
            ValueError, TypeError: ids or vectors are not as they should be; nothing has changed.
            StoreUnavailable: the disk is full or fails; nothing has changed.
        """
        with self._writing:
            opened = self._writable(table)
            wanted, values = ids_of(ids, table), np.asarray(vectors)
            refuse_bad_update(opened.record, wanted, values)
            if not len(wanted):
                return
            rows = opened.codec.encode(values)
            spare = self._spare_blocks(opened, rows.nbytes) if self._options["tidy"] else 0.0
            self._commit(opened, deltas.update(opened, wanted, rows, spare_blocks=spare))
            if opened.shadow is not None:
                opened.shadow[wanted] = opened.shadow_codec.encode(values)
            if self._options["tidy"]:
                self._tidy(opened)
            self._fold_if_long()

    def load(self, table: str, vectors: np.ndarray | Iterable[np.ndarray], layout: Layout | None = None) -> None:
        """Gives all rows of a table their vectors, durably: (rows, dim), or in pieces, in the order of ids.

        Pieces are for tables larger than memory; they are written in id order, so a layout needs the whole array.
        """
        with self._writing:
            opened = self._writable(table)
            if layout is None:
                layout = Layout.in_id_order(opened.record.rows, opened.slots_per_block)
            elif not isinstance(vectors, np.ndarray):
                raise ValueError("Expected one array of vectors with a layout, got pieces. Load first, then retrain.")
            if isinstance(vectors, np.ndarray):
                _refuse_shape(opened.record, vectors)
                self._rewrite(opened, layout, lambda ids: opened.codec.encode(vectors[ids]), is_new=True)
            else:
                self._rewrite(opened, layout, _Pieces(opened, vectors).rows_of, is_new=True)

    def place(self, table: str, layout: Layout, *, offered: np.ndarray | None = None, most_blocks: int | None = None,
              misses: Trace | None = None, **settings: Any) -> int:  # fmt: skip
        """Moves a table's rows to a layout; returns the blocks written.

        Args:
            layout: of all rows, with as many vectors a block as the table has.
            offered: (num_blocks,) how many of a block's first rows are offered to the cache; none by default.
            most_blocks: move only what saves most reads of `misses`, so many blocks at most, and nothing that saves none.
            misses: what the cache missed, query by query.
            settings: `policy`, `admission`, `cache_bytes`, `tier`, `reason` of the table from now on.
        """
        with self._writing:
            opened = self._writable(table)
            if layout.vectors_per_block != opened.slots_per_block or layout.num_rows != opened.record.rows:
                raise ValueError(
                    f"Expected a layout of {opened.record.rows} rows, {opened.slots_per_block} a block, for table {table!r}, got "
                    f"{layout.num_rows} rows, {layout.vectors_per_block} a block."
                )
            offers = np.zeros(layout.num_blocks, np.int16) if offered is None else offered.astype(np.int16)
            if most_blocks is None:
                self._rewrite(opened, layout, opened.stored_rows, offers, settings)
                return layout.num_blocks
            if misses is None or settings:
                raise ValueError(
                    "Expected misses, and no settings, with most_blocks: what is moved is what they would read."
                )
            chosen = rewrite.best_blocks(opened, layout, misses, most_blocks)
            if len(chosen):
                self._commit(opened, rewrite.some(opened, layout, chosen, offers))
            return len(chosen)

    def retrain(self, trace: Trace | Mapping[str, Trace], **options: Any) -> dict[str, Any]:
        """Learns from a trace where rows should lie, which cache each table should have, and how much memory; see `training.py`.

        Returns:
            For each table what was done and why.
        """
        from shoal.embed import training

        with self._writing:
            self._check_writable()
            if isinstance(trace, Trace):
                if len(self._tables) != 1:
                    raise ValueError(
                        f"Expected {{table: trace}} for the tables {', '.join(self._tables)}, got one trace."
                    )
                trace = {next(iter(self._tables)): trace}
            for name in trace:
                self._table(name)
            learned: dict[str, Any] = training.retrain(self, dict(trace), **options)
            return learned

    def rebalance(self, *, least_gain: float = 0.03) -> dict[str, float]:
        """Divides memory between the tables, and chooses their evictions, by the latest lookups (see `open`'s `remember`).

        Writes no block, and changes nothing where that would save less than `least_gain` of the reads. Call it from time to time.

        Returns:
            Bytes of memory of each table that was weighed: tables in blocks that remember enough queries.
        """
        from shoal.embed import training

        with self._writing:
            self._check_writable()
            return training.rebalance(self, least_gain=least_gain)

    def _configure(self, settings: Mapping[str, Mapping[str, Any]]) -> None:
        """Gives tables other caches, durably; no row moves."""
        changed = {
            name: (replace(self._tables[name].record, **some), self._tables[name].state())
            for name, some in settings.items()
        }
        self._checkpoint(changed)
        for name in settings:
            self._tables[name].adopt(self._manifest_record(name))

    def compact(self, *, most_blocks: int | None = None) -> int:
        """Tidies up at once, whatever the budget says; returns the blocks written. By default until nothing is left to do."""
        written = 0
        with self._writing:
            for name in self._tables:
                opened = self._writable(name)
                while most_blocks is None or written < most_blocks:
                    room = _TIDY_BLOCKS if most_blocks is None else most_blocks - written
                    step = deltas.compact(opened, room, everything=True)
                    if step is None:
                        break
                    self._commit(opened, step)
                    written += len(step.change.blocks)
        return written

    def verify(self, *, repair: bool = False) -> dict[str, list[int]]:
        """Reads every block in use; table -> numbers of the damaged ones.

        `repair`: writes the rows of damaged blocks anew where each has a copy (in the cache, in memory, in a replica); what is
        repaired is no longer listed.
        """
        found: dict[str, list[int]] = {}
        for name, table in self._tables.items():
            self._table(name)
            used = np.flatnonzero(table.space.kind != FREE)
            bad = [int(b) for b in used if table._try_block(int(b)) is None]
            found[name] = [block for block in bad if not (repair and self._repair(table, block))]
        return found

    def _repair(self, table: Table, block: int) -> bool:
        size = table.slots_per_block
        with self._writing:
            self._check_writable()
            ids = table.view.id_at[block * size : (block + 1) * size].astype(np.int64)
            ids = ids[
                (ids >= 0) & (table.view.where[np.maximum(ids, 0)] == np.arange(block * size, (block + 1) * size))
            ]
            rows = [table._copy_of(int(id), block) for id in ids]
            if any(row is None for row in rows):
                return False
            if len(ids):
                self._commit(table, deltas.update(table, ids, np.stack(rows)))
            self._commit(table, Step(Change(table=table.record.name, freed=np.array([block])), np.empty((0, 1)), 0))
            return True

    def _writable(self, table: str) -> Table:
        self._check_writable()
        return self._table(table)

    def _check_writable(self) -> None:
        if self.read_only:
            raise StoreError(f"{self.folder} was opened for reading only. Open it without read_only to write.")
        self._check_open()

    def _check_open(self) -> None:
        if not self._is_open:
            raise StoreError(f"The store {self.folder} is closed, or a write failed at its very end. Open it again.")

    def _commit(self, table: Table, step: Step) -> None:
        """Journals a change whose blocks are written, then makes it visible."""
        assert self._journal is not None
        try:
            written = self._journal.append(step.change.to_bytes())
        except BaseException:
            deltas.undo(table, step.change.blocks)
            raise
        table.apply(step.change, step.values)
        self._spend(step.written_bytes + written)

    def _spend(self, num_bytes: int) -> None:
        self._budget.resize(self._capacity())
        self._budget.available(self._clock.wall_s())
        self._budget.spend(num_bytes)

    def _spare_blocks(self, table: Table, needed_bytes: int) -> float:
        """What the budget leaves beside an update, in blocks; half of it, as more updates may come."""
        left = self._budget.available(self._clock.wall_s()) - 1.1 * needed_bytes
        return min(_TIDY_BLOCKS, max(0.0, left / 2 / table.record.block_bytes))

    def _tidy(self, table: Table) -> None:
        room = self._budget.available(self._clock.wall_s()) / 2  # the rest is for what users change next
        most = min(_TIDY_BLOCKS, int(room // table.record.block_bytes))
        if most >= 1:
            step = deltas.compact(table, most)
            if step is not None:
                self._commit(table, step)

    def _fold_if_long(self) -> None:
        assert self._journal is not None
        states = sum(table.map_bytes for table in self._tables.values())
        if self._journal.size_bytes <= max(_JOURNAL_BYTES, 2 * states):
            return
        for table in self._tables.values():
            if table.mirror is not None and table.changed.mean() > _MOST_CHANGED:
                self._rewrite(table, Layout.in_id_order(table.record.rows, table.slots_per_block), table.stored_rows)
        self._checkpoint({})

    def _rewrite(
        self,
        table: Table,
        layout: Layout,
        rows_of: Callable[[np.ndarray], np.ndarray],
        offered: np.ndarray | None = None,
        settings: Mapping[str, Any] | None = None,
        *,
        is_new: bool = False,
    ) -> None:
        """Writes a table anew as a layout says, and commits it with a new manifest."""
        offers = np.zeros(layout.num_blocks, np.int16) if offered is None else offered
        record = replace(table.record, **(settings or {}))
        old = np.flatnonzero(table.space.kind != FREE)
        state, blocks = rewrite.whole(table, layout, offers, rows_of)
        self._spend(len(blocks) * record.block_bytes)
        try:
            self._checkpoint({record.name: (record, state)})
        except BaseException:
            deltas.undo(table, blocks)
            raise
        table.become(self._manifest_record(record.name), state, blocks, old, is_new=is_new)
        if record.shadow:
            table.make_shadow()

    def _manifest_record(self, name: str) -> TableRecord:
        return next(record for record in self._manifest.tables if record.name == name)

    def _checkpoint(self, new: Mapping[str, tuple[TableRecord, Tensors]]) -> None:
        """Writes the states of all tables (those of `new` as given) and an empty journal, and commits them."""
        records = tuple(new[name][0] if name in new else table.record for name, table in self._tables.items())
        states = {name: new[name][1] if name in new else table.state() for name, table in self._tables.items()}
        now_s = self._clock.wall_s()
        manifest = replace(
            self._manifest,
            tables=records,
            written_bytes=self._manifest.written_bytes + self._budget.spent,
            budget_bytes=self._budget.available(now_s),
            budget_wall_s=now_s,
        )
        try:
            made, written = _commit_files(self.folder, manifest, states)
        except StoreError:
            if _is_committed(self.folder, manifest.epoch + 1):  # it has its name, but perhaps not for ever
                self._is_open = False
            raise
        assert self._journal is not None
        self._journal.close()
        self._journal = Journal(self.folder / made.journal, sequence=0, end=0)
        self._manifest = made
        for record in made.tables:
            if record.name not in new:
                self._tables[record.name].record = record
        self._budget.spent = 0
        self._budget.spend(written)
        self._sweep()

    # Telling and ending.

    def statistics(self) -> Statistics:
        """What the store is and did. Cheap; reads counters, waits for nothing longer than a lookup holds a lock."""
        self._budget.resize(self._capacity())
        return Statistics(
            epoch=self._manifest.epoch,
            dram_bytes=self._manifest.dram_bytes,
            journal_bytes=0 if self._journal is None else self._journal.size_bytes,
            written_bytes=self._manifest.written_bytes + self._budget.spent,
            budget_bytes=self._budget.available(self._clock.wall_s()),
            tables={name: _statistics_of(table) for name, table in self._tables.items()},
        )

    def close(self) -> None:
        """Ends the store's threads and closes its files. All that was committed is on the disk already."""
        with self._writing:
            self._is_open = False
            self._release()

    def _release(self) -> None:
        if self._pool is not None:
            self._pool.shutdown()
        for table in self._tables.values():
            table.close()
        self._tables = {}
        journal = getattr(self, "_journal", None)
        if journal is not None:
            journal.close()
        self._lock.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


@final
class _Pieces:
    """Rows in id order from an iterable of arrays, a piece in memory at a time."""

    def __init__(self, table: Table, pieces: Iterable[np.ndarray]) -> None:
        self._table, self._pieces, self._next = table, iter(pieces), 0
        self._held = np.empty((0, table.codec.words), np.uint32)

    def rows_of(self, ids: np.ndarray) -> np.ndarray:
        assert ids[0] == self._next, "rows are asked for in id order"
        while len(self._held) < len(ids):
            piece = next(self._pieces, None)
            if piece is None:
                raise ValueError(
                    f"Expected {self._table.record.rows} vectors for table {self._table.record.name!r}, got "
                    f"{self._next + len(self._held)}."
                )
            self._held = np.concatenate([self._held, self._table.codec.encode(piece)])
        made, self._held = self._held[: len(ids)], self._held[len(ids) :]
        self._next += len(ids)
        return made


def _refuse_shape(record: TableRecord, vectors: np.ndarray) -> None:
    if vectors.shape != (record.rows, record.dim):
        raise ValueError(
            f"Expected vectors of shape ({record.rows}, {record.dim}) for table {record.name!r}, got {vectors.shape}."
        )


def _empty_state(record: TableRecord) -> Tensors:
    return {
        "where": np.full(record.rows, -1, np.int32),
        "id_at": np.empty(0, np.int32),
        "sums": np.empty(0, np.uint64),
        "kind": np.empty(0, np.uint8),
        "wear": np.empty(0, np.uint32),
        "offered": np.empty(0, np.int16),
        "replica_ids": np.empty(0, np.int32),
        "replica_slots": np.empty(0, np.int32),
        "replica_valid": np.empty(0, np.uint8),
        "resident_ids": np.empty(0, np.int32),
        "resident_rows": np.empty((0, record.codec.words), np.uint32),
    }


def _commit_files(folder: Path, manifest: Manifest, states: Mapping[str, Tensors]) -> tuple[Manifest, int]:
    """Writes the next epoch: states, an empty journal, and last the manifest that names them; it, and the bytes written."""
    epoch, written, records = manifest.epoch + 1, 0, []
    made: list[Path] = []
    try:
        for record in manifest.tables:
            name = f"{record.name}-{epoch}.state"
            (folder / name).unlink(missing_ok=True)
            made.append(folder / name)
            digest, size = write_state(folder / name, states[record.name], {"table": record.name})
            records.append(replace(record, state=name, state_hash=digest))
            written += size
        journal = folder / f"journal-{epoch}.log"
        journal.unlink(missing_ok=True)
        made.append(journal)
        Journal.create(journal).close()
        manifest = replace(manifest, epoch=epoch, journal=journal.name, tables=tuple(records))
        return manifest, written + manifest.write(folder)
    except StoreError:
        if not _is_committed(folder, epoch):
            for path in made:
                path.unlink(missing_ok=True)
        raise


def _is_committed(folder: Path, epoch: int) -> bool:
    """Whether the manifest in the folder is that of the epoch, durably or not."""
    return (folder / NAME).exists() and Manifest.read(folder).epoch == epoch


def _statistics_of(table: Table) -> TableStatistics:
    used = len(table.space.wear) - max(1, len(table.space.wear) // 100)
    if table.mirror is not None:
        memory = table.mirror.nbytes
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
