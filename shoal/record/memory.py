"""The run store in memory, for tests and for simulated crashes: the contract of `SqliteStore` without a disk.

`copy()` is the store as it would be found after a crash between two calls: rows and blobs are immutable and shared, only
the containers are copied, so its cost is a few nanoseconds a row. It is also the readable reference of what the tables
mean; `tests/record/test_contract.py` holds both stores to the same words.
"""

import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field, fields, replace
from itertools import chain
from typing import Any, Literal, final

import numpy as np

from shoal.errors import LeaseLost
from shoal.record import _checks, _leases
from shoal.record._checks import Counted
from shoal.record._rows import plain
from shoal.record._sweep import swept_versions
from shoal.record.blobs import check_hash, check_piece, check_size, missing, shaped
from shoal.record.ledger import answers, reserved
from shoal.record.store import (
    CommitRow,
    EventRow,
    FinalRow,
    GroupRow,
    LeaseRow,
    LedgerRow,
    MetricRow,
    RoundLog,
    RoundRow,
    RunRow,
    RunStatus,
    Spend,
    TelemetryRow,
    TokenRow,
    UsageRow,
)
from shoal.tensors import Entry, Index, TensorSpec, sha256


@final
class MemoryBlobs:
    """Blobs in a dictionary."""

    def __init__(self) -> None:
        self._data: dict[str, bytes] = {}

    def put(self, data: bytes) -> str:
        hash = sha256(data)
        self._data.setdefault(hash, bytes(data))
        return hash

    def put_all(self, pieces: Sequence[bytes]) -> list[str]:
        return [self.put(piece) for piece in pieces]

    def writer(self) -> "MemoryBlobWriter":
        return MemoryBlobWriter(self)

    def get(self, hash: str) -> bytes:
        data = self._data.get(check_hash(hash))
        if data is None:
            raise missing(hash, "this store")
        return data

    def view(self, hash: str, spec: TensorSpec) -> np.ndarray:
        data = self.get(hash)
        check_size(len(data), spec, hash)
        return shaped(data, spec)

    def read(self, hash: str, offset: int, size: int) -> bytes:
        check_piece(offset, size)
        return self.get(hash)[offset : offset + size]

    def size(self, hash: str) -> int:
        return len(self.get(hash))

    def has(self, hash: str) -> bool:
        return check_hash(hash) in self._data

    def forget(self, hash: str) -> None:
        self._data.pop(check_hash(hash), None)

    def copy(self) -> "MemoryBlobs":
        """The same blobs; what is put later is not shared."""
        other = MemoryBlobs()
        other._data = dict(self._data)
        return other


@final
class MemoryBlobWriter:
    """Gathers one blob in pieces."""

    def __init__(self, blobs: MemoryBlobs) -> None:
        self._blobs, self._pieces = blobs, bytearray()

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self._pieces += data

    def finish(self) -> str:
        return self._blobs.put(bytes(self._pieces))

    def discard(self) -> None:
        self._pieces.clear()


