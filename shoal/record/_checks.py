"""Checks of what callers hand to a store, the same for every store: mistakes are ValueErrors before anything is written.

Also the texts of the StoreErrors that every store raises, so that a test or a reader meets the same words.
"""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, Final

from shoal import validate
from shoal.errors import StoreError
from shoal.record.store import CommitRow, GroupRow, MetricRow, RoundLog, RoundRow, TelemetryRow, TokenRow, UsageRow

Counted = Sequence[tuple[bytes, float]]

MAX_NONCE_BYTES: Final = 64
LARGEST: Final = 2**63 - 1
"""What a whole number in a column can be."""


def to_json(value: Mapping[str, Any], *, what: str) -> str:
    """A mapping as JSON text. Raises ValueError for what JSON cannot hold (NaN and infinities too)."""
    try:
        return json.dumps(dict(value), sort_keys=True, separators=(",", ":"), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"Expected {what} to be JSON (text, finite numbers, lists, objects), got {error}.") from error


def check_nonce(nonce: bytes) -> None:
    if not 1 <= len(nonce) <= MAX_NONCE_BYTES:
        raise ValueError(f"Expected a nonce of 1 to {MAX_NONCE_BYTES} bytes, got {len(nonce)}.")


def check_counted(counted: Counted) -> None:
    """Each nonce is one, and none comes twice in one call."""
    for nonce, _ in counted:
        check_nonce(nonce)
    if len({nonce for nonce, _ in counted}) < len(counted):
        seen: set[bytes] = set()
        for nonce, _ in counted:
            if nonce in seen:
                raise settled(nonce, "comes twice in this call")
            seen.add(nonce)


def check_group(group: GroupRow) -> None:
    if group.version is not None:
        raise ValueError(f"Expected a group with version=None (the commit gives it), got version={group.version}.")
    validate.between(0, LARGEST, number=group.number, members=group.members, weight=group.weight)


def check_new_group(group: GroupRow) -> None:
    check_group(group)
    if group.number:
        raise ValueError(f"Expected a new group with number=0 (the store gives it), got number={group.number}.")


def check_telemetry(row: TelemetryRow) -> None:
    validate.between(0, LARGEST, day=row.day, reports=row.reports)
    validate.positive(noise=row.noise)
    for each in row.sums:
        validate.between(-LARGEST, LARGEST, sums=each)


def check_commit(commit: CommitRow, round: RoundRow | None, groups: Sequence[GroupRow], counted: Counted) -> None:
    validate.between(
        0, LARGEST, version=commit.version, round=commit.round, members=commit.members, weight=commit.weight
    )
    if round is not None and (round.number != commit.round or round.state != "committed"):
        raise ValueError(
            f"Expected the round of commit {commit.version} to be number {commit.round} in state committed, got number "
            f"{round.number} in state {round.state}."
        )
    if round is not None:
        check_round(round)
    for group in groups:
        check_group(group)
    numbers = [group.number for group in groups if group.number]
    if len(set(numbers)) < len(numbers):
        raise ValueError(f"Expected each waiting group once in commit {commit.version}, got numbers {numbers}.")
    check_counted(counted)
    bases = [group.base_version for group in groups] + ([] if round is None else [round.base_version])
    if not all(0 <= base < commit.version for base in bases):
        raise ValueError(f"Expected base versions before commit {commit.version}, got {sorted(set(bases))}.")


def check_round(row: RoundRow) -> None:
    validate.positive(number=row.number)
    validate.not_negative(
        base_version=row.base_version, selected=row.selected, counted=row.counted, released=row.released
    )


def check_log(log: RoundLog | None, row: RoundRow | None) -> None:
    if log is not None and (row is None or log.round != row.number or log.kept < 1):
        raise ValueError(
            f"Expected the log of the round that is closed, kept for at least 1 round, got that of round {log.round}, "
            f"kept for {log.kept}."
        )


def check_open(row: RoundRow) -> None:
    check_round(row)
    if row.state != "open":
        raise ValueError(f"Expected round {row.number} to be opened in state open, got {row.state}.")


def check_closed(row: RoundRow) -> None:
    check_round(row)
    if row.state == "open":
        raise ValueError(f"Expected round {row.number} to be closed as abandoned or committed, got open.")


def check_metrics(metrics: Sequence[MetricRow]) -> None:
    for row in metrics:
        if not row.name or row.version < 0:
            raise ValueError(
                f"Expected a metric with a name and a version >= 0, got {row.name!r}, version {row.version}."
            )
        if (row.scope == "class") != bool(row.device_class):
            raise ValueError(
                f"Expected metric {row.name} to name a device_class if and only if its scope is class, got scope "
                f"{row.scope} and device_class={row.device_class!r}."
            )


def check_usage(usage: Sequence[UsageRow]) -> None:
    for row in usage:
        if not all(math.isfinite(value) for value in (row.seconds, row.joules or 0.0)):
            raise ValueError(
                f"Expected finite seconds and joules for phase {row.phase}, got {row.seconds}, {row.joules}."
            )


def settled(nonce: bytes, how: str) -> StoreError:
    return StoreError(f"Nonce {nonce.hex()} {how}. A contribution counts once; leave it out and commit again.")


def settled_before(token: TokenRow) -> StoreError:
    if token.state == "refused":
        return settled(token.nonce, f"was refused before ({token.reason})")
    where = "a group that waits" if token.version is None else f"version {token.version}"
    return settled(token.nonce, f"was counted before, in {where}")


def run_exists(run_id: str) -> StoreError:
    return StoreError(f"Expected a new run, but {run_id} exists. Take another id, or go on with that run.")


def no_run(run_id: str, known: Sequence[str]) -> StoreError:
    return StoreError(f"Expected a run of this store ({', '.join(known[-5:]) or 'it has none'}), got {run_id!r}.")


def no_version(run_id: str, version: int, last: int | None) -> StoreError:
    holds = "has no versions yet" if last is None else f"has versions 0 to {last}"
    return StoreError(f"Expected a version of run {run_id}, which {holds}, got {version}.")


def wrong_version(run_id: str, version: int, last: int | None) -> StoreError:
    following = 0 if last is None else last + 1
    return StoreError(
        f"Expected version {following} of run {run_id} next, got {version}. Another writer may have committed: read the last "
        "commit and go on from it."
    )


def not_open(number: int, state: str | None) -> StoreError:
    how = "was never opened" if state is None else f"is {state}"
    return StoreError(f"Expected round {number} to be open, but it {how}. A round closes once.")


def round_exists(number: int, state: str) -> StoreError:
    return StoreError(f"Expected a new round, but number {number} exists and is {state}. Take the next number.")


def not_waiting(number: int, version: int | None) -> StoreError:
    how = "does not exist" if version is None else f"is in version {version}"
    return StoreError(f"Expected group {number} to wait for a commit, but it {how}. Read `groups(waiting=True)` again.")
