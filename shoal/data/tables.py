"""CSV and Parquet as columns of numbers: the only home of pyarrow, which is optional (`shoal[tables]`).

A numeric or boolean column becomes an array (N,), a column of lists of one length an array (N, length),
nested lists further dims. Refused, by name: text, dates, decimals, missing values, lists of unequal lengths.
All files are read whole into memory.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from shoal.errors import DataError, MissingExtra


def read(
    files: Sequence[Path], *, user: str, fields: Mapping[str, str] | None
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Reads tables of one kind and joins them.

    Args:
        files: `.csv` or `.parquet` files, at least one.
        user: The column that names the user.
        fields: Field name -> column name; None takes every other column under its name.

    Returns:
        The users (N,) as text, and field -> array (N, ...).

    Raises:
        MissingExtra: pyarrow is not installed.
        DataError: A file or a column that cannot be used; the message names it.
    """
    parts = [_read_file(file, user, fields) for file in files]
    users = np.concatenate([users for users, _ in parts])
    names, arrays = parts[0][1].keys(), {}
    for file, (_, columns) in zip(files, parts, strict=True):
        if columns.keys() != names:
            raise DataError(f"{file} has the columns {', '.join(columns)}, but {files[0]} has {', '.join(names)}.")
    for name in names:
        try:
            arrays[name] = np.concatenate([columns[name] for _, columns in parts])
        except ValueError as error:
            raise DataError(f"Column {name!r} has different shapes in the files beside {files[0]}.") from error
    return users, arrays


def _read_file(file: Path, user: str, fields: Mapping[str, str] | None) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    table = _load(file, user)
    wanted = fields or {name: name for name in table.column_names if name != user}
    for column in (user, *wanted.values()):
        if column not in table.column_names:
            raise DataError(
                f"{file} has no column {column!r}; it has {', '.join(table.column_names) or 'none'}. "
                f"{'Name the column of the user with user=.' if column == user else 'Check fields=.'}"
            )
    return _users(table[user], file, user), {
        name: _numbers(table[column], f"Column {column!r} of {file}") for name, column in wanted.items()
    }


def _load(file: Path, user: str) -> Any:
    try:
        import pyarrow as pa
        import pyarrow.csv
        import pyarrow.parquet
    except ImportError as error:
        raise MissingExtra("pyarrow", extra="tables", why=f"Reading {file.name}") from error
    try:
        if file.suffix.lower() == ".parquet":
            return pa.parquet.ParquetFile(file).read()
        # Without the type, "007" would be read as 7.
        options = pa.csv.ConvertOptions(column_types={user: pa.string()})
        return pa.csv.read_csv(file, convert_options=options)
    except (OSError, pa.ArrowException) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise DataError(f"Cannot read {file}: {reason}. Expected a {file.suffix} table with a header.") from error


def _users(column: Any, file: Path, user: str) -> np.ndarray:
    import pyarrow as pa

    what = f"Column {user!r} of {file}"
    _refuse_missing(column, what)
    kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
    if not (pa.types.is_integer(kind) or pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        raise DataError(f"{what} names the user, so it must be text or integers, got {kind}.")
    return np.array(column.cast(pa.string()).to_pylist(), dtype=str)


def _numbers(column: Any, what: str) -> np.ndarray:
    """One column, a chunked array, as numbers."""
    import pyarrow as pa

    _refuse_missing(column, what)
    kind = column.type
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        return _lists(column, what)
    if not (pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)):
        raise DataError(
            f"{what} is {kind}; expected numbers, booleans or lists of them of one length. "
            "Encode it, or choose the other columns with fields=."
        )
    array: np.ndarray = column.to_numpy()
    return array


def _lists(column: Any, what: str) -> np.ndarray:
    import pyarrow.compute as pc

    lengths = pc.unique(pc.list_value_length(column)).to_pylist()
    if len(lengths) > 1:
        raise DataError(f"{what} has lists of {min(lengths)} to {max(lengths)}; expected one length. Pad them.")
    inner = _numbers(pc.list_flatten(column), what)
    return inner.reshape(len(column), lengths[0] if lengths else 0, *inner.shape[1:])


def _refuse_missing(column: Any, what: str) -> None:
    if column.null_count:
        raise DataError(f"{what} lacks {column.null_count} of {len(column)} values. Fill them or drop the rows.")
