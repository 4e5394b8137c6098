"""The run store's contract: what is kept of a run, and what one transaction holds.

A `Store` keeps runs (a task trained once: a *line* of commits), their rounds, groups, tokens, commits, metrics, use of
time and bytes, and the ledger. Tensors and plans are blobs, written first and named by their hash; the row that names
them is the commit. `record/sqlite.py` is the store on disk, `record/memory.py` the one for tests and simulation of
crashes. Nothing here is about one device: tokens are kept as nonces, metrics are of the server, a cohort or a class.

Invariants (tests cite them by number):
    (1) A line's versions are 0, 1, 2, … without a gap; version 0 is the initial model.
    (2) A nonce settles once. It is counted in the transaction of the commit (or group) that holds its contribution.
    (3) What a call has returned for is durable: it is read back after the process is killed at any later point.
    (4) A blob named by a row exists and has that hash.
    (5) Every call is one transaction: it happens whole or not at all.
    (6) Of the stores on one record only the one that took a run's lease last writes that run. Every write looks at the
        lease in its own transaction, whatever the clocks say; while nobody has a lease, whoever opens the record may write.
    (7) What is taken from a budget is taken in the transaction that opens the round, after `Spend.allows` has seen all that
        was taken before. A commit settles it; only a round that is closed with `gives_back` gives it back.
"""

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np

from shoal.tensors import Index, TensorSpec

RunKind = Literal["simulate", "host", "train"]
RunStatus = Literal["running", "finished", "failed", "stopped"]
Scope = Literal["server", "cohort", "class"]
RoundState = Literal["open", "committed", "abandoned"]
TokenState = Literal["pending", "counted", "refused"]
LedgerEntry = Literal["reservation", "settlement", "release"]


