"""Brings a record's tables to the newest form: numbered steps forward, each in one transaction, after a backup copy.

A file without tables gets the present schema in one step and the newest number. A file with an older number gets the
steps that it lacks, in order. A file with a newer number is left as it is. There are no steps back: the backup is.

To change the schema: change `schema.py`, raise `SCHEMA_VERSION`, append a function here that alters a file of the
number before. A step is never edited once released.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Final

from sqlalchemy import Connection, delete, insert, inspect, select, text

from shoal.errors import StoreError
from shoal.record import schema

Migration = Callable[[Connection], None]


def create_schema(connection: Connection) -> None:
    """Number 1: all tables."""
    schema.METADATA.create_all(connection)


def late_groups(connection: Connection) -> None:
    """Number 2: groups whose sums are kept are found by an index, and versions have a final form."""
    schema.GROUPS_WITH_SUMS.create(connection)
    for column in ("final_model_root", "final_server_state_root"):
        connection.execute(text(f"ALTER TABLE commits ADD COLUMN {column} TEXT REFERENCES indexes (root)"))


def analytics(connection: Connection) -> None:
    """Number 3: what was seen of a round's devices, and the logs of the newest rounds."""
    connection.execute(text("ALTER TABLE rounds ADD COLUMN analytics TEXT DEFAULT '{}' NOT NULL"))
    schema.ROUND_LOGS.create(connection)


def retention(connection: Connection) -> None:
    """Number 4: what names an index or a group is found by an index, so that old ones can be swept."""
    for index in schema.NAMED_BY:
        index.create(connection)


def telemetry(connection: Connection) -> None:
    """Number 5: sums over devices' days."""
    schema.TELEMETRY.create(connection)


MIGRATIONS: Final[tuple[Migration, ...]] = (create_schema, late_groups, analytics, retention, telemetry)
"""Step n, at place n - 1, makes schema n out of schema n - 1."""


def schema_version(connection: Connection) -> int:
    """The number of the file's schema; 0 where there are no tables yet.

    Raises:
        StoreError: the file holds tables of something else.
    """
    tables = sorted(inspect(connection).get_table_names())
    if "meta" in tables:
        value = connection.execute(select(schema.META.c.value).where(schema.META.c.key == "schema")).scalar()
        if value is not None and str(value).isdigit():
            return int(value)
    if tables:
        raise StoreError(
            f"Expected a record of shoal or an empty database, got one with tables {', '.join(tables[:5])} and no schema "
            "number. Choose another folder."
        )
    return 0


def refuse_newer(found: int, newest: int = schema.SCHEMA_VERSION) -> None:
    """Raises StoreError for a schema that this version of shoal does not know."""
    if found > newest:
        raise StoreError(
            f"This record has schema {found}; this version of shoal knows schemas up to {newest}. Upgrade shoal to open "
            "it. The file was not changed."
        )


def migrate(
    begin: Callable[[], AbstractContextManager[Connection]],
    *,
    backup: Callable[[int], Path],
    migrations: Sequence[Migration] = MIGRATIONS,
) -> Path | None:
    """Takes a file to the newest schema.

    Args:
        begin: Opens a transaction that may write; a step that fails is rolled back by it.
        backup: Copies the file, given its schema's number, and returns the copy's path. Not called for a file without
            tables or one that has the newest schema.
        migrations: The steps.

    Returns:
        The backup's path, or None where none was made.

    Raises:
        StoreError: the file is of a newer schema, or a step failed (then the file is as the step before left it).
    """
    newest = len(migrations)
    with begin() as connection:
        found = schema_version(connection)
        refuse_newer(found, newest)
        if found == 0:
            create_schema(connection)
            _stamp(connection, newest)
    if found in (0, newest):
        return None
    copy = backup(found)
    for number in range(found + 1, newest + 1):
        _step(begin, number, migrations[number - 1], copy)
    return copy


def _step(begin: Callable[[], AbstractContextManager[Connection]], number: int, step: Migration, copy: Path) -> None:
    try:
        with begin() as connection:
            if schema_version(connection) < number:  # else another process was faster
                step(connection)
                _stamp(connection, number)
    except Exception as error:
        raise StoreError(
            f"Bringing the record from schema {number - 1} to {number} failed: {error}. It still has schema {number - 1}; a "
            f"copy from before is {copy}. Please report this."
        ) from error


def _stamp(connection: Connection, number: int) -> None:
    connection.execute(delete(schema.META).where(schema.META.c.key == "schema"))
    connection.execute(insert(schema.META), {"key": "schema", "value": str(number)})
