"""A worker's training: its share of every batch, step by step; the first worker also tells progress and versions.

Order --batch--> Step --one_step.taken--> gradients                at every version: whole parameters --evaluated--> Watch
   Choice --ranks of the next step--^ |
      ^--what the step took-----------+
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final, final

import jax
import numpy as np

from shoal.data.store import Examples
from shoal.local import Named, evaluator, named
from shoal.plan.train import ratios
from shoal.pod.order import Order
from shoal.pod.servers.choice import Choice
from shoal.pod.servers.exchange import Exchange, rate, whole
from shoal.pod.servers.one_step import Following, Seen, taken
from shoal.pod.training import Laps, Pace, Progress, Version, Watch
from shoal.schedule.staged import Step

RATE_PULLS: Final = 2
"""Of all parameters, to measure a line by."""
EVALUATED: Final = 256
"""Examples of a batch of evaluation."""


@dataclass(frozen=True, kw_only=True)
class Course:
    """What all workers of a training have in common."""

    step: Step
    order: Order
    examples: Examples
    held_out: Examples | None
    first: int
    """Steps that are done already."""
    steps: int
    commit_every: int
    checkpoint_every: int
    seed: int
    num_workers: int
    ahead: bool
    """A step's parameters are asked for while the step before is computed."""
    watch: Watch

    def is_early(self, step: int) -> bool:
        """Whether a step's parameters are asked for before the update of the step before: not at versions and checkpoints, so that a run that goes on from one does
        as it would have done."""
        return self.ahead and step < self.steps and bool(step % self.commit_every and step % self.checkpoint_every)


@final
class WorkerTraining:
    """Of one worker."""

    def __init__(self, course: Course, worker: int, exchange: Exchange, choice: Choice) -> None:
        """
        Args:
            course: of all workers.
            worker: its number; 0 evaluates versions and tells the watch.
            exchange: its lines to the servers.
            choice: of the order of its transfers.
        """
        self._course, self._worker, self._exchange, self._choice = course, worker, exchange, choice
        variables = course.step.task.variables(jax.random.key(course.seed))
        params = named(variables.params, "params")
        self._frozen = {name: params[name] for name in params if name not in course.step.learned}
        self._state = named(variables.state, "state")
        self._sums: dict[str, float] = {}
        """Of metrics, since the last version."""
        self._laps = Laps()

    def run(self) -> dict[str, Any]:
        """Takes all steps.

        Returns:
            ``step``, and ``params``: name -> tensor, in the first worker.

        Raises:
            TransportError: a server is gone.
        """
        course, exchange, marks, pace = self._course, self._exchange, self._course.watch.pod.marks, Pace()
        batches = course.order.steps(course.first)
        ranks = self._choice.ranks()
        if self._choice.needs_rate:
            for _ in range(RATE_PULLS):
                self._choice.saw_sent(*rate(exchange, course.first, ranks))
        params: Named = {}
        exchange.pull(course.first, ranks)
        number = course.first // course.commit_every
        marks.doing("training")
        pending: Any = None
        for step in range(course.first, course.steps):
            indices, mask = next(batches)
            marks.begin(step + 1)
            following = self._choice.ranks()
            metrics, seen = self._take(step, indices, mask, ranks, Following(following, course.is_early(step + 1)))
            ranks = following
            self._add(pending)
            pending = metrics
            marks.done(step + 1)
            is_version = (step + 1) % course.commit_every == 0 or step + 1 == course.steps
            if is_version:
                self._add(pending)
                pending = None
            self._laps.took("compute")
            if self._worker == 0:
                progress = Progress(
                    step=step + 1, last=course.steps, metrics=ratios(self._sums), steps_per_s=pace.at(step + 1)
                )
                course.watch.on_call(progress)
            if is_version:
                number += 1
                if self._worker == 0:
                    params = course.step.whole(whole(exchange))
                    self._tell(step + 1, number, params)
                    if step + 1 < course.steps:
                        exchange.pull(step + 1, ranks)  # once more, for the step itself
                self._sums = {}
            self._choice.took(seen)
            if self._worker == 0 and step + 1 < course.steps and course.watch.should_stop(step + 1):
                params = whole(exchange)
                if course.is_early(step + 1):
                    exchange.pull(step + 1, ranks)
                    params = whole(exchange)
                return {"step": step + 1, "params": course.step.whole(params) | self._frozen}
        self._choice.keep()
        return {"step": course.steps, "params": params | self._frozen}

    def _take(
        self, step: int, indices: np.ndarray, mask: np.ndarray, ranks: np.ndarray, following: Following
    ) -> tuple[Any, Seen]:
        course = self._course
        rows, seen = (np.split(each, course.num_workers)[self._worker] for each in (indices, mask))
        batch = {name: values[rows] for name, values in course.examples.fields.items()} | {"mask": seen}
        # Of all workers, whoever waits for whom: each gradient counts for its share of the batch, and a step is as long in every mode.
        count = np.float32(max(1, mask.sum()))
        key = np.array([course.seed & 0xFFFFFFFF, (step * course.num_workers + self._worker) & 0xFFFFFFFF], np.uint32)
        run = course.step.begin(self._frozen, self._state, batch, count, key)
        self._laps.took("wait")
        seen_step = taken(
            run, course.step.staged, self._exchange, step=step, ranks=ranks, following=following, is_alone=self._choice.is_alone
        )  # fmt: skip
        _, self._state, metrics = course.step.returned(run)
        return metrics, seen_step

    def _add(self, metrics: Any) -> None:
        if metrics is not None:
            for name, value in jax.device_get(metrics).items():
                self._sums[name] = self._sums.get(name, 0.0) + float(value)

    def _tell(self, step: int, number: int, params: Mapping[str, Any]) -> None:
        course = self._course
        course.watch.pod.marks.doing("evaluating")
        model = dict(sorted((dict(params) | self._frozen | self._state).items()))
        metrics = {} if course.held_out is None else self._evaluate(model, course.held_out)
        self._laps.took("evaluate")
        course.watch.on_version(
            Version(
                version=number, step=step, examples=round(self._sums.get("loss/denominator", 0.0) * course.num_workers), model=model,
                training=ratios(self._sums), metrics=metrics, seconds=self._laps.taken(),
            )
        )  # fmt: skip
        self._laps.took("commit")
        course.watch.pod.marks.doing("training")

    def _evaluate(self, model: Named, held_out: Examples) -> dict[str, float]:
        size = min(EVALUATED, len(held_out))
        totals: dict[str, float] = {}
        for begin in range(0, len(held_out), size):
            rows = np.arange(begin, min(begin + size, len(held_out)))
            batch = dict(held_out.take(np.resize(rows, size)))
            sums = self._evaluation(model, batch, np.arange(size) < len(rows))
            for name, value in jax.device_get(sums).items():
                totals[name] = totals.get(name, 0.0) + float(value)
        return ratios(totals)

    @cached_property
    def _evaluation(self) -> Any:
        function = evaluator(self._course.step.task)
        assert function is not None
        return jax.jit(function)
