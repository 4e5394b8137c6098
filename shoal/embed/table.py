"""One table of a store while it is open: its arrays, its cache, its lookups, and how a change is applied to it.

It writes no file: `deltas.py` makes changes and writes their blocks, `store.py` journals them and owns the files' names.

A row is in exactly one of these places (`View.where`):

    ABSENT     never written: it reads as zeros
    a slot     of a HOME block (as the placement put it) or of a DELTA block (it changed since)
    resident   it changed often: the newest value is in memory and in the journal

A table of tier `dram` has all rows in `mirror` besides; its blocks and journal are only what it is opened from.

Guarantees:
    (1) A lookup gives for each row a value that was committed when it began or since; never part of one.
    (2) A block whose checksum is wrong is never used: its rows come from a copy, or the error names block and rows.
    (3) No lookup waits for a disk while it holds the lock.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, final

import numpy as np

from shoal.embed import kernel, reads, stored
from shoal.embed.blockfile import BlockFile
from shoal.embed.cache import Cache, prefetch_pays
from shoal.embed.codec import Codec
from shoal.embed.kernel import Plan, View
from shoal.embed.layout import Layout
from shoal.embed.manifest import TableRecord
from shoal.embed.options import Options
from shoal.embed.recent import Recent
from shoal.embed.space import HOME, Space
from shoal.embed.tail import Tail, places_of
from shoal.errors import StoreError
from shoal.tensors import Tensors

MOST_SLOTS: Final = 2**31 - 2
_NO_READS: Final = Plan(np.empty(0, np.int64), np.zeros(1, np.int64), np.empty(0, np.int64), np.empty(0, np.int64))
_FIXED_BYTES: Final = 512
"""What a cache takes whatever its size."""


@dataclass(slots=True)
class Counters:
    """What lookups did; only ever rises."""

    queries: int = 0
    lookups: int = 0
    """Ids asked for."""
    hits: int = 0
    """Of them found in memory: in the cache, among the rows that rest there, or never written."""
    resident_hits: int = 0
    """Of these, rows that rest there because they change often."""
    block_reads: int = 0
    read_bytes: int = 0
    prefetched: int = 0
    """Rows that entered the cache because a neighbour was asked for."""
    prefetch_hits: int = 0
    """Of these, how many were asked for before they left."""
    hedged_reads: int = 0
    """Reads of a copy because the first was late."""
    approximate: int = 0
    """Rows given in low precision because a deadline struck."""
    damaged_blocks: int = 0
    """Blocks found damaged or unreadable."""
    rescued_rows: int = 0
    """Rows of such blocks that were served from a copy."""


@final
class Table:
    """An open table. `lock` guards its arrays; one writer at a time, by the store's lock."""

    def __init__(self, record: TableRecord, folder: Path, state: Tensors, lanes: reads.Lanes, options: Options) -> None:
        self.record, self.codec, self.path = record, record.codec, folder / record.blocks
        self.slots_per_block = record.block_bytes // self.codec.row_bytes
        self.lock = threading.Lock()
        self._is_idle, self._is_closed = threading.Condition(self.lock), False
        self.file = BlockFile(self.path, record.block_bytes, read_only=options.read_only, direct=options.direct)
        self.lanes, self.tail = lanes, options.tail or Tail()
        self.recent = Recent(options.remember, record.rows) if options.remember else None
        self.counters, self.damaged = Counters(), set[int]()
        self.lost = set[int]()
        """Damaged blocks with a row that has no copy: tidying leaves alone what it would need them for."""
        self._take_state(state)
        self._make_cache()
        self.mirror: np.ndarray | None = None
        if record.tier == "dram":
            self.mirror = self._load_mirror()
        self.shadow_codec = Codec(record.dim, "int8")
        self.shadow: np.ndarray | None = None

    def _take_state(self, state: Tensors) -> None:
        self.sums = state["sums"].copy()
        self.space = Space(state["kind"].copy(), state["wear"].copy())
        capacity = max(self.resident_capacity, len(state["resident_ids"]))
        self.view = View(
            where=state["where"].copy(),
            id_at=state["id_at"].copy(),
            cached=np.empty((0, self.codec.words), np.uint32),
            resident=np.zeros((capacity, self.codec.words), np.uint32),
            offered=state["offered"].copy(),
            read_count=np.zeros(len(self.sums), np.uint32),
            replica_ids=state["replica_ids"].copy(),
            replica_slots=state["replica_slots"].copy(),
            replica_valid=state["replica_valid"].copy(),
        )
        self.resident_id = np.full(capacity, -1, np.int32)
        self.resident_home = np.full(capacity, -1, np.int32)
        """The slot that a resident row was in: who are its neighbours."""
        self.resident_stamp = np.zeros(capacity, np.int64)
        self.changes = 0
        """Changes applied: the time by which hot rows are told from others."""
        self.free_resident = list(range(capacity - 1, -1, -1))
        self.changed = np.zeros(self.record.rows if self.record.tier == "dram" else 0, bool)
        """Rows of a table in memory whose block is out of date."""
        self.pending = (state["resident_ids"].copy(), state["resident_rows"].copy())

    def layout(self) -> Layout:
        """Where the rows lie now; those without a place as if they were in order of id behind the others."""
        where = self.state()["where"].astype(np.int64)
        absent = np.flatnonzero(where < 0)
        first = -(-(int(where.max(initial=-1)) + 1) // self.slots_per_block) * self.slots_per_block
        where[absent] = first + np.arange(len(absent))
        valid = self.view.replica_valid > 0
        replicas = self.view.replica_ids[valid].astype(np.int64), self.view.replica_slots[valid].astype(np.int64)
        return Layout(where, self.slots_per_block, *replicas)

    def home_of(self, ids: np.ndarray) -> np.ndarray:
        """(n,) int64: the slot of each row in a HOME block, where its placement is, whether it is there or not; -1: it has none.

        Of rows that are elsewhere it is found in the lists of the HOME blocks, which takes a pass over all slots: no memory is kept
        for what only the writer asks.
        """
        made: np.ndarray = self.view.where[ids].astype(np.int64)
        is_there = made >= 0
        is_there[is_there] = self.space.kind[made[is_there] // self.slots_per_block] == HOME
        if np.all(is_there):
            return made
        slots = np.flatnonzero(np.repeat(self.space.kind == HOME, self.slots_per_block) & (self.view.id_at >= 0))
        slots = slots[self.view.where[self.view.id_at[slots]] != slots]
        slots = np.setdiff1d(slots, self.view.replica_slots, assume_unique=True)
        slots = slots[np.argsort(self.view.id_at[slots], kind="stable")]
        names = self.view.id_at[slots]
        away = np.flatnonzero(~is_there)
        at = np.searchsorted(names, ids[away])
        found = at < len(names)
        found[found] = names[at[found]] == ids[away[found]]
        made[away] = -1
        made[away[found]] = slots[at[found]]
        return made

    def _make_cache(self) -> None:
        words, rows = self.codec.words, self.record.rows
        room = self.record.cache_bytes - self.view.resident.nbytes - _FIXED_BYTES
        self.capacity = 0
        if self.record.tier == "block" and room > 0:
            self.capacity = min(
                rows, Cache.capacity_of(room, self.codec.row_bytes, self.record.policy, duel=self._duels)
            )
        self.cache = self.new_cache()
        self._prefetch_again()
        self.view = self.view._replace(cached=np.zeros((max(1, self.capacity), words), np.uint32))

    def _prefetch_again(self) -> None:
        self.prefetches = True
        self._weighed_from = self.counters.prefetched, self.counters.prefetch_hits

    def new_cache(self) -> Cache:
        """An empty cache like the table's own."""
        record = self.record
        return Cache(record.policy, max(1, self.capacity), record.rows, duel=self._duels, read_aware=record.read_aware)

    @property
    def _duels(self) -> bool:
        return self.record.admission == "duel"

    def cache_room(self, size_bytes: int) -> float:
        """What is left for the cache of so much memory."""
        rows = max(2 * self.slots_per_block, size_bytes // 10 // self.codec.row_bytes)
        return max(0, size_bytes - min(self.record.rows, rows) * self.codec.row_bytes - _FIXED_BYTES)

    def adopt(self, record: TableRecord) -> None:
        """The table has another cache from now on; what fits of the old one moves over."""
        with self.lock:
            old, cached, had = self.cache, self.view.cached, self.capacity
            self.record = record
            self._make_cache()
            if had and self.capacity:
                kernel.carry_over(old.state, cached, self.cache.state, self.view.cached)

    @property
    def resident_capacity(self) -> int:
        """Rows that may rest in memory because they change often: a tenth of the table's memory."""
        if self.record.tier == "dram":
            return 0
        return min(
            self.record.rows, max(2 * self.slots_per_block, self.record.cache_bytes // 10 // self.codec.row_bytes)
        )

    @property
    def num_resident(self) -> int:
        return len(self.resident_id) - len(self.free_resident)

    def _load_mirror(self) -> np.ndarray:
        """All rows, from the blocks."""
        mirror = np.zeros((self.record.rows, self.codec.words), np.uint32)
        for first in range(0, self.record.rows, 1 << 16):
            ids = np.arange(first, min(first + (1 << 16), self.record.rows))
            mirror[ids] = stored.stored_rows(self, ids)
        return mirror

    # Reading.

    def rows_of(self, ids: np.ndarray, *, deadline_s: float | None = None) -> tuple[np.ndarray, np.ndarray | None]:
        """The encoded rows of ids (n,) int64 and, with a deadline, which of them are approximate.

        Raises:
            ValueError: an id is out of range.
            StoreError: a block is damaged and a row has no copy.
        """
        out = np.empty((len(ids), self.codec.words), np.uint32)
        with self.lock:
            if self.mirror is not None:
                self._refuse_closed()
                self._refuse_range(ids, kernel.gather(self.mirror, ids, out))
                self._count(ids, len(ids), 0)
                return out, None
        missed = np.empty(len(ids), np.int64)
        entries = np.empty(len(ids), np.int32)
        with self.lock:
            self._refuse_closed()
            count, resident = kernel.probe_rows(self.cache.state, self.view, ids, out, entries, missed)
            self._refuse_range(ids, -1 - count if count < 0 else -1)
            self._count(ids, len(ids) - count, resident)
            plan = kernel.plan_reads(self.view, self.slots_per_block, ids, missed[:count]) if count else _NO_READS
            self.counters.prefetch_hits += kernel.settle(
                self.cache.state, self.view, ids, entries, self.slots_per_block, plan.blocks
            )
            if not count:
                return out, None
            epoch = self.space.enter()
        try:
            return out, self._fetch(ids, out, plan, deadline_s)
        finally:
            with self.lock:
                self._leave(epoch)

    @contextmanager
    def reading(self) -> Iterator[None]:
        """While this is entered, no block in use is written over and the file stays open."""
        with self.lock:
            self._refuse_closed()
            epoch = self.space.enter()
        try:
            yield
        finally:
            with self.lock:
                self._leave(epoch)

    def _leave(self, epoch: int) -> None:
        self.space.leave(epoch)
        if self._is_closed:
            self._is_idle.notify_all()

    def _refuse_closed(self) -> None:
        if self._is_closed:
            raise StoreError(f"The store of table {self.record.name!r} is closed. Open it again.")

    def _refuse_range(self, ids: np.ndarray, place: int) -> None:
        if place >= 0:
            raise ValueError(
                f"Expected ids of table {self.record.name!r} from 0 to {self.record.rows - 1}, got {ids[place]} "
                f"at place {place}. Map unknown ids to a row of their own."
            )

    def _count(self, ids: np.ndarray, hits: int, resident: int) -> None:
        if self.recent is not None:
            self.recent.add(ids)
        self.counters.queries += 1
        self.counters.lookups += len(ids)
        self.counters.hits += hits
        self.counters.resident_hits += resident

    def _fetch(self, ids: np.ndarray, out: np.ndarray, plan: Plan, deadline_s: float | None) -> np.ndarray | None:
        """Reads a plan's blocks, a lane's depth at a time, and gives them to request and cache; which rows came too late."""
        late: list[np.ndarray] = []
        ends_s = float("inf") if deadline_s is None else self.tail.now_s() + deadline_s
        lane = self.lanes.take(self.sums)
        if deadline_s is not None and not lane.is_queue:
            self.lanes.give_back(lane)
            raise StoreError(
                f"Expected no deadline, got {deadline_s} s: this system reads with threads (no Linux AIO), which cannot be "
                "left waiting. Look up without a deadline."
            )
        try:
            together = self.tail.blocks_together(lane.depth)
            for begin in range(0, len(plan.blocks), together):
                end = min(begin + together, len(plan.blocks))
                # What is late may yet arrive in this lane: it takes no other read.
                if late and (len(late[-1]) or self.tail.now_s() >= ends_s):
                    late.append(places_of(plan, np.arange(begin, len(plan.blocks))))
                    break
                if (self.tail.hedge or deadline_s is not None) and lane.is_queue:
                    left_s = None if deadline_s is None else ends_s - self.tail.now_s()
                    late.append(
                        self.tail.read(self, lane, plan, begin, end, ids, out, left_s)
                    )  # none without a deadline
                else:
                    lane.read(self.file.fd, plan.blocks[begin:end], self.sums)
                    kernel.scatter(lane.queue, plan, begin, end, self.slots_per_block, out)
                self._take_in(lane, ids, out, plan, begin, end)
        finally:
            self.lanes.give_back(lane)
        return None if deadline_s is None else self._stand_in(ids, out, np.concatenate(late))

    def _stand_in(self, ids: np.ndarray, out: np.ndarray, places: np.ndarray) -> np.ndarray:
        """Gives the places of late rows what there is instead; which they are, (n,) bool."""
        approximate = np.zeros(len(ids), bool)
        if len(places):
            approximate[places] = True
            out[places] = self.low_precision(ids, places, out)
            with self.lock:
                self.counters.approximate += len(places)
        return approximate

    def _take_in(self, lane: reads.Lane, ids: np.ndarray, out: np.ndarray, plan: Plan, begin: int, end: int) -> None:
        status = lane.queue.status[: end - begin]
        bad = np.flatnonzero((status == reads.DAMAGED) | (status == reads.FAILED))
        with self.lock:
            self.counters.block_reads += end - begin
            self.counters.read_bytes += (end - begin) * self.record.block_bytes
            self.counters.prefetched += kernel.admit_round(
                self.cache.state,
                self.view,
                lane.queue,
                plan,
                begin,
                end,
                self.slots_per_block,
                ids,
                self.capacity,
                self.prefetches,
            )
            self._weigh_prefetch()
        for place in bad.tolist():
            self._rescue(ids, out, plan, begin + place)

    def _weigh_prefetch(self) -> None:
        """Switches prefetch off where it does not pay: until the rows are placed anew."""
        entered, used = self._weighed_from
        if not prefetch_pays(self.counters.prefetched - entered, self.counters.prefetch_hits - used):
            self.prefetches = False

    def _rescue(self, ids: np.ndarray, out: np.ndarray, plan: Plan, index: int) -> None:
        """Serves the rows of a bad block from a second read, or from a copy."""
        block = int(plan.blocks[index])
        mine = slice(plan.starts[index], plan.starts[index + 1])
        again = stored.try_block(self, block)
        if again is None:
            with self.lock:
                if block not in self.damaged:
                    self.damaged.add(block)
                    self.counters.damaged_blocks += 1
        for place, slot in zip(plan.places[mine].tolist(), plan.slots[mine].tolist(), strict=True):
            row = (
                again[slot % self.slots_per_block]
                if again is not None
                else stored.copy_of(self, int(ids[place]), block)
            )
            if row is None:
                wanted = sorted({int(i) for i in ids[plan.places[mine]]})
                raise StoreError(
                    f"Block {block} of {self.path} is damaged or cannot be read, and row {int(ids[place])} of table "
                    f"{self.record.name!r} has no copy (asked for: {wanted[:5]}). Write these rows again with update, "
                    "or restore the file from a copy."
                )
            out[place] = row

    def low_precision(self, ids: np.ndarray, places: np.ndarray, out: np.ndarray) -> np.ndarray:
        """Stand-ins for rows that did not come in time: from the int8 copy, else the mean of those that did."""
        if self.shadow is not None:
            return self.codec.encode(self.shadow_codec.decode(self.shadow[ids[places]]))
        others = np.setdiff1d(np.arange(len(ids)), places)
        if not len(others):
            return np.zeros((len(places), self.codec.words), np.uint32)
        mean = self.codec.decode(np.ascontiguousarray(out[others])).mean(axis=0, keepdims=True)
        return np.repeat(self.codec.encode(mean), len(places), axis=0)

    def make_shadow(self) -> None:
        """Fills the int8 copy of all rows from the blocks."""
        self.shadow = np.zeros((self.record.rows, self.shadow_codec.words), np.uint32)
        for first in range(0, self.record.rows, 1 << 16):
            ids = np.arange(first, min(first + (1 << 16), self.record.rows))
            self.shadow[ids] = self.shadow_codec.encode(self.codec.decode(stored.stored_rows(self, ids)))

    def grow_to(self, num_blocks: int) -> None:
        """Arrays for a file that has grown."""
        more = num_blocks - len(self.sums)
        if more <= 0:
            return
        self.space.grow(num_blocks)
        self.sums = np.append(self.sums, np.zeros(more, np.uint64))
        self.view = self.view._replace(
            id_at=np.append(self.view.id_at, np.full(more * self.slots_per_block, -1, np.int32)),
            offered=np.append(self.view.offered, np.zeros(more, np.int16)),
            read_count=np.append(self.view.read_count, np.zeros(more, np.uint32)),
        )

    def become(self, record: TableRecord, state: Tensors, blocks: np.ndarray, old: np.ndarray, *, is_new: bool) -> None:
        """The table was written anew and that is committed: `state` says where, `old` blocks are no longer needed.

        The cache stays as it is unless its settings changed: values are the same wherever they lie. Where they are new
        (`is_new`), it begins empty.
        """
        with self.lock:
            same = not is_new and replace(record, state="", state_hash="", reason="") == replace(
                self.record, state="", state_hash="", reason=""
            )
            counts, space = self.view.read_count, self.space
            cache, cached, capacity = self.cache, self.view.cached, self.capacity
            self.record = record
            self._take_state(state)
            self.view = self.view._replace(read_count=counts)
            self.space = space
            space.use(blocks, np.full(len(blocks), HOME, np.uint8))
            space.retire(old)
            self._prefetch_again()
            if same:
                self.cache, self.capacity = cache, capacity
                self.view = self.view._replace(cached=cached)
            else:
                self._make_cache()
            self.damaged.clear()
            self.lost.clear()
            self.mirror = None
        self.mirror = self._load_mirror() if record.tier == "dram" else None

    def make_room(self, count: int) -> None:
        """Grows the file until `count` blocks are free. Raises StoreUnavailable, with nothing changed, on a full disk."""
        with self.lock:
            target = self.space.missing(count)
        if target * self.slots_per_block > MOST_SLOTS:
            raise StoreError(f"Table {self.record.name!r} needs more than {MOST_SLOTS} slots. Split it in two.")
        if target:
            self.file.grow(target)
            with self.lock:
                self.grow_to(target)

    def state(self) -> Tensors:
        """All that the table is opened from, beside its blocks."""
        if self.mirror is None:
            held = np.flatnonzero(self.resident_id >= 0)
            ids, rows = self.resident_id[held], self.view.resident[held]
            where = self.view.where.copy()
            where[ids] = self.resident_home[held]
        else:
            ids = np.flatnonzero(self.changed).astype(np.int32)
            rows, where = self.mirror[ids], self.view.where
        return {
            "where": where,
            "id_at": self.view.id_at,
            "sums": self.sums,
            "kind": self.space.kind,
            "wear": self.space.wear,
            "offered": self.view.offered,
            "replica_ids": self.view.replica_ids,
            "replica_slots": self.view.replica_slots,
            "replica_valid": self.view.replica_valid,
            "resident_ids": ids,
            "resident_rows": rows,
        }

    @property
    def map_bytes(self) -> int:
        """Memory that says where rows are: it is beside the DRAM that caches are given."""
        view, space = self.view, self.space
        arrays = (
            view.where,
            view.id_at,
            view.offered,
            view.read_count,
            view.replica_ids,
            view.replica_slots,
        )
        return sum(a.nbytes for a in (*arrays, self.sums, space.kind, space.wear))

    def close(self) -> None:
        """Waits for the lookups that have begun; those that come later are refused."""
        with self.lock:
            self._is_closed = True
            while self.space.has_readers:
                self._is_idle.wait()
        self.lanes.close(self.sums)
        self.file.close()
