"""Machine code is kept where a folder can be written; where none can, it is made in each process."""

import pytest
from numba.core import caching

from shoal.embed._compiled import compiled


def twice(x: int) -> int:
    return 2 * x


def test_where_no_folder_can_be_written_it_still_compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(caching.CompileResultCacheImpl, "_locator_classes", [])
    assert compiled(twice)(21) == 42
