"""Trains a task on a mesh: from examples to a run in the record, with checkpoints to go on from.

A run is a line of versions, as anywhere in shoal: version n is the model after n times `commit_every` steps. A checkpoint has more, all that is
needed to go on with the next step. Which examples a step takes follows from the seed and its number alone (`order.py`), so a run that goes on,
on the same mesh or another, does what it would have done.

Every process of the mesh calls the same things in the same order; only the first one writes the record.
"""

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Final, final

import jax
import numpy as np

from shoal import validate
from shoal.data.store import Examples
from shoal.errors import DataError, StoreError
from shoal.local import Named, named
from shoal.lora import with_adapters
from shoal.plan.train import fields_of, ratios
from shoal.pod.checkpoint import Checkpoints
from shoal.pod.collectives import Members, SumType
from shoal.pod.feed import Call, Feed, filled_up, placed
from shoal.pod.loss_scaling import LossScaling
from shoal.pod.mesh import DATA, MeshSpec
from shoal.pod.order import Order
from shoal.pod.piecewise import check
from shoal.pod.placement import State, Update
from shoal.pod.rules import Rules, specs
from shoal.pod.step import Program
from shoal.task import Task
from shoal.tensors import TensorSpec

EVALUATED_BY_MEMBER: Final = 256
"""Examples of a batch of evaluation that each member has."""


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Where a training stands after a call."""

    step: int
    last: int
    """The step that it ends with."""
    metrics: Mapping[str, float]
    """Of the examples since the last version."""
    steps_per_s: float
    """Since this session began, compilation apart; 0 while unknown."""

    @property
    def left_s(self) -> float:
        """Seconds until the end, if it goes on like this; infinite while unknown."""
        return (self.last - self.step) / self.steps_per_s if self.steps_per_s else float("inf")


@dataclass(frozen=True, kw_only=True)
class Version:
    """What was reached at a commit."""

    version: int
    step: int
    examples: int
    """That its steps saw."""
    model: Named = field(repr=False)
    """Whole tensors, on this process's devices."""
    training: Mapping[str, float]
    """The loss's metrics over its steps."""
    metrics: Mapping[str, float]
    """On what is held out."""
    seconds: Mapping[str, float]
    """By phase, since the last version: compile, wait (for examples), compute, evaluate, commit."""


