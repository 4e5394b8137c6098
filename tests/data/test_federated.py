"""Data sets whose users are in the data: small files in the true format; and, slow, the real ones from whoever answers."""

import hashlib
from dataclasses import replace
from types import MappingProxyType

import numpy as np
import pytest

from shoal.data import Population, federated_names, leave_out, load_federated
from shoal.data import cache as cached
from shoal.data import federated_recipes as recipes
from shoal.errors import DataError

from .test_load import Failing, Ready
from .test_pickled import objects, pandas_like
from .test_sources import program

__all__ = ["pandas_like"]


def test_movielens_by_user_with_the_last_fifth_held_out() -> None:
    raw = b"user_id:token\titem_id:token\trating:float\ttimestamp:float\n"
    rows = [(7, 20 + at, 1 + at % 5, 1000 - at) for at in range(10)] + [(3, 25, 4, 5)]
    made = recipes.parse_movielens({"ml-100k.inter": raw + b"".join(b"%d\t%d\t%d\t%d\n" % row for row in rows)})
    assert recipes.names(made["users"]) == ("3", "7")
    assert made["train.@user"].tolist() == [0] + [1] * 8 and made["test.@user"].tolist() == [1, 1]
    assert made["train.time"].tolist() == [5, *range(991, 999)] and made["test.time"].tolist() == [999, 1000]
    assert (
        made["test.film"].tolist() == [1, 0]
        and made["test.rating"].tolist() == [2, 1]
        and made["test.rating"].dtype == "f4"
    )


def test_brown_by_document() -> None:
    text = " ".join(f"{word}/at" for word in ["The", "1/2", "cat"] * 7 + ["."]).encode()
    raw = {name: text for name in recipes.DOCUMENTS} | {"ca10": b"zebra/nn " * 21, "ca01": b"the/at " * 45}
    made = recipes.parse_brown(raw)
    assert len(recipes.DOCUMENTS) == 500 and recipes.DOCUMENTS[-1] == "cr09"
    words = recipes.names(made["words"])
    assert words == ("<unknown>", "the", "1/2", "cat", "."), "the words of documents held out are not in the vocabulary"
    assert made["train.word"].shape == (451, 20) and made["test.word"].shape == (50, 20)
    assert np.count_nonzero(made["train.@user"] == 0) == 2
    assert [words[at] for at in made["train.word"][2][:3]] == ["the", "1/2", "cat"]
    assert words[made["train.label"][2][-1]] == "cat" or words[made["train.label"][2][-1]] == "the"
    assert not made["test.word"][0].any() and recipes.names(made["users"])[made["test.@user"][0]] == "ca10"


def test_watch_by_subject() -> None:
    series = np.arange(6.0 * 220).reshape(220, 6)
    given = {
        "X": [series, series[:99]] * 10,
        "y": np.arange(20) % 7,
        "subject": np.repeat(np.arange(1, 11), 2),
        "y_labels": list("abcdefg"),
    }
    made = recipes.parse_watch({"watch_dataset.npy": objects(given)})
    assert made["train.window"].shape == (9 * 3, 100, 6) and made["test.window"].shape == (3, 100, 6)
    assert made["train.window"][1, 0].tolist() == series[50].tolist()
    assert (
        made["test.label"].tolist() == [18 % 7] * 3
        and recipes.names(made["users"])[made["test.@user"][0]] == "subject-10"
    )


def test_flights_by_carrier(pandas_like) -> None:  # type: ignore[no-untyped-def]
    text = {
        "carrier": ["UA", "AA", "UA", "AA"],
        "origin": ["JFK", "EWR", "JFK", "JFK"],
        "dest": ["LAX", "SFO", "LAX", "BOS"],
    }
    whole = {
        "year": [2013] * 4,
        "month": [1, 1, 12, 2],
        "day": [1, 2, 31, 1],
        "hour": [5, 6, 7, 8],
        "distance": [10, 20, 30, 40],
    }
    columns = {name: np.array(values, object) for name, values in text.items()} | {
        n: np.array(v) for n, v in whole.items()
    }
    packed = pandas_like(**columns, arr_delay=np.array([15.0, 16.0, 99.0, np.nan]))
    made = recipes.parse_flights({"flights.pkl.compress": packed})
    assert recipes.names(made["users"]) == ("AA", "UA")
    assert made["train.@user"].tolist() == [1, 0] and made["train.label"].tolist() == [0, 1]
    assert made["train.weekday"].tolist() == [1, 2], "the first of January 2013 was a Tuesday"
    assert made["test.month"].tolist() == [12] and made["test.label"].tolist() == [1]
    assert recipes.names(made["words"]) == ("EWR", "JFK", "LAX", "SFO")


