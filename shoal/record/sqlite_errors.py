"""What SQLite's errors mean, and what to do. No SQL library here: a device has none."""

from typing import Any, Final

from shoal.errors import StoreError, StoreUnavailable

BUSY_TIMEOUT_S: Final = 30.0
"""How long a writer waits for another process's transaction."""


def explain(error: Any, what: str) -> StoreError:
    """A StoreError that says what SQLite's error means and what to do. `what`: the file's kind and path."""
    name = str(getattr(error, "sqlite_errorname", ""))
    if name == "SQLITE_FULL" or name.startswith("SQLITE_IOERR"):
        todo = "No space left, or the disk fails. Nothing was lost; free space (or check the disk) and try again."
        return StoreUnavailable(f"The {what} says: {error}. {todo}")
    elif name.startswith(("SQLITE_BUSY", "SQLITE_LOCKED")):
        todo = f"Another process has been writing for {BUSY_TIMEOUT_S:.0f} s. End it, or try again."
        return StoreUnavailable(f"The {what} says: {error}. {todo}")
    elif name.startswith("SQLITE_READONLY"):
        todo = "The file cannot be written. Check its permissions and those of its folder."
    elif name.startswith("SQLITE_CANTOPEN"):
        todo = "The file cannot be opened. Check the path, its permissions and those of its folder."
    elif name.startswith(("SQLITE_NOTADB", "SQLITE_CORRUPT")):
        todo = "The file is no database, or is damaged. Restore it from a copy, or choose another folder."
    else:
        todo = "Please report this."
    return StoreError(f"The {what} says: {error}. {todo}")
