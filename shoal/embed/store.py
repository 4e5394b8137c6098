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
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from math import isfinite
from pathlib import Path
from types import TracebackType
from typing import Any, Self, final

import numpy as np

from shoal import validate
from shoal.clock import Clock
from shoal.embed import deltas, lookups, rewrite, training
from shoal.embed.applying import restore_resident
from shoal.embed.arrays import array_of
from shoal.embed.changes import Change
from shoal.embed.creating import make_files
from shoal.embed.deltas import Step
from shoal.embed.layout import Layout
from shoal.embed.loading import Pieces, whole_rows
from shoal.embed.locks import FolderLock
from shoal.embed.manifest import Manifest, TableRecord, read_state
from shoal.embed.options import Options
from shoal.embed.progress import Tell, shown
from shoal.embed.reads import Lanes
from shoal.embed.space import FREE
from shoal.embed.spec import (
    SETTINGS,
    TableSpec,
    first_records,
    ids_of,
    offers_of,
    offsets_of,
    parse_bytes,
    refuse_bad_update,
    refuse_layout,
    refuse_trace,
)
from shoal.embed.statistics import Statistics, statistics_of
from shoal.embed.stored import copy_of, damaged_blocks, stored_rows, try_block
from shoal.embed.table import Table
from shoal.embed.tail import Answer, Tail
from shoal.embed.trace import Trace
from shoal.embed.writer import TIDY_BLOCKS, Writer
from shoal.errors import StoreError


