"""The record's tables, in SQLAlchemy Core: what `SqliteStore` writes now and another database may hold later.

Portable SQL: JSON is text, times are double precision, tensors and plans are blobs, named by hash
and kept elsewhere. This is the newest
form of the schema; older files are brought to it by `migrations.py`. Nothing in any table is about one device.

What the database itself holds to, whatever a program does (numbers are those of `store.py`):
    (1) `commits.follows` is the version before and must exist, so a line has no gap; (run, version) is the key.
    (2) (run, nonce) is the key of `tokens`, so a nonce settles once.
`leases` and `ledger` are in the first schema so that they need no migration; no code writes them yet.
"""

from typing import Final

from sqlalchemy import (
    BigInteger,
    CheckConstraint,
    Column,
    Double,
    ForeignKey,
    ForeignKeyConstraint,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    Table,
    Text,
)

SCHEMA_VERSION: Final = 5
"""The number of the newest migration."""

METADATA: Final = MetaData()

_ROW_NUMBER: Final = BigInteger().with_variant(Integer, "sqlite")  # SQLite numbers rows only in INTEGER keys


def _run_id(*, key: bool = False) -> Column[str]:
    return Column("run_id", Text, ForeignKey("runs.id"), primary_key=key, nullable=False)


def _number() -> Column[int]:
    """Order of insertion."""
    return Column("id", _ROW_NUMBER, primary_key=True, autoincrement=True)


META: Final = Table(
    "meta",
    METADATA,
    Column("key", Text, primary_key=True),
    Column("value", Text, nullable=False),
)

RUNS: Final = Table(
    "runs",
    METADATA,
    Column("id", Text, primary_key=True),
    Column("name", Text, nullable=False),
    Column("kind", Text, nullable=False),
    Column("plan_hash", Text, nullable=False),
    Column("population", Text, nullable=False),
    Column("config", Text, nullable=False),
    Column("provenance", Text, nullable=False),
    Column("status", Text, nullable=False),
    Column("created_s", Double, nullable=False),
    Column("finished_s", Double),
)

# An index is JSON, small, and new with every version: in the transaction it costs nothing, as a blob two fsyncs.
INDEXES: Final = Table(
    "indexes",
    METADATA,
    Column("root", Text, primary_key=True),
    Column("data", Text, nullable=False),
)

COMMITS: Final = Table(
    "commits",
    METADATA,
    _run_id(key=True),
    Column("version", BigInteger, primary_key=True, autoincrement=False),
    Column("follows", BigInteger),  # version - 1; null for version 0, where the foreign key does not apply
    Column("model_root", Text, ForeignKey("indexes.root"), nullable=False),  # '' where its tensors were swept
    Column("server_state_root", Text, ForeignKey("indexes.root"), nullable=False),
    Column("round", BigInteger, nullable=False),
    Column("members", BigInteger, nullable=False),
    Column("weight", BigInteger, nullable=False),
    Column("created_s", Double, nullable=False),
    # The version with all that came late for those before it, once nothing more can; null where nothing is patched.
    Column("final_model_root", Text, ForeignKey("indexes.root")),
    Column("final_server_state_root", Text, ForeignKey("indexes.root")),
    ForeignKeyConstraint(["run_id", "follows"], ["commits.run_id", "commits.version"]),
    CheckConstraint(
        "(version = 0 AND follows IS NULL) OR (version > 0 AND follows IS NOT NULL AND follows = version - 1)"
    ),
)

ROUNDS: Final = Table(
    "rounds",
    METADATA,
    _run_id(key=True),
    Column("number", BigInteger, primary_key=True, autoincrement=False),
    Column("base_version", BigInteger, nullable=False),
    Column("state", Text, nullable=False),
    Column("opened_s", Double, nullable=False),
    Column("closed_s", Double),
    Column("selected", BigInteger, nullable=False),
    Column("counted", BigInteger, nullable=False),
    Column("released", BigInteger, nullable=False),
    Column("reason", Text, nullable=False),
    Column("configuration", Text, nullable=False),
    Column("analytics", Text, nullable=False, server_default="{}"),
    ForeignKeyConstraint(["run_id", "base_version"], ["commits.run_id", "commits.version"]),
    CheckConstraint("state IN ('open', 'committed', 'abandoned')"),
    Index("rounds_by_state", "run_id", "state"),
)

# Few: the newest rounds', what their machine was told, so that it can be run again.
ROUND_LOGS: Final = Table(
    "round_logs",
    METADATA,
    _run_id(key=True),
    Column("round", BigInteger, primary_key=True, autoincrement=False),
    Column("data", LargeBinary, nullable=False),
    ForeignKeyConstraint(["run_id", "round"], ["rounds.run_id", "rounds.number"]),
)