@dataclass
class _Run:
    """What a store keeps of one run. Rows are frozen."""

    row: RunRow
    commits: list[CommitRow] = field(default_factory=list)
    rounds: dict[int, RoundRow] = field(default_factory=dict)
    logs: dict[int, bytes] = field(default_factory=dict)
    groups: dict[int, GroupRow] = field(default_factory=dict)
    tokens: dict[bytes, tuple[TokenRow, int]] = field(default_factory=dict)  # with the group's number, or 0
    metrics: list[MetricRow] = field(default_factory=list)
    usage: list[UsageRow] = field(default_factory=list)
    events: list[EventRow] = field(default_factory=list)
    telemetry: list[TelemetryRow] = field(default_factory=list)
    finals: dict[int, FinalRow] = field(default_factory=dict)
    last_group: int = 0
    # What is asked for with every commit, found without looking through all groups of a long run.
    waiting: dict[int, None] = field(default_factory=dict)
    with_sums: dict[int, None] = field(default_factory=dict)
    taken: dict[int, tuple[int, ...]] = field(default_factory=dict)  # version -> groups that it holds

    @property
    def last_version(self) -> int | None:
        return len(self.commits) - 1 if self.commits else None

    def copy(self) -> "_Run":
        containers = {f.name: copy(getattr(self, f.name)) for f in fields(self) if f.name != "row"}
        return _Run(self.row, **containers)

    def put_group(self, group: GroupRow) -> int:
        """Keeps a new group, or what an old one has become."""
        if not group.number:
            self.last_group += 1
            group = replace(group, number=self.last_group)
        number = group.number
        if group.version is not None and (number not in self.groups or number in self.waiting):
            self.taken[group.version] = (*self.taken.get(group.version, ()), number)
        for chosen, belongs in ((self.waiting, group.version is None), (self.with_sums, bool(group.sums_root))):
            if belongs:
                chosen[number] = None
            else:
                chosen.pop(number, None)
        self.groups[number] = group
        return number

    def forget_group(self, number: int) -> None:
        """Drops a group that a version holds and whose sums are not kept."""
        version = self.groups.pop(number).version
        assert version is not None
        self.taken[version] = tuple(other for other in self.taken[version] if other != number)
        if not self.taken[version]:
            del self.taken[version]


