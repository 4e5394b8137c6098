"""Rows of the store's contract to and from columns. Numbers are made plain: a NumPy scalar never reaches the database."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from shoal.record._checks import Counted, to_json
from shoal.record.store import (
    CommitRow,
    EventRow,
    GroupRow,
    LedgerRow,
    MetricRow,
    RoundRow,
    RunRow,
    TelemetryRow,
    TokenRow,
    UsageRow,
)
from shoal.tensors import Index

Values = dict[str, Any]
SWEPT = ""
"""Root in the row of a version whose tensors are not kept any more."""


def run_values(row: RunRow) -> Values:
    return {
        "id": row.id, "name": row.name, "kind": row.kind, "plan_hash": row.plan_hash, "status": row.status,
        "population": row.population,
        "config": to_json(row.config, what="config"), "provenance": to_json(row.provenance, what="provenance"),
        "created_s": float(row.created_s), "finished_s": _maybe(float, row.finished_s),
    }  # fmt: skip


def run_row(values: Values) -> RunRow:
    return RunRow(**{**values, "config": json.loads(values["config"]), "provenance": json.loads(values["provenance"])})


def round_values(run_id: str, row: RoundRow) -> Values:
    return {
        "run_id": run_id, "number": int(row.number), "base_version": int(row.base_version), "state": row.state,
        "opened_s": float(row.opened_s), "closed_s": _maybe(float, row.closed_s), "selected": int(row.selected),
        "counted": int(row.counted), "released": int(row.released), "reason": row.reason,
        "configuration": to_json(row.configuration, what="the round's configuration"),
        "analytics": to_json(row.analytics, what="the round's analytics"),
    }  # fmt: skip


def round_row(values: Values) -> RoundRow:
    read = {name: json.loads(values[name]) for name in ("configuration", "analytics")}
    return RoundRow(**{**_without_run(values), **read})


def ledger_values(row: LedgerRow) -> Values:
    return {
        "population": row.population, "budget": row.budget, "entry": row.entry, "amount": float(row.amount), "run_id": row.run_id,
        "reservation": row.reservation, "time_s": float(row.time_s),
        "data": to_json({"round": int(row.round), **row.data}, what="the ledger's data"),
    }  # fmt: skip


def ledger_row(values: Values) -> LedgerRow:
    data = json.loads(values["data"])
    kept = {name: value for name, value in values.items() if name not in ("id", "data")}
    return LedgerRow(**kept, number=values["id"], round=data.pop("round"), data=data)


def group_values(run_id: str, row: GroupRow, *, number: int, version: int | None) -> Values:
    return {
        "run_id": run_id, "number": number, "round": int(row.round), "base_version": int(row.base_version),
        "members": int(row.members), "weight": int(row.weight), "sums_root": row.sums_root, "version": version,
    }  # fmt: skip


def group_row(values: Values) -> GroupRow:
    return GroupRow(**_without_run(values))


def commit_values(run_id: str, row: CommitRow) -> Values:
    return {
        "run_id": run_id, "version": int(row.version), "follows": int(row.version) - 1 if row.version else None,
        "model_root": row.model.root, "server_state_root": row.server_state.root, "round": int(row.round),
        "members": int(row.members), "weight": int(row.weight), "created_s": float(row.created_s),
        "final_model_root": None, "final_server_state_root": None,
    }  # fmt: skip


def commit_row(values: Values, read_index: Callable[[str], Index]) -> CommitRow:
    values = _without_run(values)
    for name in ("follows", "final_model_root", "final_server_state_root"):
        values.pop(name, None)
    is_swept = values["model_root"] == SWEPT
    model, server_state = read_index(values.pop("model_root")), read_index(values.pop("server_state_root"))
    return CommitRow(**values, model=model, server_state=server_state, is_swept=is_swept)


def counted_values(run_id: str, counted: Counted, *, version: int | None, group: int | None) -> list[Values]:
    return [
        {"run_id": run_id, "nonce": nonce, "state": "counted", "version": version, "group_number": group, "reason": "",
         "expires_s": float(expires_s)}
        for nonce, expires_s in counted
    ]  # fmt: skip


def token_row(values: Values) -> TokenRow:
    return TokenRow(**values)


def metric_values(run_id: str, metrics: Sequence[MetricRow]) -> list[Values]:
    return [
        {"run_id": run_id, "version": int(row.version), "name": row.name, "scope": row.scope, "time_s": float(row.time_s),
         "value": None if math.isnan(row.value) else float(row.value), "device_class": row.device_class}
        for row in metrics
    ]  # fmt: skip


def metric_row(values: Values) -> MetricRow:
    return MetricRow(**{**values, "value": math.nan if values["value"] is None else values["value"]})


def usage_values(run_id: str, usage: Sequence[UsageRow]) -> list[Values]:
    return [
        {"run_id": run_id, "round": int(row.round), "phase": row.phase, "seconds": float(row.seconds),
         "bytes_down": int(row.bytes_down), "bytes_up": int(row.bytes_up), "joules": _maybe(float, row.joules),
         "count": int(row.count)}
        for row in usage
    ]  # fmt: skip


def usage_row(values: Values) -> UsageRow:
    return UsageRow(**values)


def event_values(run_id: str, events: Sequence[EventRow]) -> list[Values]:
    return [
        {"run_id": run_id, "time_s": float(row.time_s), "kind": row.kind, "data": to_json(row.data, what="an event's data")}
        for row in events
    ]  # fmt: skip


def event_row(values: Values) -> EventRow:
    return EventRow(**{**values, "data": json.loads(values["data"])})


def telemetry_values(run_id: str, row: TelemetryRow) -> Values:
    return {
        "run_id": run_id, "day": int(row.day), "schema": row.schema, "reports": int(row.reports), "noise": float(row.noise),
        "sums": json.dumps([int(each) for each in row.sums]), "time_s": float(row.time_s),
    }  # fmt: skip


def telemetry_row(values: Values) -> TelemetryRow:
    return TelemetryRow(**{**values, "sums": tuple(json.loads(values["sums"]))})


def plain(value: Mapping[str, Any], *, what: str) -> dict[str, Any]:
    """A mapping as it comes back from JSON: what a store that keeps no text must give too."""
    return dict(json.loads(to_json(value, what=what)))


def _without_run(values: Values) -> Values:
    return {name: value for name, value in values.items() if name != "run_id"}


def _maybe(convert: Callable[[Any], float], value: Any) -> float | None:
    return None if value is None else convert(value)
