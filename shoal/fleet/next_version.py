"""The next version of a line: what its groups add up to, and the model that comes of it.

Where late updates are patched in, each counts in the sum of its own version, and the versions since are made again of their
sums (`aggregate/patch.py`). The oldest version that something may still be late for is kept in its *final form*: what it is with all
that came late. From there on versions are replayed.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain

from shoal.aggregate.accumulator import Accumulator
from shoal.aggregate.commit import Aggregator
from shoal.aggregate.patch import replay
from shoal.aggregate.sums import merge_saved
from shoal.fleet.group_sums import GroupResult
from shoal.record.store import CommitRow, FinalRow, GroupRow, Store
from shoal.tensors import Index


@dataclass(frozen=True, kw_only=True)
class NextVersion:
    """See the module's text. Reads the record and writes blobs; the rows are its caller's."""

    store: Store
    run: str
    head: CommitRow
    """The version that it follows."""
    aggregator: Aggregator
    max_staleness: int
    empty: Callable[[], Accumulator]
    """Makes an accumulator of the round."""

    def sums(self, closed: Sequence[GroupResult], waiting: Sequence[GroupRow], version: int | None) -> Accumulator:
        """The sum of these groups; only of those that are part of `version`, if one is named."""
        closed = [group for group in closed if version in (None, group.base_version)]
        waiting = [row for row in waiting if version in (None, row.base_version)]
        if len(closed) == 1 and not waiting:
            return closed[0].sums  # as it is: another of that size would be most of the host's memory
        sums = self.empty()
        for group in closed:
            sums.merge_all(group.sums)
        for row in waiting:
            merge_saved(sums, row, self.store.blobs)
        return sums

    def final(self, rows: Sequence[GroupRow]) -> FinalRow:
        """The oldest version that something may still be late for after this commit, in its final form."""
        oldest = max(0, self.head.version + 1 - self.max_staleness)
        before = max(0, oldest - 1)
        known = self.store.final(self.run, before)
        if known is None:
            row = self.store.get_commit(self.run, before)
            known = FinalRow(version=before, model=row.model, server_state=row.server_state)
        if before == oldest:
            return known
        sums = self._whole_sum(before, rows)
        model, state = replay(self.aggregator, (known.model, known.server_state), [sums], self.store.blobs)
        return FinalRow(version=oldest, model=model, server_state=state)

    def model(
        self, present: Accumulator, rows: Sequence[GroupRow], replayed_from: FinalRow | None
    ) -> tuple[Index, Index]:
        """Model and server state: a step from the head, or replayed where something late changes what came before it."""
        if replayed_from is None:
            return self.aggregator.commit(present, self.head.model, self.head.server_state, self.store.blobs)
        versions = range(replayed_from.version, self.head.version)
        sums = chain((self._whole_sum(version, rows) for version in versions), [present])
        return replay(self.aggregator, (replayed_from.model, replayed_from.server_state), sums, self.store.blobs)

    def _whole_sum(self, version: int, rows: Sequence[GroupRow]) -> Accumulator:
        """The sum of a version before the present one, with what this commit adds to it."""
        kept = self.store.groups(self.run, since_version=version)
        taken = [group for group in kept if group.base_version == version and group.version is not None]
        return self.sums((), [*taken, *(row for row in rows if row.base_version == version)], None)
