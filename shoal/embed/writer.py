"""The one writer of a store: journal, write budget, epochs. What users call is in `store.py`.

Every step is a `Change` whose blocks are written and synced; then its record is in the journal (`commit`), or a new epoch names the
states that have it (`checkpoint`): only then is it visible. A step that fails leaves all as it was.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Final, final

import numpy as np

from shoal.clock import Clock
from shoal.embed import deltas
from shoal.embed import rewrite as rewriting
from shoal.embed.applying import apply
from shoal.embed.budget import WriteBudget
from shoal.embed.changes import Change
from shoal.embed.deltas import Step
from shoal.embed.epoch import commit_files, is_committed, sweep
from shoal.embed.journal import Journal, Replay
from shoal.embed.layout import Layout
from shoal.embed.manifest import Manifest, TableRecord
from shoal.embed.progress import Tell, nobody
from shoal.embed.space import FREE
from shoal.embed.stored import stored_rows
from shoal.embed.table import Table
from shoal.errors import StoreError, StoreUnavailable
from shoal.tensors import Tensors

_JOURNAL_BYTES: Final = 4 << 20
"""A journal is folded into the tables' states when it is larger than this and than twice the states."""
_MOST_CHANGED: Final = 1 / 8
"""A table in memory is written anew when so many of its rows changed; before, they go into its state."""
TIDY_BLOCKS: Final = 1024
"""Most blocks that one update writes to tidy up."""