@final
class MemoryStore:
    """A `Store` in memory. Calls may come from any thread. Every call checks all, then changes all."""

    def __init__(self) -> None:
        self._blobs = MemoryBlobs()
        self._runs: dict[str, _Run] = {}
        self._ledger: list[LedgerRow] = []
        self._leases: dict[str, LeaseRow] = {}
        self._fences: dict[str, int] = {}  # run -> of the lease that this store took
        self._lock = threading.RLock()
        self._to_settle = threading.Lock()

    @property
    def blobs(self) -> MemoryBlobs:
        return self._blobs

    @property
    def settling(self) -> threading.Lock:
        return self._to_settle

    def copy(self) -> "MemoryStore":
        """The store as it is now; what is written to either later is not seen by the other."""
        with self._lock:
            other = MemoryStore()
            other._blobs = self._blobs.copy()
            other._runs = {run_id: run.copy() for run_id, run in self._runs.items()}
            other._leases, other._fences = dict(self._leases), dict(self._fences)
            other._ledger = list(self._ledger)
            return other

    def opened_again(self) -> "MemoryStore":
        """Another store on this very record, as another process would open it: it has none of this one's leases."""
        other = MemoryStore()
        other._blobs, other._runs, other._leases, other._lock = self._blobs, self._runs, self._leases, self._lock
        other._ledger = self._ledger
        return other

    # Leases

    def take_lease(
        self, run_id: str, *, holder: str, now_s: float, life_s: float, instead_of: LeaseRow | None = None
    ) -> int:
        _leases.check_terms(holder, life_s)
        with self._lock:
            self._run(run_id)
            row = _leases.taken(
                self._leases.get(run_id), run_id, holder=holder, now_s=now_s, life_s=life_s, mine=self._fences.get(run_id),
                instead_of=instead_of,
            )  # fmt: skip
            self._leases[run_id], self._fences[run_id] = row, row.fence
            return row.fence

    def renew_lease(self, run_id: str, fence: int, *, expires_s: float) -> None:
        with self._lock:
            self._leases[run_id] = replace(self._my_lease(run_id, fence), expires_s=float(expires_s))

    def end_lease(self, run_id: str, fence: int) -> None:
        with self._lock:
            try:
                row = self._my_lease(run_id, fence)
            except LeaseLost:
                return
            self._leases[run_id] = replace(row, holder=_leases.FREE, expires_s=0.0)
            if self._fences.get(run_id) == fence:
                del self._fences[run_id]

    def lease(self, run_id: str) -> LeaseRow | None:
        with self._lock:
            self._run(run_id)
            return self._leases.get(run_id)

    def _my_lease(self, run_id: str, fence: int) -> LeaseRow:
        self._run(run_id)
        row = self._leases.get(run_id)
        if row is None or row.holder == _leases.FREE or row.fence != fence:
            raise _leases.lost(run_id, row, fence)
        return row

    # Runs

    def create_run(self, run: RunRow) -> None:
        row = replace(run, config=plain(run.config, what="config"), provenance=plain(run.provenance, what="provenance"))
        self._need_blobs([run.plan_hash])
        with self._lock:
            if run.id in self._runs:
                raise _checks.run_exists(run.id)
            self._runs[run.id] = _Run(row)

    def run(self, run_id: str) -> RunRow:
        return self._run(run_id).row

    def runs(self) -> list[RunRow]:
        return [self._runs[run_id].row for run_id in sorted(self._runs)]

    def set_status(self, run_id: str, status: RunStatus, *, time_s: float | None) -> None:
        with self._lock:
            run = self._to_write(run_id)
            run.row = replace(run.row, status=status, finished_s=time_s)

    def set_plan(self, run_id: str, plan_hash: str) -> None:
        self._need_blobs([plan_hash])
        with self._lock:
            run = self._to_write(run_id)
            run.row = replace(run.row, plan_hash=plan_hash)

    def set_config(self, run_id: str, config: Mapping[str, Any]) -> None:
        with self._lock:
            run = self._to_write(run_id)
            run.row = replace(run.row, config=plain(config, what="config"))

    # Rounds and groups

    def open_round(self, run_id: str, row: RoundRow, *, spend: Spend | None = None) -> None:
        _checks.check_open(row)
        row = _plain_round(row)
        with self._lock:
            run = self._to_write(run_id)
            _need_version(run, row.base_version)
            if row.number in run.rounds:
                raise _checks.round_exists(row.number, run.rounds[row.number].state)
            if spend is not None:
                population = run.row.population
                spend.allows(self.ledger(population, spend.budget))
                self._enter(
                    reserved(spend, run_id=run_id, population=population, round=row.number, time_s=row.opened_s)
                )
            run.rounds[row.number] = row

    def ledger(self, population: str, budget: str) -> list[LedgerRow]:
        with self._lock:
            return [row for row in self._ledger if (row.population, row.budget) == (population, budget)]

    def _enter(self, *rows: LedgerRow) -> None:
        for row in rows:
            plain_row = replace(row, number=len(self._ledger) + 1, data=plain(row.data, what="the ledger's data"))
            self._ledger.append(plain_row)

    def _answer(self, run_id: str, row: RoundRow, entry: Literal["settlement", "release"]) -> None:
        rows = [row for row in self._ledger if row.run_id == run_id]
        self._enter(*answers(rows, round=row.number, entry=entry, time_s=row.closed_s or row.opened_s))

    def close_round(
        self,
        run_id: str,
        row: RoundRow,
        *,
        usage: Sequence[UsageRow] = (),
        log: RoundLog | None = None,
        gives_back: bool = False,
    ) -> None:
        _checks.check_closed(row)
        _checks.check_usage(usage)
        _checks.check_log(log, row)
        row = _plain_round(row)
        with self._lock:
            run = self._to_write(run_id)
            _need_version(run, row.base_version)
            found = run.rounds.get(row.number)
            if found is None or found.state != "open":
                raise _checks.not_open(row.number, None if found is None else found.state)
            run.rounds[row.number] = row
            run.usage.extend(usage)
            _keep_log(run, log)
            if gives_back:
                self._answer(run_id, row, "release")

    def rounds(self, run_id: str) -> list[RoundRow]:
        with self._lock:
            rounds = self._run(run_id).rounds
            return [rounds[number] for number in sorted(rounds)]

    def round_log(self, run_id: str, round: int) -> bytes | None:
        with self._lock:
            return self._run(run_id).logs.get(round)

    def add_group(self, run_id: str, group: GroupRow, *, counted: Counted, usage: Sequence[UsageRow] = ()) -> int:
        _checks.check_new_group(group)
        _checks.check_usage(usage)
        _checks.check_counted(counted)
        self._need_blobs([group.sums_root])
        with self._lock:
            run = self._to_write(run_id)
            _need_version(run, group.base_version)
            _need_unsettled(run, counted)
            number = run.put_group(group)
            run.tokens.update(_counted(counted, version=None, group=number))
            run.usage.extend(usage)
            return number

    def groups(self, run_id: str, *, waiting: bool = False, since_version: int = 0) -> list[GroupRow]:
        with self._lock:
            run = self._run(run_id)
            numbers: Iterable[int] = run.groups
            if waiting:
                numbers = run.waiting
            elif since_version:  # a group is taken in after its own version
                taken = (run.taken.get(version, ()) for version in range(since_version + 1, len(run.commits)))
                numbers = sorted([*chain.from_iterable(taken), *run.waiting])
            return [run.groups[number] for number in numbers if run.groups[number].base_version >= since_version]

    def forget_sums(self, run_id: str, *, before_version: int) -> int:
        with self._lock:
            run = self._to_write(run_id)
            kept = [run.groups[number] for number in run.with_sums]
            old = [row for row in kept if row.version is not None and row.base_version < before_version]
            for row in old:
                run.put_group(replace(row, sums_root=""))
            named = {each.groups[number].sums_root for each in self._runs.values() for number in each.with_sums}
        for row in old:
            if row.sums_root not in named:
                self.blobs.forget(row.sums_root)
        return len(old)

    def waiting_nonces(self, run_id: str) -> list[bytes]:
        with self._lock:
            run = self._run(run_id)
            return [nonce for nonce, (_, group) in run.tokens.items() if group and run.groups[group].version is None]

    def counted_nonces(self, run_id: str, *, since_version: int) -> dict[int, list[bytes]]:
        with self._lock:
            run, made = self._run(run_id), dict[int, list[bytes]]()
            for nonce, (token, group) in run.tokens.items():
                version = run.groups[group].version if group else token.version
                if version is not None and version >= since_version:
                    made.setdefault(version, []).append(nonce)
            return made

    # Commits

    def commit(
        self,
        run_id: str,
        commit: CommitRow,
        *,
        round: RoundRow | None,
        groups: Sequence[GroupRow] = (),
        counted: Counted = (),
        metrics: Sequence[MetricRow] = (),
        usage: Sequence[UsageRow] = (),
        final: FinalRow | None = None,
        log: RoundLog | None = None,
    ) -> None:
        _checks.check_commit(commit, round, groups, counted)
        _checks.check_log(log, round)
        _checks.check_metrics(metrics)
        _checks.check_usage(usage)
        self._need_blobs([group.sums_root for group in groups])
        self._need_blobs([entry.hash for index in (commit.model, commit.server_state) for entry in index])
        if round is not None:
            round = _plain_round(round)
        with self._lock:
            run = self._to_write(run_id)
            if commit.version != len(run.commits):
                raise _checks.wrong_version(run_id, commit.version, run.last_version)
            if round is not None and round.number in run.rounds and run.rounds[round.number].state != "open":
                raise _checks.not_open(round.number, run.rounds[round.number].state)
            for group in groups:
                _need_waiting(run, group)
            _need_unsettled(run, counted)
            if round is not None:
                self._answer(run_id, round, "settlement")
            self._apply(run, commit, round, groups, counted)
            run.metrics.extend(replace(row, value=float(row.value)) for row in metrics)
            run.usage.extend(usage)
            _keep_log(run, log)
            if final is not None:
                _need_version(run, final.version)
                run.finals[final.version] = final

    def final(self, run_id: str, version: int) -> FinalRow | None:
        with self._lock:
            return self._run(run_id).finals.get(version)

    def _apply(
        self, run: _Run, commit: CommitRow, round: RoundRow | None, groups: Sequence[GroupRow], counted: Counted
    ) -> None:
        run.commits.append(commit)
        if round is not None:
            run.rounds[round.number] = round
        for group in groups:
            kept = run.groups[group.number] if group.number else group
            run.put_group(replace(kept, version=commit.version))
        run.tokens.update(_counted(counted, version=commit.version, group=0))

    def last_version(self, run_id: str) -> int | None:
        return self._run(run_id).last_version

    def last_commit(self, run_id: str) -> CommitRow | None:
        with self._lock:
            commits = self._run(run_id).commits
            return commits[-1] if commits else None

    def get_commit(self, run_id: str, version: int) -> CommitRow:
        with self._lock:
            run = self._run(run_id)
            _need_version(run, version)
            return run.commits[version]

    def commits(self, run_id: str) -> Iterator[CommitRow]:
        with self._lock:
            return iter(tuple(self._run(run_id).commits))

    # Tokens

    def token(self, run_id: str, nonce: bytes) -> TokenRow | None:
        with self._lock:
            run = self._run(run_id)
            if nonce not in run.tokens:
                return None
            row, group = run.tokens[nonce]
            return replace(row, version=run.groups[group].version) if group else row

    def refuse(self, run_id: str, nonce: bytes, *, reason: str, expires_s: float) -> None:
        _checks.check_nonce(nonce)
        with self._lock:
            run = self._to_write(run_id)
            row = TokenRow(nonce=nonce, state="refused", version=None, reason=reason, expires_s=expires_s)
            kept, _ = run.tokens.setdefault(nonce, (row, 0))
            if kept.state == "counted":
                raise _checks.settled(nonce, "was counted and cannot be refused")

    def forget_tokens(self, run_id: str, *, before_s: float, to_version: int) -> int:
        with self._lock:
            run = self._to_write(run_id)

            def stays(token: TokenRow, group: int) -> bool:
                version = run.groups[group].version if group else token.version
                is_settled = token.state == "refused" or (version is not None and version <= to_version)
                return bool(token.expires_s >= before_s) or not is_settled

            kept = {nonce: token for nonce, token in run.tokens.items() if stays(*token)}
            dropped, run.tokens = len(run.tokens) - len(kept), kept
            return dropped

    def sweep(self, run_id: str, *, since_version: int, before_version: int, every: int, finals_before: int) -> int:
        with self._lock:
            run = self._to_write(run_id)
            named = {entry.hash for entry in _entries(run)}
            versions = set(swept_versions(since_version, before_version, every))
            for version in versions & set(range(len(run.commits))):
                commit = run.commits[version]
                run.commits[version] = replace(commit, model=Index(()), server_state=Index(()), is_swept=True)
                run.finals.pop(version, None)
            run.finals = {version: final for version, final in run.finals.items() if version >= finals_before}
            if versions:
                _forget_rounds(run, versions)
            _forget_groups(run, before_version)
            unnamed = named - {entry.hash for each in self._runs.values() for entry in _entries(each)}
        for hash in unnamed:
            self.blobs.forget(hash)
        return len(unnamed)

    # Metrics, usage, journal

    def log(self, run_id: str, metrics: Sequence[MetricRow]) -> None:
        _checks.check_metrics(metrics)
        with self._lock:
            self._to_write(run_id).metrics.extend(replace(row, value=float(row.value)) for row in metrics)

    def metrics(self, run_id: str, name: str | None = None) -> list[MetricRow]:
        with self._lock:
            return [row for row in self._run(run_id).metrics if name is None or row.name == name]

    def add_usage(self, run_id: str, usage: Sequence[UsageRow]) -> None:
        _checks.check_usage(usage)
        with self._lock:
            self._to_write(run_id).usage.extend(usage)

    def usage(self, run_id: str) -> list[UsageRow]:
        with self._lock:
            return list(self._run(run_id).usage)

    def journal(self, run_id: str, events: Sequence[EventRow]) -> None:
        rows = [replace(event, data=plain(event.data, what="an event's data")) for event in events]
        with self._lock:
            self._to_write(run_id).events.extend(rows)

    def events(self, run_id: str) -> list[EventRow]:
        with self._lock:
            return list(self._run(run_id).events)

    def add_telemetry(self, run_id: str, row: TelemetryRow) -> None:
        _checks.check_telemetry(row)
        with self._lock:
            self._to_write(run_id).telemetry.append(row)

    def telemetry(self, run_id: str) -> list[TelemetryRow]:
        with self._lock:
            return sorted(self._run(run_id).telemetry, key=lambda row: row.day)

    def close(self) -> None:
        pass

    def _run(self, run_id: str) -> _Run:
        if run_id not in self._runs:
            raise _checks.no_run(run_id, sorted(self._runs))
        return self._runs[run_id]

    def _to_write(self, run_id: str) -> _Run:
        run = self._run(run_id)
        _leases.check_fence(self._leases.get(run_id), run_id, self._fences.get(run_id))
        return run

    def _need_blobs(self, hashes: Iterable[str]) -> None:
        for hash in hashes:
            if hash and not self._blobs.has(hash):
                raise missing(hash, "this store")


