import sys

import numpy as np
import pytest

from shoal.data import open_population
from shoal.errors import DataError, MissingExtra

pa = pytest.importorskip("pyarrow")
pytest.importorskip("pyarrow.parquet")


def test_csv(tmp_path):
    (tmp_path / "a.csv").write_text("user,x,flag\n007,1.5,true\n7,2,false\n007,3,true\n")
    opened = open_population(tmp_path / "a.csv")
    assert opened.sizes() == {"007": 2, "7": 1}
    assert opened.spec() == {"x": ((), "float64"), "flag": ((), "bool")}
    assert opened["007"].fields["x"].tolist() == [1.5, 3]


def test_csv_errors_name_file_column_and_row(tmp_path):
    (tmp_path / "a.csv").write_text("who,x,y,note\nann,1,1.5,good\nann,,-2e3,bad\nben,3,n.a.,bad\n")
    for column, says in {
        "x": "lacks 1 of 3 values, the first in row 2",
        "y": r"is string \(row 3 has 'n.a.'\); expected numbers",
        "note": r"is string \(row 1 has 'good'\)",
    }.items():
        with pytest.raises(DataError, match=rf"Column '{column}' of .*a.csv {says}"):
            open_population(tmp_path / "a.csv", user="who", fields={"f": column})


def test_columns_not_asked_for_may_be_anything(tmp_path):
    pa.parquet.write_table(table(x=[1, 2, 3], text=["a", None, "c"]), tmp_path / "a.parquet")
    assert open_population(tmp_path / "a.parquet", fields={"x": "x"}).spec() == {"x": ((), "int64")}


def table(**columns):
    return pa.table({"user": ["a", "b", "a"], **columns})


def test_parquet_with_lists(tmp_path):
    image = pa.array(np.arange(12, dtype=np.float32).reshape(3, 4).tolist(), pa.list_(pa.float32(), 4))
    nested = pa.array(np.arange(12).reshape(3, 2, 2).tolist())
    pa.parquet.write_table(table(image=image, nested=nested, y=pa.array([1, 2, 3], pa.int8())), tmp_path / "a.parquet")
    opened = open_population(tmp_path / "a.parquet")
    assert opened.spec() == {"image": ((4,), "float32"), "nested": ((2, 2), "int64"), "y": ((), "int8")}
    np.testing.assert_array_equal(opened["a"].fields["nested"], np.arange(12).reshape(3, 2, 2)[[0, 2]])
    assert opened["b"].fields["image"].tolist() == [[4, 5, 6, 7]]


def test_a_folder_of_tables_is_joined(tmp_path):
    pa.parquet.write_table(pa.table({"who": [1, 2], "x": [1.0, 2.0]}), tmp_path / "0.parquet")
    pa.parquet.write_table(pa.table({"who": [2, 30], "x": [3.0, 4.0]}), tmp_path / "1.parquet")
    opened = open_population(tmp_path, user="who", fields={"feature": "x"})
    assert opened.sizes() == {"1": 1, "2": 2, "30": 1}
    assert opened["2"].fields["feature"].tolist() == [2, 3]


@pytest.mark.parametrize(
    ("columns", "says"),
    [
        ({"x": ["1.5", "-2e3", "c"]}, r"Column 'x' of .* is string \(row 3 has 'c'\); expected numbers"),
        ({"x": [1, None, 2]}, "lacks 1 of 3 values, the first in row 2"),
        ({"x": [[1], [1, 2], [3]]}, "lists of 1 to 2, the first other than row 1's in row 2; expected one length"),
        ({"x": [[1, 2], [1, 2], [3, None]]}, "lacks 1 of 6 values, the first in row 3"),
        ({"x": [[[1], [2]], [[3], [4]], [[5], [6, 7]]]}, "lists of 1 to 2, the first other than row 1's in row 3"),
        ({}, "at least one field"),
    ],
)
def test_bad_columns_are_named(tmp_path, columns, says):
    pa.parquet.write_table(table(**columns), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=says):
        open_population(tmp_path / "a.parquet")


def test_bad_tables_are_named(tmp_path):
    (tmp_path / "a.csv").write_text("x,y\n1,2\n")
    with pytest.raises(DataError, match=r"no column 'user'; it has x, y. Name the column .* \(--user-column\)"):
        open_population(tmp_path)
    with pytest.raises(DataError, match=r"no column 'z'; it has x, y. Check fields"):
        open_population(tmp_path, user="x", fields={"f": "z"})
    (tmp_path / "b.csv").write_text("x,z\n1,2\n")
    with pytest.raises(DataError, match=r"b.csv has the columns z, but .*a.csv has y"):
        open_population(tmp_path, user="x")
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "c.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match=r"Cannot read .*c.parquet"):
        open_population(tmp_path / "c")
    (tmp_path / "d.csv").write_text("")
    with pytest.raises(DataError, match=r"Cannot read .*d.csv: Empty CSV file"):
        open_population(tmp_path / "d.csv")


def test_tables_say_what_they_need(tmp_path, monkeypatch):
    (tmp_path / "a.csv").write_text("user,x\na,1\n")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(MissingExtra, match=r"shoal\[tables\]"):
        open_population(tmp_path / "a.csv")


def test_several_columns_become_one_field(tmp_path):
    (tmp_path / "a.csv").write_text("user,x,y,z\nann,1,2,3\nben,4,5,6\n")
    opened = open_population(tmp_path / "a.csv", fields={"xz": ["x", "z"], "y": "y"})
    assert opened["ben"].fields["xz"].tolist() == [[4, 6]] and opened["ben"].fields["y"].tolist() == [5]
    with pytest.raises(DataError, match="no column 'w'"):
        open_population(tmp_path / "a.csv", fields={"xw": ["x", "w"]})
    pa.parquet.write_table(table(x=[1, 2, 3], v=[[1, 2], [3, 4], [5, 6]]), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"columns x, v of .* to have one shape"):
        open_population(tmp_path / "a.parquet", fields={"f": ["x", "v"]})
