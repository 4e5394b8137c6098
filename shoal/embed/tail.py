"""Short tails: a read that is late is asked of a copy too, and a deadline can be kept at the price of precision.

A *hedge* is a second read, of blocks that hold replicas of all that the late one was to give. It is sent once the late
read has taken longer than a quantile of the reads so far, at most `most_extra` of all reads; the first answer counts, the
other is not waited for. Without replicas there is nothing to hedge with: the same address twice is the same queue.

A *deadline* is opt-in, call by call, for all rounds of a lookup together; a round that would begin after it is not read. What has
not come by then is given in low precision: from the int8 copy of the table
in memory where there is one (`TableSpec(shadow=True)`), else the mean of the rows that the same lookup found. Such rows
are flagged in the answer and counted.

Guarantees:
    (1) Hedges are at most `most_extra` of reads, at every moment after the first 1 / most_extra.
    (2) A row that is not flagged is exact.

References: Dean and Barroso, 2013, The tail at scale, CACM 56(2) (hedged requests after the 95th percentile); Hao et al., 2017,
MittOS, SOSP (why waiting for the same device again is too slow).
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, final

import numpy as np

from shoal import validate
from shoal.embed import kernel, reads
from shoal.embed.kernel import Plan

if TYPE_CHECKING:
    from shoal.embed.table import Table

_SAMPLES: Final = 4096
_ENOUGH: Final = 200


@final
class Latencies:
    """The last few thousand latencies of reads and a quantile of them, refreshed now and then."""

    def __init__(self, quantile: float) -> None:
        self._quantile, self._values = quantile, np.zeros(_SAMPLES)
        self._count, self._limit_s = 0, float("inf")

    def add(self, latency_s: float) -> None:
        self._values[self._count % _SAMPLES] = latency_s
        self._count += 1
        if self._count >= _ENOUGH and self._count % (_ENOUGH // 2) == 0:
            self._limit_s = float(np.quantile(self._values[: min(self._count, _SAMPLES)], self._quantile))

    @property
    def limit_s(self) -> float:
        """Later than this is late; infinite until enough was seen."""
        return self._limit_s


@final
class Tail:
    """When to hedge, and the account of hedges. Shared by a table's lookups; races cost a count, nothing else."""

    def __init__(
        self,
        *,
        hedge: bool = False,
        quantile: float = 0.97,
        most_extra: float = 0.05,
        now_s: Callable[[], float] = time.perf_counter,
    ) -> None:
        """Args:
        hedge: ask copies for late reads.
        quantile: of the latencies so far, beyond which a read is late.
        most_extra: hedges as a part of all reads, at most 0.05.
        """
        validate.flags(hedge=hedge)
        validate.of_kind(Callable, "a function that gives seconds", now_s=now_s)  # type: ignore[arg-type]
        validate.between(0.5, 0.9999, quantile=quantile)
        validate.between(0.0, 0.05, most_extra=most_extra)
        self.hedge, self._most_extra, self.now_s = hedge, most_extra, now_s
        self.latencies = Latencies(quantile)
        self.reads = self.hedges = 0

    def blocks_together(self, depth: int) -> int:
        """Blocks that a lane of so many places reads together: where reads are hedged, some places are the copies'."""
        return depth - max(1, depth // 8) if self.hedge and depth > 1 else depth

    def may_hedge(self, count: int) -> bool:
        """Whether `count` more reads stay within the account."""
        return self.hedges + count <= self._most_extra * self.reads

    def spend(self, count: int) -> None:
        self.hedges += count

    def read(
        self,
        table: "Table",
        lane: reads.Lane,
        plan: Plan,
        begin: int,
        end: int,
        ids: np.ndarray,
        out: np.ndarray,
        deadline_s: float | None,
    ) -> np.ndarray:
        """Reads the plan's blocks begin..end - 1 and copies their rows to `out`.

        Returns:
            Places of the request that the deadline left without a row.
        """
        started_s = self.now_s()
        queue, blocks = lane.queue, plan.blocks[begin:end]
        taken = reads.submit(queue, table.file.fd, blocks, 0)
        for place in range(taken, len(blocks)):
            reads.read_one(queue, table.file.fd, int(blocks[place]), place, table.sums)
        self.reads += len(blocks)
        hedged = _Hedges(table, lane, plan, begin, len(blocks))
        seen = np.zeros(len(blocks), bool)
        while True:
            now_s = self.now_s()
            arrived = queue.status[: len(blocks)] != reads.WAITING
            for _ in range(int((arrived & ~seen).sum())):
                self.latencies.add(now_s - started_s)
            seen |= arrived
            late = np.flatnonzero(~arrived & ~hedged.answered())
            if not len(late):
                break
            if deadline_s is not None and now_s - started_s >= deadline_s:
                break
            if self.hedge and now_s - started_s >= self.latencies.limit_s and not hedged.was_sent:
                hedged.send(late, self, ids)
            reads.reap(queue, 1, self._wait_ns(now_s - started_s, deadline_s, hedged.was_sent), table.sums)
        kernel.scatter(queue, plan, begin, end, table.slots_per_block, out)
        hedged.scatter(out)
        return places_of(plan, begin + late)

    def _wait_ns(self, waited_s: float, deadline_s: float | None, was_sent: bool) -> int:
        limits = [] if was_sent or not self.hedge else [self.latencies.limit_s]
        limits += [] if deadline_s is None else [deadline_s]
        until_s = min((limit for limit in limits), default=float("inf"))
        return -1 if until_s == float("inf") else max(1000, int((until_s - waited_s) * 1e9))


def places_of(plan: Plan, blocks: np.ndarray) -> np.ndarray:
    """The places of the request whose rows are to come from blocks of the plan, by their numbers in it (n,)."""
    parts = [plan.places[plan.starts[b] : plan.starts[b + 1]] for b in blocks.tolist()]
    return np.concatenate(parts) if parts else np.empty(0, np.int64)


@final
class _Hedges:
    """The hedges of one round: which late block is answered by which places of the lane."""

    def __init__(self, table: "Table", lane: reads.Lane, plan: Plan, begin: int, count: int) -> None:
        self._table, self._lane, self._plan, self._begin, self._count = table, lane, plan, begin, count
        self._answers: dict[int, tuple[np.ndarray, np.ndarray, np.ndarray]] = {}
        self.was_sent = False

    def answered(self) -> np.ndarray:
        """Which of the round's blocks have all their rows from copies by now."""
        made = np.zeros(self._count, bool)
        for b, (lane_places, _, _) in self._answers.items():
            made[b] = bool(np.all(self._lane.queue.status[lane_places] == reads.OK))
        return made

    def send(self, late: np.ndarray, tail: Tail, ids: np.ndarray) -> None:
        """Reads copies for late blocks, as far as there are any and the account allows."""
        self.was_sent = True
        first = self._count
        for b in late.tolist():
            rows = slice(self._plan.starts[self._begin + b], self._plan.starts[self._begin + b + 1])
            slots = self._other_slots(ids[self._plan.places[rows]], int(self._plan.blocks[self._begin + b]))
            if slots is None:
                continue
            blocks, index = np.unique(slots // self._table.slots_per_block, return_inverse=True)
            if first + len(blocks) > self._lane.depth or not tail.may_hedge(len(blocks)):
                return
            if reads.submit(self._lane.queue, self._table.file.fd, blocks, first) < len(blocks):
                return
            tail.spend(len(blocks))
            with self._table.lock:
                self._table.counters.hedged_reads += len(blocks)
                self._table.counters.block_reads += len(blocks)
            self._answers[b] = (first + np.arange(len(blocks)), first + index, slots)
            first += len(blocks)

    def _other_slots(self, ids: np.ndarray, but: int) -> np.ndarray | None:
        """A slot outside one block for each id, or None where one has none."""
        view, size = self._table.view, self._table.slots_per_block
        made = np.empty(len(ids), np.int64)
        for i, id in enumerate(ids.tolist()):
            r = slice(*np.searchsorted(view.replica_ids, [id, id + 1]))
            slots = [int(view.where[id]), *view.replica_slots[r][view.replica_valid[r] > 0].tolist()]
            others = [slot for slot in slots if slot >= 0 and slot // size != but]
            if not others:
                return None
            made[i] = others[0]
        return made

    def scatter(self, out: np.ndarray) -> None:
        """Copies what the hedges brought for blocks that did not come."""
        size, words = self._table.slots_per_block, out.shape[1]
        for b, (lane_places, row_places, slots) in self._answers.items():
            queue = self._lane.queue
            if queue.status[b] == reads.OK or not np.all(queue.status[lane_places] == reads.OK):
                continue
            rows = slice(self._plan.starts[self._begin + b], self._plan.starts[self._begin + b + 1])
            for place, lane_place, slot in zip(
                self._plan.places[rows].tolist(), row_places.tolist(), slots.tolist(), strict=True
            ):
                at = slot % size * words
                out[place] = queue.buffer[lane_place, at : at + words]


@dataclass(frozen=True)
class Answer:
    """A lookup with a deadline."""

    vectors: np.ndarray
    """(n, dim) float32."""
    approximate: np.ndarray
    """(n,) bool: rows given in low precision because their block was late."""