def _plain_round(row: RoundRow) -> RoundRow:
    configuration = plain(row.configuration, what="the round's configuration")
    return replace(row, configuration=configuration, analytics=plain(row.analytics, what="the round's analytics"))


def _keep_log(run: _Run, log: RoundLog | None) -> None:
    if log is not None:
        run.logs[log.round] = log.data
        run.logs = {number: data for number, data in run.logs.items() if number > log.round - log.kept}


def _entries(run: _Run) -> Iterator[Entry]:
    """What the run's versions name."""
    rows: list[CommitRow | FinalRow] = [*run.commits, *run.finals.values()]
    return chain.from_iterable((*row.model, *row.server_state) for row in rows)


def _forget_rounds(run: _Run, versions: set[int]) -> None:
    """What belongs to versions that are swept: their rounds (usage is added up under round 0) and metrics."""
    gone = {row.number for row in run.rounds.values() if row.state != "open" and row.base_version + 1 in versions}
    kept: dict[str, UsageRow] = {}
    others: list[UsageRow] = []
    for row in run.usage:
        if row.round and row.round not in gone:
            others.append(row)
        else:
            kept[row.phase] = _added(kept.get(row.phase), row)
    run.usage = [*kept.values(), *others] if gone else run.usage
    run.rounds = {number: row for number, row in run.rounds.items() if number not in gone}
    run.logs = {number: data for number, data in run.logs.items() if number not in gone}
    run.metrics = [row for row in run.metrics if row.version not in versions]


