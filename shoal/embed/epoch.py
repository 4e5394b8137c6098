"""An epoch of a store: its tables' states and an empty journal, committed by the manifest that names them."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from shoal.embed.journal import Journal
from shoal.embed.manifest import NAME, Manifest, TableRecord, write_state
from shoal.errors import StoreError
from shoal.tensors import Tensors


def commit_files(folder: Path, manifest: Manifest, states: Mapping[str, Tensors]) -> tuple[Manifest, int]:
    """Writes the next epoch: states, an empty journal, and last the manifest that names them; it, and the bytes written."""
    epoch, written, records = manifest.epoch + 1, 0, []
    made: list[Path] = []
    try:
        for record in manifest.tables:
            name = f"{record.name}-{epoch}.state"
            (folder / name).unlink(missing_ok=True)
            made.append(folder / name)
            digest, size = write_state(folder / name, states[record.name], {"table": record.name})
            records.append(replace(record, state=name, state_hash=digest))
            written += size
        journal = folder / f"journal-{epoch}.log"
        journal.unlink(missing_ok=True)
        made.append(journal)
        Journal.create(journal).close()
        manifest = replace(manifest, epoch=epoch, journal=journal.name, tables=tuple(records))
        return manifest, written + manifest.write(folder)
    except StoreError:
        if not is_committed(folder, epoch):
            for path in made:
                path.unlink(missing_ok=True)
        raise


def is_committed(folder: Path, epoch: int) -> bool:
    """Whether the manifest in the folder is that of the epoch, durably or not."""
    return (folder / NAME).exists() and Manifest.read(folder).epoch == epoch


def sweep(folder: Path, manifest: Manifest) -> None:
    """Deletes what a kill left of an epoch that was never committed, or of one before."""
    keep = {manifest.journal, *(record.state for record in manifest.tables)}
    for path in [*folder.glob("*.state"), *folder.glob("journal-*.log"), folder / f"{NAME}.new"]:
        if path.name not in keep:
            path.unlink(missing_ok=True)


def empty_state(record: TableRecord) -> Tensors:
    """Of a table whose rows are all zeros."""
    return {
        "where": np.full(record.rows, -1, np.int32),
        "id_at": np.empty(0, np.int32),
        "sums": np.empty(0, np.uint64),
        "kind": np.empty(0, np.uint8),
        "wear": np.empty(0, np.uint32),
        "offered": np.empty(0, np.int16),
        "replica_ids": np.empty(0, np.int32),
        "replica_slots": np.empty(0, np.int32),
        "replica_valid": np.empty(0, np.uint8),
        "resident_ids": np.empty(0, np.int32),
        "resident_rows": np.empty((0, record.codec.words), np.uint32),
    }
