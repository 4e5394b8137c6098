"""The field's standard federated sets, as TensorFlow Federated publishes them: FEMNIST, Shakespeare, Stack Overflow.

Each is one SQLite file (`tff.py`), packed with lzma, on the web. It is downloaded once, checked by hash where one has been
published, unpacked beside the other data sets, and its numbers of users and examples are checked against those published.
The splits are those of the file. The real files could not be had where this was written: the tests use small files made in
their format.

References:
    Caldas et al., 2018, LEAF: A Benchmark for Federated Settings, https://arxiv.org/abs/1812.01097.
    McMahan et al., 2017, https://arxiv.org/abs/1602.05629 (Shakespeare by role, 80 characters).
    Reddi et al., 2021, Adaptive Federated Optimization, https://arxiv.org/abs/2003.00295 (the preprocessing of the three).
"""

import lzma
import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import final

import numpy as np

from shoal.data import cache as cached
from shoal.data import tokens
from shoal.data.address import Address
from shoal.data.formats import read_members
from shoal.data.loading import progress_bar
from shoal.data.sources import Say
from shoal.data.store import Examples, Population, Spec
from shoal.data.tff import Features, Split
from shoal.errors import DataError

_HEADER = b"SQLite format 3\0"
_CHUNK_BYTES = 1 << 22
_WEB = "https://storage.googleapis.com/tff-datasets-public"


@dataclass(frozen=True)
class Found:
    """A data set by its parts."""

    train: Population
    test: Population
    validation: Population | None
    words: tuple[str, ...]
    about: str


@final
@dataclass(frozen=True, kw_only=True)
class Published:
    """How one of the files is had and read."""

    packed: Address
    """The file, packed."""
    most_bytes: int
    """Unpacked, a longer file is refused."""
    splits: Mapping[str, tuple[str, int, int]]
    """Part -> its name in the file, its users, its rows."""
    read: "Callable[[Path, Mapping[str, Split]], tuple[Mapping[str, Population], tuple[str, ...]]]"
    """Folder with what belongs to the file, and the splits, to populations and words."""
    beside: Address | None = None
    """Another file that reading needs."""
    about: str
    """Fields, test part, source, licence, citation."""


def load(name: str, *, cache: Path | None, progress: bool) -> Found:
    """See `federated.load_federated`."""
    recipe, folder = RECIPES[name], (cache or cached.cache_folder()) / name
    cached.make_folder(folder)
    database = folder / f"{name}.sqlite"
    with progress_bar(name, recipe.packed.most_bytes, shown=progress) as say:
        if not database.exists():
            _fetch(name, recipe, folder, database, say)
        if recipe.beside is not None and not (folder / recipe.beside.name).exists():
            _download(name, recipe.beside, folder, say)
        splits = {part: Split(database, split) for part, (split, _, _) in recipe.splits.items()}
        _check_counts(recipe, splits)
        populations, words = recipe.read(folder, splits)
    return Found(populations["train"], populations["test"], populations.get("validation"), words, recipe.about)


def _fetch(name: str, recipe: Published, folder: Path, database: Path, say: Say) -> None:
    """Makes the unpacked file, out of the packed one that lies in the folder or is downloaded."""
    packed = folder / recipe.packed.name
    was_there = packed.exists()
    if not was_there:
        _download(name, recipe.packed, folder, say)
    else:
        recipe.packed.check(packed)
    _unpack(packed, database, most_bytes=recipe.most_bytes, say=say)
    if not was_there:
        packed.unlink(missing_ok=True)  # another process that loads may have done it


def _download(name: str, address: Address, folder: Path, say: Say) -> None:
    with tempfile.TemporaryDirectory(prefix=".shoal-", dir=folder, ignore_cleanup_errors=True) as scratch:
        try:
            os.replace(address.get(Path(scratch), say), folder / address.name)
        except DataError as error:
            raise DataError(
                f"Cannot load {name}: {address.what}: {error}\nConnect to the internet, or put {address.name} by hand into "
                f"{folder}."
            ) from error


def _unpack(packed: Path, to: Path, *, most_bytes: int, say: Say) -> None:
    """Unpacks to `to`, whole or not at all."""
    with tempfile.TemporaryDirectory(prefix=".shoal-", dir=to.parent, ignore_cleanup_errors=True) as scratch:
        part, size = Path(scratch) / to.name, 0
        try:
            with lzma.open(packed) as source, open(part, "wb") as file:
                while chunk := source.read(_CHUNK_BYTES):
                    if not size and not chunk.startswith(_HEADER):
                        raise DataError(f"{packed} holds no SQLite file. Remove it and load again.")
                    size += len(chunk)
                    if size > most_bytes:
                        raise DataError(f"{packed} unpacks to more than {most_bytes} bytes: it is not what was meant.")
                    file.write(chunk)
                    say(f"unpacking {packed.name}", 0)
        except (lzma.LZMAError, EOFError) as error:
            raise DataError(f"Cannot unpack {packed}: {error}. Remove it and load again.") from error
        except OSError as error:
            raise DataError(f"Cannot unpack {packed} to {to.parent}: {error.strerror}.") from error
        os.replace(part, to)


def _check_counts(recipe: Published, splits: Mapping[str, Split]) -> None:
    for part, split in splits.items():
        _, users, rows = recipe.splits[part]
        sizes = split.sizes()
        if (len(sizes), sum(sizes.values())) != (users, rows):
            raise DataError(
                f"{split.path} has {len(sizes)} users and {sum(sizes.values())} rows in its split {split.name!r}, expected "
                f"{users} and {rows}. Remove it and load again."
            )


