"""The run store on disk: `record.sqlite` beside `blobs/` in one folder.

Not for many machines: one process writes a run's commits, any number on the same machine read. What each call promises
stands in `store.py`; the schema enforces it (`schema.py`), and what the database refuses is said again in words here.

Cost: a commit is one fsync of the log (measured 1.0 to 1.5 ms on an SSD with 20 nonces and 10 metrics); its blobs were
written before, at two fsyncs each. Reads use a connection of their own and never wait for a write.
"""

import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, Final, Literal, final

from sqlalchemy import Connection, delete, exc, select, update

from shoal.errors import StoreError
from shoal.record import _checks, _leases, _rows, _sweep, migrations
from shoal.record import _statements as sql
from shoal.record._checks import Counted
from shoal.record._database import Database
from shoal.record.blobs import FolderBlobs, disk, make_folder, missing
from shoal.record.ledger import answers, reserved
from shoal.record.schema import (
    COMMITS,
    EVENTS,
    GROUPS,
    INDEXES,
    LEASES,
    LEDGER,
    METRICS,
    ROUND_LOGS,
    ROUNDS,
    RUNS,
    TELEMETRY,
    TOKENS,
    USAGE,
)
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
from shoal.tensors import Index, sha256

DATABASE_NAME: Final = "record.sqlite"
BLOBS_NAME: Final = "blobs"


def open_store(folder: Path, *, read_only: bool = False) -> "SqliteStore":
    """Opens the record in a folder.

    Args:
        folder: Holds `record.sqlite` and `blobs/`; made where it does not exist.
        read_only: Changes nothing and waits for nobody: for listings, dashboards, reports. The record must exist.

    Raises:
        StoreError: there is no record to read, it is of a newer schema, or the disk refuses.
    """
    path = folder / DATABASE_NAME
    exists = path.exists() and path.stat().st_size > 0
    if read_only and not exists:
        raise StoreError(
            f"Expected a run folder with {DATABASE_NAME}, got {folder}. `shoal runs list` shows run folders."
        )
    if exists:
        _check_schema(path, read_only=read_only)
    else:
        with disk(folder):
            make_folder(folder)
    store = SqliteStore(folder, read_only=read_only)
    try:
        if not read_only:
            store.prepare()
    except BaseException:
        store.close()
        raise
    return store


def _check_schema(path: Path, *, read_only: bool) -> None:
    """Looks before anything is opened for writing, so that a newer file stays as it is to the byte."""
    database = Database(path, read_only=True)
    try:
        with database.read() as connection:
            found = migrations.schema_version(connection)
    finally:
        database.close()
    newest = len(migrations.MIGRATIONS)
    migrations.refuse_newer(found, newest)
    if read_only and found < newest:
        raise StoreError(
            f"{path} has schema {found}, older than {newest}. Open it once for writing, which brings it forward."
        )


