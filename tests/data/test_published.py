"""FEMNIST, Shakespeare and Stack Overflow out of small files made in the true format."""

import bz2
import hashlib
import io
import lzma
import pickle
import sqlite3
import tarfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

import numpy as np
import pytest

from shoal.data import load_federated, published, tff, tokens
from shoal.errors import DataError

Rows = Mapping[str, Mapping[str, list[dict[str, object]]]]
"""Split -> user -> examples by feature."""


def example(features: Mapping[str, object]) -> bytes:
    """A serialized `tf.train.Example`."""
    made = tff._message()()
    for name, value in features.items():
        feature = made.features.feature[name]
        match value:
            case bytes():
                feature.bytes_list.value.append(value)
            case int():
                feature.int64_list.value.append(value)
            case _:
                feature.float_list.value.extend(np.asarray(value).ravel())
    raw: bytes = made.SerializeToString()
    return raw


def database(rows: Rows, path: Path) -> bytes:
    """The file that TensorFlow Federated would publish, with its tables and indexes."""
    connection = sqlite3.connect(path)
    connection.executescript(
        "CREATE TABLE examples (split_name TEXT NOT NULL, client_id TEXT NOT NULL, serialized_example_proto BLOB NOT NULL);"
        "CREATE INDEX idx_examples_client_id ON examples (client_id);"
        "CREATE INDEX idx_examples_client_id_split ON examples (split_name, client_id);"
        "CREATE TABLE client_metadata (client_id TEXT NOT NULL, split_name TEXT NOT NULL, num_examples INTEGER NOT NULL);"
        "CREATE INDEX idx_metadata_client_id ON client_metadata (client_id);"
    )
    for split, users in rows.items():
        for user, examples in users.items():
            connection.execute("INSERT INTO client_metadata VALUES (?, ?, ?)", (user, split, len(examples)))
            for features in examples:
                connection.execute("INSERT INTO examples VALUES (?, ?, ?)", (split, user, example(features)))
    connection.commit()
    connection.close()
    return path.read_bytes()


