"""What a step computes and what has to be there for it: stages, and the transfers that they wait for. No JAX, no I/O.

    transfer   tensors that travel together, from a server to a member before they are used, and as gradients back
    stage      a part of the step that is computed as one program; it waits for stages before it and for transfers that it is the first to use

`dependencies` are all transfers upstream of a stage, its own and those of the stages before it: dep(op) of Hashemi et al. 2019, "TicTac: accelerating
distributed deep learning with communication scheduling", section 3.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from shoal import validate


@dataclass(frozen=True, kw_only=True)
class Transfer:
    """Tensors that travel together."""

    name: str
    size_bytes: int

    def __post_init__(self) -> None:
        validate.positive(size_bytes=self.size_bytes)


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A part of the step."""

    name: str
    after: tuple[int, ...] = ()
    """Stages whose results it takes; their numbers are lower."""
    needs: tuple[int, ...] = ()
    """Transfers whose tensors it takes itself."""
    makes: tuple[int, ...] = ()
    """Transfers whose gradients are whole when it is done."""


@dataclass(frozen=True, kw_only=True)
class Graph:
    """Of one step."""

    transfers: tuple[Transfer, ...]
    stages: tuple[Stage, ...]
    """Each stands after those that it waits for."""

    def __post_init__(self) -> None:
        """
        Raises:
            ValueError: a stage waits for one that does not stand before it, a number is not that of a transfer, or two transfers share a name.
        """
        names = [transfer.name for transfer in self.transfers]
        if len(set(names)) < len(names):
            raise ValueError(f"Expected transfers with names of their own, got {sorted(names)}.")
        for number, stage in enumerate(self.stages):
            if any(not 0 <= before < number for before in stage.after):
                raise ValueError(f"Expected stage {stage.name!r} to wait for stages before it, got {stage.after}.")
            if any(not 0 <= one < len(names) for one in (*stage.needs, *stage.makes)):
                raise ValueError(
                    f"Expected numbers of {len(names)} transfers in stage {stage.name!r}, got {(*stage.needs, *stage.makes)}."
                )

    @cached_property
    def depends(self) -> np.ndarray:
        """(stages, transfers), True where the stage cannot begin without the transfer."""
        made = np.zeros((len(self.stages), len(self.transfers)), bool)
        for number, stage in enumerate(self.stages):
            made[number, list(stage.needs)] = True
            for before in stage.after:
                made[number] |= made[before]
        return made

    @cached_property
    def by_name(self) -> "ByName":
        """What each transfer is upstream of, transfers numbered by name."""
        names = np.argsort(np.array([transfer.name for transfer in self.transfers]), kind="stable")
        depends = self.depends[:, names]
        transfers, stages = np.nonzero(depends.T)
        begins = np.searchsorted(transfers, np.arange(len(names) + 1))
        waits = depends.sum(1, dtype=np.int64)
        return ByName(names, begins.astype(np.int64), stages.astype(np.int64), waits)

    @cached_property
    def num_forward(self) -> int:
        """Stages before the first that makes a gradient, or waits for one that has: the way forward."""
        for number, stage in enumerate(self.stages):
            if stage.makes:
                return number
        return len(self.stages)

    @cached_property
    def forward(self) -> "Graph":
        """The way forward alone."""
        return Graph(transfers=self.transfers, stages=self.stages[: self.num_forward])

    @property
    def sizes(self) -> np.ndarray:
        """Bytes of each transfer."""
        return np.array([transfer.size_bytes for transfer in self.transfers], np.int64)


@dataclass(frozen=True)
class ByName:
    """A graph's dependencies from the transfers' side."""

    names: np.ndarray
    """(transfers,), numbers of transfers in the order of their names."""
    begins: np.ndarray
    """(transfers + 1,), where the stages of each begin."""
    stages: np.ndarray
    """Those downstream of the first by name, then of the second, …"""
    waits: np.ndarray
    """(stages,), how many transfers each waits for."""


@dataclass(frozen=True)
class Times:
    """How long each part takes alone, in nanoseconds: whole numbers, so that every member finds the same order."""

    transfers: np.ndarray
    """(transfers,) int64, 1 or more."""
    stages: np.ndarray
    """(stages,) int64, 0 or more."""

    @classmethod
    def of_seconds(cls, transfers: Sequence[float], stages: Sequence[float]) -> "Times":
        """From seconds."""
        return cls(
            np.maximum(1, np.rint(1e9 * np.asarray(transfers, float))).astype(np.int64),
            np.maximum(0, np.rint(1e9 * np.asarray(stages, float))).astype(np.int64),
        )

    def check(self, graph: Graph) -> None:
        """Raises ValueError where they are not of this graph."""
        wanted = (len(graph.transfers),), (len(graph.stages),)
        if (self.transfers.shape, self.stages.shape) != wanted:
            raise ValueError(
                f"Expected times of {wanted[0][0]} transfers and {wanted[1][0]} stages, got {self.transfers.shape} and {self.stages.shape}."
            )
        if (self.transfers < 1).any() or (self.stages < 0).any():
            raise ValueError("Expected at least 1 ns for each transfer and 0 ns for each stage.")
