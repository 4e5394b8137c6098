"""Where an app on a device keeps examples as they arise, for `shoal device` to learn from: one SQLite file, `NAME.examples`.

An app adds; a device reads all anew for each round; both hold to the limits on age, number and bytes that are kept in the file. It is no
database of the app's: what goes in comes out whole or expires, nothing is looked up.

Invariants:
    1. What `add` was given is in the file, whole, when it returns; or nothing is, and it raises.
    2. Never more examples or bytes than the limits allow: the oldest go, in the order in which they came.
    3. Nothing older than `max_age_s` is handed out; it is deleted by whoever looks next.
    4. All examples have one spec, that of the first.
    5. A shard (`shoal data take`) is in it whole or not at all, and never twice.

Clocks: an example's age counts from the time at which it was added. Where that lies in the future, as the clock was set back since, its
age counts from when this is noticed, at the next call: so it expires after `max_age_s` more at the latest, and not before its time. A
clock that leaps forward cannot be told from time that has passed: examples expire.

Cost: rows of up to 1 MiB (`CHUNK_BYTES`) of examples, with a checksum; of the oldest, what was dropped takes room until all of it was.
Reading takes the memory of the examples. The file is as large as it ever was: room of what was deleted is used again.
"""

import json
import math
import sqlite3
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Final, Self, final

import numpy as np

from shoal import validate
from shoal.data.store import Examples, Spec, difference
from shoal.errors import DataError, StoreError, TooFewExamples
from shoal.record.private_file import PrivateFile
from shoal.tensors import DTYPES, to_bytes

