"""The collectives of a compiled program, read off the HLO text that `compiled.as_text()` gives.

A small parser: of each computation only the instructions that move something or call another computation. Groups are read in both forms,
written out (``{{0,1},{2,3}}``) and counted (``[2,4]<=[4,2]T(1,0)``: number the devices in that shape, transpose, cut into groups). Halves
that only wait (``-done``) are passed over.
"""

import re
from collections.abc import Mapping
from typing import Final, cast

import numpy as np

from shoal.pod.traffic import KINDS, Collective, Kind, Operand, Traffic, along, operand

_HEAD: Final = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{\s*$")
_INSTRUCTION: Final = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = ")
_SHAPE: Final = re.compile(r"([a-z][a-z0-9]*)\[([\d,<=]*)\]")
_TURNS: Final = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_CALLERS: Final = ("call", "fusion", "async-start")
_COUNTED: Final = re.compile(r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")

Groups = list[list[int]]


def compiled_traffic(text: str, sizes: Mapping[str, int]) -> Traffic:
    """What one device sends in one run.

    Args:
        text: of `compiled.as_text()`.
        sizes: the axes of the mesh it was made for, in order.

    Raises:
        ValueError: it is no HLO text, or a group names no device of that mesh.
    """
    reader = _Reader(text, sizes)
    reader.read(reader.entry, 1, False)
    return Traffic(tuple(reader.found))


def groups(text: str) -> Groups:
    """Numbers of devices in groups: ``{{0,1},{2,3}}``, or ``[2,4]<=[8]``, or ``[2,4]<=[4,2]T(1,0)``; ``{}`` is one group of all.

    Raises:
        ValueError: it is written otherwise.
    """
    counted = _COUNTED.fullmatch(text)
    if counted:
        shape, dims, order = (_numbers(part or "") for part in counted.groups())
        numbered = np.arange(np.prod(dims)).reshape(dims)
        return cast(Groups, (numbered.transpose(order) if order else numbered).reshape(shape).tolist())
    if not re.fullmatch(r"\{(\{[\d,\- ]*\},? ?)*\}", text):
        raise ValueError(
            f"Expected groups of devices such as {{{{0,1}},{{2,3}}}} or [2,4]<=[8] or [2,4]<=[4,2]T(1,0), got {text!r}."
        )
    return [_numbers(part) for part in re.findall(r"\{([\d,\- ]+)\}", text)]


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",") if part.strip()]


class _Reader:
    """Goes through a module from its entry on."""

    def __init__(self, text: str, sizes: Mapping[str, int]) -> None:
        self.sizes = sizes
        self.found: list[Collective] = []
        self.entry = ""
        self.computations: dict[str, dict[str, str]] = {}
        """Name -> its instructions, by name."""
        lines: dict[str, str] = {}
        for line in text.splitlines():
            head = _HEAD.match(line)
            if head:
                lines = self.computations.setdefault(head[2], {})
                self.entry = head[2] if head[1] else self.entry
            elif instruction := _INSTRUCTION.match(line):
                lines[instruction[1]] = line
        if not self.entry:
            raise ValueError(f"Expected the text of a compiled program with an ENTRY, got {text[:80]!r}.")

    def read(self, name: str, times: int | None, is_conditional: bool) -> None:
        """Takes in a computation that is done so often."""
        lines = self.computations.get(name, {})
        for line in lines.values():
            _, operation, given, rest = _parts(line)
            kind = operation.removesuffix("-start").replace("-", "_")
            if kind in KINDS:
                self.found.append(self._collective(kind, _operands(given, lines), rest, times, is_conditional))
            elif operation == "while":
                turns = _TURNS.search(rest)
                each = None if turns is None or times is None else times * int(turns[1])
                for called in (*_called(rest, "condition"), *_called(rest, "body")):
                    self.read(called, each, is_conditional)
            elif operation == "conditional":
                for key in ("branch_computations", "true_computation", "false_computation"):
                    for called in _called(rest, key):
                        self.read(called, times, True)
            elif operation in _CALLERS:
                for called in (*_called(rest, "calls"), *_called(rest, "to_apply")):
                    self.read(called, times, is_conditional)

    def _collective(
        self, kind: Kind, operands: tuple[Operand, ...], rest: str, times: int | None, is_conditional: bool
    ) -> Collective:
        written = "source_target_pairs" if kind == "collective_permute" else "replica_groups"
        group_size, axes = along(groups(_attribute(rest, written)), self.sizes)
        return Collective(kind, operands, group_size, axes, times, is_conditional)


def _parts(line: str) -> tuple[str, str, str, str]:
    """Type, operation, what it is given, and attributes of ``%name = type operation(given), attributes``."""
    rest = line.split(" = ", 1)[1]
    end = _closing(rest) if rest.startswith("(") else rest.index(" ")
    made, rest = rest[:end], rest[end:].lstrip()
    operation, bracket, _ = rest.partition("(")
    end = len(operation) + _closing(rest[len(operation) :]) if bracket else len(operation)
    return made, operation, rest[len(operation) + 1 : end - 1], rest[end:]


def _closing(text: str) -> int:
    """One past the bracket that closes the one with which the text begins."""
    depth = 0
    for place, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if depth == 0:
            return place + 1
    return len(text)


def _operands(given: str, lines: Mapping[str, str]) -> tuple[Operand, ...]:
    """Found by name among the instructions of the same computation, since newer texts leave out their types."""
    names = re.findall(r"%([\w.\-]+)", given) or [part.split()[-1] for part in given.split(",") if part.strip()]
    return tuple(each for name in names for each in _shapes(_parts(lines[name])[0]))


def _shapes(text: str) -> list[Operand]:
    return [operand(name, _numbers(sizes.replace("<=", ""))) for name, sizes in _SHAPE.findall(text)]


def _attribute(rest: str, key: str) -> str:
    found = re.search(rf"{key}=(\{{\{{.*?\}}\}}|\{{\}}|\[[^\s]*\](?:T\([\d,]+\))?)", rest)
    return found[1] if found else "{}"


def _called(rest: str, key: str) -> list[str]:
    found = re.search(rf"{key}=(\{{[^}}]*\}}|%?[\w.\-]+)", rest)
    return re.findall(r"[\w.\-]+", found[1]) if found else []
