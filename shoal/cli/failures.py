"""How a command ends when it does not succeed: one line on standard error and an exit code, never a traceback.

Codes: 1 it failed, 2 it was called wrongly, 130 it was interrupted (Ctrl-C), 143 it was told to end (SIGTERM).
With SHOAL_DEBUG=1 the traceback is shown before the line.
"""

import os
import sys
import traceback
from collections.abc import Sequence
from typing import Final, NoReturn

from shoal.errors import ShoalError

FAILED: Final = 1
WRONG_USE: Final = 2
INTERRUPTED: Final = 130
TERMINATED: Final = 143
MOST_CHARACTERS: Final = 1500


class Stopped(Exception):
    """The command was told to end before it was done; the text says how to go on."""

    def __init__(self, text: str, *, code: int = INTERRUPTED) -> None:
        super().__init__(text)
        self.code = code


def told(error: Exception) -> int:
    """Says how a command ended; the exit code."""
    if os.environ.get("SHOAL_DEBUG", "0") not in ("", "0") and not isinstance(error, Stopped):
        traceback.print_exception(error)
    if isinstance(error, Stopped):
        return _said(f"shoal: {one_line(error)}", error.code)
    if isinstance(error, BrokenPipeError):  # whoever read our output has gone: `shoal runs list | head`
        return FAILED
    return _said(f"shoal: {describe(error)}", FAILED)


def wrong_use(command: str, message: str) -> int:
    """Says that a command was called wrongly; the exit code."""
    return _said(f"{command}: {one_line(message).rstrip('.')}. See {command} --help.", WRONG_USE)


def leave(code: object) -> NoReturn:
    """Ends the process with what a command gave back."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        # Python flushes once more when it ends, and would complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(code if isinstance(code, int) else 0)


def _said(line: str, code: int) -> int:
    try:
        print(line, file=sys.stderr)
    except BrokenPipeError:  # nobody reads any more: the code says it
        pass
    return code


def describe(error: BaseException) -> str:
    """An error in one line; what is not an error of shoal is named by its kind."""
    if isinstance(error, OSError) and not isinstance(error, ShoalError) and error.strerror:
        where = f"{error.filename}: " if error.filename else ""
        return one_line(f"{where}{error.strerror}.")
    if isinstance(error, ShoalError | ValueError | OSError) and not isinstance(error, UnicodeError):
        return one_line(error) or type(error).__name__
    return f"{type(error).__name__}: {one_line(error)} (SHOAL_DEBUG=1 shows where)"


def one_line(text: object) -> str:
    """The text without line breaks, not longer than a screen."""
    joined = " ".join(str(text).split())
    return joined if len(joined) <= MOST_CHARACTERS else f"{joined[:MOST_CHARACTERS]}…"


def command_line(words: Sequence[object]) -> str:
    """A command that can be pasted into a shell."""
    import shlex

    return " ".join(shlex.quote(str(word)) for word in words if word != "")