@dataclass(frozen=True, kw_only=True, slots=True)
class RunRow:
    """One run: a task trained once."""

    id: str
    """Short, unique in the store, sortable by time of creation."""
    name: str
    """The task's name."""
    kind: RunKind
    """Which place it runs in."""
    plan_hash: str
    """Hash of the plan's manifest; the plan is a blob of that name (or empty, while there is none)."""
    config: Mapping[str, Any]
    """Settings of the run, as JSON."""
    provenance: Mapping[str, Any]
    """Versions, cores, platform, commit of the source."""
    status: RunStatus
    created_s: float
    """Seconds since the epoch."""
    finished_s: float | None = None
    population: str = "default"
    """The devices that it draws on."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RoundRow:
    """One pass of selection, configuration, reporting, commit."""

    number: int
    """From 1, in order of opening; an abandoned round keeps its number."""
    base_version: int
    """The version that its devices started from."""
    state: RoundState
    opened_s: float
    closed_s: float | None = None
    selected: int = 0
    counted: int = 0
    released: int = 0
    """Selected devices that did not count: dropped, refused or late."""
    reason: str = ""
    """Why it closed: goal | window | abandoned: …"""
    configuration: Mapping[str, Any] = field(default_factory=dict)
    """The round configuration: fixed points, seed, windows."""
    analytics: Mapping[str, Any] = field(default_factory=dict)
    """What was seen of its devices, never of one: written when it closes (`fleet/analytics.py` says in what form)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RoundLog:
    """What a round's machine was told, so that it can be run again. Kept of the newest rounds only."""

    round: int
    data: bytes
    """In the form of `fleet/round_log.py`."""
    kept: int
    """Rounds whose logs stay: those of round `round - kept` and before go."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupRow:
    """Updates added together before anybody saw them."""

    round: int
    base_version: int
    members: int
    weight: int
    sums_root: str = ""
    """Hash of the blob that holds the sums; empty where they are not kept (any more)."""
    number: int = 0
    """From 1 within the run, given by the store; 0 before the store has it."""
    version: int | None = None
    """The commit that holds it; None while it waits for one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LedgerRow:
    """An entry in the ledger of a population's budget."""

    number: int
    """From 1 within the record."""
    population: str
    budget: str
    """Which: privacy, …"""
    entry: LedgerEntry
    """Taken from the budget; known to have been used; given back unused. What is only reserved is spent, too: a crash may have used it."""
    amount: float
    run_id: str
    round: int
    """That it was taken for."""
    time_s: float
    """Seconds since the epoch."""
    data: Mapping[str, Any]
    """What it was taken for, as JSON."""
    reservation: int | None = None
    """Number of the reservation that a settlement or release answers."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Spend:
    """What opening a round takes from a budget of its run's population."""

    budget: str
    amount: float
    data: Mapping[str, Any]
    """What it is taken for, as JSON."""
    allows: Callable[[Sequence[LedgerRow]], None]
    """Looks at all entries of the budget, in the transaction that is to add this one. Raises BudgetSpent: it may not."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CommitRow:
    """One version of a line."""

    version: int
    model: Index
    """The model's tensors; each hash is a blob."""
    server_state: Index
    """The server rule's tensors."""
    round: int
    """The round that made it; 0 for the initial model."""
    members: int
    weight: int
    created_s: float
    is_swept: bool = False
    """Its tensors are not kept any more (`Retention`); model and server state have no entries then."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FinalRow:
    """A version as it would be had everything that came late for the versions before it come in time."""

    version: int
    model: Index
    server_state: Index


@dataclass(frozen=True, kw_only=True, slots=True)
class MetricRow:
    """One value of one metric."""

    version: int
    """The version it was measured on."""
    name: str
    value: float
    scope: Scope
    time_s: float
    """Seconds since the run was created."""
    device_class: str = ""
    """Which class of device, where the scope is class; else empty."""


@dataclass(frozen=True, kw_only=True, slots=True)
class UsageRow:
    """What one phase of a round cost, over all its members."""

    round: int
    phase: str
    """select | configure | compute | compile | wait | push | pull | aggregate | commit | evaluate | …"""
    seconds: float = 0.0
    bytes_down: int = 0
    bytes_up: int = 0
    joules: float | None = None
    count: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenRow:
    """What became of an assignment, by nonce; kept until it expires."""

    nonce: bytes
    state: TokenState
    version: int | None
    """The commit that counted it; None while its group waits for one."""
    reason: str
    """Why it was refused."""
    expires_s: float


@dataclass(frozen=True, kw_only=True, slots=True)
class EventRow:
    """One line of the journal."""

    time_s: float
    kind: str
    data: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class TelemetryRow:
    """The sum of what some devices told of one day, with noise."""

    day: int
    """Since 1970-01-01 UTC."""
    schema: str
    """Names the entries (`privacy/telemetry.py`)."""
    reports: int
    """How many devices."""
    noise: float
    """Standard deviation of each entry's noise, in that entry's units."""
    sums: tuple[int, ...]
    """By entry."""
    time_s: float
    """When it was opened, seconds since the epoch."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LeaseRow:
    """Who may write a run."""

    holder: str
    """Names one life of a process, its machine first, as `fleet.lease.holder_name` does; empty: it was ended."""
    fence: int
    """Rises by one with every new holder, also after an end."""
    expires_s: float
    """Epoch seconds, by its holder's clock. From then on another may take it; until one does it goes on to be good."""


@runtime_checkable
class BlobWriter(Protocol):
    """Writes one blob in pieces; it exists only once `finish` has returned."""

    def write(self, data: bytes | bytearray | memoryview) -> None: ...
    def finish(self) -> str:
        """Makes it durable and returns its hash."""
        ...

    def discard(self) -> None:
        """Forgets what was written; does nothing after `finish`."""
        ...


@runtime_checkable
class Blobs(Protocol):
    """Bytes by hash. A hash that is not 64 hexadecimal digits is a ValueError; a blob that is missing, a StoreError."""

    def put(self, data: bytes) -> str:
        """Makes the bytes durable and returns their hash; a blob that exists is not written again."""
        ...

    def put_all(self, pieces: Sequence[bytes]) -> Sequence[str]:
        """Makes several blobs durable and returns their hashes; cheaper than one by one."""
        ...

    def writer(self) -> BlobWriter: ...
    def get(self, hash: str) -> bytes:
        """The bytes, checked against the hash. Raises StoreError where missing or damaged."""
        ...

    def view(self, hash: str, spec: TensorSpec) -> np.ndarray:
        """The tensor, memory-mapped where the store is on disk (no anonymous memory), read-only; not hashed again."""
        ...

    def read(self, hash: str, offset: int, size: int) -> bytes:
        """A piece of a blob; shorter at its end."""
        ...

    def size(self, hash: str) -> int: ...
    def has(self, hash: str) -> bool: ...
    def forget(self, hash: str) -> None:
        """Deletes a blob that no row names any more; does nothing where there is none."""
        ...


