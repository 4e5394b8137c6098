"""--data, --split, --users and --held-out: users' examples from files, or a known data set dealt out to made users.

`name:digits` is a data set of `shoal.data.load`. It is dealt out with a fixed seed, so that `shoal simulate` and
`shoal device` with the same options mean the same users.
"""

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from shoal.data import Examples, Population, Split

PREFIX: Final = "name:"
DEFAULT_SPLIT: Final = "iid"
DEFAULT_USERS: Final = 20
_SPLIT_SEED: Final = 0


def open_data(text: str, *, split: str = DEFAULT_SPLIT, users: int = DEFAULT_USERS) -> "Population":
    """The population that --data names.

    Raises:
        ValueError: an unknown data set or split.
        DataError: nothing there, unreadable, or not to be had.
    """
    from shoal import data

    if not text.startswith(PREFIX):
        if split != DEFAULT_SPLIT or users != DEFAULT_USERS:
            raise ValueError(
                f"--split and --users are for --data {PREFIX}…; the users of {text} are those in its files."
            )
        return data.open_population(text)
    examples = data.load(text.removeprefix(PREFIX)).train
    return data.Population.from_split(examples, _deal(examples, split, users))


def open_held_out(text: str, *, data_text: str = "") -> "Examples | None":
    """What --held-out names, all users' examples joined; without it, the test part of the data set of --data."""
    from shoal import data

    if not text and data_text.startswith(PREFIX):
        text = data_text
    if not text:
        return None
    if text.startswith(PREFIX):
        return data.load(text.removeprefix(PREFIX)).test
    population = data.open_population(text)
    return data.Examples.concatenate([examples for _, examples in population.items()])


def _deal(examples: "Examples", split: str, users: int) -> "Split":
    import numpy as np

    from shoal import data

    kind, _, setting = split.partition(":")
    rng = np.random.default_rng(_SPLIT_SEED)
    labels = examples.fields["label"]
    try:
        match kind:
            case "iid" if not setting:
                return data.iid(len(examples), users, rng=rng)
            case "dirichlet":
                return data.dirichlet(labels, users, alpha=float(setting), rng=rng)
            case "shards":
                return data.shards(labels, users, shards_per_user=int(setting), rng=rng)
    except ValueError as error:
        if not setting or "convert" in str(error) or "literal" in str(error):
            raise ValueError(_expected(split)) from error
        raise
    raise ValueError(_expected(split))


def _expected(split: str) -> str:
    return (
        f"Expected --split iid, dirichlet:ALPHA (like dirichlet:0.3) or shards:NUMBER (like shards:2), got {split!r}."
    )
