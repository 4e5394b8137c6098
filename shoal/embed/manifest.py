"""The root of a store: which files hold its last committed state. One small JSON file, replaced as a whole.

A store is a folder: `manifest.json`, and for each epoch (a number that rises) `journal-EPOCH.log`, for each table
`NAME.blocks` and `NAME-EPOCH.state` (where each row lies, each block's checksum and wear, the rows that rest in memory).
The manifest names them and the hash of each state; it has a hash of itself.

Guarantees:
    (1) `write` is atomic: a kill at any moment leaves the old manifest or the new one, whole.
    (2) What a manifest names was durable before it.
    (3) A damaged manifest or state is found when it is read.
"""

import hashlib
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, Literal

from shoal import validate
from shoal.embed.cache import POLICIES
from shoal.embed.codec import DTYPES, Codec, Dtype
from shoal.errors import StoreError
from shoal.record.blobs import disk, sync_folder
from shoal.tensors import PARSE_ERRORS, Tensors, canonical_json, frame_parts, parse_json, sha256, unpack

FORMAT: Final = "shoal embed/2"
NAME: Final = "manifest.json"
ADMISSIONS: Final = ("threshold", "duel")
Tier = Literal["auto", "dram", "block"]


@dataclass(frozen=True, kw_only=True)
class TableRecord:
    """One table as the manifest has it."""

    name: str
    """Letters, digits, `_` and `-`: it is part of file names."""
    rows: int
    dim: int
    dtype: Dtype
    tier: Literal["dram", "block"]
    """Where rows are looked up: all in memory, or in blocks behind a cache."""
    reason: str
    """Why the table is there, in words."""
    asked: Tier
    """What the caller asked for."""
    cache_bytes: int
    """Its part of the DRAM."""
    policy: str
    """The cache's eviction."""
    admission: str
    """What becomes of a read block's other rows."""
    read_aware: bool
    """Whether the cache counts what a miss costs in reads."""
    shadow: bool
    """Whether an int8 copy of all rows is kept in memory for lookups with a deadline."""
    block_bytes: int
    state: str
    """File name of the state."""
    state_hash: str
    """SHA-256 of that file."""

    def __post_init__(self) -> None:
        validate.types(self)
        validate.positive(rows=self.rows)
        validate.one_of(DTYPES, dtype=self.dtype)
        validate.one_of(POLICIES, policy=self.policy)
        validate.one_of(ADMISSIONS, admission=self.admission)
        validate.not_negative(cache_bytes=self.cache_bytes)
        if not self.name or not self.name.replace("_", "a").replace("-", "a").isalnum() or len(self.name) > 80:
            raise ValueError(f"Expected a table name of letters, digits, _ and -, got {self.name!r}.")

    @property
    def codec(self) -> Codec:
        return Codec(self.dim, self.dtype)

    @property
    def blocks(self) -> str:
        """File name of the blocks."""
        return f"{self.name}.blocks"


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The last committed state of a store."""

    epoch: int
    dram_bytes: int
    writes_per_day: float
    """The write budget in capacities a day."""
    capacity_bytes: int
    """Of the drive; 0 means that of the store's own blocks."""
    written_bytes: int
    """By this store so far, up to this epoch."""
    budget_bytes: float
    """What was left of the write budget when the epoch began."""
    budget_wall_s: float
    """When that was, in seconds since 1970."""
    journal: str
    tables: tuple[TableRecord, ...]

    def __post_init__(self) -> None:
        validate.types(self)

    def write(self, folder: Path) -> int:
        """Makes this the state of the store, durably; returns the bytes written."""
        body = {"shoal": FORMAT, **asdict(self)}
        data = canonical_json({**body, "hash": sha256(canonical_json(body))})
        new = folder / f"{NAME}.new"
        with disk(new):
            with new.open("wb", buffering=0) as file:
                if file.write(data) != len(data):
                    raise OSError(28, "No space left on device", str(new))
                os.fsync(file.fileno())
            sync_folder(folder)  # the files that it names have their names, durably, before it has its own
            os.replace(new, folder / NAME)
            sync_folder(folder)
        return len(data)

    @classmethod
    def read(cls, folder: Path) -> "Manifest":
        """Raises StoreError unless the folder has a whole manifest of this format."""
        path = folder / NAME
        if not path.exists():
            raise StoreError(
                f"There is no embedding store in {folder}: {NAME} is missing. Make one with EmbeddingStore.create."
            )
        with disk(path):
            data = path.read_bytes()
        try:
            return _parse(data)
        except PARSE_ERRORS as error:
            raise StoreError(f"{path} is damaged or no manifest: {error}. Restore it from a copy.") from error


def _parse(data: bytes) -> Manifest:
    body = dict(parse_json(data))
    if body.get("shoal") != FORMAT:
        raise ValueError(f"its format is {body.get('shoal')!r}, this version reads {FORMAT!r}")
    if body.pop("hash", None) != sha256(canonical_json(body)):
        raise ValueError("its hash is wrong")
    del body["shoal"]
    return Manifest(tables=tuple(TableRecord(**row) for row in body.pop("tables")), **body)


def write_state(path: Path, tensors: Tensors, header: Mapping[str, Any]) -> tuple[str, int]:
    """Writes a new state file, durably; its hash and size."""
    digest, size = hashlib.sha256(), 0
    try:
        with disk(path), path.open("xb") as file:
            for part in frame_parts(tensors, header):
                digest.update(part)
                size += file.write(part)
            file.flush()
            os.fsync(file.fileno())
    except StoreError:
        path.unlink(missing_ok=True)
        raise
    return digest.hexdigest(), size


def read_state(path: Path, expected: str) -> tuple[Tensors, dict[str, Any]]:
    """What `write_state` wrote. Raises StoreError where it is missing or damaged."""
    with disk(path):
        data = path.read_bytes()
    if sha256(data) != expected:
        raise StoreError(f"{path} is damaged: its {len(data)} bytes have another hash. Restore it from a copy.")
    return unpack(data)
