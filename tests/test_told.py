"""Ctrl-C is heard, whatever a library makes of it."""

import contextlib
import signal

import pytest

from shoal.told import Told


def test_a_ctrl_c_that_is_swallowed_is_not_lost() -> None:
    before = signal.getsignal(signal.SIGINT)
    with Told() as told:
        told.check()
        with contextlib.suppress(KeyboardInterrupt):  # as an import in the middle of which it comes may do
            signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)  # a second one does not disturb the end
        with pytest.raises(KeyboardInterrupt):
            told.check()
        assert told.code == 130
    assert signal.getsignal(signal.SIGINT) is before


def test_an_import_that_fails_of_it_is_it() -> None:
    with pytest.raises(KeyboardInterrupt), Told():
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt as error:
            raise ImportError("while initializing the extension") from error
    with pytest.raises(ImportError), Told():
        raise ImportError("of its own")


def test_who_hears_already_goes_on_hearing() -> None:
    heard = list[int]()
    before = signal.signal(signal.SIGINT, lambda number, frame: heard.append(number))
    try:
        with Told(from_anybody=False) as told:
            signal.raise_signal(signal.SIGINT)
            told.check()
        assert heard == [signal.SIGINT]
    finally:
        signal.signal(signal.SIGINT, before)