@pytest.fixture
def put(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
    """Puts a packed file where one put there by hand is looked for, with hash and counts of its own."""

    def put(name: str, rows: Rows, **changes: object) -> Path:
        packed = lzma.compress(database(rows, tmp_path / f"{name}.sqlite"), format=lzma.FORMAT_ALONE)
        recipe = published.RECIPES[name]
        parts = {part: split for part, (split, _, _) in recipe.splits.items()}
        counts = {part: (len(rows[split]), sum(map(len, rows[split].values()))) for part, split in parts.items()}
        address = replace(recipe.packed, sha256=hashlib.sha256(packed).hexdigest())
        splits = {part: (split, *counts[part]) for part, split in parts.items()}
        made = replace(recipe, packed=address, splits=splits, **changes)
        monkeypatch.setattr(published, "RECIPES", MappingProxyType({**published.RECIPES, name: made}))
        (cache / name).mkdir(parents=True)
        (cache / name / address.name).write_bytes(packed)
        return cache / name

    return put


def femnist() -> Rows:
    rng = np.random.default_rng(0)

    def pictures(count: int) -> list[dict[str, object]]:
        return [{"pixels": rng.integers(0, 256, (28, 28)) / 255, "label": int(rng.integers(62))} for _ in range(count)]

    users = {"f0000_14": 3, "f0001_41": 2}
    return {split: {user: pictures(count) for user, count in users.items()} for split in ("all_train", "all_test")}


def test_femnist_by_writer(put, cache: Path) -> None:  # type: ignore[no-untyped-def]
    rows = femnist()
    folder = put("femnist", rows)
    made = load_federated("femnist")
    assert made.train.sizes() == made.test.sizes() == {"f0000_14": 3, "f0001_41": 2}
    examples = made.train["f0001_41"]
    assert examples.spec() == made.train.spec() == {"image": ((28, 28, 1), "uint8"), "label": ((), "int32")}
    for row, image, label in zip(rows["all_train"]["f0001_41"], *examples.fields.values(), strict=True):
        np.testing.assert_array_equal(image[..., 0], np.rint(np.asarray(row["pixels"]) * 255))
        assert label == row["label"]
    assert len(made.words) == 62 and made.words[10] == "A" and "Source:" in made.about
    assert (folder / "femnist.sqlite").exists() and not list(folder.glob(".shoal-*"))
    (folder / "emnist_all.sqlite.lzma").unlink()
    assert load_federated("femnist").train.sizes() == made.train.sizes(), "the unpacked file is enough"
    assert len(pickle.loads(pickle.dumps(made.train))["f0000_14"]) == 3, "a population travels to other processes"


def test_shakespeare_by_role(put) -> None:  # type: ignore[no-untyped-def]
    line = b"Now is the winter of our discontent, made glorious summer by this sun of York; and all the clouds"
    users = {
        "RICHARD_III_GLOUCESTER": [{"snippets": line}, {"snippets": b"Hm\xc3"}],
        "HAMLET_GHOST": [{"snippets": b"Mark me."}],
    }
    put("shakespeare", {"train": users, "test": users})
    made = load_federated("shakespeare")
    assert made.train.sizes() == {"HAMLET_GHOST": 1, "RICHARD_III_GLOUCESTER": 3}
    assert made.train.spec() == {"character": ((80,), "int32"), "label": ((80,), "int32")}
    fields = made.train["RICHARD_III_GLOUCESTER"].fields
    names = np.array(made.words, object)
    read = names[np.concatenate([fields["character"][0], fields["character"][1]])]
    assert read[0] == "<begin>" and "".join(read[1 : len(line) + 1]).encode() == line
    np.testing.assert_array_equal(fields["label"][0][:-1], fields["character"][0][1:])
    assert fields["label"][0][-1] == fields["character"][1][0], "no character is lost between rows"
    assert names[fields["label"][2]].tolist()[:5] == ["H", "m", "<unknown>", "<end>", "<padding>"]


def test_stackoverflow_by_user(put) -> None:  # type: ignore[no-untyped-def]
    def posts(*sentences: bytes) -> list[dict[str, object]]:
        other = {
            "creation_date": b"2010-01-08 09:34:05 UTC",
            "score": 3,
            "tags": b"a|b",
            "title": b"t",
            "type": b"answer",
        }
        return [{**other, "tokens": sentence} for sentence in sentences]

    long = b" ".join([b"the"] * 30)
    rows = {
        "train": {"12": posts(b"edit : the", long)},
        "test": {"12": posts(b"thanks .")},
        "heldout": {"10": posts(b"the")},
    }
    vocabulary = ["the", "edit", ":", *(f"word{number}" for number in range(9997)), "thanks"]
    counts = "".join(f"{word} {20_000 - number}\n" for number, word in enumerate(vocabulary)).encode()
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as archive:
        entry = tarfile.TarInfo("stackoverflow.word_count")
        entry.size = len(counts)
        archive.addfile(entry, io.BytesIO(counts))
    words = bz2.compress(packed.getvalue())
    beside = published.RECIPES["stackoverflow"].beside
    assert beside is not None
    folder = put("stackoverflow", rows, beside=replace(beside, sha256=hashlib.sha256(words).hexdigest()))
    (folder / beside.name).write_bytes(words)
    made = load_federated("stackoverflow")
    assert made.validation is not None and made.validation.ids == ("10",)
    fields = made.train["12"].fields
    assert made.words[:4] == ("<padding>", "the", "edit", ":") and made.words[10_001:] == (
        "<unknown>",
        "<begin>",
        "<end>",
    )
    unknown, begin, end = 10_001, 10_002, 10_003
    assert fields["word"][0].tolist()[:6] == [begin, 2, 3, 1, end, 0]
    assert fields["label"][0].tolist()[:5] == [2, 3, 1, end, 0]
    assert fields["word"][1].tolist() == [begin] + [1] * 19 and fields["label"][1].tolist() == [1] * 20
    assert made.test["12"].fields["label"][0].tolist()[:3] == [unknown, unknown, end]


def test_a_vocabulary_must_be_one() -> None:
    with pytest.raises(DataError, match="line 2 of the words' counts, got 'edit'"):
        tokens.Sentences.of_counts(b"the 3\nedit\n")
    with pytest.raises(DataError, match="at least 10000 words, got 1"):
        tokens.Sentences.of_counts(b"the 3\n")


def test_other_content_is_refused(put, cache: Path) -> None:  # type: ignore[no-untyped-def]
    folder = put("femnist", femnist())
    packed = folder / "emnist_all.sqlite.lzma"
    whole, recipe = packed.read_bytes(), published.RECIPES["femnist"]
    packed.write_bytes(whole[:-20])
    with pytest.raises(DataError, match=r"emnist_all.sqlite.lzma has sha256 .* expected"):
        load_federated("femnist")
    cases = {
        "Cannot unpack": (whole[:-200], {}),
        "holds no SQLite file": (lzma.compress(b"rubbish"), {}),
        "unpacks to more than 1000 bytes": (whole, {"most_bytes": 1000}),
        "has 2 users and 5 rows in its split 'all_train', expected 3400": (
            whole, {"splits": {"train": ("all_train", 3400, 671_585)}}
        ),
        "has no users in a split 'digits'": (whole, {"splits": {"train": ("digits", 1, 1)}}),
    }  # fmt: skip
    for says, (content, changes) in cases.items():
        changed = replace(recipe, packed=replace(recipe.packed, sha256=""), **changes)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(published, "RECIPES", {"femnist": changed})
            packed.write_bytes(content)
            (folder / "femnist.sqlite").unlink(missing_ok=True)
            with pytest.raises(DataError, match=says):
                load_federated("femnist")
        assert not list(folder.glob(".shoal-*"))


def test_without_file_or_network_it_says_where_to_put_it(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = published.RECIPES["shakespeare"]
    nowhere = replace(recipe, packed=replace(recipe.packed, url="http://127.0.0.1:1/shakespeare.sqlite.lzma"))
    monkeypatch.setattr(published, "RECIPES", {"shakespeare": nowhere})
    with pytest.raises(
        DataError, match=r"(?s)Cannot load shakespeare: .*refused.*put shakespeare.sqlite.lzma by hand into"
    ):
        load_federated("shakespeare")


def test_rows_that_are_not_as_they_should_be(tmp_path: Path) -> None:
    path = tmp_path / "x.sqlite"
    database({"train": {"ann": [{"label": 1, "pixels": [0.5]}]}}, path)
    (features,) = tff.Split(path, "train").features("ann")
    assert features.integer("label") == 1 and features.floats("pixels") == [0.5]
    for read in (lambda: features.text("label"), lambda: features.integer("other")):
        with pytest.raises(
            DataError, match=r"Expected '(label|other)' as .* in row 0 of user 'ann'.*; it has label, pixels"
        ):
            read()
    connection = sqlite3.connect(path)
    connection.execute("UPDATE examples SET serialized_example_proto = ?", (b"\xff\xff",))
    connection.commit()
    with pytest.raises(DataError, match=r"Row 0 of user 'ann' .* is no tf.train.Example"):
        list(tff.Split(path, "train").features("ann"))
    connection.execute("UPDATE examples SET serialized_example_proto = zeroblob(2000000)")
    connection.commit()
    connection.close()
    with pytest.raises(DataError, match=r"Cannot read .*too big"):
        list(tff.Split(path, "train").features("ann"))
    path.write_bytes(b"SQLite format 3\0" + bytes(100))
    with pytest.raises(DataError, match=r"Cannot read .* as federated data"):
        tff.Split(path, "train").sizes()