@dataclass(frozen=True)
class _UserView:
    """Reads a user's rows when asked; a class rather than a closure so that it can be pickled."""

    split: Split
    made: Callable[[list[Features]], dict[str, np.ndarray]]

    def __call__(self, user: str) -> Examples:
        return Examples(self.made(list(self.split.features(user))))


def _lazily(
    splits: Mapping[str, Split], made: Callable[[list[Features]], dict[str, np.ndarray]], spec: Spec
) -> dict[str, Population]:
    """Populations of which a row is an example."""
    return {part: Population(split.sizes(), _UserView(split, made), spec=spec) for part, split in splits.items()}


def read_femnist(folder: Path, splits: Mapping[str, Split]) -> tuple[dict[str, Population], tuple[str, ...]]:
    """Pictures (28, 28, 1) uint8, 255 being paper, and labels: digits, capitals, small letters."""
    return _lazily(splits, _pictures, {"image": ((28, 28, 1), "uint8"), "label": ((), "int32")}), CHARACTERS


def _pictures(rows: list[Features]) -> dict[str, np.ndarray]:
    pixels = [row.floats("pixels") for row in rows]
    if any(len(picture) != 28 * 28 for picture in pixels):
        raise DataError("Expected pictures of 784 pixels.")
    image = np.array(pixels, np.float32).reshape(-1, 28, 28, 1)
    if not np.all((image >= 0) & (image <= 1)):
        raise DataError("Expected pixels in [0, 1].")
    label = np.array([row.integer("label") for row in rows], np.int32)
    return {"image": np.rint(image * 255).astype(np.uint8), "label": label}


def read_shakespeare(folder: Path, splits: Mapping[str, Split]) -> tuple[dict[str, Population], tuple[str, ...]]:
    """Rows of 80 characters by number and the characters after them; all in memory, as rows are known only when read."""
    made = {}
    for part, split in splits.items():
        users = {user: [features.text("snippets") for features in split.features(user)] for user in split.sizes()}
        made[part] = Population.from_arrays({user: tokens.characters(texts) for user, texts in users.items()})
    return made, tokens.CHARACTER_NAMES


def read_stackoverflow(folder: Path, splits: Mapping[str, Split]) -> tuple[dict[str, Population], tuple[str, ...]]:
    """Sentences as rows of 20 words by number and the words after them."""
    beside = RECIPES["stackoverflow"].beside
    assert beside is not None
    beside.check(folder / beside.name)
    raw = read_members(folder / beside.name, ["stackoverflow.word_count"])["stackoverflow.word_count"]
    sentences = tokens.Sentences.of_counts(raw)
    spec: Spec = {field: ((sentences.length,), "int32") for field in ("word", "label")}
    return _lazily(splits, _Sentences(sentences), spec), sentences.names


@dataclass(frozen=True)
class _Sentences:
    sentences: tokens.Sentences

    def __call__(self, rows: list[Features]) -> dict[str, np.ndarray]:
        return self.sentences([row.text("tokens") for row in rows])


CHARACTERS = tuple("0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz")
"""The label of a character in FEMNIST is its place here."""

RECIPES: Mapping[str, Published] = {
    "femnist": Published(
        packed=Address(
            f"{_WEB}/emnist_all.sqlite.lzma",
            most_bytes=170_507_172,
            sha256="c3aaf91b4cf4e69d53d81627ad119eccdc878ff906f68e66063ff10f67faad48",
        ),
        most_bytes=4_708_990_976,
        splits={"train": ("all_train", 3_400, 671_585), "test": ("all_test", 3_400, 77_483)},
        read=read_femnist,
        about=(
            "FEMNIST: characters written by 3,400 people, 62 classes. Fields: image (28, 28, 1) uint8 on white, label. Test "
            "part: other pictures by the same writers, as the file splits them. Source: TensorFlow Federated. Licence: not "
            "stated; NIST Special Database 19. Cite: Caldas et al., 2018, LEAF; Cohen et al., 2017, EMNIST."
        ),
    ),
    "shakespeare": Published(
        packed=Address(
            f"{_WEB}/shakespeare.sqlite.lzma",
            most_bytes=1_329_828,
            sha256="d3d11fceb9e105439ac6f4d52af6efafed5a2a1e1eb24c5bd2dd54ced242f5c4",
        ),
        most_bytes=1 << 28,
        splits={"train": ("train", 715, 16_068), "test": ("test", 715, 2_356)},
        read=read_shakespeare,
        about=(
            "Shakespeare: the lines of 715 roles. Fields: character (80,) and label (80,), the character after each; 0 is "
            "padding. Test part: the last lines of the same roles, as the file splits them. Source: TensorFlow Federated, from "
            "Project Gutenberg. Licence: the text is in the public domain. Cite: McMahan et al., 2017."
        ),
    ),
    "stackoverflow": Published(
        packed=Address(f"{_WEB}/stackoverflow.sqlite.lzma", most_bytes=1 << 35),
        most_bytes=1 << 38,
        splits={
            "train": ("train", 342_477, 135_818_730),
            "test": ("test", 204_088, 16_586_035),
            "validation": ("heldout", 38_758, 16_491_230),
        },
        read=read_stackoverflow,
        beside=Address(
            f"{_WEB}/stackoverflow.word_count.tar.bz2",
            most_bytes=1 << 28,
            sha256="1dc00256d6e527c54b9756d968118378ae14e6692c0b3b6cad470cdd3f0c519c",
        ),
        about=(
            "Stack Overflow: sentences of 342,477 people's questions and answers. Fields: word (20,) and label (20,), the word "
            "after each; 0 is padding. Test part: what was written after 2018-01-01; validation: other people. Source: "
            "TensorFlow Federated. Licence: CC BY-SA 3.0. Cite: The TensorFlow Federated Authors, 2019, Stack Overflow dataset."
        ),
    ),
}
