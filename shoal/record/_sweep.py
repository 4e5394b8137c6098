"""What `SqliteStore.sweep` does in its transaction: rows of the past go, and the hashes of blobs that nobody names are given.

The line keeps a row for each version (invariant 1). Usage of rounds that go is added up under round 0.
"""

import re
from collections.abc import Sequence
from typing import Final

from sqlalchemy import Connection, delete, func, insert, literal, select, update

from shoal.record._rows import SWEPT
from shoal.record.schema import COMMITS, GROUPS, INDEXES, METRICS, ROUND_LOGS, ROUNDS, TOKENS, USAGE

_HASH: Final = re.compile(r"[0-9a-f]{64}")
_ROOTS: Final = (
    COMMITS.c.model_root, COMMITS.c.server_state_root, COMMITS.c.final_model_root, COMMITS.c.final_server_state_root,
)  # fmt: skip
MOST_NAMED: Final = 500
"""Rounds in one statement: SQLite takes a bounded number of values, and weeks of rounds may have come to nothing."""
_SUMS: Final = ("seconds", "bytes_down", "bytes_up", "joules", "count")


def swept_versions(since: int, before: int, every: int) -> list[int]:
    """The versions that go."""
    return [v for v in range(max(1, since), before) if not every or v % every]


def sweep(connection: Connection, run_id: str, *, since: int, before: int, every: int, finals_before: int) -> set[str]:
    """Returns the hashes that no index names any more."""
    versions = _still_kept(connection, run_id, swept_versions(since, before, every))
    roots = _forget_tensors(connection, run_id, versions) | _forget_finals(connection, run_id, finals_before)
    if versions:
        _forget_rounds(connection, run_id, versions)
    _forget_groups(connection, run_id, before)
    return _forget_indexes(connection, roots)


def _still_kept(connection: Connection, run_id: str, versions: Sequence[int]) -> list[int]:
    if not versions:
        return []
    between = COMMITS.c.version.between(versions[0], versions[-1])
    kept = connection.execute(
        select(COMMITS.c.version).where(COMMITS.c.run_id == run_id, between, COMMITS.c.model_root != SWEPT)
    )
    return sorted(set(versions) & set(kept.scalars()))


def _forget_tensors(connection: Connection, run_id: str, versions: Sequence[int]) -> set[str]:
    if not versions:
        return set()
    if connection.execute(select(INDEXES.c.root).where(INDEXES.c.root == SWEPT)).first() is None:
        connection.execute(insert(INDEXES).values(root=SWEPT, data=""))
    named: set[str] = set()
    for version in versions:
        at = (COMMITS.c.run_id == run_id, COMMITS.c.version == version)
        named |= {root for row in connection.execute(select(*_ROOTS).where(*at)) for root in row if root}
        none = dict.fromkeys(_ROOTS[2:])
        connection.execute(update(COMMITS).where(*at).values({_ROOTS[0]: SWEPT, _ROOTS[1]: SWEPT, **none}))
    return named


def _forget_finals(connection: Connection, run_id: str, before: int) -> set[str]:
    old = (COMMITS.c.run_id == run_id, COMMITS.c.final_model_root > "", COMMITS.c.version < before)
    named = {root for row in connection.execute(select(*_ROOTS[2:]).where(*old)) for root in row}
    if named:
        connection.execute(update(COMMITS).where(*old).values(dict.fromkeys(_ROOTS[2:])))
    return named


def _forget_rounds(connection: Connection, run_id: str, versions: Sequence[int]) -> None:
    """Rounds that were to make one of these versions, what they cost, and what was measured on the versions."""
    first, last = versions[0] - 1, versions[-1] - 1
    between = (ROUNDS.c.run_id == run_id, ROUNDS.c.base_version.between(first, last), ROUNDS.c.state != "open")
    gone = {version - 1 for version in versions}
    old = connection.execute(select(ROUNDS.c.number, ROUNDS.c.base_version).where(*between)).all()
    numbers = [number for number, base_version in old if base_version in gone]
    for first in range(0, len(numbers), MOST_NAMED):
        _add_usage_up(connection, run_id, numbers[first : first + MOST_NAMED])
    for number in numbers:
        connection.execute(delete(ROUND_LOGS).where(ROUND_LOGS.c.run_id == run_id, ROUND_LOGS.c.round == number))
        connection.execute(delete(ROUNDS).where(ROUNDS.c.run_id == run_id, ROUNDS.c.number == number))
    metrics = (METRICS.c.run_id == run_id, METRICS.c.version.between(versions[0], versions[-1]))
    measured = connection.execute(select(METRICS.c.id, METRICS.c.version).where(*metrics)).all()
    versions_gone = set(versions)
    for row in [row for row, version in measured if version in versions_gone]:
        connection.execute(delete(METRICS).where(METRICS.c.id == row))


def _add_usage_up(connection: Connection, run_id: str, rounds: Sequence[int]) -> None:
    of = (USAGE.c.run_id == run_id, USAGE.c.round.in_([0, *rounds]))
    sums = [func.sum(USAGE.c[name]).label(name) for name in _SUMS]
    totals = connection.execute(select(USAGE.c.phase, *sums).where(*of).group_by(USAGE.c.phase)).all()
    connection.execute(delete(USAGE).where(*of))
    if totals:
        connection.execute(insert(USAGE), [{"run_id": run_id, "round": 0, **row._asdict()} for row in totals])


def _forget_groups(connection: Connection, run_id: str, before: int) -> None:
    """Groups that were taken in before that version, but for those that a token names (devices may still ask), and the newest."""
    named = select(literal(1)).where(TOKENS.c.run_id == GROUPS.c.run_id, TOKENS.c.group_number == GROUPS.c.number)
    newest = select(func.max(GROUPS.c.number)).where(GROUPS.c.run_id == run_id).scalar_subquery()
    old = (GROUPS.c.run_id == run_id, GROUPS.c.version < before, GROUPS.c.sums_root == "", GROUPS.c.number < newest)
    connection.execute(delete(GROUPS).where(*old, ~named.exists()))


def _forget_indexes(connection: Connection, roots: set[str]) -> set[str]:
    unnamed: set[str] = set()
    for root in roots:
        if not any(connection.execute(select(column).where(column == root).limit(1)).first() for column in _ROOTS):
            data = connection.execute(select(INDEXES.c.data).where(INDEXES.c.root == root)).scalar()
            unnamed |= set(_HASH.findall(data or ""))
            connection.execute(delete(INDEXES).where(INDEXES.c.root == root))
    if unnamed:
        for data in connection.execute(select(INDEXES.c.data)).scalars():
            unnamed -= set(_HASH.findall(data))
        unnamed -= set(connection.execute(select(GROUPS.c.sums_root).where(GROUPS.c.sums_root != "")).scalars())
    return unnamed
