"""How the table of operations is written: an operation's name and the function that does it in JAX."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import jax

Function = Callable[..., Any]
F = TypeVar("F", bound=Function)


class Table:
    """Operations by the name that torch gives them, `aten.add.Tensor`."""

    def __init__(self) -> None:
        self.functions: dict[str, Function] = {}

    def add(self, name: str, function: Function) -> None:
        """`name` is without `aten.`."""
        self.functions[f"aten.{name}"] = function

    def operation(self, *names: str) -> Callable[[F], F]:
        """Decorates the function of one or several overloads."""

        def put(function: F) -> F:
            for name in names:
                self.add(name, function)
            return function

        return put


@dataclass
class Step:
    """What operations of training need beside their arguments. One is made for each call of a module."""

    keys: Iterator[jax.Array]
    """A key for each operation that draws."""
    mask: Any | None
    """(B,), True for real examples; None where padding counts for nothing anyway."""
