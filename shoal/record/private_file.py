"""One SQLite file that only its owner may read: made, opened, written in whole transactions. No SQL library.

A transaction is on the disk when it is over (write-ahead log, synchronous=FULL). Several processes may have the file open: readers and
one writer at a time, who waits for the other. What is deleted is overwritten (secure_delete) once the log is folded into the file, at
the latest when the last process closes it. A file of another kind is refused by its number, `application_id`.
"""

import os
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final, final

from shoal.errors import StoreError
from shoal.record.sqlite_errors import BUSY_TIMEOUT_S, explain

_PAUSE_S: Final = 0.02


@final
class PrivateFile:
    """See the module's text. Calls may come from any thread."""

    def __init__(
        self,
        path: Path | None,
        *,
        kind: str,
        application_id: int,
        version: int,
        schema: str,
        must_exist: bool = False,
        read_only: bool = False,
    ) -> None:
        """
        Args:
            path: of the file; it and its folder are made where there is none. None: in memory, and gone when it is closed.
            kind: what it is called in errors: "example store".
            application_id: number that SQLite keeps in files of this kind.
            version: of the schema.
            schema: statements that make it.
            must_exist: raise where there is no file.
            read_only: for one who only looks: nothing is made, and what is not there is as if empty.

        Raises:
            StoreError: it is not there, of another kind or version, damaged, or cannot be opened.
        """
        self.path, self.what = path, f"{kind} {path or 'in memory'}"
        self._kind, self._application_id, self._version = kind, application_id, version
        self._lock = threading.RLock()
        is_there = path is not None and path.exists()
        if must_exist and not is_there:
            raise StoreError(f"There is no {kind} at {path}. Check the path; whoever fills it makes it.")
        with self._explained():
            if path is not None and not read_only:
                _make_private(path)
            if path is None or (read_only and not is_there):
                where, read_only = ":memory:", False
            else:
                where = f"{path.absolute().as_uri()}?mode={'ro' if read_only else 'rw'}"
            self._db = sqlite3.connect(
                where, uri=True, timeout=BUSY_TIMEOUT_S, check_same_thread=False, isolation_level=None
            )
            try:
                self._check() if read_only else self._open(schema)
            except BaseException:
                self._db.close()
                raise

    def _open(self, schema: str) -> None:
        self._check()  # before anything is written
        self._use_log()
        self._db.execute("PRAGMA synchronous = FULL")
        self._db.execute("PRAGMA secure_delete = ON")
        with self.writing() as db:
            if self._check():
                for statement in filter(str.strip, schema.split(";")):
                    db.execute(statement)
                db.execute(f"PRAGMA application_id = {self._application_id}")
                db.execute(f"PRAGMA user_version = {self._version}")

    def _use_log(self) -> None:
        """SQLite does not wait where several processes make the same file a logged one at once."""
        end_s = time.monotonic() + BUSY_TIMEOUT_S
        while True:
            try:
                self._db.execute("PRAGMA journal_mode = WAL")
                return
            except sqlite3.OperationalError as error:
                if "locked" not in str(error) or time.monotonic() > end_s:
                    raise
                time.sleep(_PAUSE_S)

    def _check(self) -> bool:
        """Whether nothing is in it yet."""
        found = self._db.execute("PRAGMA application_id").fetchone()[0]
        version = self._db.execute("PRAGMA user_version").fetchone()[0]
        tables = self._db.execute("SELECT COUNT(*) FROM sqlite_master").fetchone()[0]
        if not found and not version and not tables:
            return True
        if found != self._application_id:
            raise StoreError(f"{self.path} is no {self._kind}: another program made it. Choose another path.")
        if version != self._version:
            raise StoreError(
                f"The {self.what} has schema {version}, this shoal reads {self._version}. Take the shoal that wrote it, or another file."
            )
        return False

    @contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        """One state of the file, whatever others write meanwhile."""
        with self._transaction("BEGIN") as db:
            yield db

    @contextmanager
    def writing(self) -> Iterator[sqlite3.Connection]:
        """All that is written within is kept, or nothing."""
        with self._transaction("BEGIN IMMEDIATE") as db:
            yield db

    @contextmanager
    def _transaction(self, begin: str) -> Iterator[sqlite3.Connection]:
        with self._explained(), self._lock:
            self._db.execute(begin)
            try:
                yield self._db
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise explain(error, self.what) from error
        except OSError as error:
            raise StoreError(f"The {self.what} cannot be made: {error}.") from error

    def close(self) -> None:
        """Nothing can be asked of it afterwards."""
        with self._lock:
            self._db.close()


def _make_private(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        if os.name == "posix" and os.fstat(descriptor).st_mode & 0o077:
            os.fchmod(descriptor, 0o600)
    finally:
        os.close(descriptor)
