import zipfile

import numpy as np
import pytest

from shoal.data import Examples, Population, open_population, write_population
from shoal.errors import DataError

pa = pytest.importorskip("pyarrow")


def population() -> Population:
    return Population.from_arrays(
        {
            user: {"x": np.full((size, 2), size, np.float32), "file": np.arange(size, dtype=np.int16)}
            for user, size in {"ann": 2, "b/../o b": 1, "ünal": 0, ".": 3}.items()
        }
    )


def assert_same(first: Population, second: Population) -> None:
    assert sorted(first.ids) == sorted(second.ids)
    assert first.spec() == second.spec()
    for user, held in first.items():
        for name, array in held.fields.items():
            np.testing.assert_array_equal(array, second[user].fields[name])


def test_written_populations_are_read_back(tmp_path):
    write_population(population(), tmp_path / "deep" / "er")
    again = open_population(tmp_path / "deep" / "er")
    assert_same(population(), again)
    assert again.sizes() == {"ann": 2, "b/../o b": 1, "ünal": 0, ".": 3}
    assert all(file.suffix == ".npz" for file in (tmp_path / "deep" / "er").iterdir())


def test_equal_examples_make_equal_files_that_numpy_reads(tmp_path):
    write_population(population(), tmp_path / "a", progress=True)
    write_population(population(), tmp_path / "b")
    assert (tmp_path / "a" / "ann.npz").read_bytes() == (tmp_path / "b" / "ann.npz").read_bytes()
    with np.load(tmp_path / "a" / "ann.npz", allow_pickle=False) as arrays:
        assert arrays["file"].tolist() == [0, 1]


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    write_population(population(), tmp_path)
    before = {file: file.read_bytes() for file in tmp_path.iterdir()}

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np.lib.format, "write_array", full)
    with pytest.raises(DataError, match=r"Cannot write .*: No space left"):
        write_population(population(), tmp_path)
    assert {file: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_ids_that_a_file_system_may_confuse_are_refused(tmp_path):
    held = Examples({"x": np.zeros(1)})
    with pytest.raises(ValueError, match="differ in more than case, got 'A' and 'a'"):
        write_population(Population.from_arrays({"A": held, "a": held}), tmp_path)


def test_a_folder_as_numpy_writes_it(tmp_path):
    np.savez(tmp_path / "ann.npz", x=np.zeros((2, 3)), y=np.zeros(2))
    np.savez_compressed(tmp_path / "bob.npz", x=np.ones((1, 3)), y=np.ones(1))
    (tmp_path / "notes.txt").write_text("not data")
    opened = open_population(tmp_path, fields={"features": "x"})
    assert opened.sizes() == {"ann": 2, "bob": 1}
    assert opened["bob"].spec() == {"features": ((3,), "float64")}


def test_a_single_file_is_one_user(tmp_path):
    np.savez(tmp_path / "ann.npz", x=np.zeros((2, 3)))
    assert open_population(str(tmp_path / "ann.npz")).sizes() == {"ann": 2}


@pytest.mark.parametrize("users", [np.array(["b", "a", "b"]), np.array([20, 3, 20])])
def test_a_single_file_with_users_is_many(tmp_path, users):
    np.savez(tmp_path / "all.npz", owner=users, x=np.arange(3))
    opened = open_population(tmp_path / "all.npz", user="owner")
    assert opened.sizes() == {str(users[1]): 1, str(users[0]): 2}
    assert opened[str(users[0])].fields["x"].tolist() == [0, 2]


def broken(tmp_path, name):
    folder = tmp_path / name
    folder.mkdir()
    match name:
        case "not zip":
            (folder / "a.npz").write_bytes(b"no zip")
        case "pickle":
            np.savez(folder / "a.npz", x=np.array([None, {}]), allow_pickle=True)
        case "cut":
            np.savez(folder / "a.npz", x=np.zeros(100))
            (folder / "a.npz").write_bytes((folder / "a.npz").read_bytes()[:300])
        case "stranger":
            with zipfile.ZipFile(folder / "a.npz", "w") as archive:
                archive.writestr("readme.txt", "hello")
        case "mixed":
            np.savez(folder / "a.npz", x=np.zeros(1))
            (folder / "a.csv").write_text("user,x\na,1\n")
        case "disagree":
            np.savez(folder / "a.npz", x=np.zeros((1, 2)))
            np.savez(folder / "b.npz", x=np.zeros((1, 3)))
        case "twice":
            np.savez(folder / "a b.npz", x=np.zeros(1))
            np.savez(folder / "a%20b.npz", x=np.zeros(1))
        case "user column":
            np.savez(folder / "a.npz", x=np.zeros(1), user=np.zeros(1))
        case "lengths":
            np.savez(folder / "a.npz", x=np.zeros(1), y=np.zeros(2))
    return folder


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("empty", "No data in .*empty: nothing there ends in .npz"),
        ("not zip", "Cannot read .*a.npz: File is not a zip file"),
        ("pickle", "Python objects"),
        ("cut", "Cannot read .*a.npz"),
        ("stranger", "readme.txt is no array"),
        ("mixed", "mixes .csv and .npz"),
        ("disagree", r"User 'b' \(.*b.npz\) does not agree with .*a.npz: field 'x'"),
        ("twice", "are user 'a b'"),
        ("user column", "the file's name is the user"),
        ("lengths", "a.npz: Expected fields of one length"),
    ],
)
def test_bad_folders_are_named(tmp_path, name, says):
    with pytest.raises(DataError, match=says):
        open_population(broken(tmp_path, name))


def test_bad_paths_are_named(tmp_path):
    with pytest.raises(DataError, match=r"got ''. Give a folder"):
        open_population("")
    with pytest.raises(DataError, match="nowhere: it does not exist"):
        open_population(tmp_path / "nowhere")
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(DataError, match=r"No data in .*a.txt"):
        open_population(tmp_path / "a.txt")
    np.savez(tmp_path / "a.npz", x=np.zeros(0))
    with pytest.raises(DataError, match="no examples"):
        open_population(tmp_path / "a.npz")
    with pytest.raises(DataError, match="no array 'z', asked for as field 'x'; it has x"):
        open_population(tmp_path / "a.npz", fields={"x": "z"})
    np.savez(tmp_path / "b.npz", x=np.zeros(2), user=np.zeros(2))
    with pytest.raises(DataError, match="text or integers"):
        open_population(tmp_path / "b.npz")
    np.savez(tmp_path / "b.npz", x=np.zeros(2), user=np.array(["a"]))
    with pytest.raises(DataError, match="user for each of 2"):
        open_population(tmp_path / "b.npz")


def test_a_file_that_changes_later_is_noticed(tmp_path):
    np.savez(tmp_path / "a.npz", x=np.zeros(2))
    opened = open_population(tmp_path)
    np.savez(tmp_path / "a.npz", x=np.zeros(3))
    with pytest.raises(DataError, match=r"User 'a' .* 3 examples, expected 2"):
        opened["a"]
