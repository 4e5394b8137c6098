"""One training, step by step: calls of the compiled program, what is fetched when, versions, checkpoints, and what is told of it.

feed --call--> program --sums (k,)--> fetched while the next call runs --> Progress
                  |                                                            every commit_every steps --> Version
                  +--state, every checkpoint_every steps --> Checkpoints --> members agree whether to pause
"""

import hashlib
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

import jax
import numpy as np

from shoal import validate
from shoal.data.store import Examples
from shoal.errors import DataError, StoreError
from shoal.local import Named
from shoal.plan.train import ratios
from shoal.pod import rescue
from shoal.pod.checkpoint import Checkpoints
from shoal.pod.describe import Made
from shoal.pod.feed import Call, Feed
from shoal.pod.placement import State
from shoal.pod.rescue import Rescue
from shoal.pod.seeing import Seeing
from shoal.pod.seen import MemberSeen
from shoal.pod.worker import Marks, Worker

if TYPE_CHECKING:
    from shoal.pod.trainer import Trainer

log = logging.getLogger("shoal.pod")


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Where a training stands after a call."""

    step: int
    last: int
    """The step that it ends with."""
    metrics: Mapping[str, float]
    """Of the examples since the last version."""
    steps_per_s: float
    """Since training was begun or taken up, compilation apart; 0 while unknown."""

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
    members: Sequence[MemberSeen] = ()
    """What each process saw since then; none with parameter servers."""


@dataclass(frozen=True, kw_only=True)
class Watch:
    """Who is told what."""

    on_made: Callable[[Made, Call], None] = lambda made, call: None
    """A program was compiled, for calls of that form."""
    on_call: Callable[[Progress], None] = lambda progress: None
    on_version: Callable[[Version], None] = lambda version: None
    should_stop: Callable[[int], bool] = lambda step: False
    """Asked after each call, with the steps taken; yes: a checkpoint is written, and it ends. The same answer in all processes."""
    pod: Worker = field(default_factory=lambda: Worker(None, Marks(None)))
    """This process as a member of a pod whose members come and go."""


@final
class Training:
    """One training, from where it stands."""

    def __init__(
        self, trainer: "Trainer", examples: Examples, held_out: Examples | None, *, steps: int, commit_every: int, checkpoint_every: int | None,
        seed: int, folder: Path | None, watch: Watch,
    ) -> None:  # fmt: skip
        """Arguments as for `Trainer.train`; the examples have the task's fields and types."""
        validate.positive(steps=steps, commit_every=commit_every, checkpoint_every=checkpoint_every or 1)
        if held_out is not None and trainer.task.evaluate is None:
            raise DataError(f"Task {trainer.task.name!r} has no evaluate: leave out held_out, or give the task one.")
        self._trainer, self._program, self._watch = trainer, trainer.program, watch
        self._examples, self._held_out = examples, held_out
        self._last, self._commit_every, self._seed = steps, commit_every, seed
        self._checkpoint_every = checkpoint_every or commit_every
        self._checkpoints = None if folder is None else Checkpoints(folder)
        self._rescue: Rescue | None = None
        self._is_first = jax.process_index() == 0
        self._key = np.frombuffer(hashlib.sha256(f"shoal pod {seed}".encode()).digest()[:8], "<u4")
        self._number = 0
        """Of the last version."""
        self._running: tuple[int, Any] | None = None
        """The step that the call that was begun last ends with, and its metric sums."""
        self._saving: int | None = None
        """The step of the checkpoint that was begun last."""
        self._sums: dict[str, float] = {}
        """Since the last version."""
        self._laps = Laps()
        self._seeing = Seeing(watch.pod.life)

    def run(self) -> State:
        """See `Trainer.train`."""
        try:
            state = self._run()
        except SystemExit:
            raise
        except BaseException:
            self._watch.pod.end()  # before anybody waits for those who are gone
            raise
        finally:
            if self._checkpoints is not None:
                self._checkpoints.close()
        if self._rescue is not None:
            self._rescue.let_go()
        if self._checkpoints is not None and self._saving is not None:
            rescue.forget(self._checkpoints.folder, up_to=self._saving)
        return state

    def _run(self) -> State:
        trainer, marks, pace = self._trainer, self._watch.pod.marks, Pace()
        state, first = self._begin()
        is_watched = self._watch.pod.assignment is not None
        if self._checkpoints is not None and is_watched and rescue.can_hold(state):
            self._rescue = Rescue(self._checkpoints.folder)
            self._watch.pod.at_end(self._rescue.write)
        order = trainer.order(len(self._examples), seed=self._seed)
        feed = Feed(
            self._examples, order, self._program.row_shardings(1), first=first, last=self._last,
            steps_per_call=trainer.steps_per_call, ends=self._commit_every, multiple=trainer.spec.num_members * self._program.accumulate,
        )  # fmt: skip
        self._laps.took("begin")
        with closing(feed):
            for call in feed:
                waited_s = self._laps.took("wait")
                run = self._compiled(state, call)
                step = call.first + call.num_steps
                marks.begin(step)
                before, (state, sums) = state, run(state, call.batches, call.mask, self._key)
                self._add()  # those of the call before, while this one runs
                # At a version the first process alone knows that it is in the record, until the next call's sums are there.
                if self._rescue is not None and (self._is_first or call.first % self._commit_every):
                    self._rescue.hold(call.first, before, self._kept(call.first))
                self._running = step, sums
                is_over = self._watch.should_stop(step)
                is_version = step % self._commit_every == 0 or step == self._last
                if is_version or is_over:
                    self._add()
                self._seeing.saw(call.num_steps, waited_s=waited_s, worked_s=self._laps.took("compute"))
                self._watch.on_call(
                    Progress(step=step, last=self._last, metrics=ratios(self._sums), steps_per_s=pace.at(step))
                )
                if is_version:
                    self._tell(state, step)
                if step % self._checkpoint_every == 0 or step == self._last or is_over:
                    self._save(state, step)
                if is_over:
                    break
        return state

    def _compiled(self, state: State, call: Call) -> Any:
        """The program for calls of that form."""
        is_given_away = self._rescue is None
        if (made := self._trainer.made(call.num_steps, is_given_away=is_given_away)) is None:
            self._watch.pod.marks.doing("compiling")
            made = self._trainer.make(state, call, self._key, is_given_away=is_given_away)
            self._laps.took("compile")
            self._watch.on_made(made, call)
            self._laps.took("describe")
        self._watch.pod.marks.doing("training")
        return made.compiled

    def _save(self, state: State, step: int) -> None:
        if self._checkpoints is None:
            return
        pod = self._watch.pod
        pod.marks.doing("saving")
        self._checkpoints.save(step, state, self._kept(step))
        if self._saving is not None:  # there is one at a time, so the one before is whole
            pod.marks.saved(self._saving)
            rescue.forget(self._checkpoints.folder, up_to=self._saving)
        self._saving = step
        if pod.assignment is not None and pod.agree_to_pause() and step < self._last:
            self._checkpoints.wait()
            pod.marks.saved(step)
            pod.pause()
        self._laps.took("checkpoint")

    def _tell(self, state: State, step: int) -> None:
        self._watch.pod.marks.doing("evaluating")
        self._watch.on_version(self._version(state, step))
        self._laps.took("commit")

    def _begin(self) -> tuple[State, int]:
        program, checkpoints = self._program, self._checkpoints
        key = jax.random.key(self._seed)
        if checkpoints is None:
            return program.begin(key), 0
        latest = checkpoints.latest()
        rescued = rescue.agreed(checkpoints.folder, beyond=-1 if latest is None else latest)
        like = jax.eval_shape(program.beginning, key)
        if rescued is not None:
            state, about = rescue.read(checkpoints.folder, rescued, like, program.shardings)
            self._take_up(about)
            log.info("goes on from step %d, which was rescued when the training ended last", rescued)
            return state, rescued
        if latest is None:
            return program.begin(key), 0
        self._take_up(checkpoints.about(latest))
        log.info("goes on from the checkpoint of step %d", latest)
        return checkpoints.restore(latest, like, program.shardings), latest

    def _take_up(self, about: Mapping[str, Any]) -> None:
        self._refuse_other(about)
        self._number, self._sums = int(about["version"]), {n: float(value) for n, value in about["sums"].items()}

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
            "commit_every": self._commit_every, "version": self._number, "sums": dict(self._sums) if step % self._commit_every else {},
        }  # fmt: skip

    def _version(self, state: State, step: int) -> Version:
        training = ratios(self._sums)
        self._number += 1
        seen, self._sums = self._sums.get("loss/denominator", 0.0), {}
        self._laps.took("commit")
        metrics = {} if self._held_out is None else self._trainer.evaluate(state, self._held_out)
        self._laps.took("evaluate")
        model = self._trainer.whole(state)
        self._laps.took("commit")
        return Version(
            version=self._number,
            step=step,
            examples=round(seen),
            model=model,
            training=training,
            metrics=metrics,
            seconds=self._laps.taken(),
            members=self._seeing.gathered(),
        )

    def _add(self) -> None:
        """The metric sums of the call that was begun last go into those since the last version."""
        if self._running is not None:
            step, sums = self._running
            for name, values in jax.device_get(sums).items():
                self._sums[name] = self._sums.get(name, 0.0) + float(np.sum(values, dtype=np.float64))
            self._watch.pod.marks.done(step)
        self._running = None


@final
class Laps:
    """Into which phases time goes."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}
        self._since_s = time.perf_counter()

    def took(self, phase: str) -> float:
        """The time since this was last called went into `phase`. Returns it, in seconds."""
        now_s = time.perf_counter()
        lap_s, self._since_s = now_s - self._since_s, now_s
        self._seconds[phase] = self._seconds.get(phase, 0.0) + lap_s
        return lap_s

    def taken(self) -> dict[str, float]:
        """Seconds by phase, since this was last called."""
        seconds, self._seconds = self._seconds, {}
        return seconds


@final
class Pace:
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
