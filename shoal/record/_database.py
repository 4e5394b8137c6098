"""A SQLite file: one connection that writes, one that reads, each behind a lock.

Write-ahead log with synchronous=FULL: a transaction is durable when it returns, readers never wait for the writer.
"""

import os
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import final

from sqlalchemy import Connection, Engine, NullPool, create_engine, event, exc

from shoal.errors import StoreError
from shoal.record.sqlite_errors import BUSY_TIMEOUT_S, explain


@final
class Database:
    """Transactions on one file. Calls may come from any thread."""

    def __init__(self, path: Path, *, read_only: bool) -> None:
        self._path, self._read_only = path, read_only
        self._reader = _Session(path, read_only=read_only, begin="BEGIN")
        self._writer = None if read_only else _Session(path, read_only=False, begin="BEGIN IMMEDIATE")

    @contextmanager
    def read(self) -> Iterator[Connection]:
        """A transaction that sees one state of the file."""
        with self._explained(), self._reader.transaction() as connection:
            yield connection

    @contextmanager
    def write(self) -> Iterator[Connection]:
        """A transaction that happens whole or not at all. `IntegrityError` passes, for the caller to explain."""
        if self._writer is None:
            raise StoreError(f"{self._path} was opened for reading only. Open the store without read_only to write.")
        with self._explained(), self._writer.transaction() as connection:
            yield connection

    def backup(self, target: Path) -> None:
        """Copies the file's present state to a new file, durably."""
        with self._explained(), sqlite3.connect(self._path) as source, sqlite3.connect(target) as copy:
            source.backup(copy)
        source.close()
        copy.close()

    def close(self) -> None:
        """Waits for transactions in progress."""
        for session in (self._reader, self._writer):
            if session is not None:
                session.close()

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except exc.IntegrityError:
            raise
        except sqlite3.IntegrityError as error:  # from a prepared statement
            raise exc.IntegrityError(None, None, error) from error
        except exc.DBAPIError as error:
            raise explain(error.orig or error, f"record {self._path}") from error
        except sqlite3.Error as error:
            raise explain(error, f"record {self._path}") from error


@final
class _Session:
    """One connection, opened when first used, used by one thread at a time."""

    def __init__(self, path: Path, *, read_only: bool, begin: str) -> None:
        self._engine = _engine(path, read_only=read_only, begin=begin)
        self._lock = threading.Lock()
        self._connection: Connection | None = None
        self._path, self._is_closed = path, False

    @contextmanager
    def transaction(self) -> Iterator[Connection]:
        with self._lock:
            if self._is_closed:
                raise StoreError(f"The store of {self._path} is closed. Open it again.")
            if self._connection is None:
                self._connection = self._engine.connect()
            with self._connection.begin():
                yield self._connection

    def close(self) -> None:
        with self._lock:
            self._is_closed = True
            if self._connection is not None:
                self._connection.close()
                self._connection = None
            self._engine.dispose()


def _engine(path: Path, *, read_only: bool, begin: str) -> Engine:
    def connect() -> sqlite3.Connection:
        # isolation_level=None: the driver begins nothing by itself; the event below does
        connection = sqlite3.connect(
            _uri(path, read_only=read_only),
            uri=True,
            timeout=BUSY_TIMEOUT_S,
            isolation_level=None,
            check_same_thread=False,
        )
        if not read_only:
            connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute("PRAGMA foreign_keys = ON")
        return connection

    engine = create_engine("sqlite+pysqlite://", creator=connect, poolclass=NullPool)

    @event.listens_for(engine, "begin")
    def _(connection: Connection) -> None:
        connection.connection.cursor().execute(begin)

    return engine


def _uri(path: Path, *, read_only: bool) -> str:
    uri = path.absolute().as_uri()
    if not read_only:
        return uri
    log = path.with_name(path.name + "-wal")
    if not log.exists() and not os.access(path.parent, os.W_OK):
        return f"{uri}?immutable=1"  # nobody writes there, and SQLite may not make its log's index
    return f"{uri}?mode=ro"
