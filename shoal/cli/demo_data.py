"""The demo's data: real pictures, dealt out to devices that do not exist, each with a file of its own."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import numpy as np

from shoal import data
from shoal.cli.demo_settings import DemoSettings

NAMES: Final = ("fashion-mnist", "mnist-5k", "digits")
SIDE: Final = 28


@dataclass(frozen=True)
class DemoData:
    """A data set, cut to the demo's size, and who has what of it."""

    dataset: data.Dataset
    population: data.Population


def load(settings: DemoSettings, *, say: Callable[[str], None], names: tuple[str, ...] = NAMES) -> DemoData:
    """Loads the first data set that can be had and deals it out.

    Args:
        settings: how much of it, to how many.
        say: told of every data set that could not be had, and what is taken instead.
        names: in order of preference.

    Raises:
        DataError: none can be had.
    """
    dataset = data.load_first(names, say=say)
    if dataset.name != names[0]:
        say(f"{names[0]} cannot be had here (see above): this demo uses {dataset.name} instead.")
    dataset = replace(
        dataset, train=_fitted(dataset.train, settings.num_train), test=_fitted(dataset.test, settings.num_test)
    )
    rng = np.random.default_rng(settings.seed)
    labels = dataset.train.fields["label"]
    split = data.dirichlet(labels, settings.devices, alpha=settings.alpha, rng=rng, min_examples=5)
    return DemoData(dataset, data.Population.from_split(dataset.train, split))


def write(found: DemoData, folder: Path) -> None:
    """Writes what the processes read: `devices/*.npz`, and `held-out.npz` for the server."""
    data.write_population(found.population, folder / "devices")
    data.write_population(data.Population.from_arrays({"held-out": found.dataset.test}), folder)


def remove(folder: Path) -> None:
    """Removes what `write` wrote."""
    shutil.rmtree(folder, ignore_errors=True)


def _fitted(examples: data.Examples, most: int | None) -> data.Examples:
    """The first examples, as 28x28 pictures: smaller ones are enlarged and get a black edge."""
    fields = examples.take(slice(0, most))
    image = fields["image"]
    if image.shape[1:3] != (SIDE, SIDE):
        image = np.kron(image, np.ones((1, SIDE // image.shape[1], SIDE // image.shape[2], 1), image.dtype))
        before = [(SIDE - side) // 2 for side in image.shape[1:3]]
        after = [SIDE - side - edge for side, edge in zip(image.shape[1:3], before, strict=True)]
        image = np.pad(image, ((0, 0), *zip(before, after, strict=True), (0, 0)))
    return data.Examples({**fields, "image": image})