SUFFIX: Final = ".examples"
CHUNK_BYTES: Final = 1 << 20
_APPLICATION_ID: Final = 0x53684578
_VERSION: Final = 1
_SCHEMA: Final = """
CREATE TABLE fact (name TEXT PRIMARY KEY, value BLOB NOT NULL) WITHOUT ROWID;
CREATE TABLE shard (id TEXT PRIMARY KEY, confirmed INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE chunk (
    number INTEGER PRIMARY KEY AUTOINCREMENT, wall_s REAL NOT NULL, count INTEGER NOT NULL, dropped INTEGER NOT NULL,
    shard TEXT NOT NULL, checksum INTEGER NOT NULL, data BLOB NOT NULL
);
CREATE INDEX chunk_size ON chunk (wall_s, count, dropped);
CREATE INDEX chunk_shard ON chunk (shard);
"""


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class StoreLimits:
    """What a store keeps at most; infinity: no limit."""

    max_age_s: float = math.inf
    """Seconds from when an example was added."""
    max_examples: float = math.inf
    """Examples at a time."""
    max_bytes: float = math.inf
    """Bytes of the examples' arrays at a time; the file has about 1 MiB more."""

    def __post_init__(self) -> None:
        validate.positive(max_age_s=self.max_age_s, max_bytes=self.max_bytes)
        if not (self.max_examples >= 1 and self.max_examples in (math.inf, self.max_examples // 1)):
            raise ValueError(
                f"Expected max_examples to be a whole number above zero, or infinity, got {self.max_examples!r}."
            )

    def most_examples(self, spec: Spec) -> float:
        """How many examples of a spec it keeps."""
        each = bytes_each(spec)
        return min(self.max_examples, self.max_bytes // each if each else math.inf)


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class StoreStatistics:
    """What a store holds now."""

    examples: int
    size_bytes: int
    """Of their arrays."""
    oldest_s: float
    """Age of the oldest in seconds; 0 where there is none."""
    spec: Spec
    """Empty until the first example."""
    limits: StoreLimits
    shards: int
    """Taken from `shoal data push`, also where their examples have expired."""


@final
class ExampleStore:
    """See the module's text. Calls may come from any thread and from several processes.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder, ExampleStore(f"{folder}/steps.examples", max_examples=2) as store:
        ...     store.add({"x": np.zeros((3, 4), np.float32), "label": np.array([0, 1, 2])})
        ...     store.examples().fields["label"].tolist()
        [1, 2]
    """

    def __init__(
        self,
        path: Path | str,
        max_age_s: float | None = None,
        max_examples: float | None = None,
        max_bytes: float | None = None,
        wall_s: Callable[[], float] = time.time,
        *,
        must_exist: bool = False,
    ) -> None:
        """Opens the store; makes it where there is none.

        Args:
            path: of the file, `NAME.examples`.
            max_age_s: seconds after which an example expires.
            max_examples: how many are kept at most.
            max_bytes: how many bytes of arrays are kept at most.
            wall_s: seconds since the epoch.
            must_exist: raise where there is no file.

        A limit that is None is as the file has it (no limit in a new file); one that is given takes its place, for all processes.

        Raises:
            ValueError: another name, or a limit that is not above zero.
            StoreError: the file is of another kind, damaged, or cannot be opened.
        """
        self.path, self._wall_s = Path(path), wall_s
        if self.path.suffix != SUFFIX:
            raise ValueError(f"Expected an example store to be called NAME{SUFFIX}, got {str(path)!r}.")
        named = {"max_age_s": max_age_s, "max_examples": max_examples, "max_bytes": max_bytes}
        asked = {name: value for name, value in named.items() if value is not None}
        StoreLimits(**asked)  # refused before a file is made
        self._file = PrivateFile(
            self.path, kind="example store", application_id=_APPLICATION_ID, version=_VERSION, schema=_SCHEMA, must_exist=must_exist
        )  # fmt: skip
        if asked:
            with self._file.writing() as db:
                limits = StoreLimits(**{**asdict(self._limits(db)), **asked})
                finite = {name: value for name, value in asdict(limits).items() if math.isfinite(value)}
                _keep(db, "limits", json.dumps(finite).encode())
                self._drop(db, limits, self._spec(db))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Nothing can be asked of it afterwards."""
        self._file.close()

    def add(self, fields: Mapping[str, np.ndarray]) -> None:
        """Adds examples, all or none of them; they are on the disk when it returns. The oldest go where a limit is passed.

        Args:
            fields: name -> array (N, ...) of numbers, all with the same N.

        Raises:
            TypeError, ValueError: these are no examples, or have another spec than those in the store.
            StoreUnavailable: the disk is full; nothing was added.
        """
        examples = Examples(dict(fields))
        with self._file.writing() as db:
            limits, spec = self._limits(db), self._fitting(db, examples)
            # Of more than are kept only the newest are written.
            most = limits.most_examples(spec)
            if not most:
                raise ValueError(
                    f"One example has {bytes_each(spec)} bytes, {self.path} keeps at most {limits.max_bytes:g}: raise max_bytes."
                )
            first = 0 if most >= len(examples) else len(examples) - int(most)
            self._write(db, spec, examples.take(slice(first, None)), shard="")
            self._drop(db, limits, spec)

    def examples(self) -> Examples:
        """All that it holds, in the order in which they came.

        Raises:
            TooFewExamples: nothing was ever added, so that nobody knows what they look like.
            StoreError: the file is damaged.
        """
        self._tidy()
        with self._file.reading() as db:
            spec = self._spec(db)
            if not spec:
                raise TooFewExamples(f"The example store {self.path} is empty: nothing was added yet.")
            oldest_s = self._wall_s() - self._limits(db).max_age_s
            total = db.execute("SELECT COALESCE(SUM(count - dropped), 0) FROM chunk WHERE wall_s >= ?", (oldest_s,)).fetchone()[0]  # fmt: skip
            made = {name: np.empty((total, *shape), DTYPES[dtype]) for name, (shape, dtype) in spec.items()}
            at = 0
            for number, count, dropped, checksum, data in db.execute(
                "SELECT number, count, dropped, checksum, data FROM chunk WHERE wall_s >= ? ORDER BY number",
                (oldest_s,),
            ):
                if zlib.crc32(data) != checksum or len(data) != count * bytes_each(spec):
                    raise StoreError(f"The {self._file.what} is damaged: chunk {number} has changed. Delete the file.")
                for name, part in _arrays(data, spec, count).items():
                    made[name][at : at + count - dropped] = part[dropped:]
                at += count - dropped
        return Examples(made)

    def __len__(self) -> int:
        """How many examples there are now."""
        self._tidy()
        with self._file.reading() as db:
            return _count(db)

    def spec(self) -> Spec:
        """Field -> (shape of one example, dtype name); empty until the first example."""
        with self._file.reading() as db:
            return self._spec(db)

    def statistics(self) -> StoreStatistics:
        """What it holds now."""
        self._tidy()
        with self._file.reading() as db:
            count, spec = _count(db), self._spec(db)
            oldest_s = db.execute("SELECT MIN(wall_s) FROM chunk").fetchone()[0]
            return StoreStatistics(
                examples=count, size_bytes=count * bytes_each(spec), spec=spec, limits=self._limits(db),
                oldest_s=0.0 if oldest_s is None else max(0.0, self._wall_s() - oldest_s),
                shards=db.execute("SELECT COUNT(*) FROM shard").fetchone()[0],
            )  # fmt: skip

    # Shards, for `shoal.fleet.take`.

    def shards(self) -> dict[str, bool]:
        """Shards that have joined, by id, and whether the server has heard of it."""
        with self._file.reading() as db:
            return {id: bool(confirmed) for id, confirmed in db.execute("SELECT id, confirmed FROM shard ORDER BY id")}

    def join(self, shard: str, count: int, blocks: Iterable[Mapping[str, np.ndarray]]) -> None:
        """Adds a shard's examples, all in one transaction; nothing where it has joined before.

        Args:
            shard: its id.
            count: how many examples it has.
            blocks: its examples, some at a time.

        Raises:
            DataError: they have another spec, or the store's limits leave no room for them beside those that it holds.
            StoreUnavailable: the disk is full; nothing was added.
        """
        self._tidy()
        with self._file.writing() as db:
            if db.execute("SELECT 1 FROM shard WHERE id = ?", (shard,)).fetchone():
                return
            for fields in blocks:
                examples = Examples(dict(fields))
                try:
                    spec = self._fitting(db, examples)
                except ValueError as error:
                    raise DataError(str(error)) from error
                most, held = self._limits(db).most_examples(spec), _count(db)
                if held + len(examples) > most:
                    raise DataError(
                        f"The example store {self.path} keeps at most {most:,.0f} examples and has no room for a shard of {count:,}. "
                        "Open it once with wider limits, or take it into another store."
                    )
                self._write(db, spec, examples.fields, shard=shard)
            db.execute("INSERT INTO shard VALUES (?, 0)", (shard,))

    def confirm(self, shard: str) -> None:
        """The server has heard that the shard is here."""
        with self._file.writing() as db:
            db.execute("UPDATE shard SET confirmed = 1 WHERE id = ?", (shard,))

    def leave(self, shard: str) -> None:
        """Takes a shard's examples out again."""
        with self._file.writing() as db:
            db.execute("DELETE FROM chunk WHERE shard = ?", (shard,))
            db.execute("DELETE FROM shard WHERE id = ?", (shard,))

    def fact(self, name: str) -> bytes | None:
        """What was kept under a name."""
        with self._file.reading() as db:
            return _fact(db, f"kept {name}")

    def keep_fact(self, name: str, value: bytes) -> None:
        """Keeps a small value under a name, in place of the one before."""
        with self._file.writing() as db:
            _keep(db, f"kept {name}", value)

    # Within a transaction.

    def _fitting(self, db: sqlite3.Connection, examples: Examples) -> Spec:
        """The store's spec, which these examples have; theirs where they are the first. Raises ValueError."""
        held, spec = self._spec(db), examples.spec()
        if strange := [name for name, (_, dtype) in spec.items() if dtype not in DTYPES]:
            raise ValueError(
                f"Expected field {strange[0]!r} to be one of {' | '.join(DTYPES)}, got {spec[strange[0]][1]}."
            )
        if held and (problem := difference(spec, held)):
            raise ValueError(f"The examples do not fit those in {self.path}: {problem}. One store holds one kind.")
        if not held:
            _keep(db, "spec", json.dumps(spec).encode())
        return held or spec

    def _write(self, db: sqlite3.Connection, spec: Spec, fields: Mapping[str, np.ndarray], *, shard: str) -> None:
        now_s, total = self._wall_s(), len(next(iter(fields.values())))
        step = max(1, CHUNK_BYTES // max(1, bytes_each(spec)))
        for start in range(0, total, step):
            data = b"".join(to_bytes(fields[name][start : start + step]) for name in spec)
            db.execute(
                "INSERT INTO chunk (wall_s, count, dropped, shard, checksum, data) VALUES (?, ?, 0, ?, ?, ?)",
                (now_s, min(step, total - start), shard, zlib.crc32(data), data),
            )

    def _tidy(self) -> None:
        """Deletes what has expired; what comes from the future was added now."""
        with self._file.reading() as db:
            oldest_s, newest_s = db.execute("SELECT MIN(wall_s), MAX(wall_s) FROM chunk").fetchone()
            max_age_s = self._limits(db).max_age_s
        now_s = self._wall_s()
        if oldest_s is not None and (oldest_s < now_s - max_age_s or newest_s > now_s):
            with self._file.writing() as db:
                self._expire(db, self._limits(db))

    def _expire(self, db: sqlite3.Connection, limits: StoreLimits) -> None:
        now_s = self._wall_s()
        db.execute("UPDATE chunk SET wall_s = ? WHERE wall_s > ?", (now_s, now_s))
        db.execute("DELETE FROM chunk WHERE wall_s < ?", (now_s - limits.max_age_s,))

    def _drop(self, db: sqlite3.Connection, limits: StoreLimits, spec: Spec) -> None:
        """Holds to the limits: the oldest go."""
        self._expire(db, limits)
        surplus = _count(db) - limits.most_examples(spec)
        while surplus > 0:
            number, left = db.execute("SELECT number, count - dropped FROM chunk ORDER BY number LIMIT 1").fetchone()
            if left <= surplus:
                db.execute("DELETE FROM chunk WHERE number = ?", (number,))
            else:
                db.execute("UPDATE chunk SET dropped = dropped + ? WHERE number = ?", (int(surplus), number))
            surplus -= left

    def _spec(self, db: sqlite3.Connection) -> Spec:
        held = _fact(db, "spec")
        return {} if held is None else {name: (tuple(shape), dtype) for name, (shape, dtype) in json.loads(held).items()}  # fmt: skip

    def _limits(self, db: sqlite3.Connection) -> StoreLimits:
        held = _fact(db, "limits")
        return StoreLimits() if held is None else StoreLimits(**json.loads(held))


def bytes_each(spec: Spec) -> int:
    """Bytes of one example."""
    return sum(prod(shape) * DTYPES[dtype].itemsize for shape, dtype in spec.values())


def _arrays(data: bytes, spec: Spec, count: int) -> dict[str, np.ndarray]:
    """The fields of a chunk, as views of its bytes."""
    return dict(_views(memoryview(data), spec, count))


def _views(data: memoryview, spec: Spec, count: int) -> Iterator[tuple[str, np.ndarray]]:
    at = 0
    for name, (shape, dtype) in spec.items():
        held = DTYPES[dtype].newbyteorder("<")
        size = count * prod(shape) * held.itemsize
        yield name, np.frombuffer(data[at : at + size], held).reshape(count, *shape)
        at += size


def _count(db: sqlite3.Connection) -> int:
    return int(db.execute("SELECT COALESCE(SUM(count - dropped), 0) FROM chunk").fetchone()[0])


def _fact(db: sqlite3.Connection, name: str) -> bytes | None:
    row = db.execute("SELECT value FROM fact WHERE name = ?", (name,)).fetchone()
    return None if row is None else bytes(row[0])


def _keep(db: sqlite3.Connection, name: str, value: bytes) -> None:
    db.execute("INSERT OR REPLACE INTO fact VALUES (?, ?)", (name, value))
