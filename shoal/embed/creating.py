"""The files of a new store: empty blocks for each table, an empty journal, the first manifest."""

from pathlib import Path

from shoal.embed.blockfile import BlockFile
from shoal.embed.epoch import commit_files, empty_state
from shoal.embed.locks import FolderLock
from shoal.embed.manifest import NAME, Manifest
from shoal.errors import StoreError
from shoal.record.blobs import disk


def make_files(folder: Path, blank: Manifest) -> None:
    """Makes a store that has the tables of `blank`, all rows zeros.

    Raises:
        StoreError: there is a store already, or what is left of one.
        StoreUnavailable: the disk is full or fails.
    """
    with disk(folder):
        folder.mkdir(parents=True, exist_ok=True)
    if (folder / NAME).exists():
        raise StoreError(f"There is an embedding store in {folder} already. Open it, or choose another folder.")
    with FolderLock(folder, write=True):
        for record in blank.tables:
            _refuse_rows(folder / record.blocks)
        for record in blank.tables:
            (folder / record.blocks).unlink(missing_ok=True)
            BlockFile.create(folder / record.blocks, record.block_bytes, 0).close()
        commit_files(folder, blank, {record.name: empty_state(record) for record in blank.tables})


def _refuse_rows(blocks: Path) -> None:
    """Raises StoreError where a file of blocks holds something: a store that has lost its manifest, or another's file."""
    with disk(blocks):
        if blocks.exists() and blocks.stat().st_size:
            raise StoreError(
                f"{blocks} is not empty, though there is no {NAME} beside it. Restore that from a copy, or choose another folder."
            )