@final
class EmbeddingStore:
    """Tables of vectors in a folder. Made by `create` and `open`."""

    def __init__(self, folder: Path, manifest: Manifest, lock: FolderLock, options: Options) -> None:
        self.folder, self.read_only = folder, options.read_only
        self._lock, self._options = lock, options
        self._writing = threading.RLock()
        self._is_open, self._process = True, os.getpid()
        self._pool_lock = threading.Lock()
        self._pool: ThreadPoolExecutor | None = None
        self._tables: dict[str, Table] = {}
        self._writer: Writer | None = None
        try:
            for record in manifest.tables:
                self._tables[record.name] = self._open_table(record)
            self._writer = Writer(folder, manifest, self._tables, options.ticking, read_only=self.read_only)
            for table in self._tables.values():
                if table.record.shadow:
                    table.make_shadow()
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
            dram: memory for caches, rows that change often, tables kept whole; where rows are (9 to 13 bytes a row of tables
                in blocks) comes on top.
            writes_per_day: the write budget in capacities a day.
            capacity: of the drive; no more than the store's own blocks counts, which is also the default: only they wear.
            options: as of `open`.

        Raises:
            ValueError: what must be in memory does not fit, or a setting is out of range.
            StoreError: there is a store already.
            StoreUnavailable: the disk is full or fails.
        """
        validate.of_kind(str | os.PathLike, "a path", path=path)
        dram_bytes = parse_bytes(dram, "dram")
        validate.positive(writes_per_day=writes_per_day)
        if not isfinite(writes_per_day):
            raise ValueError(
                f"Expected a finite writes_per_day, got {writes_per_day!r}. For no limit, give a large number such as 1e6."
            )
        chosen = Options(**options)
        if chosen.read_only:
            raise ValueError(
                "Expected no read_only for a store that is made. Make it, close it, and open it with read_only."
            )
        blank = Manifest(
            epoch=0,
            dram_bytes=dram_bytes,
            writes_per_day=float(writes_per_day),
            capacity_bytes=parse_bytes(capacity, "capacity", least=0),
            written_bytes=0,
            budget_bytes=0.0,
            budget_wall_s=chosen.ticking.wall_s(),
            journal="",
            tables=tuple(first_records(tables, dram_bytes)),
        )
        make_files(Path(path), blank)
        return cls.open(path, **options)

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
        validate.of_kind(str | os.PathLike, "a path", path=path)
        folder = Path(path)
        options = Options(
            read_only=read_only, direct=direct, engine=engine, threads=threads, tail=tail, tidy=tidy, remember=remember, clock=clock
        )  # fmt: skip
        Manifest.read(folder)  # says that there is none, before a lock file is made
        lock = FolderLock(folder, write=not read_only)
        try:
            return cls(folder, Manifest.read(folder), lock, options)
        except BaseException:
            lock.close()
            raise

    def _open_table(self, record: TableRecord) -> Table:
        state, _ = read_state(self.folder / record.state, record.state_hash)
        lanes = Lanes(record.block_bytes, engine=self._options.engine, threads=self._options.threads)
        table = Table(record, self.folder, state, lanes, self._options)
        restore_resident(table)
        return table

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
        """As `lookup`, but rows whose blocks take longer than `deadline_s` are flagged, and are not read.

        They come from the table's shadow in low precision; without one they are the mean of the rows that were found.
        """
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
        validate.of_kind(Mapping, "a mapping of tables to ids, such as {'items': [3, 1]}", ids=ids)
        for name in ids:
            self._table(name)
        wanted = {name: ids_of(some, name) for name, some in ids.items()}
        if len(wanted) < 2:
            return {name: self.lookup(name, some) for name, some in wanted.items()}
        with self._pool_lock:
            self._check_open()
            if self._pool is None:
                self._pool = ThreadPoolExecutor(max(2, len(self._tables)), "shoal-lookup")
            waiting = {name: self._pool.submit(self.lookup, name, some) for name, some in wanted.items()}
        return {name: one.result() for name, one in waiting.items()}

    def _table(self, name: str) -> Table:
        self._check_open()
        if not isinstance(name, str) or name not in self._tables:
            raise ValueError(f"Expected a table of {', '.join(sorted(self._tables))}, got {name!r}.")
        return self._tables[name]

    @property
    def tables(self) -> dict[str, TableRecord]:
        """Name -> what the manifest says of it."""
        return {name: table.record for name, table in self._tables.items()}

    def layout(self, table: str) -> Layout:
        """Where the rows of a table lie now: rows that rest in memory at their old place, rows without a place (never written)
        as if they were behind the others."""
        opened = self._table(table)
        with self._writing:
            return opened.layout()

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
            wanted, values = ids_of(ids, table), array_of(vectors, f"vectors of table {table!r}")
            refuse_bad_update(opened.record, wanted, values)
            if not len(wanted):
                return
            rows = opened.codec.encode(values)
            spare = self._write.spare_blocks(opened, rows.nbytes) if self._options.tidy else 0.0
            self._write.commit(opened, deltas.update(opened, wanted, rows, spare_blocks=spare))
            if opened.shadow is not None:
                opened.shadow[wanted] = opened.shadow_codec.encode(values)
            self._write.follow_up(opened, tidy=self._options.tidy)

    def load(
        self,
        table: str,
        vectors: np.ndarray | Iterable[np.ndarray],
        layout: Layout | None = None,
        *,
        progress: bool | Tell = True,
    ) -> None:
        """Gives all rows of a table their vectors, durably: (rows, dim), or in pieces, in the order of ids.

        Pieces are for tables larger than memory; they are written in id order, so a layout needs the whole array.
        A table's first load is not taken from the write budget. `progress`: as of `retrain`.
        """
        with self._writing, shown(progress) as tell:
            opened = self._writable(table)
            is_whole = hasattr(vectors, "__array__")
            if layout is None:
                layout = Layout.in_id_order(opened.record.rows, opened.slots_per_block)
            elif not is_whole:
                raise ValueError("Expected one array of vectors with a layout, got pieces. Load first, then retrain.")
            refuse_layout(opened.record, layout, opened.slots_per_block)
            rows_of = whole_rows(opened, vectors) if is_whole else Pieces(opened, vectors).rows_of
            self._write.rewrite(opened, layout, rows_of, is_new=True, tell=tell)

    def place(self, table: str, layout: Layout, *, offered: np.ndarray | None = None, most_blocks: int | None = None,
              misses: Trace | None = None, progress: bool | Tell = True, **settings: Any) -> int:  # fmt: skip
        """Moves a table's rows to a layout; returns the blocks written.

        Args:
            layout: of all rows, with as many vectors a block as the table has.
            offered: (num_blocks,) how many of a block's first rows are offered to the cache; none by default.
            most_blocks: move only what saves most reads of `misses`, so many blocks at most, and nothing that saves none.
            misses: what the cache missed, query by query.
            progress: as of `retrain`.
            settings: `policy`, `admission`, `read_aware`, `cache_bytes`, `tier`, `reason` of the table from now on.
        """
        for setting in settings:
            validate.one_of(SETTINGS, setting=setting)
        with self._writing, shown(progress) as tell:
            opened = self._writable(table)
            refuse_layout(opened.record, layout, opened.slots_per_block)
            offers = offers_of(offered, layout)
            if most_blocks is None:
                self._write.rewrite(opened, layout, partial(stored_rows, opened), offers, settings, tell=tell)
                return layout.num_blocks
            validate.whole(1, most_blocks=most_blocks)
            if misses is None or settings:
                raise ValueError(
                    "Expected misses, and no settings, with most_blocks: what is moved is what they would read."
                )
            refuse_trace(opened.record, misses)
            chosen = rewrite.best_blocks(opened, layout, misses, int(most_blocks))
            if len(chosen):
                self._write.commit(opened, rewrite.some(opened, layout, chosen, offers))
            return len(chosen)

    def retrain(
        self,
        trace: Trace | Mapping[str, Trace],
        *,
        most_blocks: int | None = None,
        effort: training.Effort = "normal",
        space: float = 0.0,
        policies: Sequence[str] = ("s3-fifo", "w-tinylfu", "lru"),
        progress: bool | Tell = True,
    ) -> dict[str, Any]:
        """Learns from a trace where rows should lie, which cache each table should have, and how much memory; see `training.py`.

        Args:
            trace: of the only table, or {table: trace}; 10 queries at least. Tables that are not named stay as they are.
            most_blocks: write so many blocks of each table at most, those that save most reads; caches and memory stay as they are.
            effort: normal | high, how long to look for a placement; see `docs/embedding-store.md` for what it brings.
            space: further copies of rows, as a part of the rows: they save reads, and serve when a block is late or damaged.
            policies: evictions to choose from.
            progress: shows a bar with rate and time left where standard error is a terminal; or a function that is told each
                `shoal.embed.progress.Progress`.

        Returns:
            For each table: `tier`, `reason`, `policy`, `cache_bytes`, `reads_before`, `reads_after` (a query, foretold),
            `written_blocks`.

        Raises:
            TypeError, ValueError: an argument is of the wrong kind or out of range.
            DataError: a trace has too few queries, or rows that the table has not.
            StoreUnavailable: the disk is full or fails; the table stays as it was.
        """
        wanted = training.Wanted(most_blocks=most_blocks, effort=effort, space=space, policies=policies)
        with self._writing, shown(progress) as tell:
            self._check_writable()
            if isinstance(trace, Trace):
                if len(self._tables) != 1:
                    raise ValueError(
                        f"Expected {{table: trace}} for the tables {', '.join(self._tables)}, got one trace."
                    )
                trace = {next(iter(self._tables)): trace}
            validate.of_kind(Mapping, "a shoal.embed.Trace of the only table, or {table: trace}", trace=trace)
            for name, one in trace.items():
                refuse_trace(self._table(name).record, one)
            learned: dict[str, Any] = training.retrain(self, trace, wanted, tell)
            return learned

    def rebalance(self, *, least_gain: float = 0.03) -> dict[str, float]:
        """Divides memory between the tables, and chooses their evictions, by the latest lookups (see `open`'s `remember`).

        Writes no block, and changes nothing where that would save less than `least_gain` of the reads. Call it from time to time.

        Returns:
            Bytes of memory of each table that was weighed: tables in blocks that remember enough queries.
        """
        with self._writing:
            self._check_writable()
            return training.rebalance(self, least_gain=least_gain)

    def compact(self, *, most_blocks: int | None = None) -> int:
        """Tidies up at once, whatever the budget says; returns the blocks written. By default until nothing is left to do."""
        validate.whole(0, most_blocks=0 if most_blocks is None else most_blocks)
        written = 0
        with self._writing:
            for name in self._tables:
                opened = self._writable(name)
                while most_blocks is None or written < most_blocks:
                    room = TIDY_BLOCKS if most_blocks is None else most_blocks - written
                    step = deltas.compact(opened, room, everything=True)
                    if step is None:
                        break
                    self._write.commit(opened, step)
                    written += len(step.change.blocks)
        return written

    def verify(self, *, repair: bool = False, progress: bool | Tell = True) -> dict[str, list[int]]:
        """Reads every block in use; table -> numbers of the damaged ones.

        Args:
            repair: write the rows of damaged blocks anew where each has a copy (in the cache, in memory, in a replica); what is
                repaired is no longer listed.
            progress: as of `retrain`.
        """
        validate.flags(repair=repair)
        found: dict[str, list[int]] = {}
        with shown(progress) as tell:
            for name, table in self._tables.items():
                self._table(name)
                with table.reading():
                    bad = damaged_blocks(table, tell)
                found[name] = [block for block in bad if not (repair and self._repair(table, block))]
        return found

    def _repair(self, table: Table, block: int) -> bool:
        size = table.slots_per_block
        with self._writing:
            self._check_writable()
            if table.space.kind[block] == FREE or try_block(table, block) is not None:
                return True  # another thread has written it, or freed it, meanwhile
            ids = table.view.id_at[block * size : (block + 1) * size].astype(np.int64)
            ids = ids[
                (ids >= 0) & (table.view.where[np.maximum(ids, 0)] == np.arange(block * size, (block + 1) * size))
            ]
            rows = [copy_of(table, int(id), block) for id in ids]
            if any(row is None for row in rows):
                return False
            if len(ids):
                self._write.commit(table, deltas.update(table, ids, np.stack(rows)))
            self._write.commit(
                table, Step(Change(table=table.record.name, freed=np.array([block])), np.empty((0, 1)), 0)
            )
            return True

    @property
    def _write(self) -> Writer:
        assert self._writer is not None, "the store did not open"
        return self._writer

    def _writable(self, table: str) -> Table:
        self._check_writable()
        return self._table(table)

    def _check_writable(self) -> None:
        if self.read_only:
            raise StoreError(f"{self.folder} was opened for reading only. Open it without read_only to write.")
        self._check_open()

    def _check_open(self) -> None:
        if os.getpid() != self._process and not self.read_only:
            raise StoreError(
                f"The store {self.folder} was opened for writing by process {self._process}, of which this one is a fork: neither "
                "would know what the other writes. Use it there, or let workers fork from a store opened with read_only."
            )
        if not self._is_open or (self._writer is not None and self._writer.is_broken):
            raise StoreError(
                f"The store {self.folder} is closed, or a write was interrupted or failed at its very end. Open it again."
            )

    # Telling and ending.

    def statistics(self) -> Statistics:
        """What the store is and did. Cheap; reads counters, waits for nothing longer than a lookup holds a lock."""
        writer = self._write
        return Statistics(
            epoch=writer.manifest.epoch,
            dram_bytes=writer.manifest.dram_bytes,
            journal_bytes=0 if writer.journal is None else writer.journal.size_bytes,
            written_bytes=writer.written_bytes,
            budget_bytes=writer.budget_bytes,
            postponed=writer.postponed,
            tables={name: statistics_of(table) for name, table in self._tables.items()},
        )

    def close(self) -> None:
        """Waits for lookups that have begun, refuses others, closes the files. All that was committed is on the disk already."""
        with self._writing:
            with self._pool_lock:
                self._is_open = False
            self._release()

    def _release(self) -> None:
        for table in self._tables.values():
            table.close()
        if self._pool is not None:
            self._pool.shutdown()
        if self._writer is not None:
            self._writer.close()
        self._lock.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
