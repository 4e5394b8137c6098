"""The run store: what is kept of a run, how it is written so that nothing is lost, and how it is found again.

`store.py` is the contract, `sqlite.py` the store on disk, `memory.py` the one for tests; `run.py` is the short way for
scripts. The room's README says what a run folder holds.
"""

from shoal.record.blobs import FolderBlobs
from shoal.record.memory import MemoryBlobs, MemoryStore
from shoal.record.provenance import provenance
from shoal.record.resume import TakenUp, abandon_open_rounds, take_up
from shoal.record.run import FoundRun, Run, find_runs, init, latest_run, new_run_id, open_run
from shoal.record.sqlite import SqliteStore, open_store
from shoal.record.store import (
    Blobs,
    BlobWriter,
    CommitRow,
    EventRow,
    GroupRow,
    MetricRow,
    RoundRow,
    RunRow,
    Store,
    TokenRow,
    UsageRow,
)
from shoal.record.tensor_blobs import put_tensors, view_tensors

__all__ = [
    "BlobWriter",
    "Blobs",
    "CommitRow",
    "EventRow",
    "FolderBlobs",
    "FoundRun",
    "GroupRow",
    "MemoryBlobs",
    "MemoryStore",
    "MetricRow",
    "RoundRow",
    "Run",
    "RunRow",
    "SqliteStore",
    "Store",
    "TakenUp",
    "TokenRow",
    "UsageRow",
    "abandon_open_rounds",
    "find_runs",
    "init",
    "latest_run",
    "new_run_id",
    "open_run",
    "open_store",
    "provenance",
    "put_tensors",
    "take_up",
    "view_tensors",
]