def test_loans_by_state(pandas_like) -> None:  # type: ignore[no-untyped-def]
    columns: dict[str, np.ndarray] = {
        "addr_state": np.array(["UT", "CA"] * 5, object),
        "sub_grade": np.array(["A1", "B2"] * 5, object),
        "term": np.array(["term_36", "term_60"] * 5, object),
        "Class": np.array(["good"] * 8 + ["bad"] * 2, object),
    }
    numbers = [*recipes._DOLLARS, *recipes._RATES, *recipes._COUNTS]
    packed = pandas_like(**columns, **{name: np.full(10, 99.0 * place) for place, name in enumerate(numbers)})
    made = recipes.parse_loans({"lending_club.pkl.compress": packed})
    assert recipes.names(made["users"]) == ("CA", "UT")
    assert made["train.loan"].shape == (8, 19) and made["train.loan"].dtype == np.float32
    assert made["test.@user"].tolist() == [1, 0] and made["test.label"].tolist() == [1, 1]
    assert made["train.loan"][1].tolist()[:2] == [0, 2] and made["train.loan"][1].tolist()[-2:] == pytest.approx(
        [0.2, 1]
    )
    assert recipes.names(made["words"])[5] == "int_rate" and made["train.loan"][0][5] == pytest.approx(0.99 * 5)


def test_a_data_set_is_loaded_kept_and_loaded_again(monkeypatch, cache) -> None:  # type: ignore[no-untyped-def]
    header = b"user_id:token\titem_id:token\trating:float\ttimestamp:float\n"
    raw = header + b"".join(b"%d\t%d\t3\t%d\n" % (user, user, at) for user in (1, 2) for at in range(5))
    recipe = recipes.RECIPES["movielens-100k"]
    (member,) = recipe.members
    from .test_formats import wheel

    package = Ready(wheel({member: raw}), "p.whl")
    arrays = recipe.parse({"ml-100k.inter": raw})
    made = replace(
        recipe, sources=(package,), members={member: hashlib.sha256(raw).hexdigest()}, sha256=cached.content_hash(arrays)
    )  # fmt: skip
    monkeypatch.setattr(recipes, "RECIPES", MappingProxyType({"movielens-100k": made}))
    loaded = load_federated("movielens-100k")
    assert loaded.train.sizes() == {"1": 4, "2": 4} and loaded.test.sizes() == {"1": 1, "2": 1} and loaded.words == ()
    assert all(word in loaded.about for word in ("Source:", "Licence:", "Cite:"))
    monkeypatch.setattr(recipes, "RECIPES", {"movielens-100k": replace(made, sources=(Failing("down"),))})
    assert load_federated("movielens-100k").train.sizes() == {"1": 4, "2": 4}
    with pytest.raises(
        ValueError, match=r"one of femnist \| movielens-100k \| shakespeare \| stackoverflow, got name='mnist'"
    ):
        load_federated("mnist")
    (cache / "movielens-100k.npz").unlink()
    with pytest.raises(DataError, match=r"(?s)Cannot load movielens-100k.*down"):
        load_federated("movielens-100k")


def test_npm_packs_the_package_and_runs_nothing_of_it(tmp_path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    from shoal.data.sources import Npm

    (tmp_path / "scratch").mkdir()
    program(tmp_path / "npm", f'echo "$@" > {tmp_path}/asked; echo packed > corpus-1.tgz')
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    sha256 = hashlib.sha256(b"packed\n").hexdigest()
    assert Npm("corpus@1", sha256=sha256).get(tmp_path / "scratch", lambda what, size: None).read_bytes() == b"packed\n"
    assert (tmp_path / "asked").read_text().split() == ["pack", "--silent", "--ignore-scripts", "corpus@1"]
    with pytest.raises(DataError, match=r"corpus-1.tgz has sha256"):
        Npm("corpus@1", sha256="0" * 64).get(tmp_path / "scratch", lambda what, size: None)


def test_leaving_users_out() -> None:
    everybody = Population.from_arrays({name: {"x": np.full(2, at)} for at, name in enumerate("abc")})
    others, left_out = leave_out(everybody, "b")
    assert others.ids == ("a", "c") and left_out.ids == ("b",) and left_out["b"].fields["x"].tolist() == [1, 1]
    assert leave_out(everybody, ["c", "a"])[1].ids == ("a", "c")
    with pytest.raises(KeyError):
        others["b"]
    with pytest.raises(ValueError, match="No user 'd' among 3"):
        leave_out(everybody, "d")
    for users in ([], "abc"):
        with pytest.raises(ValueError, match="at least one user and not all 3"):
            leave_out(everybody, list(users))


REAL = {
    "movielens-100k": (943, 80_367, 943, 19_633),
    "brown": (450, 52_029, 50, 5_763),
    "watch": (9, 4_158, 1, 519),
    "flights": (16, 300_326, 15, 27_020),
    "loans": (50, 7_905, 50, 1_952),
}


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", REAL)
def test_the_real_data_sets(name: str) -> None:
    try:
        made = load_federated(name)
    except DataError as error:
        if "sha256" in str(error):
            raise
        pytest.skip(f"no source answered: {error}")
    counts = [(len(part), sum(part.sizes().values())) for part in (made.train, made.test)]
    assert (*counts[0], *counts[1]) == REAL[name]
    assert len(load_federated(name).train) == len(made.train)


def test_every_name_is_in_the_docs() -> None:
    from pathlib import Path

    page = (Path(__file__).parents[2] / "docs" / "data.md").read_text()
    assert all(f"`{name}`" in page for name in federated_names())
