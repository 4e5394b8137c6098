"""Which order a worker's transfers take: found by measuring its first steps, held against the order of layers, given up where it does not pay.

auto, tac    steps that are measured (nothing is sent while stages run) --Oracle--> TAC --auto: Guard--> ours or by layers
others       from the first step on
"""

import time
from collections import deque
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final, final

import jax
import numpy as np

from shoal import validate
from shoal.pod.servers.one_step import Seen
from shoal.schedule import ORDER_NAMES, OrderName, orders
from shoal.schedule import oracle as oracles
from shoal.schedule.fast_tac import fast_tac
from shoal.schedule.graph import Graph, Times
from shoal.schedule.guard import Guard, Verdict, Which
from shoal.schedule.makespan import How, makespan_s
from shoal.schedule.staged import Staged

MEASURED_STEPS: Final = 3
"""Beyond the first, which compiles."""
_FIXED: Final = {"tic": orders.tic, "layer": orders.layer, "tree": orders.tree}


@final
class Choice:
    """Of one worker."""

    def __init__(
        self, name: OrderName, staged: Staged, *, seed: int, is_training: bool, has_barrier: bool, ahead: bool, slice_bytes: int, folder: Path | None
    ) -> None:  # fmt: skip
        """
        Args:
            name: of the order.
            staged: the step.
            seed: of `random`.
            is_training, has_barrier, ahead, slice_bytes: see `makespan.How`.
            folder: in which measured times are kept; None: they are not.
        """
        validate.one_of(ORDER_NAMES, order=name)
        self._name, self._graph, self._rng = name, staged.graph, np.random.default_rng(seed)
        self._how = How(
            slice_bytes=slice_bytes, is_training=is_training, has_barrier=has_barrier, ahead=ahead, num_steps=4
        )
        hardware = {"platform": jax.default_backend(), "devices": str(jax.local_device_count())}
        self._path = None if folder is None else folder / oracles.kept_as(staged.graph, staged.costs, hardware)
        self.oracle = oracles.Oracle(staged.costs) if self._path is None else oracles.read(self._path, staged.costs)
        self._layer = orders.layer(staged.graph)
        self._ours: np.ndarray | None = None
        self._guard: Guard | None = None
        self._left = 0 if name not in ("auto", "tac") or self.oracle.is_measured else 1 + MEASURED_STEPS
        self._begun: deque[Which] = deque()
        self._spent_s = 0.0
        """What measuring and ordering took beyond plain steps."""
        self._alone_s: list[float] = []
        """Of the steps that were measured."""
        self.predicted_s: float | None = None
        if self._left == 0:
            self._settle()

    @property
    def needs_rate(self) -> bool:
        """Whether the line is to be measured before the first step."""
        return self._left > 0

    def saw_sent(self, size_bytes: int, seconds: float) -> None:
        """The line was measured, with nothing else done meanwhile."""
        self._spent_s += seconds
        self.oracle.saw_sent(size_bytes, seconds)

    @property
    def verdict(self) -> Verdict | None:
        """Of the guard; None where there is none."""
        return self._guard.verdict if self._guard else None

    def ranks(self) -> np.ndarray:
        """Of the next step. Asked once for each."""
        which: Which = "layer" if self._ours is None and self._name != "random" else "ours"
        if self._guard is not None:
            which = self._guard.next()
        self._begun.append(which)
        if which == "layer":
            return self._layer
        if self._name == "random":
            return orders.random(self._graph, self._rng)
        assert self._ours is not None
        return self._ours

    @property
    def is_alone(self) -> bool:
        """Whether the stages of the step that is next are measured, with nothing sent meanwhile."""
        return self._left > 0

    def took(self, seen: Seen) -> None:
        """A step is done."""
        which = self._begun.popleft()
        if self._left:
            self._left -= 1
            if seen.stages and self._left < MEASURED_STEPS:  # the first compiles
                self._alone_s.append(seen.seconds)
                for stage, seconds in enumerate(seen.stages):
                    self.oracle.saw_stage(stage, seconds)
            if not self._left:
                self._settle()
            return
        if self._guard is not None:
            self._guard.took(which, seen.seconds)
        if self.predicted_s is not None and which == "ours":
            self.oracle.saw_step(self.predicted_s, seen.seconds)

    def lines(self) -> list[str]:
        """What came of it, for people."""
        if self.verdict is None:
            return [f"transfers went by {self._name}"]
        error = self.oracle.error()
        told = [f"transfers: the order found is {self.verdict.state}: {self.verdict.why}"]
        if self.verdict.breaks_even_at is not None:
            told.append(f"what finding it took is paid back at step {self.verdict.breaks_even_at}")
        return told + ([f"steps were foretold within {error:.0%}"] if error is not None else [])

    def to_json(self) -> dict[str, Any]:
        """The same for the record."""
        verdict = {} if self.verdict is None else asdict(self.verdict)
        return {"order": self._name, **verdict, "error": self.oracle.error(), "predicted_s": self.predicted_s}

    def keep(self) -> None:
        """For the next run of the same program."""
        if self._path is not None and self.oracle.is_measured:
            oracles.write(self._path, self.oracle)

    def _settle(self) -> None:
        if self._name in _FIXED:
            self._ours = _FIXED[self._name](self._graph)
        elif self._name != "random":
            begun = time.perf_counter()
            times = self.oracle.times(self._graph)
            self._ours = fast_tac(self._graph.forward, _forward(self._graph, times))
            self.predicted_s = makespan_s(self._graph, times, self._ours, self._how)
            by_layers = makespan_s(self._graph, times, self._layer, self._how)
            plain_s = self.oracle.foretold(by_layers)
            self._spent_s += sum(max(0.0, seconds - plain_s) for seconds in self._alone_s)
            self._spent_s += time.perf_counter() - begun
            if self._name == "auto":
                self._guard = Guard(by_layers / self.predicted_s - 1, spent_s=self._spent_s)


def _forward(graph: Graph, times: Times) -> Times:
    return Times(times.transfers, times.stages[: graph.num_forward])
