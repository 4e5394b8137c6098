"""Trains a task on a mesh: from examples to a run in the record, with checkpoints to go on from.

A run is a line of versions, as anywhere in shoal: version n is the model after n times `commit_every` steps. A checkpoint has more, all that is
needed to go on with the next step. Which examples a step takes follows from the seed and its number alone (`order.py`), so a run that goes on,
on the same mesh or another, does what it would have done.

Every process of the mesh calls the same things in the same order; only the first one writes the record.
"""

import time
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, Final, final

import jax
import numpy as np

from shoal import validate
from shoal.data.store import Examples
from shoal.local import Named, named
from shoal.lora import with_adapters
from shoal.plan.train import fields_of, ratios
from shoal.pod.batch_norm import check_group
from shoal.pod.collectives import How, Members, SumType
from shoal.pod.describe import Made
from shoal.pod.feed import Call, filled_up, placed
from shoal.pod.loss_scaling import LossScaling
from shoal.pod.mesh import DATA, MeshSpec
from shoal.pod.order import Order
from shoal.pod.piecewise import check
from shoal.pod.placement import State, Update
from shoal.pod.rules import Rules, specs
from shoal.pod.self_check import self_check
from shoal.pod.step import Program
from shoal.pod.training import Training, Watch
from shoal.task import Task
from shoal.tensors import TensorSpec