GROUPS: Final = Table(
    "groups",
    METADATA,
    _run_id(key=True),
    Column("number", BigInteger, primary_key=True, autoincrement=False),
    Column("round", BigInteger, nullable=False),
    Column("base_version", BigInteger, nullable=False),
    Column("members", BigInteger, nullable=False),
    Column("weight", BigInteger, nullable=False),
    Column("sums_root", Text, nullable=False),
    Column("version", BigInteger),  # the commit that holds it; null while it waits
    ForeignKeyConstraint(["run_id", "base_version"], ["commits.run_id", "commits.version"]),
    ForeignKeyConstraint(["run_id", "version"], ["commits.run_id", "commits.version"]),
    Index("groups_by_version", "run_id", "version"),
)

# The few groups whose sums are kept: found, and forgotten, with every commit of a run of any length.
GROUPS_WITH_SUMS: Final = Index(
    "groups_with_sums",
    GROUPS.c.run_id,
    GROUPS.c.base_version,
    sqlite_where=GROUPS.c.sums_root != "",
    postgresql_where=GROUPS.c.sums_root != "",
)

TOKENS: Final = Table(
    "tokens",
    METADATA,
    _run_id(key=True),
    Column("nonce", LargeBinary, primary_key=True),
    Column("state", Text, nullable=False),
    Column("version", BigInteger),  # of the commit that counted it directly; else that of its group
    Column("group_number", BigInteger),
    Column("reason", Text, nullable=False),
    Column("expires_s", Double, nullable=False),
    ForeignKeyConstraint(["run_id", "version"], ["commits.run_id", "commits.version"]),
    ForeignKeyConstraint(["run_id", "group_number"], ["groups.run_id", "groups.number"]),
    CheckConstraint("state IN ('counted', 'refused')"),  # what is pending is in an Edge's memory
    Index("tokens_by_expiry", "run_id", "expires_s"),
)

# What names an index or a group, so that one that nobody names is found without looking through all.
NAMED_BY: Final = (
    *(
        Index(f"commits_by_{column.name.removesuffix('_root')}", column)
        for column in (
            COMMITS.c.model_root, COMMITS.c.server_state_root, COMMITS.c.final_model_root, COMMITS.c.final_server_state_root,
        )
    ),
    Index("tokens_by_group", TOKENS.c.run_id, TOKENS.c.group_number),
)  # fmt: skip

METRICS: Final = Table(
    "metrics",
    METADATA,
    _number(),
    _run_id(),
    Column("version", BigInteger, nullable=False),
    Column("name", Text, nullable=False),
    Column("value", Double),  # null is NaN: SQLite has no NaN
    Column("scope", Text, nullable=False),
    Column("time_s", Double, nullable=False),
    Column("device_class", Text, nullable=False),
    CheckConstraint("scope IN ('server', 'cohort', 'class')"),
    Index("metrics_by_name", "run_id", "name"),
)

USAGE: Final = Table(
    "usage",
    METADATA,
    _number(),
    _run_id(),
    Column("round", BigInteger, nullable=False),
    Column("phase", Text, nullable=False),
    Column("seconds", Double, nullable=False),
    Column("bytes_down", BigInteger, nullable=False),
    Column("bytes_up", BigInteger, nullable=False),
    Column("joules", Double),
    Column("count", BigInteger, nullable=False),
    Index("usage_by_round", "run_id", "round"),
)

EVENTS: Final = Table(
    "events",
    METADATA,
    _number(),
    _run_id(),
    Column("time_s", Double, nullable=False),
    Column("kind", Text, nullable=False),
    Column("data", Text, nullable=False),
    Index("events_by_run", "run_id"),
)

# Sums over devices' days, each with noise: see `fleet/telemetry_host.py`. Nothing of a report is here.
TELEMETRY: Final = Table(
    "telemetry",
    METADATA,
    _number(),
    _run_id(),
    Column("day", BigInteger, nullable=False),  # since 1970-01-01 UTC
    Column("schema", Text, nullable=False),
    Column("reports", BigInteger, nullable=False),
    Column("noise", Double, nullable=False),  # standard deviation, in units of each entry
    Column("sums", Text, nullable=False),
    Column("time_s", Double, nullable=False),
    Index("telemetry_by_run", "run_id", "day"),
)

LEDGER: Final = Table(
    "ledger",
    METADATA,
    _number(),
    Column("population", Text, nullable=False),
    Column("budget", Text, nullable=False),  # which budget: epsilon, joules, bytes, …
    Column("entry", Text, nullable=False),
    Column("reservation", _ROW_NUMBER, ForeignKey("ledger.id")),  # what a settlement or release answers
    Column("amount", Double, nullable=False),
    Column("run_id", Text, ForeignKey("runs.id")),
    Column("time_s", Double, nullable=False),
    Column("data", Text, nullable=False),
    CheckConstraint("entry IN ('reservation', 'settlement', 'release')"),
    Index("ledger_by_budget", "population", "budget"),
)

LEASES: Final = Table(
    "leases",
    METADATA,
    Column("name", Text, primary_key=True),
    Column("holder", Text, nullable=False),
    Column("fence", BigInteger, nullable=False),  # rises with every new holder; writers show it
    Column("expires_s", Double, nullable=False),
)
