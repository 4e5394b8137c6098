"""The commands as typer runs them, with the ends that `failures.py` describes."""

import sys
from collections.abc import Sequence
from typing import Any, Final

import typer
from typer.core import TyperGroup

from shoal.cli.failures import INTERRUPTED, leave, told, wrong_use

# typer brings its own copy of click or uses the library, by version; this is the base of usage errors in either.
_USAGE: Final = next(base for base in typer.BadParameter.__mro__ if base.__name__ == "ClickException")


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
            code = _wrong_use(error) if isinstance(error, _USAGE) else told(error)
        else:
            if code == INTERRUPTED:
                print("shoal: stopped.", file=sys.stderr)
        if not standalone_mode:
            return code
        leave(code)


def _wrong_use(error: Exception) -> int:
    context = getattr(error, "ctx", None)
    path = context.command_path if context is not None else "shoal"
    return wrong_use(path, getattr(error, "format_message", lambda: str(error))())
