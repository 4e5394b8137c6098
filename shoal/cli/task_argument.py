"""TASK on the command line: `module:attribute` or `file.py:attribute`. Loading it runs the file and starts JAX."""

import importlib
import importlib.util
import sys
import traceback
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from shoal.task import Task

EXTRAS: Final = {"torch": "torch", "pandas": "pandas", "pyarrow": "tables", "equinox": "equinox"}
"""Library that a task may import -> shoal's extra that brings it."""


def load_task(text: str) -> "Task":
    """The task that a text names.

    Raises:
        ValueError: there is no such file, module or task, or the file cannot be run; the text says why.
    """
    where, attribute = _parts(text)
    module = _module(where)
    return _attribute(module, where, attribute) if attribute else _only_task(module, where)


def _parts(text: str) -> tuple[str, str]:
    where, colon, attribute = text.rpartition(":")
    if not colon or not attribute.replace(".", "_").isidentifier():
        where, attribute = (text.removesuffix(":"), "")
    if not where or where.startswith(":"):
        raise ValueError(f"Expected TASK like file.py:task or module:task, got {text!r}.")
    return where, attribute


def _module(where: str) -> ModuleType:
    try:
        return _file_module(Path(where)) if where.endswith(".py") else _named_module(where)
    except (ValueError, KeyboardInterrupt) as error:
        if isinstance(error, KeyboardInterrupt) or error.args[:1] == (_missing(where),):
            raise
        raise _cannot_load(where, error) from error
    except SystemExit as error:
        raise ValueError(f"Cannot load {where}: it ends Python (SystemExit). Put that under `if __name__ == '__main__':`.") from error  # fmt: skip
    except Exception as error:
        raise _cannot_load(where, error) from error


def _missing(where: str) -> str:
    return f"There is no file {where}. `shoal new NAME` writes a task to start from."


def _cannot_load(where: str, error: Exception) -> ValueError:
    # The innermost frame may be in a library; the innermost one of the file is what its author can change.
    frames = traceback.extract_tb(error.__traceback__)
    name = Path(where).name if where.endswith(".py") else ""
    line = next((frame.lineno for frame in reversed(frames) if name and Path(frame.filename).name == name), None)
    line = error.lineno if isinstance(error, SyntaxError) else line
    at = f", line {line}" if line else ""
    missing = getattr(error, "name", "") if isinstance(error, ModuleNotFoundError) else ""
    hint = f". Install it with: pip install 'shoal[{EXTRAS[missing]}]'" if missing in EXTRAS else ""
    return ValueError(f"Cannot load {where}{at}: {type(error).__name__}: {error}{hint}")


def _file_module(path: Path) -> ModuleType:
    if not path.is_file():
        raise ValueError(_missing(str(path)))
    folder = str(path.resolve().parent)
    if folder not in sys.path:
        sys.path.insert(0, folder)  # so that the file can import what lies beside it
    spec = importlib.util.spec_from_file_location(path.stem.replace("-", "_"), path)
    assert spec is not None and spec.loader is not None, "the name ends in .py"
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault(spec.name, module)  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def _named_module(name: str) -> ModuleType:
    if Path(f"{name}.py").is_file() and "." not in name:
        return _file_module(Path(f"{name}.py"))
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    return importlib.import_module(name)


def _attribute(module: ModuleType, where: str, attribute: str) -> "Task":
    from shoal.task import Task

    value: object = module
    for part in attribute.split("."):
        if not hasattr(value, part):
            raise ValueError(f"{where} has no {attribute!r}; {_told(module)}.")
        value = getattr(value, part)
    if not isinstance(value, Task):
        raise ValueError(
            f"Expected {where}:{attribute} to be a shoal.Task, got {type(value).__name__}; {_told(module)}."
        )
    return value


def _only_task(module: ModuleType, where: str) -> "Task":
    tasks = _tasks(module)
    if not tasks:
        raise ValueError(f"{where} has no shoal.Task at its top level.")
    if len({id(task) for task in tasks.values()}) != 1:
        raise ValueError(f"Expected one of its names after {where}:, because {_told(module)}.")
    return next(iter(tasks.values()))


def _tasks(module: ModuleType) -> "dict[str, Task]":
    from shoal.task import Task

    return {name: value for name, value in vars(module).items() if isinstance(value, Task)}


def _told(module: ModuleType) -> str:
    names = sorted(_tasks(module))
    return f"it has the tasks {' | '.join(names)}" if names else "it has no task"