@final
class Writer:
    """Brings the tables to the journal's end, and writes from then on. Its caller holds the store's lock of writing."""

    def __init__(
        self, folder: Path, manifest: Manifest, tables: Mapping[str, Table], clock: Clock, *, read_only: bool
    ) -> None:
        """`tables`: as their states have them. `read_only`: nothing is written, and there is no journal to write to."""
        self.folder, self.manifest = folder, manifest
        self._tables, self._clock = tables, clock
        self.is_broken = False
        """Whether a write failed, or was interrupted, so that nobody knows what is on the disk: the store must be opened again."""
        self.postponed = 0
        self.journal, replayed_bytes = self._replay(read_only)
        self.budget = WriteBudget(
            writes_per_day=manifest.writes_per_day,
            capacity_bytes=self._capacity(),
            balance=manifest.budget_bytes,
            now_s=manifest.budget_wall_s,
        )
        self.budget.spend(replayed_bytes)
        if not read_only:
            sweep(folder, manifest)

    def _replay(self, read_only: bool) -> tuple[Journal | None, int]:
        """Applies what the journal has; the journal, to write on, and the bytes that were written for it."""
        path = self.folder / self.manifest.journal
        replay = Replay(path)
        written = 0
        for payload in replay:
            change = Change.from_bytes(payload)
            if change.table not in self._tables:
                raise StoreError(
                    f"{path} changes a table {change.table!r} that the store has not. Restore it from a copy."
                )
            table = self._tables[change.table]
            apply(table, change)
            table.space.wrote(change.blocks)
            written += len(change.blocks) * table.record.block_bytes
        journal = None if read_only else Journal(path, sequence=replay.sequence, end=replay.end)
        return journal, written + replay.end

    def _capacity(self) -> int:
        """What the budget counts by: no more than the store's own blocks, as wear spreads over these only."""
        own = sum(table.space.num_blocks * table.record.block_bytes for table in self._tables.values())
        return min(self.manifest.capacity_bytes or own, own) or 1

    def commit(self, table: Table, step: Step) -> None:
        """Journals a change whose blocks are written, then makes it visible."""
        assert self.journal is not None
        with self._or_broken():
            try:
                written = self.journal.append(step.change.to_bytes())
            except StoreError:
                deltas.undo(table, step.change.blocks)
                raise
            apply(table, step.change, step.values)
        self.spend(step.written_bytes + written)

    @contextmanager
    def _or_broken(self) -> Iterator[None]:
        """What is inside makes memory follow the disk. Where it is interrupted (Ctrl-C), only opening again tells what is there."""
        try:
            yield
        except StoreError:
            raise
        except BaseException:
            self.is_broken = True
            raise

    def spend(self, num_bytes: int, *, is_first: bool = False) -> None:
        """Takes written bytes off the budget, but those of a table's first rows."""
        self.budget.resize(self._capacity())
        self.budget.available(self._clock.wall_s())
        self.budget.spend(num_bytes, is_first=is_first)

    def spare_blocks(self, table: Table, needed_bytes: int) -> float:
        """What the budget leaves beside an update, in blocks; half of it, as more updates may come."""
        left = self.budget.available(self._clock.wall_s()) - 1.1 * needed_bytes
        return min(TIDY_BLOCKS, max(0.0, left / 2 / table.record.block_bytes))

    def follow_up(self, table: Table, *, tidy: bool) -> None:
        """What an update brings with it. The update is committed: where the disk fails now, the next one follows up."""
        try:
            if tidy:
                self._tidy(table)
            self._fold_if_long()
        except StoreUnavailable:
            self.postponed += 1

    def _tidy(self, table: Table) -> None:
        """One step of tidying, as far as the budget lets it."""
        room = self.budget.available(self._clock.wall_s()) / 2  # the rest is for what users change next
        most = min(TIDY_BLOCKS, int(room // table.record.block_bytes))
        if most >= 1:
            step = deltas.compact(table, most)
            if step is not None:
                self.commit(table, step)

    def _fold_if_long(self) -> None:
        """Begins a new epoch where the journal has become long."""
        assert self.journal is not None
        states = sum(table.map_bytes for table in self._tables.values())
        if self.journal.size_bytes <= max(_JOURNAL_BYTES, 2 * states):
            return
        for table in self._tables.values():
            if table.mirror is not None and table.changed.mean() > _MOST_CHANGED:
                self.rewrite(
                    table,
                    Layout.in_id_order(table.record.rows, table.slots_per_block),
                    partial(stored_rows, table),
                )
        self.checkpoint({})

    def rewrite(
        self,
        table: Table,
        layout: Layout,
        rows_of: Callable[[np.ndarray], np.ndarray],
        offered: np.ndarray | None = None,
        settings: Mapping[str, Any] | None = None,
        *,
        is_new: bool = False,
        tell: Tell = nobody,
    ) -> None:
        """Writes a table anew as a layout says, and commits it with a new manifest; `is_new`: with new values."""
        offers = np.zeros(layout.num_blocks, np.int16) if offered is None else offered
        record = replace(table.record, **(settings or {}))
        old = np.flatnonzero(table.space.kind != FREE)
        is_first = is_new and not len(old)
        state, blocks = rewriting.whole(table, layout, offers, rows_of, tell)
        self.spend(len(blocks) * record.block_bytes, is_first=is_first)
        with self._or_broken():
            try:
                self.checkpoint({record.name: (record, state)}, is_first=is_first)
            except StoreError:
                deltas.undo(table, blocks)
                raise
            table.become(self._record(record.name), state, blocks, old, is_new=is_new)
            if record.shadow:
                table.make_shadow()

    def _record(self, name: str) -> TableRecord:
        return next(record for record in self.manifest.tables if record.name == name)

    def checkpoint(self, new: Mapping[str, tuple[TableRecord, Tensors]], *, is_first: bool = False) -> None:
        """Writes the states of all tables (those of `new` as given) and an empty journal, and commits them."""
        records = tuple(new[name][0] if name in new else table.record for name, table in self._tables.items())
        states = {name: new[name][1] if name in new else table.state() for name, table in self._tables.items()}
        now_s = self._clock.wall_s()
        manifest = replace(
            self.manifest,
            tables=records,
            written_bytes=self.manifest.written_bytes + self.budget.spent,
            budget_bytes=self.budget.available(now_s),
            budget_wall_s=now_s,
        )
        with self._or_broken():
            try:
                made, written = commit_files(self.folder, manifest, states)
            except StoreError:
                if is_committed(self.folder, manifest.epoch + 1):  # it has its name, but perhaps not for ever
                    self.is_broken = True
                raise
            assert self.journal is not None
            self.journal.close()
            self.journal = Journal(self.folder / made.journal, sequence=0, end=0)
            self.manifest = made
        for record in made.tables:
            if record.name not in new:
                self._tables[record.name].record = record
        self.budget.spent = 0
        self.budget.spend(written, is_first=is_first)
        sweep(self.folder, self.manifest)

    def configure(self, settings: Mapping[str, Mapping[str, Any]]) -> None:
        """Gives tables other caches, durably; no row moves."""
        changed = {
            name: (replace(self._tables[name].record, **some), self._tables[name].state())
            for name, some in settings.items()
        }
        with self._or_broken():
            self.checkpoint(changed)
            for name in settings:
                self._tables[name].adopt(self._record(name))

    @property
    def budget_bytes(self) -> float:
        """What may be written now on the store's own account."""
        self.budget.resize(self._capacity())
        return self.budget.available(self._clock.wall_s())

    @property
    def written_bytes(self) -> int:
        """Since the store was made."""
        return self.manifest.written_bytes + self.budget.spent

    def close(self) -> None:
        if self.journal is not None:
            self.journal.close()
