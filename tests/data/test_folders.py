import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from shoal.data import open_folders
from shoal.errors import DataError


def picture(path: Path, value: int, *, mode: str = "L", size: tuple[int, int] = (3, 2)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, value if mode == "L" else (value, 0, 0)).save(path)


def test_the_arrays_of_a_user_are_joined(tmp_path: Path) -> None:
    for user, day, count in (("ann", "monday", 2), ("ann", "tuesday", 1), ("ben", "monday", 3)):
        (tmp_path / user).mkdir(exist_ok=True)
        np.savez(tmp_path / user / f"{day}.npz", x=np.full((count, 4), count, np.float32))
    (tmp_path / ".hidden").mkdir()
    made = open_folders(tmp_path)
    assert made.sizes() == {"ann": 3, "ben": 3} and made.spec() == {"x": ((4,), "float32")}
    assert made["ann"].fields["x"][:, 0].tolist() == [2, 2, 1]
    np.savez(tmp_path / "ben" / "wednesday.npz", x=np.zeros((1, 5), np.float32))
    with pytest.raises(DataError, match=r"wednesday.npz is not like .*monday.npz: field 'x' is float32 \(5,\)"):
        open_folders(tmp_path)


@pytest.mark.parametrize(("mode", "channels"), [("L", 1), ("RGB", 3)])
def test_pictures_by_class(tmp_path: Path, mode: str, channels: int) -> None:
    picture(tmp_path / "ann" / "dog" / "1.png", 10, mode=mode)
    picture(tmp_path / "ann" / "cat" / "1.png", 20, mode=mode)
    picture(tmp_path / "ben" / "emu" / "1.bmp", 30, mode=mode)
    (tmp_path / "ann" / "cat" / "notes.txt").write_text("not a picture")
    made = open_folders(tmp_path)
    assert made.spec() == {"image": ((2, 3, channels), "uint8"), "label": ((), "int32")}
    assert made["ann"].fields["image"][:, 0, 0, 0].tolist() == [20, 10] and made["ann"].fields["label"].tolist() == [
        0,
        1,
    ]
    assert made["ben"].fields["label"].tolist() == [2], "classes are those of all users"
    assert len(pickle.loads(pickle.dumps(made))["ann"]) == 2


def test_pictures_that_do_not_fit_are_named(tmp_path: Path) -> None:
    picture(tmp_path / "ann" / "dog" / "1.png", 10)
    picture(tmp_path / "ann" / "dog" / "2.png", 10, size=(5, 5))
    with pytest.raises(DataError, match=r"2.png is not like .*1.png: field 'image' is uint8 \(5, 5, 1\)"):
        open_folders(tmp_path)["ann"]
    (tmp_path / "ann" / "dog" / "2.png").write_bytes(b"rubbish")
    with pytest.raises(DataError, match=r"Cannot read .*2.png: UnidentifiedImageError"):
        open_folders(tmp_path)["ann"]
    picture(tmp_path / "ann" / "3.png", 10)
    with pytest.raises(DataError, match=r"Expected pictures as USER/CLASS/picture, got .*ann/3.png"):
        open_folders(tmp_path)


def test_any_files_with_a_reader(tmp_path: Path) -> None:
    for user, text in (("ann", "1 2"), ("ben", "3 4")):
        (tmp_path / user / "deep").mkdir(parents=True)
        (tmp_path / user / "deep" / "a.txt").write_text(text)
    made = open_folders(tmp_path, read=lambda file: {"x": np.array(file.read_text().split(), np.float32)})
    assert made["ben"].fields["x"].tolist() == [[3, 4]]
    with pytest.raises(DataError, match=r"Cannot read .*a.txt: ValueError: could not convert"):
        open_folders(tmp_path, read=lambda file: {"x": np.array([file.name], np.float32)})


def test_folders_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"Cannot look into .*missing: No such file"):
        open_folders(tmp_path / "missing")
    with pytest.raises(DataError, match="There is no folder in"):
        open_folders(tmp_path)
    (tmp_path / "ann").mkdir()
    with pytest.raises(DataError, match=r"User 'ann' has no file in .* that ends in .npz"):
        open_folders(tmp_path)
    np.savez(tmp_path / "ann" / "a.npz", x=np.zeros(1))
    picture(tmp_path / "ben" / "dog" / "1.png", 1)
    with pytest.raises(DataError, match=r"mixes arrays \(.npz\) and pictures"):
        open_folders(tmp_path)
