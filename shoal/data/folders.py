"""Populations from folders: one folder a user, in it files of arrays, or pictures in a folder for each class.

    users/anna/monday.npz                     examples of anna: the files of a user are joined
    users/anna/cat/1.png                      a picture, with its class; classes are those of all users, in order of name
    users/anna/anything                       with `read`, which makes the arrays of one file

Opening lists files and reads the first one; a user's files are read when asked for, so memory holds the list of files and
one user.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from shoal.data import npz
from shoal.data.rows import spec_of, stacked
from shoal.data.store import Examples, Population, Spec, difference, num_examples
from shoal.errors import DataError

Read = Callable[[Path], Mapping[str, np.ndarray]]
"""A file -> field -> what one example has there, array (...)."""

PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".pgm", ".ppm")
_MOST_PIXELS = 1 << 26


def open_folders(path: Path | str, *, read: Read | None = None) -> Population:
    """Opens a population of which each user is a folder.

    Args:
        path: The folder of the users' folders; their names are the users' ids.
        read: Makes one example of each file, at any depth; its fields must agree in shape and type. None: `.npz` files,
            each of several examples, or pictures in a folder for each class, which give `image` (height, width, channels)
            uint8 and `label` int32.

    Raises:
        DataError: Nothing there, or files that do not agree; the message names the file.
    """
    root = Path(path)
    users = _users(root)
    if read is not None:
        return _one_each({user: _files(folder, ()) for user, folder in users.items()}, read)
    files = {user: _files(folder, (".npz", *PICTURES)) for user, folder in users.items()}
    kinds = sorted(
        {"arrays (.npz)" if file.suffix == ".npz" else "pictures" for found in files.values() for file in found}
    )
    if len(kinds) > 1:
        raise DataError(f"The folder {root} mixes {' and '.join(kinds)}. Keep one kind, or pass read=.")
    return _arrays(files) if kinds == ["arrays (.npz)"] else _one_each(files, _pictures(root, files))


def _users(root: Path) -> dict[str, Path]:
    try:
        found = {entry.name: entry for entry in sorted(root.iterdir()) if entry.is_dir() and entry.name[0] != "."}
    except OSError as error:
        raise DataError(
            f"Cannot look into {root}: {error.strerror}. Give a folder of folders, one for each user."
        ) from error
    if not found:
        raise DataError(f"There is no folder in {root}. Give a folder of folders, one for each user.")
    return found


def _files(folder: Path, suffixes: tuple[str, ...]) -> list[Path]:
    """The files below a folder, hidden ones left out, in order of name."""
    below = (file for file in folder.rglob("*") if not any(part[0] == "." for part in file.relative_to(folder).parts))
    files = sorted(file for file in below if file.is_file() and (not suffixes or file.suffix.lower() in suffixes))
    if not files:
        kinds = f" that ends in {', '.join(suffixes)}" if suffixes else ""
        raise DataError(f"User {folder.name!r} has no file in {folder}{kinds}. Remove the folder, or pass read=.")
    return files


def _one_each(files: dict[str, list[Path]], read: Read) -> Population:
    """A file is an example."""
    first = next(iter(files.values()))[0]
    spec = spec_of(_read(read, first))
    view = _FilesView(files, read, spec, first)
    return Population({user: len(found) for user, found in files.items()}, view, spec=spec)


def _arrays(files: dict[str, list[Path]]) -> Population:
    """A file is several examples."""
    sizes, spec, first = {}, None, next(iter(files.values()))[0]
    for user, found in files.items():
        sizes[user] = 0
        for file in found:
            layout = npz.layout(file)
            try:
                sizes[user] += num_examples(layout)
            except ValueError as error:
                raise DataError(f"Cannot use {file}: {error}") from error
            here: Spec = {field: (shape[1:], dtype.name) for field, (shape, dtype) in layout.items()}
            spec = spec or here
            if problem := difference(here, spec):
                raise DataError(f"{file} is not like {first}: {problem}.")
    assert spec is not None
    return Population(sizes, _ArraysView(files), spec=spec)


@dataclass(frozen=True)
class _ArraysView:
    """Reads a user's files when asked; a class rather than a closure so that it can be pickled."""

    files: dict[str, list[Path]]

    def __call__(self, user: str) -> Examples:
        return Examples.concatenate([Examples(npz.read(file)) for file in self.files[user]])


@dataclass(frozen=True)
class _FilesView:
    files: dict[str, list[Path]]
    read: Read
    spec: Spec
    first: Path

    def __call__(self, user: str) -> Examples:
        files = self.files[user]
        rows = ((str(file), _read(self.read, file)) for file in files)
        return stacked(rows, len(files), self.spec, like=str(self.first))


def _read(read: Read, file: Path) -> dict[str, np.ndarray]:
    try:
        return {field: np.asarray(value) for field, value in read(file).items()}
    except DataError:
        raise
    except Exception as error:  # whatever the caller's reader raises: the file must be named
        raise DataError(f"Cannot read {file}: {type(error).__name__}: {error}") from error


def _pictures(root: Path, files: dict[str, list[Path]]) -> Read:
    classes = set()
    for user, found in files.items():
        for file in found:
            parts = file.relative_to(root / user).parts
            if len(parts) != 2:
                raise DataError(f"Expected pictures as USER/CLASS/picture, got {file}. Move it, or pass read=.")
            classes.add(parts[0])
    return _PictureReader({name: number for number, name in enumerate(sorted(classes))})


@dataclass(frozen=True)
class _PictureReader:
    classes: dict[str, int]

    def __call__(self, file: Path) -> dict[str, np.ndarray]:
        from PIL import Image  # Matplotlib's

        picture: Image.Image
        with Image.open(file) as picture:
            if picture.width * picture.height > _MOST_PIXELS:
                raise DataError(
                    f"{file} has {picture.width} x {picture.height} pixels; at most {_MOST_PIXELS} are read."
                )
            plain = picture if picture.mode in ("L", "RGB") else picture.convert("RGB")
            pixels = np.asarray(plain, np.uint8)
        label = np.asarray(self.classes[file.parent.name], np.int32)
        return {"image": pixels.reshape(*pixels.shape[:2], -1), "label": label}
