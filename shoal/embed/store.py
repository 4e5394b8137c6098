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
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self, final

import numpy as np

from shoal import validate
from shoal.clock import Clock, SystemClock
from shoal.embed import deltas, lookups, rewrite
from shoal.embed.applying import restore_resident
from shoal.embed.blockfile import BlockFile
from shoal.embed.changes import Change
from shoal.embed.deltas import Step
from shoal.embed.epoch import commit_files, empty_state
from shoal.embed.layout import Layout
from shoal.embed.loading import Pieces, refuse_shape
from shoal.embed.locks import FolderLock
from shoal.embed.manifest import NAME, Manifest, TableRecord, read_state
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
)
from shoal.embed.statistics import Statistics, statistics_of
from shoal.embed.stored import copy_of, stored_rows, try_block
from shoal.embed.table import Table
from shoal.embed.tail import Answer, Tail
from shoal.embed.trace import Trace
from shoal.embed.writer import TIDY_BLOCKS, Writer
from shoal.errors import StoreError
from shoal.record.blobs import disk


@final
class EmbeddingStore:
    """Tables of vectors in a folder. Made by `create` and `open`."""

    def __init__(
        self, folder: Path, manifest: Manifest, lock: FolderLock, *, read_only: bool, options: dict[str, Any]
    ) -> None:
        self.folder, self.read_only = folder, read_only
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
            self._writer = Writer(folder, manifest, self._tables, options["clock"], read_only=read_only)
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
        folder, dram_bytes = Path(path), parse_bytes(dram, "dram")
        validate.positive(writes_per_day=writes_per_day)
        records = first_records(tables, dram_bytes)
        if "read_only" in options:
            raise ValueError(
                "Expected no read_only for a store that is made. Make it, close it, and open it with read_only."
            )
        cls._options_of(**options)
        with disk(folder):
            folder.mkdir(parents=True, exist_ok=True)
        if (folder / NAME).exists():
            raise StoreError(f"There is an embedding store in {folder} already. Open it, or choose another folder.")
        with FolderLock(folder, write=True):
            for record in records:
                _refuse_rows(folder / record.blocks)
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
            commit_files(folder, blank, {record.name: empty_state(record) for record in records})
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
        options = cls._options_of(
            direct=direct, engine=engine, threads=threads, tail=tail, tidy=tidy, remember=remember, clock=clock
        )
        Manifest.read(folder)  # says that there is none, before a lock file is made
        lock = FolderLock(folder, write=not read_only)
        try:
            return cls(folder, Manifest.read(folder), lock, read_only=read_only, options=options)
        except BaseException:
            lock.close()
            raise

    @staticmethod
    def _options_of(
        *,
        direct: bool = True,
        engine: str = "auto",
        threads: int = 8,
        tail: Tail | None = None,
        tidy: bool = True,
        remember: int = 0,
        clock: Clock | None = None,
    ) -> dict[str, Any]:
        """Refuses what `open` cannot take, before anything is made."""
        validate.one_of(("auto", "aio", "threads"), engine=engine)
        validate.between(1, 1024, threads=threads)
        validate.not_negative(remember=remember)
        if tail is not None and not isinstance(tail, Tail):
            raise TypeError(f"Expected tail to be a shoal.embed.Tail or None, got {tail!r}.")
        return {
            "direct": direct, "engine": engine, "threads": threads, "tail": tail, "tidy": tidy, "remember": int(remember),
            "clock": clock or SystemClock(),
        }  # fmt: skip

    def _open_table(self, record: TableRecord) -> Table:
        state, _ = read_state(self.folder / record.state, record.state_hash)
        lanes = Lanes(record.block_bytes, engine=self._options["engine"], threads=self._options["threads"])
        kept = {name: self._options[name] for name in ("direct", "tail", "remember")}
        table = Table(record, self.folder, state, lanes, read_only=self.read_only, **kept)
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
        wanted = {name: ids_of(some, name) for name, some in ids.items()}
        for name in wanted:
            self._table(name)
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
        if name not in self._tables:
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
            wanted, values = ids_of(ids, table), np.asarray(vectors)
            refuse_bad_update(opened.record, wanted, values)
            if not len(wanted):
                return
            rows = opened.codec.encode(values)
            spare = self._write.spare_blocks(opened, rows.nbytes) if self._options["tidy"] else 0.0
            self._write.commit(opened, deltas.update(opened, wanted, rows, spare_blocks=spare))
            if opened.shadow is not None:
                opened.shadow[wanted] = opened.shadow_codec.encode(values)
            if self._options["tidy"]:
                self._write.tidy(opened)
            self._write.fold_if_long()

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
                refuse_shape(opened.record, vectors)
                self._write.rewrite(opened, layout, lambda ids: opened.codec.encode(vectors[ids]), is_new=True)
            else:
                self._write.rewrite(opened, layout, Pieces(opened, vectors).rows_of, is_new=True)

    def place(self, table: str, layout: Layout, *, offered: np.ndarray | None = None, most_blocks: int | None = None,
              misses: Trace | None = None, **settings: Any) -> int:  # fmt: skip
        """Moves a table's rows to a layout; returns the blocks written.

        Args:
            layout: of all rows, with as many vectors a block as the table has.
            offered: (num_blocks,) how many of a block's first rows are offered to the cache; none by default.
            most_blocks: move only what saves most reads of `misses`, so many blocks at most, and nothing that saves none.
            misses: what the cache missed, query by query.
            settings: `policy`, `admission`, `read_aware`, `cache_bytes`, `tier`, `reason` of the table from now on.
        """
        for setting in settings:
            validate.one_of(SETTINGS, setting=setting)
        with self._writing:
            opened = self._writable(table)
            if layout.vectors_per_block != opened.slots_per_block or layout.num_rows != opened.record.rows:
                raise ValueError(
                    f"Expected a layout of {opened.record.rows} rows, {opened.slots_per_block} a block, for table {table!r}, got "
                    f"{layout.num_rows} rows, {layout.vectors_per_block} a block."
                )
            offers = offers_of(offered, layout)
            if most_blocks is None:
                self._write.rewrite(opened, layout, partial(stored_rows, opened), offers, settings)
                return layout.num_blocks
            if misses is None or settings:
                raise ValueError(
                    "Expected misses, and no settings, with most_blocks: what is moved is what they would read."
                )
            chosen = rewrite.best_blocks(opened, layout, misses, most_blocks)
            if len(chosen):
                self._write.commit(opened, rewrite.some(opened, layout, chosen, offers))
            return len(chosen)

    def retrain(self, trace: Trace | Mapping[str, Trace], **options: Any) -> dict[str, Any]:
        """Learns from a trace where rows should lie, which cache each table should have, and how much memory; see `training.py`.

        Args:
            trace: of the only table, or {table: trace}; 10 queries at least. Tables that are not named stay as they are.
            options: `most_blocks` (write so many blocks a table at most; caches and memory stay), `space` (copies, as a part of
                the rows), `policies` (evictions to choose from), `progress` (is told in a line what is being done), `settings`.

        Returns:
            For each table: `tier`, `reason`, `policy`, `cache_bytes`, `reads_before`, `reads_after` (a query, foretold),
            `written_blocks`.

        Raises:
            DataError: a trace has too few queries, or rows that the table has not.
            StoreUnavailable: the disk is full or fails; the table stays as it was.
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

    def compact(self, *, most_blocks: int | None = None) -> int:
        """Tidies up at once, whatever the budget says; returns the blocks written. By default until nothing is left to do."""
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

    def verify(self, *, repair: bool = False) -> dict[str, list[int]]:
        """Reads every block in use; table -> numbers of the damaged ones.

        `repair`: writes the rows of damaged blocks anew where each has a copy (in the cache, in memory, in a replica); what is
        repaired is no longer listed.
        """
        found: dict[str, list[int]] = {}
        for name, table in self._tables.items():
            self._table(name)
            with table.reading():
                used = np.flatnonzero(table.space.kind != FREE)
                bad = [int(b) for b in used if try_block(table, int(b)) is None]
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


def _refuse_rows(blocks: Path) -> None:
    """Raises StoreError where a file of blocks holds something: a store that has lost its manifest, or another's file."""
    with disk(blocks):
        if blocks.exists() and blocks.stat().st_size:
            raise StoreError(
                f"{blocks} is not empty, though there is no {NAME} beside it. Restore that from a copy, or choose another folder."
            )