@final
class Trainer:
    """A task on a mesh, ready to be trained."""

    def __init__(
        self,
        task: Task,
        *,
        mesh: str | MeshSpec | None = None,
        rules: Rules | None = None,
        inputs: Rules | None = None,
        update: Update | None = None,
        sum_type: SumType = "float32",
        batch_size: int | None = None,
        steps_per_call: int | None = None,
        accumulate: int = 1,
        scaling: LossScaling | None = None,
        remat: Sequence[str] = (),
        window: int | None = None,
        devices: Any = None,
    ) -> None:
        """
        Args:
            task: what is learned, by `Local.optimizer`, a step a round. Its server rule and round policy are for fleets.
            mesh: such as ``data=4,model=2``; None: all devices along `data`.
            rules: glob over tensor names -> a word for each dimension (`rules.py`).
            inputs: glob over fields -> a word for each dimension of an example.
            update: `replicated`, `sharded` or `fully_sharded` (`step.py`); None: sharded where the optimizer can be.
            sum_type: what of gradients is on the wire.
            batch_size: examples of a step, of all members together; None: the task's.
            steps_per_call: steps that one call of the compiled program takes; None: the task's `steps_per_block`.
            accumulate: parts that a member's share of a batch is taken in.
            scaling: of the loss, for float16.
            remat: globs over paths of the model (`remat.py`), of which activations are made again on the way back.
            window: examples within which they are shuffled; None: all.
            devices: of the mesh; None: all.

        Raises:
            ValueError: the mesh is not one of these devices, a rule does not fit, or the task is one for fleets only.
        """
        _refuse(task)
        validate.positive(accumulate=accumulate)
        self.task = with_adapters(task)
        found = jax.devices() if devices is None else devices
        self.spec = mesh if isinstance(mesh, MeshSpec) else MeshSpec.parse(mesh or f"{DATA}={len(found)}")
        self.batch_size = batch_size or task.local.batch_size
        self.steps_per_call = steps_per_call or task.local.steps_per_block
        validate.positive(batch_size=self.batch_size, steps_per_call=self.steps_per_call)
        if self.batch_size % (self.spec.num_members * accumulate) and not task.heeds_mask:
            raise ValueError(
                f"Expected a batch that {self.spec.num_members} members share evenly in {accumulate} parts, got batch_size={self.batch_size}: task {task.name!r} does "
                "not heed the mask, so that none can be filled up."
            )
        self.window = window
        self.program = self._program(
            found, rules or {}, inputs or {}, update, sum_type, accumulate, scaling, tuple(remat)
        )
        self._compiled: dict[int, Any] = {}

    def _program(
        self, devices: Any, rules: Rules, inputs: Rules, update: Update | None, sum_type: SumType, accumulate: int, scaling: LossScaling | None,
        remat: tuple[str, ...],
    ) -> Program:  # fmt: skip
        like = jax.eval_shape(self.task.variables, jax.random.key(0))
        shapes = {name: tuple(leaf.shape) for name, leaf in named(like.params, "params").items()}
        batch = {name: (self.batch_size, *shape) for name, (shape, _) in self.task.batch.items()}
        split = specs(rules, shapes, self.spec, what="rules")
        rows = specs({glob: f"-,{words}" for glob, words in inputs.items()}, batch, self.spec, what="inputs")
        members = Members(self.spec, sum_type=sum_type)
        chosen: Update = update or ("sharded" if self.spec.num_members > 1 else "replicated")
        made = Program(
            self.task, self.spec.build(devices), members, chosen, split,
            {name: jax.sharding.PartitionSpec(*spec[1:]) for name, spec in rows.items()}, accumulate, scaling, remat,
        )  # fmt: skip
        if made.is_cut:
            check(self.task.local.optimizer, *made.optimized_shapes)
        return made

    def settings(self) -> dict[str, Any]:
        """How it trains, as JSON."""
        program = self.program
        return {
            "mesh": str(self.spec), "update": program.update, "sums": program.members.sum_type, "batch_size": self.batch_size,
            "steps_per_call": self.steps_per_call, "accumulate": program.accumulate, "window": self.window, "remat": list(program.remat),
        }  # fmt: skip

    def order(self, num_examples: int, *, seed: int) -> Order:
        """Which examples its batches have."""
        local = self.task.local
        whole = local.drop_remainder or not self.task.heeds_mask
        return Order(
            num_examples=num_examples, batch_size=self.batch_size, seed=seed, window=self.window, drop_remainder=whole
        )

    def train(
        self,
        examples: Examples,
        *,
        steps: int,
        commit_every: int,
        seed: int = 0,
        held_out: Examples | None = None,
        folder: Path | None = None,
        checkpoint_every: int | None = None,
        on_version: Callable[[Version], None] = lambda version: None,
        on_call: Callable[[Progress], None] = lambda progress: None,
        should_stop: Callable[[int], bool] = lambda step: False,
    ) -> State:
        """Takes steps up to number `steps`, from the newest checkpoint in `folder` or from the beginning.

        Args:
            examples: with the task's fields.
            steps: in all.
            commit_every: steps from one version to the next.
            seed: of the initial model, the order of examples, the loss's randomness.
            held_out: examples on which versions are evaluated.
            folder: of the checkpoints; None: none are written.
            checkpoint_every: steps from one checkpoint to the next; None: at each version.
            on_version: told of each.
            on_call: told of each call of the compiled program.
            should_stop: asked after each call, with the steps taken; yes: a checkpoint is written, and it ends.

        Raises:
            DataError: the examples do not fit the task.
        """
        return _Session(self, examples, held_out, steps, commit_every, checkpoint_every, seed, folder).run(
            on_version, on_call, should_stop
        )

    # Compiled programs.

    def steps(self, like: State, call: Call, key: np.ndarray) -> Any:
        """The compiled program for calls of that many steps."""
        if call.num_steps not in self._compiled:
            run = jax.jit(
                self.program.steps, donate_argnums=0, out_shardings=(self.program.shardings, self.program.replicated)
            )
            lowered = run.lower(like, call.batches, call.mask, key)
            self._compiled[call.num_steps] = lowered.compile()
        return self._compiled[call.num_steps]

    @cached_property
    def _evaluate(self) -> Any:
        return jax.jit(self.program.evaluate)

    @cached_property
    def _whole(self) -> Any:
        return jax.jit(self.program.whole, out_shardings=self.program.replicated)

    def whole(self, state: State) -> Named:
        """The model of a State, each tensor whole on every device."""
        made: Named = dict(sorted((self._whole(state["params"]) | state["state"]).items()))
        return made

    def evaluate(self, state: State, examples: Examples) -> dict[str, float]:
        """The task's metrics over all the examples, each counted once. They are fetched once, at the end."""
        size = EVALUATED_BY_MEMBER * self.spec.num_members
        shardings = self.program.row_shardings(0)
        found = []
        for first in range(0, len(examples), size):
            indices = np.arange(first, min(first + size, len(examples)))
            rows, mask = filled_up(
                indices, np.ones(len(indices), bool), min(size, max(self.spec.num_members, len(examples)))
            )
            rows, mask = filled_up(rows, mask, self.spec.num_members)
            arrays = placed(examples, rows, mask, shardings)
            fields = {name: array for name, array in arrays.items() if name != "mask"}
            found.append(self._evaluate(state["params"], state["state"], fields, arrays["mask"]))
        totals: dict[str, float] = {}
        for sums in jax.device_get(found):
            for name, value in sums.items():
                totals[name] = totals.get(name, 0.0) + float(value)
        return ratios(totals)


