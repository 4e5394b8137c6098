"""The run store: what is kept of a run, how it is written so that nothing is lost, and how it is found again.

`store.py` is the contract, `sqlite.py` the store on disk, `memory.py` the one for tests; `run.py` is the short way for
scripts. The room's README says what a run folder holds. Names are loaded when first used, so that an Edge, which needs
only the contract, loads no SQL.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from shoal.record.blobs import FolderBlobs
    from shoal.record.memory import MemoryBlobs, MemoryStore
    from shoal.record.resume import TakenUp, abandon_open_rounds, take_up
    from shoal.record.run import FoundRun, Run, find_runs, init, latest_run, new_run_id, open_run
    from shoal.record.sqlite import SqliteStore, open_store
    from shoal.record.store import (
        Blobs,
        BlobWriter,
        CommitRow,
        EventRow,
        GroupRow,
        LeaseRow,
        MetricRow,
        RoundLog,
        RoundRow,
        RunRow,
        Store,
        TelemetryRow,
        TokenRow,
        UsageRow,
    )
    from shoal.record.tensor_blobs import put_tensors, view_tensors

_HOMES = {
    "BlobWriter": "shoal.record.store",
    "Blobs": "shoal.record.store",
    "CommitRow": "shoal.record.store",
    "EventRow": "shoal.record.store",
    "FolderBlobs": "shoal.record.blobs",
    "FoundRun": "shoal.record.run",
    "GroupRow": "shoal.record.store",
    "LeaseRow": "shoal.record.store",
    "MemoryBlobs": "shoal.record.memory",
    "MemoryStore": "shoal.record.memory",
    "MetricRow": "shoal.record.store",
    "RoundLog": "shoal.record.store",
    "RoundRow": "shoal.record.store",
    "Run": "shoal.record.run",
    "RunRow": "shoal.record.store",
    "SqliteStore": "shoal.record.sqlite",
    "Store": "shoal.record.store",
    "TakenUp": "shoal.record.resume",
    "TelemetryRow": "shoal.record.store",
    "TokenRow": "shoal.record.store",
    "UsageRow": "shoal.record.store",
    "abandon_open_rounds": "shoal.record.resume",
    "find_runs": "shoal.record.run",
    "init": "shoal.record.run",
    "latest_run": "shoal.record.run",
    "new_run_id": "shoal.record.run",
    "open_run": "shoal.record.run",
    "open_store": "shoal.record.sqlite",
    "put_tensors": "shoal.record.tensor_blobs",
    "take_up": "shoal.record.resume",
    "view_tensors": "shoal.record.tensor_blobs",
}

__all__ = [
    "BlobWriter",
    "Blobs",
    "CommitRow",
    "EventRow",
    "FolderBlobs",
    "FoundRun",
    "GroupRow",
    "LeaseRow",
    "MemoryBlobs",
    "MemoryStore",
    "MetricRow",
    "RoundLog",
    "RoundRow",
    "Run",
    "RunRow",
    "SqliteStore",
    "Store",
    "TakenUp",
    "TelemetryRow",
    "TokenRow",
    "UsageRow",
    "abandon_open_rounds",
    "find_runs",
    "init",
    "latest_run",
    "new_run_id",
    "open_run",
    "open_store",
    "put_tensors",
    "take_up",
    "view_tensors",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'shoal.record' has no attribute {name!r}")