@final
class SqliteStore:
    """A `Store` in a folder. Calls may come from any thread."""

    def __init__(self, folder: Path, *, read_only: bool) -> None:
        """Use `open_store`."""
        self._path = folder / DATABASE_NAME
        self._database = Database(self._path, read_only=read_only)
        self._blobs = FolderBlobs(folder / BLOBS_NAME, read_only=read_only)
        self._to_settle = threading.Lock()
        self._fences: dict[str, int] = {}  # run -> of the lease that this store took

    def prepare(self) -> None:
        """Brings the schema forward and clears away what killed writers left."""
        migrations.migrate(self._database.write, backup=self._backup, migrations=migrations.MIGRATIONS)
        self._blobs.sweep(now_s=time.time())

    @property
    def blobs(self) -> FolderBlobs:
        return self._blobs

    @property
    def settling(self) -> threading.Lock:
        return self._to_settle

    # Leases

    def take_lease(
        self, run_id: str, *, holder: str, now_s: float, life_s: float, instead_of: LeaseRow | None = None
    ) -> int:
        _leases.check_terms(holder, life_s)
        mine = self._fences.get(run_id)
        with self._fence_undone(run_id, mine), self._write(run_id, fenced=False) as connection:
            row = _leases.taken(
                _lease(connection, run_id), run_id, holder=holder, now_s=now_s, life_s=life_s, mine=mine, instead_of=instead_of
            )  # fmt: skip
            connection.execute(sql.DROP_LEASE, {"run": run_id})
            sql.ADD[LEASES].run(connection, {"name": run_id, **asdict(row)})
            self._fences[run_id] = row.fence
        return row.fence

    def renew_lease(self, run_id: str, fence: int, *, expires_s: float) -> None:
        with self._write(run_id, fenced=False) as connection:
            if not sql.RENEW_LEASE.run(connection, {"run": run_id, "fence_is": fence, "expires_s": float(expires_s)}):
                raise _leases.lost(run_id, _lease(connection, run_id), fence)

    def end_lease(self, run_id: str, fence: int) -> None:
        mine = self._fences.get(run_id)
        with self._fence_undone(run_id, mine), self._write(run_id, fenced=False) as connection:
            values = {"run": run_id, "fence_is": fence, "holder": _leases.FREE, "expires_s": 0.0}
            if sql.END_LEASE.run(connection, values) and mine == fence:
                del self._fences[run_id]

    def lease(self, run_id: str) -> LeaseRow | None:
        with self._read(run_id) as connection:
            return _lease(connection, run_id)

    @contextmanager
    def _fence_undone(self, run_id: str, mine: int | None) -> Iterator[None]:
        """What this store remembers is as before where the transaction fails."""
        try:
            yield
        except BaseException:
            if mine is not None:
                self._fences[run_id] = mine
            else:
                self._fences.pop(run_id, None)
            raise

    # Runs

    def create_run(self, run: RunRow) -> None:
        values = _rows.run_values(run)
        self._need_blobs([run.plan_hash] if run.plan_hash else [])
        try:
            with self._database.write() as connection:
                sql.ADD[RUNS].run(connection, values)
        except exc.IntegrityError as error:
            raise StoreError(
                f"Expected a new run, but {run.id} exists. Take another id, or go on with that run."
            ) from error

    def run(self, run_id: str) -> RunRow:
        with self._database.read() as connection:
            row = connection.execute(select(RUNS).where(RUNS.c.id == run_id)).one_or_none()
            if row is None:
                raise _no_run(connection, run_id)
        return _rows.run_row(row._asdict())

    def runs(self) -> list[RunRow]:
        with self._database.read() as connection:
            return [_rows.run_row(row._asdict()) for row in connection.execute(select(RUNS).order_by(RUNS.c.id))]

    def set_status(self, run_id: str, status: RunStatus, *, time_s: float | None) -> None:
        with self._write(run_id) as connection:
            connection.execute(update(RUNS).where(RUNS.c.id == run_id).values(status=status, finished_s=time_s))

    def set_plan(self, run_id: str, plan_hash: str) -> None:
        self._need_blobs([plan_hash] if plan_hash else [])
        with self._write(run_id) as connection:
            connection.execute(update(RUNS).where(RUNS.c.id == run_id).values(plan_hash=plan_hash))

    def set_config(self, run_id: str, config: Mapping[str, Any]) -> None:
        text = _checks.to_json(config, what="config")
        with self._write(run_id) as connection:
            connection.execute(update(RUNS).where(RUNS.c.id == run_id).values(config=text))

    # Rounds and groups

    def open_round(self, run_id: str, row: RoundRow, *, spend: Spend | None = None) -> None:
        _checks.check_open(row)
        values = _rows.round_values(run_id, row)
        population = self.run(run_id).population if spend is not None else ""
        with self._write(run_id) as connection:
            _need_version(connection, run_id, row.base_version)
            state = sql.ROUND_STATE.scalar(connection, {"run": run_id, "at": row.number})
            if state is not None:
                raise _checks.round_exists(row.number, state)
            sql.ADD[ROUNDS].run(connection, values)
            if spend is not None:
                spend.allows(_ledger_of(connection, population, spend.budget))
                taken = reserved(spend, run_id=run_id, population=population, round=row.number, time_s=row.opened_s)
                sql.ADD[LEDGER].run(connection, _rows.ledger_values(taken))

    def ledger(self, population: str, budget: str) -> list[LedgerRow]:
        with self._database.read() as connection:
            return _ledger_of(connection, population, budget)

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
        with self._write(run_id) as connection:
            _need_version(connection, run_id, row.base_version)
            if not _close_round(connection, run_id, row):
                raise _checks.not_open(row.number, None)
            sql.ADD[USAGE].run_many(connection, _rows.usage_values(run_id, usage))
            _keep_log(connection, run_id, log)
            if gives_back:
                _answer(connection, run_id, row, "release")

    def rounds(self, run_id: str) -> list[RoundRow]:
        with self._read(run_id) as connection:
            return [_rows.round_row(row._asdict()) for row in connection.execute(sql.ALL_ROUNDS, {"run": run_id})]

    def round_log(self, run_id: str, round: int) -> bytes | None:
        with self._read(run_id) as connection:
            data = sql.ONE_LOG.scalar(connection, {"run": run_id, "at": round})
        return None if data is None else bytes(data)

    def add_group(self, run_id: str, group: GroupRow, *, counted: Counted, usage: Sequence[UsageRow] = ()) -> int:
        _checks.check_new_group(group)
        _checks.check_usage(usage)
        _checks.check_counted(counted)
        self._need_groups([group])
        with self._settling(run_id, counted), self._write(run_id) as connection:
            _need_version(connection, run_id, group.base_version)
            number = _add_group(connection, run_id, group, version=None)
            sql.ADD[TOKENS].run_many(connection, _rows.counted_values(run_id, counted, version=None, group=number))
            sql.ADD[USAGE].run_many(connection, _rows.usage_values(run_id, usage))
        return number

    def groups(self, run_id: str, *, waiting: bool = False, since_version: int = 0) -> list[GroupRow]:
        statement = sql.ALL_GROUPS.where(GROUPS.c.version.is_(None)) if waiting else sql.ALL_GROUPS
        if since_version:
            # A group is taken in after its own version: said, so that the index of versions is of use.
            late_enough = GROUPS.c.version.is_(None) | (GROUPS.c.version > since_version)
            statement = statement.where(GROUPS.c.base_version >= since_version, late_enough)
        with self._read(run_id) as connection:
            return [_rows.group_row(row._asdict()) for row in connection.execute(statement, {"run": run_id})]

    def forget_sums(self, run_id: str, *, before_version: int) -> int:
        with self._write(run_id) as connection:
            old = connection.execute(sql.OLD_SUMS, {"run": run_id, "before": before_version}).scalars().all()
            connection.execute(sql.FORGET_SUMS, {"run": run_id, "before": before_version})
            named = (
                set(connection.execute(sql.SUMS_NAMED.where(GROUPS.c.sums_root.in_(old))).scalars()) if old else set()
            )
        for hash in set(old) - named:  # after the rows: a blob that nobody names does no harm
            self.blobs.forget(hash)
        return len(old)

    def waiting_nonces(self, run_id: str) -> list[bytes]:
        with self._read(run_id) as connection:
            return list(connection.execute(sql.WAITING_NONCES, {"run": run_id}).scalars())

    def counted_nonces(self, run_id: str, *, since_version: int) -> dict[int, list[bytes]]:
        made: dict[int, list[bytes]] = {}
        with self._read(run_id) as connection:
            for version, nonce in connection.execute(sql.COUNTED_SINCE, {"run": run_id, "since": since_version}):
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
        self._need_groups(groups)
        indexes = [commit.model, commit.server_state, *((final.model, final.server_state) if final is not None else ())]
        self._need_blobs([entry.hash for index in indexes for entry in index])
        with self._settling(run_id, counted), self._write(run_id) as connection:
            last = sql.LAST_VERSION.scalar(connection, {"run": run_id})
            if commit.version != (0 if last is None else last + 1):
                raise _checks.wrong_version(run_id, commit.version, last)
            for index in indexes:
                _add_index(connection, index)
            sql.ADD[COMMITS].run(connection, _rows.commit_values(run_id, commit))
            if round is not None and not _close_round(connection, run_id, round):
                sql.ADD[ROUNDS].run(connection, _rows.round_values(run_id, round))
            elif round is not None:
                _answer(connection, run_id, round, "settlement")
            _take_groups(connection, run_id, commit.version, groups)
            sql.ADD[TOKENS].run_many(
                connection, _rows.counted_values(run_id, counted, version=commit.version, group=None)
            )
            sql.ADD[METRICS].run_many(connection, _rows.metric_values(run_id, metrics))
            sql.ADD[USAGE].run_many(connection, _rows.usage_values(run_id, usage))
            _keep_log(connection, run_id, log)
            if final is not None:
                _need_version(connection, run_id, final.version)
                roots = {"model": final.model.root, "state": final.server_state.root}
                connection.execute(sql.SET_FINAL, {"run": run_id, "at": final.version, **roots})

    def final(self, run_id: str, version: int) -> FinalRow | None:
        with self._read(run_id) as connection:
            row = connection.execute(sql.ONE_COMMIT, {"run": run_id, "at": version}).one_or_none()
            if row is None or row.final_model_root is None:
                return None
            read = partial(self._index, connection)
            return FinalRow(
                version=version, model=read(row.final_model_root), server_state=read(row.final_server_state_root)
            )

    def last_version(self, run_id: str) -> int | None:
        with self._read(run_id) as connection:
            last = sql.LAST_VERSION.scalar(connection, {"run": run_id})
        return None if last is None else int(last)

    def last_commit(self, run_id: str) -> CommitRow | None:
        last = self.last_version(run_id)
        return None if last is None else self.get_commit(run_id, last)

    def get_commit(self, run_id: str, version: int) -> CommitRow:
        with self._read(run_id) as connection:
            row = connection.execute(sql.ONE_COMMIT, {"run": run_id, "at": version}).one_or_none()
            if row is None:
                raise _checks.no_version(run_id, version, sql.LAST_VERSION.scalar(connection, {"run": run_id}))
            return self._commit_row(connection, row._asdict())

    def commits(self, run_id: str) -> Iterator[CommitRow]:
        with self._read(run_id) as connection:
            last = sql.LAST_VERSION.scalar(connection, {"run": run_id})
        return (self.get_commit(run_id, version) for version in range(0 if last is None else last + 1))

    # Tokens

    def token(self, run_id: str, nonce: bytes) -> TokenRow | None:
        with self._read(run_id) as connection:
            row = connection.execute(sql.ONE_TOKEN, {"run": run_id, "nonce_is": nonce}).one_or_none()
        return None if row is None else _rows.token_row(row._asdict())

    def refuse(self, run_id: str, nonce: bytes, *, reason: str, expires_s: float) -> None:
        _checks.check_nonce(nonce)
        values = {**_rows.counted_values(run_id, [(nonce, expires_s)], version=None, group=None)[0], "state": "refused"}
        with self._write(run_id) as connection:
            row = connection.execute(sql.ONE_TOKEN, {"run": run_id, "nonce_is": nonce}).one_or_none()
            if row is not None and row.state == "counted":
                raise _checks.settled(nonce, "was counted and cannot be refused")
            if row is None:
                sql.ADD[TOKENS].run(connection, {**values, "reason": reason})

    def forget_tokens(self, run_id: str, *, before_s: float, to_version: int) -> int:
        expired = (TOKENS.c.run_id == run_id, TOKENS.c.expires_s < before_s)
        settled = (TOKENS.c.state == "refused") | sql.COUNTED_IN.between(0, to_version)
        with self._write(run_id) as connection:
            return int(connection.execute(delete(TOKENS).where(*expired, settled)).rowcount)

    def sweep(self, run_id: str, *, since_version: int, before_version: int, every: int, finals_before: int) -> int:
        with self._write(run_id) as connection:
            unnamed = _sweep.sweep(
                connection, run_id, since=since_version, before=before_version, every=every, finals_before=finals_before
            )
        for hash in unnamed:  # after the rows: a blob that nobody names does no harm
            self.blobs.forget(hash)
        return len(unnamed)

    # Metrics, usage, journal

    def log(self, run_id: str, metrics: Sequence[MetricRow]) -> None:
        _checks.check_metrics(metrics)
        with self._write(run_id) as connection:
            sql.ADD[METRICS].run_many(connection, _rows.metric_values(run_id, metrics))

    def metrics(self, run_id: str, name: str | None = None) -> list[MetricRow]:
        statement = sql.ALL_METRICS if name is None else sql.ALL_METRICS.where(METRICS.c.name == name)
        with self._read(run_id) as connection:
            return [_rows.metric_row(row._asdict()) for row in connection.execute(statement, {"run": run_id})]

    def add_usage(self, run_id: str, usage: Sequence[UsageRow]) -> None:
        _checks.check_usage(usage)
        with self._write(run_id) as connection:
            sql.ADD[USAGE].run_many(connection, _rows.usage_values(run_id, usage))

    def usage(self, run_id: str) -> list[UsageRow]:
        with self._read(run_id) as connection:
            return [_rows.usage_row(row._asdict()) for row in connection.execute(sql.ALL_USAGE, {"run": run_id})]

    def journal(self, run_id: str, events: Sequence[EventRow]) -> None:
        values = _rows.event_values(run_id, events)
        with self._write(run_id) as connection:
            sql.ADD[EVENTS].run_many(connection, values)

    def events(self, run_id: str) -> list[EventRow]:
        with self._read(run_id) as connection:
            return [_rows.event_row(row._asdict()) for row in connection.execute(sql.ALL_EVENTS, {"run": run_id})]

    def add_telemetry(self, run_id: str, row: TelemetryRow) -> None:
        _checks.check_telemetry(row)
        with self._write(run_id) as connection:
            sql.ADD[TELEMETRY].run(connection, _rows.telemetry_values(run_id, row))

    def telemetry(self, run_id: str) -> list[TelemetryRow]:
        with self._read(run_id) as connection:
            return [
                _rows.telemetry_row(row._asdict()) for row in connection.execute(sql.ALL_TELEMETRY, {"run": run_id})
            ]

    def close(self) -> None:
        self._database.close()

    # Parts

    @contextmanager
    def _read(self, run_id: str) -> Iterator[Connection]:
        with self._database.read() as connection:
            if sql.FIND_RUN.scalar(connection, {"run": run_id}) is None:
                raise _no_run(connection, run_id)
            yield connection

    @contextmanager
    def _write(self, run_id: str, *, fenced: bool = True) -> Iterator[Connection]:
        """A transaction that writes the run: invariant (6). `fenced` is off for what changes the lease itself."""
        with self._database.write() as connection:
            if sql.FIND_RUN.scalar(connection, {"run": run_id}) is None:
                raise _no_run(connection, run_id)
            if fenced and sql.HELD_BY.scalar(connection, {"run": run_id}) != self._fences.get(run_id):
                _leases.check_fence(_lease(connection, run_id), run_id, self._fences.get(run_id))
            yield connection

    @contextmanager
    def _settling(self, run_id: str, counted: Counted) -> Iterator[None]:
        """Says which nonce the database has refused."""
        try:
            yield
        except exc.IntegrityError as error:
            for nonce, _ in counted:
                if (token := self.token(run_id, nonce)) is not None:
                    raise _checks.settled_before(token) from error
            raise StoreError(f"The record {self._path} refuses: {error.orig}. Please report this.") from error

    def _need_blobs(self, hashes: Sequence[str]) -> None:
        for hash in hashes:
            if not self._blobs.has(hash):
                raise missing(hash, self._path.parent / BLOBS_NAME)

    def _need_groups(self, groups: Sequence[GroupRow]) -> None:
        for group in groups:
            if group.sums_root:
                self._need_blobs([group.sums_root])

    def _commit_row(self, connection: Connection, values: _rows.Values) -> CommitRow:
        return _rows.commit_row(values, partial(self._index, connection))

    def _index(self, connection: Connection, root: str) -> Index:
        if root == _rows.SWEPT:
            return Index(())
        data = str(sql.FIND_INDEX.scalar(connection, {"root_is": root})).encode()
        if sha256(data) != root:
            raise StoreError(f"Index {root} in {self._path} is damaged. Restore the file from a copy.")
        return Index.parse(data)

    def _backup(self, version: int) -> Path:
        """`record.sqlite.schema-1`, or with another ending where that exists."""
        target = self._path.with_name(f"{self._path.name}.schema-{version}")
        copies = 1
        while target.exists():
            copies += 1
            target = self._path.with_name(f"{self._path.name}.schema-{version}.{copies}")
        self._database.backup(target)
        return target