@final
class _Session:
    """One training, from where it stands."""

    def __init__(
        self, trainer: Trainer, examples: Examples, held_out: Examples | None, steps: int, commit_every: int, checkpoint_every: int | None,
        seed: int, folder: Path | None,
    ) -> None:  # fmt: skip
        validate.positive(steps=steps, commit_every=commit_every, checkpoint_every=checkpoint_every or 1)
        self._trainer, self._program = trainer, trainer.program
        self._examples = conform(examples, trainer.task)
        self._held_out = None if held_out is None else conform(held_out, trainer.task)
        if held_out is not None and trainer.task.evaluate is None:
            raise DataError(f"Task {trainer.task.name!r} has no evaluate: leave out held_out, or give the task one.")
        self._last, self._commit_every, self._seed = steps, commit_every, seed
        self._checkpoint_every = checkpoint_every or commit_every
        self._checkpoints = None if folder is None else Checkpoints(folder)
        self._key = np.frombuffer(hashlib.sha256(f"shoal pod {seed}".encode()).digest()[:8], "<u4")
        self._number = 0
        """Of the last version."""
        self._running: Any = None
        """Metric sums of the call that was begun last."""
        self._sums: dict[str, float] = {}
        """Since the last version."""
        self._seconds: dict[str, float] = {}
        self._lap_s = 0.0

    def run(
        self,
        on_version: Callable[[Version], None],
        on_call: Callable[[Progress], None],
        should_stop: Callable[[int], bool],
    ) -> State:
        """See `Trainer.train`."""
        try:
            return self._run(on_version, on_call, should_stop)
        finally:
            if self._checkpoints is not None:
                self._checkpoints.close()

    def _run(
        self,
        on_version: Callable[[Version], None],
        on_call: Callable[[Progress], None],
        should_stop: Callable[[int], bool],
    ) -> State:
        trainer, began_s = self._trainer, time.perf_counter()
        state, first = self._begin()
        order = trainer.order(len(self._examples), seed=self._seed)
        feed = Feed(
            self._examples, order, self._program.row_shardings(1), first=first, last=self._last,
            steps_per_call=trainer.steps_per_call, ends=self._commit_every, multiple=trainer.spec.num_members * self._program.accumulate,
        )  # fmt: skip
        self._lap_s = began_s
        self._took("begin")
        pace = _Pace()
        with closing(feed):
            for call in feed:
                self._took("wait")
                run = trainer.steps(state, call, self._key)
                self._took("compile")
                state, sums = run(state, call.batches, call.mask, self._key)
                self._add()  # those of the call before, while this one runs
                self._running, step = sums, call.first + call.num_steps
                is_over = should_stop(step)
                if step % self._commit_every == 0 or step == self._last or is_over:
                    self._add()
                self._took("compute")
                rate = pace.at(step)
                on_call(Progress(step=step, last=self._last, metrics=ratios(self._sums), steps_per_s=rate))
                if step % self._commit_every == 0 or step == self._last:
                    on_version(self._version(state, step))
                    self._took("commit")
                if self._checkpoints and (step % self._checkpoint_every == 0 or step == self._last or is_over):
                    self._checkpoints.save(step, state, self._kept(step))
                    self._took("checkpoint")
                if is_over:
                    break
        return state

    def _begin(self) -> tuple[State, int]:
        program, checkpoints = self._program, self._checkpoints
        key = jax.random.key(self._seed)
        latest = None if checkpoints is None else checkpoints.latest()
        if checkpoints is None or latest is None:
            return program.begin(key), 0
        about = checkpoints.about(latest)
        self._refuse_other(about)
        self._number, self._sums = int(about["version"]), {n: float(value) for n, value in about["sums"].items()}
        like = jax.eval_shape(program.beginning, key)
        return checkpoints.restore(latest, like, program.shardings), latest

    def _refuse_other(self, about: Mapping[str, Any]) -> None:
        """Raises StoreError where steps would not be those that a checkpoint's run would have taken."""
        own = self._kept(0)
        for name in ("seed", "batch_size", "examples", "window", "commit_every"):
            if about[name] != own[name]:
                raise StoreError(
                    f"The run began with {name}={about[name]!r}, and would go on with {own[name]!r}: its steps would be others. Go on with what it "
                    "began with, or begin anew in another folder."
                )

    def _kept(self, step: int) -> dict[str, Any]:
        """What a checkpoint has beside the state. The sums are of the steps since the last version."""
        return {
            "seed": self._seed, "batch_size": self._trainer.batch_size, "examples": len(self._examples), "window": self._trainer.window,
            "commit_every": self._commit_every, "version": self._number, "sums": self._sums if step % self._commit_every else {},
        }  # fmt: skip

    def _version(self, state: State, step: int) -> Version:
        training = ratios(self._sums)
        self._number += 1
        seen, self._sums = self._sums.get("loss/denominator", 0.0), {}
        self._took("commit")
        metrics = {} if self._held_out is None else self._trainer.evaluate(state, self._held_out)
        self._took("evaluate")
        model = self._trainer.whole(state)
        self._took("commit")
        seconds, self._seconds = self._seconds, {}
        return Version(
            version=self._number,
            step=step,
            examples=round(seen),
            model=model,
            training=training,
            metrics=metrics,
            seconds=seconds,
        )

    def _add(self) -> None:
        """The metric sums of the call that was begun last go into those since the last version."""
        if self._running is not None:
            for name, values in jax.device_get(self._running).items():
                self._sums[name] = self._sums.get(name, 0.0) + float(np.sum(values, dtype=np.float64))
        self._running = None

    def _took(self, phase: str) -> None:
        """The time since this was last called went into `phase`."""
        now_s = time.perf_counter()
        self._seconds[phase] = self._seconds.get(phase, 0.0) + now_s - self._lap_s
        self._lap_s = now_s


