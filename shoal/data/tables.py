"""CSV and Parquet as columns of numbers: the only home of pyarrow, which is optional (`shoal[tables]`).

A numeric or boolean column becomes an array (N,), a column of lists of one length an array (N, length),
nested lists further dims. Refused, by name and row: text, dates, decimals, missing values, lists of unequal
lengths. Rows count from 1, without the header. Only the columns asked for are read, a file at a time.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from shoal.data.split import Split, by_user
from shoal.errors import DataError, MissingExtra

_NUMBER = r"^\s*[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?\s*$"


def read(
    files: Sequence[Path], *, user: str, fields: Mapping[str, str | Sequence[str]] | None
) -> tuple[Split, dict[str, np.ndarray]]:
    """Reads tables of one kind and joins them.

    Args:
        files: `.csv` or `.parquet` files, at least one.
        user: The column that names the user.
        fields: Field name -> column name, or several columns of one type that become one field; None takes every other
            column under its name.

    Returns:
        The user as text -> indices of its rows, users in order, and field -> array (N, ...).

    Raises:
        MissingExtra: pyarrow is not installed.
        DataError: A file or a column that cannot be used; the message names it.
    """
    known: dict[str, int] = {}
    parts = [_read_file(file, user, fields, known) for file in files]
    split = by_user(np.concatenate([owners for owners, _ in parts]))
    users = {name: split[str(known[name])] for name in sorted(known)}
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


def _read_file(
    file: Path, user: str, fields: Mapping[str, str | Sequence[str]] | None, known: dict[str, int]
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """The number in `known` of each row's user, and the fields."""
    names = _names(file)
    wanted = fields or {name: name for name in names if name != user}
    columns = [column for given in wanted.values() for column in ([given] if isinstance(given, str) else given)]
    for column in (user, *columns):
        if column not in names:
            help = "Name the column of the user with user= (--user-column)." if column == user else "Check fields=."
            raise DataError(f"{file} has no column {column!r}; it has {', '.join(names) or 'none'}. {help}")
    table = _load(file, user, list(dict.fromkeys((user, *columns))))
    return _owners(table[user], file, user, known), {name: _field(table, given, file) for name, given in wanted.items()}


def _field(table: Any, given: str | Sequence[str], file: Path) -> np.ndarray:
    """One column as a field (N, …), or several as one (N, columns, …)."""
    if isinstance(given, str):
        return _numbers(table[given], f"Column {given!r} of {file}")
    parts = [_field(table, column, file) for column in given]
    if len({part.shape for part in parts}) != 1:
        raise DataError(
            f"Expected columns {', '.join(given)} of {file} to have one shape, so that they can be one field."
        )
    return np.stack(parts, axis=1)


def _names(file: Path) -> list[str]:
    """The columns; of a CSV file only its beginning is read."""
    pa = _arrow(file)
    with _readable(file, pa):
        if file.suffix.lower() == ".parquet":
            return list(pa.parquet.ParquetFile(file).schema_arrow.names)
        with pa.csv.open_csv(file) as reader:
            return list(reader.schema.names)


def _load(file: Path, user: str, columns: list[str]) -> Any:
    pa = _arrow(file)
    with _readable(file, pa):
        if file.suffix.lower() == ".parquet":
            return pa.parquet.ParquetFile(file).read(columns=columns)
        # Without the type, "007" would be read as 7.
        options = pa.csv.ConvertOptions(column_types={user: pa.string()}, include_columns=columns)
        return pa.csv.read_csv(file, convert_options=options)


def _arrow(file: Path) -> Any:
    try:
        import pyarrow
        import pyarrow.csv
        import pyarrow.parquet
    except ImportError as error:
        raise MissingExtra("pyarrow", extra="tables", why=f"Reading {file.name}") from error
    return pyarrow


@contextmanager
def _readable(file: Path, pa: Any) -> Iterator[None]:
    try:
        yield
    except (OSError, pa.ArrowException) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise DataError(f"Cannot read {file}: {reason}. Expected a {file.suffix} table with a header.") from error


def _owners(column: Any, file: Path, user: str, known: dict[str, int]) -> np.ndarray:
    import pyarrow as pa

    what = f"Column {user!r} of {file}"
    _refuse_missing(column, what)
    kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
    if not (pa.types.is_integer(kind) or pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        raise DataError(f"{what} names the user, so it must be text or integers, got {kind}.")
    coded = column.cast(pa.string()).dictionary_encode().unify_dictionaries()
    if not len(column):
        return np.zeros(0, np.int64)
    numbers = [known.setdefault(name, len(known)) for name in coded.chunk(0).dictionary.to_pylist()]
    codes = np.concatenate([chunk.indices.to_numpy(zero_copy_only=False) for chunk in coded.chunks])
    owners: np.ndarray = np.array(numbers, np.int64)[codes]
    return owners


def _numbers(column: Any, what: str, *, per_row: int = 1) -> np.ndarray:
    """One column, a chunked array of so many values a row, as numbers."""
    import pyarrow as pa

    _refuse_missing(column, what, per_row=per_row)
    kind = column.type
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        return _lists(column, what, per_row=per_row)
    if not (pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)):
        raise DataError(
            f"{what} is {kind}{_first_text(column)}; expected numbers, booleans or lists of them of one length. "
            "Encode it, or choose the other columns with fields=."
        )
    array: np.ndarray = column.to_numpy()
    return array


def _lists(column: Any, what: str, *, per_row: int) -> np.ndarray:
    import pyarrow.compute as pc

    each = pc.list_value_length(column)
    lengths = pc.unique(each).to_pylist()
    if len(lengths) > 1:
        row = pc.index(pc.equal(each, lengths[1]), True).as_py() // per_row + 1
        raise DataError(
            f"{what} has lists of {min(lengths)} to {max(lengths)}, the first other than row 1's in row {row}; expected one "
            "length. Pad them."
        )
    inner = _numbers(pc.list_flatten(column), what, per_row=per_row * max(1, lengths[0] if lengths else 0))
    return inner.reshape(len(column), lengths[0] if lengths else 0, *inner.shape[1:])


def _refuse_missing(column: Any, what: str, *, per_row: int = 1) -> None:
    import pyarrow.compute as pc

    if column.null_count:
        row = pc.index(pc.is_null(column), True).as_py() // per_row + 1
        raise DataError(
            f"{what} lacks {column.null_count} of {len(column)} values, the first in row {row}. Fill them or drop the rows."
        )


def _first_text(column: Any) -> str:
    """Where a column of text has the first value that is no number, as words for an error."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if not pa.types.is_string(column.type):
        return ""
    row = pc.index(pc.match_substring_regex(column, _NUMBER), False).as_py()
    return "" if row < 0 else f" (row {row + 1} has {str(column[row])[:40]!r})"