EVALUATED_BY_MEMBER: Final = 256
"""Examples of a batch of evaluation that each member has."""


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
        sums_by: How | None = None,
        batch_size: int | None = None,
        steps_per_call: int | None = None,
        accumulate: int = 1,
        scaling: LossScaling | None = None,
        remat: Sequence[str] = (),
        group: int = 1,
        window: int | None = None,
        devices: Any = None,
    ) -> None:
        """
        Args:
            task: what is learned, by `Local.optimizer`, a step a round. Its server rule and round policy are for fleets.
            mesh: such as ``data=4,model=2``; None: all devices along `data`.
            rules: glob over tensor names -> a word for each dimension (`rules.py`).
            inputs: glob over fields -> a word for each dimension of an example.
            update: `replicated`, `sharded` or `fully_sharded` (`step.py`); None: sharded, where no rule splits tensors.
            sum_type: what of gradients is on the wire.
            sums_by: the way in which processes add up, where it is right (`self_check.py`); None: the quickest that is.
            batch_size: examples of a step, of all members together; None: the task's.
            steps_per_call: steps that one call of the compiled program takes; None: the task's `steps_per_block`.
            accumulate: parts that a member's share of a batch is taken in.
            scaling: of the loss, for float16.
            remat: globs over paths of the model (`remat.py`), of which activations are made again on the way back.
            group: members whose batch statistics are taken together, of models that take them by `batch_norm.batch_moments`.
            window: examples within which they are shuffled; None: all.
            devices: of the mesh; None: all.

        Raises:
            ValueError: the mesh is not one of these devices, a rule does not fit, or the task is one for fleets only.
        """
        refuse(task)
        validate.positive(accumulate=accumulate)
        self.task = with_adapters(task)
        found = jax.devices() if devices is None else devices
        self.spec = mesh if isinstance(mesh, MeshSpec) else MeshSpec.parse(mesh or f"{DATA}={len(found)}")
        self.batch_size = task.local.batch_size if batch_size is None else batch_size
        self.steps_per_call = task.local.steps_per_block if steps_per_call is None else steps_per_call
        validate.positive(batch_size=self.batch_size, steps_per_call=self.steps_per_call)
        if self.batch_size % (self.spec.num_members * accumulate) and not task.heeds_mask:
            raise ValueError(
                f"Expected a batch that {self.spec.num_members} members share evenly in {accumulate} parts, got batch_size={self.batch_size}: task {task.name!r} does "
                "not heed the mask, so that none can be filled up."
            )
        self.window = window
        self.program = self._program(
            found, rules or {}, inputs or {}, update, sum_type, sums_by, accumulate, scaling, tuple(remat), group
        )
        self._made: dict[tuple[int, bool], Made] = {}

    def _program(
        self, devices: Any, rules: Rules, inputs: Rules, update: Update | None, sum_type: SumType, sums_by: How | None, accumulate: int,
        scaling: LossScaling | None, remat: tuple[str, ...], group: int,
    ) -> Program:  # fmt: skip
        like = jax.eval_shape(self.task.variables, jax.random.key(0))
        shapes = {name: tuple(leaf.shape) for name, leaf in named(like.params, "params").items()}
        batch = {name: (self.batch_size, *shape) for name, (shape, _) in self.task.batch.items()}
        split = specs(rules, shapes, self.spec, what="rules")
        rows = specs({glob: f"-,{words}" for glob, words in inputs.items()}, batch, self.spec, what="inputs")
        members = Members(self.spec, sum_type=sum_type)
        check_group(members, group)
        # With tensors that rules split XLA's partitioner makes operands of members' collectives whole first: a sharded update then sends more.
        is_cut = self.spec.num_members > 1 and not any(any(spec) for spec in split.values())
        chosen: Update = update or ("sharded" if is_cut else "replicated")
        made = Program(
            self.task, self.spec.build(devices), members, chosen, split,
            {name: jax.sharding.PartitionSpec(*spec[1:]) for name, spec in rows.items()}, accumulate, scaling, remat, group,
        )  # fmt: skip
        if made.is_cut:
            check(self.task.local.optimizer, *made.optimized_shapes)
        if len({device.process_index for device in made.mesh.devices.flat}) == 1:
            return made
        # Between processes: gloo's reduce-scatter has been wrong.
        return replace(made, members=replace(members, how=self_check(made.mesh, made.layout, prefer=sums_by).how))

    @property
    def num_members(self) -> int:
        """That a batch is shared by."""
        return self.spec.num_members

    def settings(self) -> dict[str, Any]:
        """How it trains, as JSON."""
        program = self.program
        return {
            "mesh": str(self.spec), "update": program.update, "sums": program.members.sum_type, "sums_by": program.members.how, "batch_size": self.batch_size,
            "steps_per_call": self.steps_per_call, "accumulate": program.accumulate, "window": self.window, "remat": list(program.remat), "batch_norm_group": program.group,
        }  # fmt: skip

    def told(self) -> list[str]:
        """What it has to say when it is over, for people."""
        return []

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
        watch: Watch | None = None,
    ) -> State:
        """Takes steps up to number `steps`, from the newest checkpoint in `folder`, from what was rescued after it (`rescue.py`), or from the beginning.

        Args:
            examples: with the task's fields.
            steps: in all.
            commit_every: steps from one version to the next.
            seed: of the initial model, the order of examples, the loss's randomness.
            held_out: examples on which versions are evaluated.
            folder: of the checkpoints; None: none are written.
            checkpoint_every: steps from one checkpoint to the next; None: at each version.
            watch: who is told what.

        Raises:
            DataError: the examples do not fit the task.
        """
        return Training(
            self, conform(examples, self.task), None if held_out is None else conform(held_out, self.task), steps=steps,
            commit_every=commit_every, checkpoint_every=checkpoint_every, seed=seed, folder=folder, watch=watch or Watch(),
        ).run()  # fmt: skip

    # Compiled programs.

    def made(self, num_steps: int, *, is_given_away: bool = True) -> Made | None:
        """The compiled program for calls of so many steps, if there is one yet."""
        return self._made.get((num_steps, is_given_away))

    def make(self, like: State, call: Call, key: np.ndarray, *, is_given_away: bool = True) -> Made:
        """Compiles the program for calls of that form; `is_given_away`: the state that it is called with is not needed any more."""
        program, begun = self.program, time.perf_counter()
        steps = jax.jit(
            program.steps,
            donate_argnums=0 if is_given_away else (),
            out_shardings=(program.shardings, program.replicated),
        )
        lowered = steps.lower(like, call.batches, call.mask, key)
        between = time.perf_counter()
        compiled = lowered.compile()
        made = self._made[call.num_steps, is_given_away] = Made(
            lowered, compiled, between - begun, time.perf_counter() - between
        )
        return made

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
        members = self.spec.num_members
        # Every batch has the same size, so that one program does.
        size = min(EVALUATED_BY_MEMBER, -(-len(examples) // members)) * members
        shardings = self.program.row_shardings(0)
        found = []
        for first in range(0, len(examples), size):
            indices = np.arange(first, min(first + size, len(examples)))
            rows, mask = filled_up(indices, np.ones(len(indices), bool), size)
            arrays = placed(examples, rows, mask, shardings)
            fields = {name: array for name, array in arrays.items() if name != "mask"}
            found.append(self._evaluate(state["params"], state["state"], fields, arrays["mask"]))
        totals: dict[str, float] = {}
        for sums in jax.device_get(found):
            for name, value in sums.items():
                totals[name] = totals.get(name, 0.0) + float(value)
        return ratios(totals)


def conform(examples: Examples, task: Task) -> Examples:
    """The fields that the task reads, in its types. Raises DataError where they are not there."""
    batch = [TensorSpec(name=n, shape=tuple(shape), dtype=dtype) for n, (shape, dtype) in sorted(task.batch.items())]
    return fields_of(examples, task.name, batch)


def refuse(task: Task) -> None:
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
    if task.local.holdout:
        raise ValueError(
            f"Expected Local(holdout=0) on a pod, got {task.local.holdout!r} in task {task.name!r}: what is held out is given apart (held_out=…, --held-out)."
        )
    if task.aggregator != "weighted_mean":
        raise ValueError(f"Expected a task that trains on a pod, got aggregation by {task.aggregator!r}.")
