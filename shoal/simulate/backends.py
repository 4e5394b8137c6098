"""What trains a cohort: `Sequential`, the plan's own programs as a device runs them, or `FusedCohorts`, one program for all.

Given the same members `Sequential` commits the same bits as a fleet (rule 7 of the design); `FusedCohorts` agrees to
rounding, many times faster. Both leave the sums of the cohort in an `Accumulator`; what follows is the fleet's own code.
"""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from shoal.aggregate.accumulator import Accumulator
from shoal.data.store import Population
from shoal.errors import DataError, UpdateRefused
from shoal.fleet.configuration import Configuration
from shoal.plan.manifest import Manifest
from shoal.plan.runner import Runner, Update
from shoal.plan.train import train
from shoal.simulate.cohort import MEND_DATA, MEND_UPDATE, Cohort, Stage
from shoal.simulate.device_states import DeviceStates
from shoal.simulate.fused import Fused
from shoal.tensors import Tensors

log = logging.getLogger("shoal.simulate")


@dataclass(frozen=True)
class Cohorts:
    """Who trains in a round; and in the next, where there is one, so that it can be made ready meanwhile."""

    configuration: Configuration
    members: tuple[str, ...]
    next_seed: bytes = b""
    next_members: tuple[str, ...] = ()


@dataclass(frozen=True)
class Trained:
    """A cohort that has trained."""

    sums: Accumulator
    seconds: dict[str, float]
    """By phase."""


@runtime_checkable
class Backend(Protocol):
    """Trains cohorts; what members keep between rounds is in `DeviceStates`."""

    def train(self, round: "Cohorts", root: str, model: Tensors) -> Trained:
        """Trains a cohort on the model with that root. Raises DataError naming a member that cannot be used."""
        ...


class Sequential:
    """One member after the other, by a `Runner`."""

    def __init__(self, runner: Runner, manifest: Manifest, population: Population, states: DeviceStates) -> None:
        self._runner, self._manifest, self._population, self._states = runner, manifest, population, states
        self._compile_s = runner.compile()

    def train(self, round: Cohorts, root: str, model: Tensors) -> Trained:
        if not self._runner.has_model(root):
            self._runner.set_model(root, model)
        sums = round.configuration.accumulator(self._manifest)
        seconds = {"compile": self._compile_s} if self._compile_s else {}
        self._compile_s = 0.0
        version = round.configuration.base_version
        self._states.settle(version)
        with self._states.writing(version + 1) as keep:
            for member in round.members:
                update = self._train(round, root, member, sums)
                keep(member, update.device_state)
                for phase, value in update.seconds.items():
                    seconds[phase] = seconds.get(phase, 0.0) + value
        return Trained(sums, seconds)

    def _train(self, round: Cohorts, root: str, member: str, sums: Accumulator) -> Update:
        try:
            update = train(
                self._runner, self._manifest, root, self._population[member], self._states.read(member),
                seed=round.configuration.seed, member=member, noise_seed=round.configuration.seed,
            )  # fmt: skip
            sums.add(update.sums, weight=update.weight)
        except (DataError, UpdateRefused, ValueError) as error:
            hint = MEND_UPDATE if isinstance(error, UpdateRefused) else MEND_DATA
            raise DataError(f"Member {member!r} cannot be used: {error} {hint}") from error
        return update


@dataclass(frozen=True)
class Attempt:
    """A cohort that can be trained with any engine, again and again: nothing is kept of it."""

    round: Cohorts
    cohort: Cohort
    states: Sequence[Tensors | None]
    root: str
    model: Tensors

    def __call__(
        self, fused: Fused, *, meanwhile: Callable[[], None] = lambda: None
    ) -> tuple[Accumulator, list[Tensors]]:
        """Its sums, and what each member keeps."""
        return fused.sums(
            self.round.configuration, self.round.members, self.cohort, self.states, root=self.root, model=self.model,
            meanwhile=meanwhile,
        )  # fmt: skip


class FusedCohorts:
    """All members in one program; the next cohort is made ready meanwhile."""

    def __init__(self, make: Callable[[Attempt], Fused], stage: Stage, states: DeviceStates) -> None:
        """`make` makes the engine when the first cohort is at hand."""
        self._make, self._stage, self._states = make, stage, states
        self._fused: Fused | None = None
        self._ahead: tuple[bytes, Cohort] | None = None

    def train(self, round: Cohorts, root: str, model: Tensors) -> Trained:
        members, begun = round.members, time.perf_counter()
        cohort = self._cohort(round.configuration.seed, members)
        staged_s = time.perf_counter() - begun
        version = round.configuration.base_version
        self._states.settle(version)
        attempt = Attempt(round, cohort, [self._states.read(member) for member in members], root, model)
        if self._fused is None:
            self._fused = self._make(attempt)
        sums, kept = attempt(self._fused, meanwhile=lambda: self._make_ready(round.next_seed, round.next_members))
        with self._states.writing(version + 1) as keep:
            for member, state in zip(members, kept, strict=True):
                keep(member, state)
        seconds = self._fused.take_seconds()
        return Trained(sums, {**seconds, "data": seconds.get("data", 0.0) + staged_s})

    def _cohort(self, seed: bytes, members: tuple[str, ...]) -> Cohort:
        ahead, self._ahead = self._ahead, None
        return ahead[1] if ahead is not None and ahead[0] == seed else self._stage.cohort(members, seed)

    def _make_ready(self, seed: bytes, members: tuple[str, ...]) -> None:
        if members:
            try:
                self._ahead = seed, self._stage.cohort(members, seed)
            except Exception:
                # The round that trains is good. When the next begins its cohort is made again, and what is wrong is raised then.
                log.debug("the next cohort could not be made ready", exc_info=True)
