"""Populations in files: open what people have, write what shoal reads fastest.

What can be opened, and what the user is in each:

    folder of .npz           one file a user; the file's stem is the user's id (%-escapes are undone)
    one .npz                 the column `user` if there is one, else the file is one user, named by its stem
    .csv, .parquet           the column `user` (`tables.py`; needs pyarrow)
    folder of one of those   all files of the folder joined

A folder of `.npz` is read lazily, a user at each access; opening reads only headers (about 0.3 ms a file),
so a broken file is named at once. The other forms are read whole into memory.
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar
from urllib.parse import quote, unquote

import numpy as np

from shoal import validate
from shoal.data import npz, tables
from shoal.data.split import Split, by_user
from shoal.data.store import Examples, Layout, Population, Spec, difference, num_examples
from shoal.errors import DataError

T = TypeVar("T")

_KINDS = (".npz", ".csv", ".parquet")
_ALLOWED = "a folder of .npz files (one a user), one .npz, or .csv or .parquet with a user column"


def open_population(
    path: Path | str, *, user: str = "user", fields: Mapping[str, str | Sequence[str]] | None = None
) -> Population:
    """Opens a population from disk.

    Args:
        path: A file or a folder, as listed in the module's docstring.
        user: The column (or array) that names the user of each example.
        fields: Field name in the examples -> column (or array) name in the file; of a table also a list of columns,
            which become one field (N, columns). None takes all under their names.

    Raises:
        DataError: Nothing there, unreadable, or users that do not agree; the message names the file.
        MissingExtra: A table without pyarrow.
    """
    if not str(path):
        raise DataError(f"Expected a path to data, got ''. Give {_ALLOWED}.")
    files = _files(Path(path))
    if files[0].suffix != ".npz":
        return _from_split(*tables.read(files, user=user, fields=fields), where=Path(path))
    if joined := next((name for name, column in (fields or {}).items() if not isinstance(column, str)), None):
        raise DataError(
            f"Expected one array for field {joined!r} of {path}, got several: an .npz holds fields as they are."
        )
    single = None if fields is None else {name: str(column) for name, column in fields.items()}
    return _open_folder(files, user, single) if Path(path).is_dir() else _open_single(files[0], user, single)


def write_population(population: Population, folder: Path | str, *, progress: bool = False) -> None:
    """Writes one uncompressed `.npz` a user, each whole or not at all; files of the same name are replaced.

    Characters of an id that not every file system allows are %-escaped. After an interruption, what was
    written is complete and `write_population` may be run again.

    Args:
        population: Whom to write.
        folder: Made if missing.
        progress: Shows a bar when standard error is a terminal.

    Raises:
        ValueError: Two ids that differ only in case, which some file systems take for one.
        DataError: The folder cannot be written.
    """
    validate.distinct_in_any_case(population.ids, "ids of users")
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"Cannot make the folder {folder}: {error.strerror}. Give another one.") from error
    from rich.console import Console
    from rich.progress import Progress

    hidden = not progress or not sys.stderr.isatty()
    with Progress(console=Console(stderr=True), transient=True, disable=hidden) as bar:
        for user in bar.track(population.ids, description=f"writing {folder.name}"):
            npz.write(folder / f"{quote(user, safe='@+ ')}.npz", population[user].fields)


def _files(path: Path) -> list[Path]:
    """The data files at a path, in order of name, all of one kind."""
    try:
        if not path.exists():
            raise DataError(f"No data at {path}: it does not exist. Give {_ALLOWED}.")
        candidates = sorted(path.iterdir()) if path.is_dir() else [path]
    except OSError as error:
        raise DataError(f"Cannot look into {path}: {error.strerror}. Give {_ALLOWED}.") from error
    files = [file for file in candidates if file.suffix.lower() in _KINDS and not file.is_dir()]
    kinds = sorted({file.suffix.lower() for file in files})
    if not files:
        raise DataError(f"No data in {path}: nothing there ends in {', '.join(_KINDS)}. Give {_ALLOWED}.")
    if len(kinds) > 1:
        raise DataError(f"The folder {path} mixes {' and '.join(kinds)}. Keep one kind in a folder.")
    return files


def _open_folder(files: list[Path], user: str, fields: Mapping[str, str] | None) -> Population:
    paths: dict[str, Path] = {}
    sizes: dict[str, int] = {}
    spec: Spec | None = None
    for file in files:
        name = unquote(file.stem)
        if name in paths:
            raise DataError(f"Both {paths[name]} and {file} are user {name!r}. Rename one of them.")
        layout = _chosen(npz.layout(file), file, fields)
        if user in layout:
            raise DataError(
                f"{file} has an array {user!r}, but in a folder of .npz files the file's name is the user. "
                f"Join the files into one .npz, or pass user= another name."
            )
        sizes[name], paths[name] = _length(layout, file), file
        found = {field: (shape[1:], dtype.name) for field, (shape, dtype) in layout.items()}
        spec = spec or found
        if problem := difference(found, spec):
            raise DataError(f"User {name!r} ({file}) does not agree with {files[0]}: {problem}.")
    assert spec is not None
    return Population(sizes, _FileView(paths, fields), spec=spec)


def _open_single(file: Path, user: str, fields: Mapping[str, str] | None) -> Population:
    arrays = npz.read(file)
    users = arrays.pop(user, None)
    arrays = dict(_chosen(arrays, file, fields))
    if users is None:
        users = np.full(_length({f: (a.shape, a.dtype) for f, a in arrays.items()}, file), unquote(file.stem))
        if not len(users):
            raise DataError(f"{file} holds no examples. Write at least one.")
    return _from_columns(users, arrays, where=file)


def _from_columns(users: np.ndarray, arrays: Mapping[str, np.ndarray], *, where: Path) -> Population:
    """A population from a column of users beside the fields."""
    try:
        length = len(Examples(dict(arrays)))
        if users.shape != (length,):
            raise ValueError(f"Expected a user for each of {length} examples, got shape {users.shape}.")
        split = by_user(users)
    except ValueError as error:
        raise DataError(f"Cannot use {where}: {error}") from error
    return _from_split(split, arrays, where=where)


def _from_split(split: Split, arrays: Mapping[str, np.ndarray], *, where: Path) -> Population:
    try:
        return Population.from_split(Examples(dict(arrays)), split)
    except ValueError as error:
        raise DataError(f"Cannot use {where}: {error}") from error


def _chosen(columns: Mapping[str, T], file: Path, fields: Mapping[str, str] | None) -> dict[str, T]:
    if fields is None:
        return dict(columns)
    for name, column in fields.items():
        if column not in columns:
            raise DataError(
                f"{file} has no array {column!r}, asked for as field {name!r}; it has {', '.join(columns) or 'none'}."
            )
    return {name: columns[column] for name, column in fields.items()}


def _length(layout: Layout, file: Path) -> int:
    try:
        return num_examples(layout)
    except ValueError as error:
        raise DataError(f"Cannot use {file}: {error}") from error


@dataclass(frozen=True)
class _FileView:
    """Reads a user's file when asked; a class rather than a closure so that it can be pickled."""

    paths: dict[str, Path]
    fields: Mapping[str, str] | None

    def __call__(self, user: str) -> Examples:
        file = self.paths[user]
        return Examples(_chosen(npz.read(file), file, self.fields))
