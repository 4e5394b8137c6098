"""A typer command run by `argparse`: the same options where typer is not installed (`shoal-device`).

A command's module says `typer.Option(…)` in its annotations. Where it is loaded through `load_command`, that is a note of ours
with the same words, and the parser is made of these: so no option has to be written twice. What is covered is what
`shoal device` and `shoal predict` need: arguments without a default, and options of str, int, float, bool, Path and lists of them, with `min`.
"""

import argparse
import inspect
import sys
import types
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, Final, Union, get_args, get_origin, get_type_hints

from shoal.cli.failures import INTERRUPTED, leave, told, wrong_use

Command = Callable[..., object]


@dataclass(frozen=True)
class Option:
    """What was said of an option."""

    names: tuple[str, ...]
    help: str = ""
    min: float | None = None
    max: float | None = None
    metavar: str | None = None
    show_default: bool | str = True


def load_command(module: str, name: str) -> Command:
    """A function of a module whose options are typer's, loaded without typer."""
    with _in_typers_place():
        command: Command = getattr(import_module(module), name)
        command.__annotations__.update(get_type_hints(command, include_extras=True))
    return command


def run(
    command: Command,
    *,
    name: str,
    epilog: str,
    arguments: Sequence[str] | None = None,
    left_out: Collection[str] = (),
    **fixed: object,
) -> None:
    """Runs it as a command line and ends the process, as `shoal` does.

    Args:
        command: of `load_command`.
        name: of the program.
        epilog: below the help.
        arguments: None: those of the process.
        left_out: parameters that cannot be given here.
        fixed: values that stand for options' own defaults.
    """
    parser = _parser(command, name, epilog, left_out, fixed)
    try:
        given = vars(parser.parse_args(arguments))
        code: object = command(**given)
    except KeyboardInterrupt:
        code = INTERRUPTED
        print("shoal: stopped.", file=sys.stderr)
    except Exception as error:
        code = told(error)
    leave(code)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        leave(wrong_use(self.prog, message))


def _parser(
    command: Command, name: str, epilog: str, left_out: Collection[str], fixed: dict[str, object]
) -> argparse.ArgumentParser:
    parser = _Parser(
        prog=name, description=inspect.getdoc(command), epilog=epilog.replace("\b\n", ""), allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    for parameter in inspect.signature(command).parameters.values():
        if parameter.name in left_out:
            continue
        default = fixed.get(parameter.name, parameter.default)
        _add(parser, parameter.name, parameter.annotation, default)
    return parser


def _add(parser: argparse.ArgumentParser, name: str, annotation: Any, default: object) -> None:
    kind, *notes = get_args(annotation) if get_origin(annotation) is Annotated else (annotation,)
    option = next(note for note in notes if isinstance(note, Option))
    is_required = default is inspect.Parameter.empty
    inner, is_list = _inner(kind)
    help = option.help.replace("%", "%%")
    if inner is bool:
        parser.add_argument(*option.names, dest=name, action="store_true", default=default, help=help)
        return
    if not option.names:
        parser.add_argument(name, type=_converter(inner, option), metavar=option.metavar, help=help)
        return
    shown = option.show_default if isinstance(option.show_default, str) else default
    if not is_required and shown not in (None, ""):
        help = f"{help} [default: {str(shown).replace('%', '%%')}]"
    parser.add_argument(
        *option.names, dest=name, action="append" if is_list else "store", type=_converter(inner, option),
        required=is_required, default=None if is_required else default, metavar=option.metavar or inner.__name__.upper(), help=help,
    )  # fmt: skip


def _inner(kind: Any) -> tuple[type, bool]:
    """The type of one value, and whether there may be several: of `list[str] | None`, str and True."""
    if get_origin(kind) in (Union, types.UnionType):
        kind = next(each for each in get_args(kind) if each is not type(None))
    if get_origin(kind) is list:
        return get_args(kind)[0], True
    return kind, False


def _converter(kind: type, option: Option) -> Callable[[str], object]:
    def convert(text: str) -> object:
        value: Any = kind(text)
        low, high = option.min, option.max
        if (low is not None and not value >= low) or (high is not None and not value <= high):
            raise argparse.ArgumentTypeError(f"{text!r} is not in the range {_range(low, high)}")
        return value

    convert.__name__ = "path" if kind is Path else kind.__name__
    return convert


def _range(low: float | None, high: float | None) -> str:
    return " and ".join(
        [*([f">= {low:g}"] if low is not None else []), *([f"<= {high:g}"] if high is not None else [])]
    )


def _option(*names: str, **said: Any) -> Option:
    known = {name: value for name, value in said.items() if name in Option.__dataclass_fields__}
    return Option(names, **known)


_TYPER: Final = "typer"


@contextmanager
def _in_typers_place() -> Iterator[None]:
    before = sys.modules.get(_TYPER)
    stand_in: Any = types.ModuleType(_TYPER)
    stand_in.Option = stand_in.Argument = _option
    sys.modules[_TYPER] = stand_in
    try:
        yield
    finally:
        if before is None:
            del sys.modules[_TYPER]
        else:
            sys.modules[_TYPER] = before