def _no_run(connection: Connection, run_id: str) -> StoreError:
    return _checks.no_run(run_id, [str(known) for known in connection.scalars(select(RUNS.c.id).order_by(RUNS.c.id))])


def _lease(connection: Connection, run_id: str) -> LeaseRow | None:
    row = connection.execute(sql.LEASE, {"run": run_id}).one_or_none()
    return None if row is None else LeaseRow(**row._asdict())


def _need_version(connection: Connection, run_id: str, version: int) -> None:
    if connection.execute(sql.ONE_COMMIT, {"run": run_id, "at": version}).first() is None:
        raise _checks.no_version(run_id, version, sql.LAST_VERSION.scalar(connection, {"run": run_id}))


def _add_index(connection: Connection, index: Index) -> None:
    if sql.FIND_INDEX.scalar(connection, {"root_is": index.root}) is None:
        sql.ADD[INDEXES].run(connection, {"root": index.root, "data": index.data.decode()})


def _close_round(connection: Connection, run_id: str, row: RoundRow) -> bool:
    """Whether there was such a round, which is closed now. Raises StoreError where it was closed before."""
    values = _rows.round_values(run_id, row)
    key = {"run": values.pop("run_id"), "at": values.pop("number")}
    if sql.CLOSE_ROUND.run(connection, {**values, **key}):
        return True
    state = sql.ROUND_STATE.scalar(connection, key)
    if state is not None:
        raise _checks.not_open(row.number, state)
    return False