def _forget_groups(run: _Run, before: int) -> None:
    asked = {group for _, group in run.tokens.values()} | {max(run.groups, default=0)}
    for number, group in list(run.groups.items()):
        taken = group.version is not None and group.version < before
        if taken and not group.sums_root and number not in asked:
            run.forget_group(number)


def _added(total: UsageRow | None, row: UsageRow) -> UsageRow:
    if total is None:
        return replace(row, round=0)
    joules = None if total.joules is None and row.joules is None else (total.joules or 0.0) + (row.joules or 0.0)
    return replace(
        total, seconds=total.seconds + row.seconds, bytes_down=total.bytes_down + row.bytes_down,
        bytes_up=total.bytes_up + row.bytes_up, joules=joules, count=total.count + row.count,
    )  # fmt: skip


def _need_version(run: _Run, version: int) -> None:
    if not 0 <= version < len(run.commits):
        raise _checks.no_version(run.row.id, version, run.last_version)


def _need_waiting(run: _Run, group: GroupRow) -> None:
    kept = run.groups.get(group.number)
    if group.number and (kept is None or kept.version is not None):
        raise _checks.not_waiting(group.number, None if kept is None else kept.version)


def _need_unsettled(run: _Run, counted: Counted) -> None:
    for nonce, _ in counted:
        if nonce in run.tokens:
            row, group = run.tokens[nonce]
            raise _checks.settled_before(replace(row, version=run.groups[group].version) if group else row)


def _counted(counted: Counted, *, version: int | None, group: int) -> dict[bytes, tuple[TokenRow, int]]:
    return {
        nonce: (TokenRow(nonce=nonce, state="counted", version=version, reason="", expires_s=float(expires_s)), group)
        for nonce, expires_s in counted
    }
