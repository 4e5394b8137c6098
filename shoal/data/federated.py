"""Data sets whose users are in the data, by name: MovieLens by user, FEMNIST by writer, Shakespeare by role, …

Small ones are loaded whole and kept as `load.py` keeps its own. The published SQLite files (`tff.py`) are kept unpacked, and
a user is read when asked for: of Stack Overflow's 342,477 users only the list is in memory.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import final

import numpy as np

from shoal import validate
from shoal.data import federated_recipes, published
from shoal.data.federated_recipes import OWNER
from shoal.data.loading import load_arrays
from shoal.data.recipes import Arrays
from shoal.data.split import by_user
from shoal.data.store import Examples, Population


@final
@dataclass(frozen=True, eq=False, kw_only=True)
class Federated:
    """A data set by users."""

    name: str
    """What it was asked for by."""
    train: Population
    """Users with what they train on."""
    test: Population
    """The part held out: other examples of the same users, or other users; `about` says which."""
    words: tuple[str, ...]
    """What numbers in the fields stand for, where they stand for words or characters; else empty."""
    about: str
    """Fields, test part, source, licence, citation."""
    validation: Population | None = None
    """A second part held out, where the data set has one."""


def federated_names() -> tuple[str, ...]:
    """What `load_federated` knows."""
    return tuple(sorted([*federated_recipes.RECIPES, *published.RECIPES]))


def load_federated(name: str, *, cache: Path | None = None, progress: bool = True) -> Federated:
    """Loads a data set with its users.

    Args:
        name: "movielens-100k" (943 users), "brown" (500 documents), "watch" (10 subjects), "flights" (16 airlines),
            "loans" (50 states), "femnist" (3,400 writers), "shakespeare" (715 roles) or "stackoverflow" (342,477 users).
        cache: Folder to keep data sets in; None is `cache.cache_folder()`.
        progress: Shows what is being fetched when standard error is a terminal.

    Raises:
        ValueError: An unknown name.
        DataError: No source answered, or what came is not the data set; lists every source and what to do.
    """
    validate.one_of(federated_names(), name=name)
    if name in published.RECIPES:
        found = published.load(name, cache=cache, progress=progress)
        return Federated(
            name=name, train=found.train, test=found.test, validation=found.validation, words=found.words, about=found.about
        )  # fmt: skip
    recipe = federated_recipes.RECIPES[name]
    arrays = load_arrays(name, recipe, cache, progress=progress)
    words = federated_recipes.names(arrays["words"]) if "words" in arrays else ()
    return Federated(
        name=name, train=_part(arrays, "train"), test=_part(arrays, "test"), words=words, about=recipe.about
    )


def leave_out(
    population: Population, users: str | Iterable[str] | float, *, rng: np.random.Generator | None = None
) -> tuple[Population, Population]:
    """Cuts users out, to measure on those a model has never seen (leave one subject out, for instance).

    Args:
        population: All users.
        users: Whom to leave out: one id, or several; or what share of them, in (0, 1), to be drawn.
        rng: Draws a share.

    Returns:
        The others, and those left out, both in the order of the population and made when asked for.

    Raises:
        ValueError: An unknown user, a share without a generator, or nobody is left on one side.
    """
    if isinstance(users, float | int):
        users = _drawn(population, users, rng)
    out = {users} if isinstance(users, str) else set(users)
    if unknown := sorted(out - set(population)):
        raise ValueError(f"No user {unknown[0]!r} among {len(population)}; the first is {population.ids[0]!r}.")
    if not out or len(out) == len(population):
        raise ValueError(f"Expected to leave out at least one user and not all {len(population)}, got {len(out)}.")
    return _some(population, out, wanted=False), _some(population, out, wanted=True)


def _drawn(population: Population, share: float, rng: np.random.Generator | None) -> list[str]:
    if not 0.0 < share < 1.0:
        raise ValueError(f"Expected a share of the users above 0 and below 1, or ids, got {share!r}.")
    if rng is None:
        raise ValueError(f"Expected rng= to draw a share of {share!r} with: np.random.default_rng(0).")
    count = min(max(1, round(share * len(population))), len(population) - 1)
    return [population.ids[place] for place in rng.choice(len(population), count, replace=False)]


def _some(population: Population, out: set[str], *, wanted: bool) -> Population:
    sizes = {user: size for user, size in population.sizes().items() if (user in out) == wanted}
    return Population(sizes, population.__getitem__, spec=population.spec())


def _part(arrays: Arrays, part: str) -> Population:
    fields = {name.removeprefix(f"{part}."): array for name, array in arrays.items() if name.startswith(f"{part}.")}
    owner = fields.pop(OWNER)
    users = federated_recipes.names(arrays["users"])
    split = {users[int(place)]: indices for place, indices in by_user(owner).items()}
    return Population.from_split(Examples(fields), split)
