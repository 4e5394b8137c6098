from pathlib import Path

import numpy as np
import pytest

from shoal.embed import Trace
from shoal.errors import DataError

TRACE = Trace.of([[0, 2], [], [2], [1, 2, 0]], 4)


def test_parts_lie_in_time_order():
    first, second = TRACE.split(0.5, 0.5)
    assert first.indptr.tolist() == [0, 2, 2]
    assert second.ids.tolist() == [2, 1, 2, 0]
    assert sum(len(part) for part in TRACE.split(1, 1, 1)) == len(TRACE)


def test_counts_names_and_transpose():
    assert TRACE.counts().tolist() == [2, 1, 3, 0]
    assert TRACE.renamed(np.array([3, 2, 1, 0])).counts().tolist() == [0, 3, 1, 2]
    starts, queries = TRACE.transposed()
    assert starts.tolist() == [0, 2, 3, 6, 6]
    assert queries.tolist() == [0, 3, 3, 0, 2, 3]


def test_it_is_saved(tmp_path: Path):
    TRACE.save(tmp_path / "t.npz")
    again = Trace.load(tmp_path / "t.npz", num_rows=4)
    assert again.ids.tolist() == TRACE.ids.tolist()
    assert Trace.load(tmp_path / "t.npz").num_rows == 3
    with pytest.raises(DataError, match="from 0 to 1"):
        Trace.load(tmp_path / "t.npz", num_rows=2)
    with pytest.raises(DataError, match="nothing"):
        Trace.load(tmp_path / "nothing.npz")


def test_files_that_are_no_traces_are_refused(tmp_path: Path):
    path = str(tmp_path / "t.npz")
    TRACE.save(path)  # text is a path too
    assert Trace.load(path).num_lookups == TRACE.num_lookups
    np.savez(path, indptr=[0, 2], ids=[1.5, 2.0])
    with pytest.raises(DataError, match=r"ids are float64, not integers\.$"):
        Trace.load(path)
    Path(path).write_text("0,2\n")
    with pytest.raises(DataError, match=r"it is no \.npz\.$"):
        Trace.load(path)


def test_bad_traces_are_refused():
    with pytest.raises(ValueError, match="rise from 0 to 1"):
        Trace(np.array([0, 2]), np.array([0]), 1)
    with pytest.raises(ValueError, match="from 0 to 1"):
        Trace(np.array([0, 1]), np.array([2]), 2)


def test_joined_and_thinned():
    first, second = Trace.of([[1, 2], []], 4), Trace.of([[3]], 6)
    both = Trace.joined([first, second])
    assert both.indptr.tolist() == [0, 2, 2, 3] and both.ids.tolist() == [1, 2, 3] and both.num_rows == 6
    assert both.only(np.array([False, True, True])).indptr.tolist() == [0, 1, 1, 2]
