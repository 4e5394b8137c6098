"""--data: files, folders and known data sets, and what --user-column is for."""

from pathlib import Path

import numpy as np
import pytest

from shoal.cli import data_argument, simulate
from shoal.errors import DataError

from .conftest import Shoal

LINES = "patient,x,y\nann,1.0,2.0\nben,2.0,4.0\nann,3.0,6.0\n"


def test_tables_by_the_column_that_names_the_user(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    pytest.importorskip("pyarrow.parquet")
    (tmp_path / "visits.csv").write_text(LINES)
    pa.parquet.write_table(pa.table({"patient": ["ann"], "x": [1.0], "y": [2.0]}), tmp_path / "visits.parquet")
    opened = data_argument.open_data(str(tmp_path / "visits.csv"), user_column="patient")
    assert opened.sizes() == {"ann": 2, "ben": 1} and list(opened.spec()) == ["x", "y"]
    assert data_argument.open_data(str(tmp_path / "visits.parquet"), user_column="patient").ids == ("ann",)
    held_out = data_argument.open_held_out(str(tmp_path / "visits.csv"), user_column="patient")
    assert held_out is not None and held_out.fields["y"].tolist() == [2, 6, 4]
    with pytest.raises(DataError, match=r"has no column 'user'; it has patient, x, y. .*--user-column"):
        data_argument.open_data(str(tmp_path / "visits.csv"))


def test_folders_of_users_folders(tmp_path: Path) -> None:
    for user in ("ann", "ben"):
        (tmp_path / user).mkdir()
        np.savez(tmp_path / user / "a.npz", x=np.zeros(2))
    assert data_argument.open_data(str(tmp_path)).sizes() == {"ann": 2, "ben": 2}


def test_names_of_data_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"one of brown \| cifar-10 \| .* \| watch, got 'mnist'"):
        data_argument.open_data("name:mnist")
    with pytest.raises(ValueError, match="--split and --users are for name:… without users"):
        data_argument.open_data("name:brown", users=5)
    with pytest.raises(ValueError, match="--user-column is for files"):
        data_argument.open_data("name:brown", user_column="who")


@pytest.mark.parametrize("command", [("simulate", "--rounds", 1), ("check",), ("device", "--server", "127.0.0.1:1")])
def test_every_command_that_takes_data_takes_the_column(
    place: Path, tmp_path: Path, shoal: Shoal, command: tuple[object, ...]
) -> None:
    pytest.importorskip("pyarrow")
    (tmp_path / "visits.csv").write_text(LINES)
    task = [] if command[0] == "device" else [place / "line.py"]
    made = shoal(command[0], *task, *command[1:], "--data", tmp_path / "visits.csv", "--user-column", "who")
    assert made.code == 1 and "has no column 'who'; it has patient, x, y" in made.err, made


def test_the_command_to_go_on_names_the_column() -> None:
    changed = simulate._changed("iid", 20, "", "patient", by_user=False, leave_out=[])
    assert changed == ["--user-column", "patient"]