@final
class _Pace:
    """Steps a second, without the first call, which has compilation in it."""

    def __init__(self) -> None:
        self._from: tuple[int, float] | None = None

    def at(self, step: int) -> float:
        """At a step that was reached just now; 0 while unknown."""
        now_s = time.perf_counter()
        if self._from is None:
            self._from = (step, now_s)
            return 0.0
        began, began_s = self._from
        return (step - began) / max(now_s - began_s, 1e-9)


def conform(examples: Examples, task: Task) -> Examples:
    """The fields that the task reads, in its types. Raises DataError where they are not there."""
    batch = [TensorSpec(name=n, shape=tuple(shape), dtype=dtype) for n, (shape, dtype) in sorted(task.batch.items())]
    return fields_of(examples, task.name, batch)


def _refuse(task: Task) -> None:
    """Raises ValueError for what is about members that are not trusted, or not alike."""
    if task.rule is not None:
        made = ", ".join(task.algorithms) or "a local rule of its own"
        raise ValueError(
            f"Expected a task that takes plain steps on a pod, got {made} in task {task.name!r}: that is for devices."
        )
    privacy = task.privacy
    if privacy.clip_norm is not None or privacy.noise_multiplier or privacy.examples is not None:
        raise ValueError(
            f"Expected Privacy() without clipping and noise on a pod, got that of task {task.name!r}: on a pod nobody's update is told from another's, "
            "so that nothing would be protected. Train on simulated devices or a fleet, or take task.replace(privacy=shoal.Privacy())."
        )
    if task.aggregator != "weighted_mean":
        raise ValueError(f"Expected a task that trains on a pod, got aggregation by {task.aggregator!r}.")