def _ledger_of(connection: Connection, population: str, budget: str) -> list[LedgerRow]:
    found = connection.execute(sql.LEDGER_OF, {"population_is": population, "budget_is": budget})
    return [_rows.ledger_row(row._asdict()) for row in found]


def _answer(connection: Connection, run_id: str, row: RoundRow, entry: Literal["settlement", "release"]) -> None:
    rows = [_rows.ledger_row(found._asdict()) for found in connection.execute(sql.LEDGER_OF_RUN, {"run": run_id})]
    made = answers(rows, round=row.number, entry=entry, time_s=row.closed_s or row.opened_s)
    sql.ADD[LEDGER].run_many(connection, [_rows.ledger_values(each) for each in made])


def _keep_log(connection: Connection, run_id: str, log: RoundLog | None) -> None:
    if log is not None:
        sql.ADD[ROUND_LOGS].run(connection, {"run_id": run_id, "round": int(log.round), "data": log.data})
        sql.FORGET_LOGS.run(connection, {"run": run_id, "at": int(log.round) - int(log.kept)})


def _take_groups(connection: Connection, run_id: str, version: int, groups: Sequence[GroupRow]) -> None:
    """Gives waiting groups to a version; then adds new ones, so that none is taken for a waiting one."""
    for group in groups:
        key = {"run": run_id, "at": group.number}
        if group.number and not sql.TAKE_GROUP.run(connection, {**key, "version": version}):
            raise _checks.not_waiting(group.number, sql.GROUP_VERSION.scalar(connection, key))
    for group in groups:
        if not group.number:
            _add_group(connection, run_id, group, version=version)


def _add_group(connection: Connection, run_id: str, group: GroupRow, *, version: int | None) -> int:
    number = 1 + int(sql.LAST_GROUP.scalar(connection, {"run": run_id}) or 0)
    sql.ADD[GROUPS].run(connection, _rows.group_values(run_id, group, number=number, version=version))
    return number