@runtime_checkable
class Store(Protocol):
    """The run store. Calls block on the disk: shells call them from a thread.

    Whatever writes rows of a run raises LeaseLost where another store has taken its lease, LeaseHeld where this one has
    none and another has: see invariant (6).
    """

    @property
    def blobs(self) -> Blobs: ...
    @property
    def settling(self) -> threading.Lock:
        """Held from the first blob of a commit or group to the row that names it, and by who sweeps: several runs may share a
        store, and a blob that one has found there must not go before its row comes."""
        ...

    # The lease of a run. A store remembers the fence that it took, and every write of the run shows it. A store without a
    # lease writes as long as nobody has one: it is refused also where that one has expired, since its holder, who may only
    # have been slow, can still write. To write such a run, take its lease.

    def take_lease(
        self, run_id: str, *, holder: str, now_s: float, life_s: float, instead_of: LeaseRow | None = None
    ) -> int:
        """Makes the run this store's, and returns the fence: from here on no other store's writes pass.

        It can be taken where nobody has it, where it has expired, and at any time by its holder or from this same store.

        Args:
            run_id: The run.
            holder: Who takes it: a name that no other process or life of it has.
            now_s: Epoch seconds.
            life_s: Seconds until others may take it, unless it is renewed.
            instead_of: A lease whose holder is known to be dead, as it was read: it need not have expired.

        Raises:
            LeaseHeld: another has it.
        """
        ...

    def renew_lease(self, run_id: str, fence: int, *, expires_s: float) -> None:
        """Makes a lease last longer, also one that has expired but that nobody has taken.

        Raises:
            LeaseLost: another has taken it, or it was ended.
        """
        ...

    def end_lease(self, run_id: str, fence: int) -> None:
        """Lets anybody take it at once. Does nothing where another has it already: this store then stays shut out."""
        ...

    def lease(self, run_id: str) -> LeaseRow | None:
        """Whose the run is; None where nobody ever took it."""
        ...

    def create_run(self, run: RunRow) -> None: ...
    def run(self, run_id: str) -> RunRow: ...
    def runs(self) -> Sequence[RunRow]: ...
    def set_status(self, run_id: str, status: RunStatus, *, time_s: float | None) -> None: ...
    def set_plan(self, run_id: str, plan_hash: str) -> None: ...
    def set_config(self, run_id: str, config: Mapping[str, Any]) -> None:
        """What a run's settings are from now on, all of them."""
        ...

    def open_round(self, run_id: str, row: RoundRow, *, spend: Spend | None = None) -> None:
        """Begins a round, and takes from a budget what it spends. Raises what `spend.allows` raises: it was not begun."""
        ...

    def close_round(
        self,
        run_id: str,
        row: RoundRow,
        *,
        usage: Sequence[UsageRow] = (),
        log: RoundLog | None = None,
        gives_back: bool = False,
    ) -> None:
        """Ends an open round without a commit. One still open when a run is taken up again: see `resume.take_up`.

        `gives_back`: what it took from a budget was not used.
        """
        ...

    def ledger(self, population: str, budget: str) -> Sequence[LedgerRow]:
        """All entries of a budget, in order."""
        ...

    def rounds(self, run_id: str) -> Sequence[RoundRow]: ...
    def round_log(self, run_id: str, round: int) -> bytes | None:
        """A round's log; None where it was not kept, or not so long."""
        ...

    def add_group(
        self, run_id: str, group: GroupRow, *, counted: Sequence[tuple[bytes, float]], usage: Sequence[UsageRow] = ()
    ) -> int:
        """Keeps a closed group (`number` 0) that no commit holds yet, with its nonces; returns the number it was given.

        From here on its devices may be told *counted*; a round that fails keeps it for a later commit.
        """
        ...

    def groups(self, run_id: str, *, waiting: bool = False, since_version: int = 0) -> Sequence[GroupRow]:
        """Groups whose sums are of `since_version` or later, by number; or only those of them that wait for a commit."""
        ...

    def forget_sums(self, run_id: str, *, before_version: int) -> int:
        """Deletes the sums of committed groups of versions before that one; returns how many."""
        ...

    def waiting_nonces(self, run_id: str) -> Sequence[bytes]:
        """Nonces that were counted in groups that wait for a commit."""
        ...

    def counted_nonces(self, run_id: str, *, since_version: int) -> Mapping[int, Sequence[bytes]]:
        """Version -> nonces that it counted, as far as they are kept; from that version on."""
        ...

    def commit(
        self,
        run_id: str,
        commit: CommitRow,
        *,
        round: RoundRow | None,
        groups: Sequence[GroupRow] = (),
        counted: Sequence[tuple[bytes, float]] = (),
        metrics: Sequence[MetricRow] = (),
        usage: Sequence[UsageRow] = (),
        final: FinalRow | None = None,
        log: RoundLog | None = None,
    ) -> None:
        """Writes one version and all that it means, in one transaction.

        Args:
            run_id: The run.
            commit: The version; its tensors are blobs already.
            round: The round that it ends, opened before or not; None leaves rounds as they are.
            groups: What it adds up. A group with a number is one that waits; one without is new, and its nonces are in
                `counted`.
            counted: (nonce, expiry in epoch seconds) of every contribution in it that no waiting group has brought.
            metrics: Values known at the commit.
            usage: What the round cost.
            final: What an earlier version has become, now that nothing can come late for it any more.
            log: What the round's machine was told.

        Raises:
            StoreError: the version does not follow the last one, a nonce was settled before, a round or group is closed
                already, a blob is missing, or the disk is full. Nothing was written then.
        """
        ...

    def last_version(self, run_id: str) -> int | None: ...
    def last_commit(self, run_id: str) -> CommitRow | None: ...
    def get_commit(self, run_id: str, version: int) -> CommitRow: ...
    def commits(self, run_id: str) -> Iterator[CommitRow]: ...
    def final(self, run_id: str, version: int) -> FinalRow | None:
        """A version with all that came late for those before it; None while that is open, or where nothing is patched."""
        ...

    def token(self, run_id: str, nonce: bytes) -> TokenRow | None: ...
    def refuse(self, run_id: str, nonce: bytes, *, reason: str, expires_s: float) -> None:
        """Keeps that an update was refused, and why. A nonce settles once: the first reason stays.

        Raises:
            StoreError: the nonce was counted.
        """
        ...

    def forget_tokens(self, run_id: str, *, before_s: float, to_version: int) -> int:
        """Drops tokens that have expired; returns how many.

        Args:
            run_id: The run.
            before_s: Now, seconds of Unix time.
            to_version: Of those counted only the ones in versions up to it go: a clock may be wrong, and what a later version holds
                might be taken again. What waits in a group stays.
        """
        ...

    def sweep(self, run_id: str, *, since_version: int, before_version: int, every: int, finals_before: int) -> int:
        """Forgets most of the past: see `retention.py`. The caller holds `settling`.

        Args:
            run_id: The run.
            since_version: Versions before it were swept by earlier calls; version 0 never is.
            before_version: Versions from it on are kept, with all that belongs to them; so are groups that still wait.
            every: Of the versions between, those whose number is a multiple of it are kept too; 0: none.
            finals_before: Final forms of versions before it go, whatever becomes of those.

        Returns:
            How many blobs were deleted: those that no row names any more.
        """
        ...

    def log(self, run_id: str, metrics: Sequence[MetricRow]) -> None: ...
    def metrics(self, run_id: str, name: str | None = None) -> Sequence[MetricRow]: ...
    def add_usage(self, run_id: str, usage: Sequence[UsageRow]) -> None: ...
    def usage(self, run_id: str) -> Sequence[UsageRow]: ...
    def journal(self, run_id: str, events: Sequence[EventRow]) -> None: ...
    def events(self, run_id: str) -> Sequence[EventRow]: ...
    def add_telemetry(self, run_id: str, row: TelemetryRow) -> None: ...
    def telemetry(self, run_id: str) -> Sequence[TelemetryRow]:
        """All sums, by day."""
        ...

    def close(self) -> None: ...
