"""The store's SQL, built once: SQLAlchemy then compiles each statement once, too. Parameters: `run`, `at`, `…_is`."""

from typing import Final

from sqlalchemy import BindParameter, bindparam, delete, func, select, update

from shoal.record._prepared import Prepared, adding
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

_RUN: Final[BindParameter[str]] = bindparam("run")
_NUMBER: Final[BindParameter[int]] = bindparam("at")
_NONCE: Final[BindParameter[bytes]] = bindparam("nonce_is")
ADD: Final = {
    table: adding(table)
    for table in (
        RUNS,
        INDEXES,
        COMMITS,
        ROUNDS,
        ROUND_LOGS,
        GROUPS,
        TOKENS,
        METRICS,
        USAGE,
        EVENTS,
        TELEMETRY,
        LEASES,
        LEDGER,
    )
}
FIND_RUN: Final = Prepared(select(RUNS.c.id).where(RUNS.c.id == _RUN))
HELD_BY: Final = Prepared(select(LEASES.c.fence).where(LEASES.c.name == _RUN, LEASES.c.holder != ""))
LEASE: Final = select(LEASES.c.holder, LEASES.c.fence, LEASES.c.expires_s).where(LEASES.c.name == _RUN)
DROP_LEASE: Final = delete(LEASES).where(LEASES.c.name == _RUN)
_MY_LEASE: Final = update(LEASES).where(
    LEASES.c.name == _RUN, LEASES.c.fence == bindparam("fence_is"), LEASES.c.holder != ""
)
RENEW_LEASE: Final = Prepared(_MY_LEASE, ["expires_s"])
END_LEASE: Final = Prepared(_MY_LEASE, ["holder", "expires_s"])
LAST_VERSION: Final = Prepared(select(func.max(COMMITS.c.version)).where(COMMITS.c.run_id == _RUN))
LAST_GROUP: Final = Prepared(select(func.max(GROUPS.c.number)).where(GROUPS.c.run_id == _RUN))
FIND_INDEX: Final = Prepared(select(INDEXES.c.data).where(INDEXES.c.root == bindparam("root_is")))
ONE_COMMIT: Final = select(COMMITS).where(COMMITS.c.run_id == _RUN, COMMITS.c.version == _NUMBER)
SET_FINAL: Final = (
    update(COMMITS)
    .where(COMMITS.c.run_id == _RUN, COMMITS.c.version == _NUMBER)
    .values(final_model_root=bindparam("model"), final_server_state_root=bindparam("state"))
)
ALL_ROUNDS: Final = select(ROUNDS).where(ROUNDS.c.run_id == _RUN).order_by(ROUNDS.c.number)
ROUND_STATE: Final = Prepared(select(ROUNDS.c.state).where(ROUNDS.c.run_id == _RUN, ROUNDS.c.number == _NUMBER))
CLOSE_ROUND: Final = Prepared(
    update(ROUNDS).where(ROUNDS.c.run_id == _RUN, ROUNDS.c.number == _NUMBER, ROUNDS.c.state == "open"),
    [column.name for column in ROUNDS.columns if not column.primary_key],
)
ONE_LOG: Final = Prepared(select(ROUND_LOGS.c.data).where(ROUND_LOGS.c.run_id == _RUN, ROUND_LOGS.c.round == _NUMBER))
FORGET_LOGS: Final = Prepared(delete(ROUND_LOGS).where(ROUND_LOGS.c.run_id == _RUN, ROUND_LOGS.c.round <= _NUMBER))
ALL_GROUPS: Final = select(GROUPS).where(GROUPS.c.run_id == _RUN).order_by(GROUPS.c.number)
_OLD: Final = (
    GROUPS.c.run_id == _RUN, GROUPS.c.sums_root != "", GROUPS.c.base_version < bindparam("before"),
    GROUPS.c.version.is_not(None),
)  # fmt: skip
OLD_SUMS: Final = select(GROUPS.c.sums_root).where(*_OLD)
FORGET_SUMS: Final = update(GROUPS).where(*_OLD).values(sums_root="")
SUMS_NAMED: Final = select(GROUPS.c.sums_root).distinct()
WAITING_NONCES: Final = (
    select(TOKENS.c.nonce)
    .join(GROUPS, (GROUPS.c.run_id == TOKENS.c.run_id) & (GROUPS.c.number == TOKENS.c.group_number))
    .where(TOKENS.c.run_id == _RUN, GROUPS.c.version.is_(None))
)
COUNTED_IN: Final = func.coalesce(
    TOKENS.c.version,
    select(GROUPS.c.version)
    .where(GROUPS.c.run_id == TOKENS.c.run_id, GROUPS.c.number == TOKENS.c.group_number)
    .scalar_subquery(),
)
"""The version that holds what a token counted; NULL while its group waits."""
COUNTED_SINCE: Final = select(COUNTED_IN, TOKENS.c.nonce).where(
    TOKENS.c.run_id == _RUN, bindparam("since") <= COUNTED_IN
)
TAKE_GROUP: Final = Prepared(
    update(GROUPS).where(GROUPS.c.run_id == _RUN, GROUPS.c.number == _NUMBER, GROUPS.c.version.is_(None)), ["version"]
)
GROUP_VERSION: Final = Prepared(select(GROUPS.c.version).where(GROUPS.c.run_id == _RUN, GROUPS.c.number == _NUMBER))
ONE_TOKEN: Final = (
    select(
        TOKENS.c.nonce, TOKENS.c.state, func.coalesce(TOKENS.c.version, GROUPS.c.version).label("version"),
        TOKENS.c.reason, TOKENS.c.expires_s,
    )
    .outerjoin(GROUPS, (GROUPS.c.run_id == TOKENS.c.run_id) & (GROUPS.c.number == TOKENS.c.group_number))
    .where(TOKENS.c.run_id == _RUN, TOKENS.c.nonce == _NONCE)
)  # fmt: skip
ALL_METRICS: Final = (
    select(*(METRICS.c[name] for name in ("version", "name", "value", "scope", "time_s", "device_class")))
    .where(METRICS.c.run_id == _RUN)
    .order_by(METRICS.c.id)
)
ALL_USAGE: Final = (
    select(*(USAGE.c[name] for name in ("round", "phase", "seconds", "bytes_down", "bytes_up", "joules", "count")))
    .where(USAGE.c.run_id == _RUN)
    .order_by(USAGE.c.id)
)
ALL_EVENTS: Final = (
    select(EVENTS.c.time_s, EVENTS.c.kind, EVENTS.c.data).where(EVENTS.c.run_id == _RUN).order_by(EVENTS.c.id)
)
ALL_TELEMETRY: Final = (
    select(*(TELEMETRY.c[name] for name in ("day", "schema", "reports", "noise", "sums", "time_s")))
    .where(TELEMETRY.c.run_id == _RUN)
    .order_by(TELEMETRY.c.day, TELEMETRY.c.id)
)

LEDGER_OF: Final = (
    select(LEDGER)
    .where(LEDGER.c.population == bindparam("population_is"), LEDGER.c.budget == bindparam("budget_is"))
    .order_by(LEDGER.c.id)
)
LEDGER_OF_RUN: Final = select(LEDGER).where(LEDGER.c.run_id == _RUN).order_by(LEDGER.c.id)
