"""How a command ends when it does not succeed: one line on standard error and an exit code, never a traceback.

Codes: 1 it failed, 2 it was called wrongly, 130 it was interrupted (Ctrl-C), 143 it was told to end (SIGTERM).
With SHOAL_DEBUG=1 the traceback is shown before the line.
"""

import os
import sys
import traceback
from collections.abc import Sequence
from typing import Any, Final

import typer
from typer.core import TyperGroup

from shoal.errors import ShoalError

FAILED: Final = 1
WRONG_USE: Final = 2
INTERRUPTED: Final = 130
TERMINATED: Final = 143
MOST_CHARACTERS: Final = 1500

# typer brings its own copy of click or uses the library, by version; this is the base of usage errors in either.
_USAGE: Final = next(base for base in typer.BadParameter.__mro__ if base.__name__ == "ClickException")


class Stopped(Exception):
    """The command was told to end before it was done; the text says how to go on."""

    def __init__(self, text: str, *, code: int = INTERRUPTED) -> None:
        super().__init__(text)
        self.code = code


class ShoalGroup(TyperGroup):
    """The commands, with the ends that this module describes."""

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **extra: Any,
    ) -> Any:
        """As a command line: exits, unless `standalone_mode` is off, when the code is returned."""
        try:
            code = super().main(args, prog_name, complete_var, False, windows_expand_args, **extra)
        except Exception as error:
            code = _told(error)
        else:
            if code == INTERRUPTED:
                print("shoal: stopped.", file=sys.stderr)
        if not standalone_mode:
            return code
        _flush()
        sys.exit(code if isinstance(code, int) else 0)


def _told(error: Exception) -> int:
    if os.environ.get("SHOAL_DEBUG", "0") not in ("", "0") and not isinstance(error, _USAGE | Stopped):
        traceback.print_exception(error)
    code, line = _ending(error)
    if line:
        try:
            print(line, file=sys.stderr)
        except BrokenPipeError:  # nobody reads any more: the code says it
            pass
    return code


def _ending(error: Exception) -> tuple[int, str]:
    """The exit code and the line."""
    if isinstance(error, Stopped):
        return error.code, f"shoal: {one_line(error)}"
    if isinstance(error, BrokenPipeError):  # whoever read our output has gone: `shoal runs list | head`
        return FAILED, ""
    if isinstance(error, _USAGE):
        context = getattr(error, "ctx", None)
        path = context.command_path if context is not None else "shoal"
        message = one_line(getattr(error, "format_message", lambda: str(error))())
        return WRONG_USE, f"{path}: {message.rstrip('.')}. See {path} --help."
    return FAILED, f"shoal: {describe(error)}"


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


def _flush() -> None:
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        # Python flushes once more when it ends, and would complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def command_line(words: Sequence[object]) -> str:
    """A command that can be pasted into a shell."""
    import shlex

    return " ".join(shlex.quote(str(word)) for word in words if word != "")
