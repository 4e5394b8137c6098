"""One step of a worker: stages as parameters come, gradients as stages end.

    pull(step, ranks) --> servers --slices by rank--> whole transfers --give--> Run --stage by stage--> gradients --push, by rank--> servers
                                                        |
                                                        v  when all are there, or when all stages have begun
                                                       pull(step + 1)

The step's stages are begun as soon as what they need is there, the first in the trace's order of those that can begin; XLA computes while threads
move bytes. Which transfer goes first is the rank's affair (`schedule/`).
"""

import time
from dataclasses import dataclass

import jax
import numpy as np

from shoal.pod.servers.exchange import Exchange
from shoal.schedule.staged import Run, Staged


@dataclass(frozen=True)
class Following:
    """How the next step is asked for."""

    ranks: np.ndarray
    is_early: bool = False
    """While this one is computed: its update is not in what comes then."""


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What one step took."""

    seconds: float
    """From asking for parameters to having sent the last gradient; where the next step was asked for meanwhile, to having begun the last stage."""
    waited_s: float
    """Of these, in which no stage could begin."""
    stages: tuple[float, ...] = ()
    """Seconds of each, where nothing was sent while they ran."""


def taken(
    run: Run,
    staged: Staged,
    exchange: Exchange,
    *,
    step: int,
    ranks: np.ndarray,
    following: Following | None = None,
    is_alone: bool = False,
) -> Seen:
    """One step, whose parameters have been asked for: stages as parameters come, gradients as stages end.

    Args:
        run: of the step, begun without its parameters.
        staged: its stages.
        exchange: the lines to the servers.
        step: its number.
        ranks: of transfers, in which gradients go up.
        following: of the next step, which is asked for as soon as this one's parameters are there, or when all its stages have begun; None: it is not.
        is_alone: nothing is sent while stages run, one after the other, so that their times can be measured.

    Raises:
        TransportError: a server is gone.
    """  # fmt: skip
    begun = time.perf_counter()
    is_moved = jax.default_backend() != "cpu"  # else each stage would move it once more
    left, waited_s = len(staged.graph.transfers), 0.0
    seconds, made, has_asked = dict[int, float](), list[int](), False
    while not run.is_done or left:
        found = exchange.arrived_now() if left else None
        stage = run.ready() if found is None and not (is_alone and left) else None
        if found is None and stage is None:
            before = time.perf_counter()
            found = exchange.next_arrived()
            waited_s += time.perf_counter() - before
        if found is not None:
            tensors = exchange.packings[found[0]].unpacked(found[1])
            run.give(found[0], jax.device_put(tensors) if is_moved else tensors)
            left -= 1
            if following is not None and following.is_early and not left and not is_alone:
                exchange.pull(step + 1, following.ranks, updates=step)
                following, has_asked = None, True
        elif stage is not None:
            before = time.perf_counter()
            run.run(stage)
            made += staged.graph.stages[stage].makes
            if is_alone:
                run.wait(stage)
                seconds[stage] = time.perf_counter() - before
            else:
                made = _pushed(made, run, exchange, step, ranks)
    if following is not None and following.is_early:  # nothing was sent while stages ran: they were measured
        exchange.pull(step + 1, following.ranks, updates=step)
        following = None
    _pushed(made, run, exchange, step, ranks)
    if following is not None:
        exchange.pull(step + 1, following.ranks)
    if not has_asked:  # else the next step does not wait for these gradients
        exchange.flushed()
    stages = tuple(seconds[number] for number in sorted(seconds))
    return Seen(seconds=time.perf_counter() - begun, waited_s=waited_s, stages=stages)


def _pushed(made: list[int], run: Run, exchange: Exchange, step: int, ranks: np.ndarray) -> list[int]:
    """Sends gradients; none is left."""
    for transfer in made:
        exchange.push(transfer, step, run.gradients(transfer), int(ranks[transfer]))
    return []
