"""SQLAlchemy Core statements compiled once to the driver's own SQL, for the calls that every round makes.

SQLAlchemy takes 50 to 100 µs to execute a statement that it has compiled before, the driver 5 to 10: with a dozen statements
a commit that is more than the disk takes. The SQL is still Core's; only its execution is short. Errors are the driver's.
"""

from collections.abc import Mapping, Sequence
from typing import Any, final

from sqlalchemy import ClauseElement, Connection, Table, insert
from sqlalchemy.dialects import sqlite
from sqlalchemy.sql.compiler import SQLCompiler

_DIALECT = sqlite.dialect(paramstyle="named")


@final
class Prepared:
    """A statement for SQLite's driver. Values go in by name: a column's, or a `bindparam`'s."""

    def __init__(self, statement: ClauseElement, columns: Sequence[str] = ()) -> None:
        """`columns` are those that an insert or update sets."""
        compiled = statement.compile(dialect=_DIALECT, column_keys=list(columns) or None)
        assert isinstance(compiled, SQLCompiler)
        self._sql = str(compiled)
        self._constants = {name: bind.value for name, bind in compiled.binds.items() if not bind.required}

    def __repr__(self) -> str:
        return f"Prepared({self._sql!r})"

    def run(self, connection: Connection, values: Mapping[str, Any]) -> int:
        """Executes it; returns how many rows it changed."""
        return int(self._cursor(connection).execute(self._sql, {**self._constants, **values}).rowcount)

    def run_many(self, connection: Connection, rows: Sequence[Mapping[str, Any]]) -> None:
        """Executes it for each row."""
        if rows:
            self._cursor(connection).executemany(self._sql, rows)

    def scalar(self, connection: Connection, values: Mapping[str, Any]) -> Any:
        """The first column of the first row, or None where there is none."""
        row = self._cursor(connection).execute(self._sql, {**self._constants, **values}).fetchone()
        return None if row is None else row[0]

    @staticmethod
    def _cursor(connection: Connection) -> Any:
        return connection.connection.cursor()


def adding(table: Table) -> Prepared:
    """An insert of all columns, except one that the database numbers."""
    return Prepared(
        insert(table).inline(), [column.name for column in table.columns if column.autoincrement is not True]
    )
