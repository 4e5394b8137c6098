"""--data, --user-column, --split, --users and --held-out: users' examples from files, or a known data set.

`name:digits` is a data set of `shoal.data.load`. It is dealt out to made users with a fixed seed, so that `shoal simulate`
and `shoal device` with the same options mean the same users. `name:movielens-100k` is one of `shoal.data.load_federated`: its
users are in it.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from shoal.data import Examples, ExampleStore, Population, Split

PREFIX: Final = "name:"
DEFAULT_SPLIT: Final = "iid"
DEFAULT_USERS: Final = 20
DEFAULT_COLUMN: Final = "user"
_SPLIT_SEED: Final = 0


def open_data(
    text: str, *, split: str = DEFAULT_SPLIT, users: int = DEFAULT_USERS, user_column: str = ""
) -> "Population":
    """The population that --data names.

    Raises:
        ValueError: an unknown data set or split.
        DataError: nothing there, unreadable, or not to be had.
    """
    from shoal import data

    name = text.removeprefix(PREFIX) if text.startswith(PREFIX) else ""
    has_users = not name or name in data.federated_names()
    if has_users and (split != DEFAULT_SPLIT or users != DEFAULT_USERS):
        where = f"in {name}" if name else "in its files"
        raise ValueError(f"--split and --users are for {PREFIX}… without users; the users of {text} are those {where}.")
    if user_column and name:
        raise ValueError(f"--user-column is for files; {text} has none.")
    if not name:
        return _open_files(text, user_column)
    if has_users:
        return data.load_federated(name).train
    examples = data.load(known_name(name)).train
    return data.Population.from_split(examples, deal(examples, split, users))


def open_joined(text: str, *, user_column: str = "") -> "Examples":
    """The examples that --data names, those of all users one after the other."""
    from shoal import data

    name = known_name(text.removeprefix(PREFIX)) if text.startswith(PREFIX) else ""
    if name and name not in data.federated_names():
        if user_column:
            raise ValueError(f"--user-column is for files; {text} has none.")
        return data.load(name).train
    return data.Examples.concatenate([examples for _, examples in open_data(text, user_column=user_column).items()])


def open_store(
    text: str, *, split: str = DEFAULT_SPLIT, users: int = DEFAULT_USERS, user_column: str = ""
) -> "ExampleStore | None":
    """The example store that --data names, which is read anew for each round; None where it names none.

    Raises:
        ValueError: options that are for other data.
        StoreError: it is not there, or damaged.
    """
    from shoal.data.example_store import SUFFIX, ExampleStore

    if not text.endswith(SUFFIX):
        return None
    if split != DEFAULT_SPLIT or users != DEFAULT_USERS or user_column:
        raise ValueError(
            f"--split, --users and --user-column are not for an example store; all of {text} is one user's."
        )
    return ExampleStore(text, must_exist=True)


def open_held_out(text: str, *, data_text: str = "", user_column: str = "") -> "Examples | None":
    """What --held-out names, all users' examples joined; without it, the test part of the data set of --data."""
    from shoal import data

    found = _held_out(text or _test_part(data_text), user_column)
    if not isinstance(found, data.Population):
        return found
    return data.Examples.concatenate([examples for _, examples in found.items()])


def open_held_out_users(text: str, *, data_text: str = "", user_column: str = "") -> "Population":
    """The same, by users.

    Raises:
        ValueError: there is nothing, or it has no users.
    """
    from shoal import data

    found = _held_out(text or _test_part(data_text), user_column)
    if not isinstance(found, data.Population):
        what = text or data_text
        raise ValueError(
            f"--by-user needs --held-out with users; {what} has none. --leave-out keeps users of --data out."
        )
    return found


def _test_part(data_text: str) -> str:
    return data_text if data_text.startswith(PREFIX) else ""


def _held_out(text: str, user_column: str) -> "Examples | Population | None":
    from shoal import data

    if not text.startswith(PREFIX):
        return _open_files(text, user_column) if text else None
    name = text.removeprefix(PREFIX)
    return data.load_federated(name).test if name in data.federated_names() else data.load(known_name(name)).test


def shut_out(population: "Population", asked: "list[str]", *, seed: int) -> "tuple[Population, Population | None]":
    """What --leave-out asks for: those who train, and those who do not. One number is a share, drawn with the run's seed.

    Raises:
        ValueError: an unknown user, or nobody or everybody is left out.
    """
    import numpy as np

    from shoal import data

    if not asked:
        return population, None
    whom: list[str] | float = asked
    if len(asked) == 1 and asked[0] not in population:
        try:
            whom = float(asked[0])
        except ValueError:
            whom = asked
    return data.leave_out(population, whom, rng=np.random.Generator(np.random.Philox(key=seed)))


def known_name(name: str) -> str:
    """The name, if it is that of a data set; raises ValueError with all names."""
    from shoal import data
    from shoal.data.recipes import RECIPES

    if name not in (known := sorted([*RECIPES, *data.federated_names()])):
        raise ValueError(f"Expected the name of a data set, one of {' | '.join(known)}, got {name!r}.")
    return name


def _open_files(text: str, user_column: str) -> "Population":
    """A file, a folder of files, a folder of users' folders, or what an example store holds now."""
    from shoal import data
    from shoal.data.example_store import SUFFIX, ExampleStore

    if text.endswith(SUFFIX):
        with ExampleStore(text, must_exist=True) as store:
            return data.Population.from_arrays({store.path.stem: store.examples()})
    folder = Path(text)
    if text and folder.is_dir() and not user_column:
        inside = [entry for entry in folder.iterdir() if entry.name[0] != "."]
        if inside and all(entry.is_dir() for entry in inside):
            return data.open_folders(folder)
    return data.open_population(text, user=user_column or DEFAULT_COLUMN)


def deal(examples: "Examples", split: str, users: int, *, seed: int = _SPLIT_SEED) -> "Split":
    """Deals examples out to users as --split says.

    Raises:
        ValueError: an unknown split, one by label where there is none, or fewer examples than users.
    """
    import numpy as np

    from shoal import data

    kind, _, setting = split.partition(":")
    rng = np.random.default_rng(seed)
    if kind in ("dirichlet", "shards") and "label" not in examples.fields:
        raise ValueError(f"--split {kind} deals by the field 'label'; the examples have {', '.join(examples.fields)}.")
    try:
        match kind:
            case "iid" if not setting:
                return data.iid(len(examples), users, rng=rng)
            case "dirichlet":
                return data.dirichlet(examples.fields["label"], users, alpha=float(setting), rng=rng)
            case "shards":
                return data.shards(examples.fields["label"], users, shards_per_user=int(setting), rng=rng)
    except ValueError as error:
        if "convert" in str(error) or "literal" in str(error):
            raise ValueError(_expected(split)) from error
        raise
    raise ValueError(_expected(split))


def _expected(split: str) -> str:
    return (
        f"Expected --split iid, dirichlet:ALPHA (like dirichlet:0.3) or shards:NUMBER (like shards:2), got {split!r}."
    )
