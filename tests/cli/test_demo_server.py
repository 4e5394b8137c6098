"""The demo's server process asks for what a host asks for."""

import gc
import sys
from typing import NoReturn

import pytest

from shoal.cli import demo_server
from shoal.fleet import process


def test_it_asks_for_files_and_a_slow_collector_as_a_host_does(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []
    monkeypatch.setattr(process, "allow_many_files", lambda: asked.append("files"))
    monkeypatch.setattr(process, "use_one_arena", lambda: None)
    monkeypatch.setattr(gc, "set_threshold", lambda *numbers: asked.append(numbers))
    monkeypatch.setattr(gc, "freeze", lambda: None)
    monkeypatch.setattr(sys, "setswitchinterval", lambda seconds: None)

    def no_parent() -> NoReturn:
        raise EOFError

    monkeypatch.setattr(demo_server, "Parent", no_parent)
    with pytest.raises(EOFError):
        demo_server.main()
    assert asked == ["files", process._COLLECT_AFTER]
