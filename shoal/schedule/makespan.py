"""How long a step takes when transfers go in an order: a simulation of one worker and its links; and what no order can beat.

Each resource (the worker's processor, the link down, the link up) does one job at a time, the one with the lowest rank of those
that can begin. A link has jobs of a slice each, and a *credit*: slices that were handed to it can no longer be overtaken.

Bounds, of Hashemi et al. 2019, "TicTac", section 3.2: U, all jobs one after the other; L, the busiest resource alone; of a makespan m the efficiency
E = (U - m) / (U - L) and the most that can be gained S = (U - L) / L. L forgets that the first transfer and the last stage cannot overlap with anything;
the chain bound does not.
"""

import heapq
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from shoal import validate
from shoal.schedule.graph import Graph, Times

COMPUTE, DOWN, UP = range(3)
"""Resources of one worker and its server."""
DEFAULT_SLICE_BYTES: Final = 1 << 20


@dataclass(frozen=True, slots=True)
class Job:
    """What one resource is busy with for a time."""

    resource: int
    nanoseconds: int
    rank: tuple[int, ...]
    """Lower goes first, of jobs that can begin."""
    after: tuple[int, ...] = ()
    """Numbers of jobs that must be done."""


@dataclass(frozen=True, kw_only=True)
class How:
    """What transfers are like, and what they are for."""

    slice_bytes: int | None = DEFAULT_SLICE_BYTES
    """Largest part that goes without being overtaken; None: whole transfers."""
    credit: int = 1
    """Slices that a link has been handed at a time."""
    is_training: bool = False
    """With the way back, gradients up and updates."""
    has_barrier: bool = True
    """A step's transfers wait for all updates of the step before, not just for their own."""
    ahead: bool = False
    """A step's transfers wait for the updates of the step before the last, not the last."""
    num_steps: int = 1

    def __post_init__(self) -> None:
        """Raises ValueError for numbers that are not positive."""
        validate.positive(credit=self.credit, num_steps=self.num_steps, slice_bytes=self.slice_bytes or 1)


def makespan_s(graph: Graph, times: Times, ranks: np.ndarray, how: How) -> float:
    """Seconds of a step: of the only one, or the mean of all but the first.

    Args:
        graph: of the step; without `is_training` only its way forward is done.
        times: of its parts.
        ranks: (transfers,), of transfers down; gradients go up by them, too.
        how: see there.
    """
    jobs, ends = step_jobs(graph, times, ranks, how)
    done = finished(jobs, {DOWN: how.credit, UP: how.credit})
    last = [max(done[job] for job in each) for each in ends]
    return 1e-9 * (last[0] if len(last) == 1 else (last[-1] - last[0]) / (len(last) - 1))


def step_jobs(graph: Graph, times: Times, ranks: np.ndarray, how: How) -> tuple[list[Job], list[list[int]]]:
    """The jobs of some steps, and for each step the numbers of those that it ends with."""
    times.check(graph)
    used = graph if how.is_training else graph.forward
    jobs: list[Job] = []

    def add(job: Job) -> int:
        jobs.append(job)
        return len(jobs) - 1

    def sent(resource: int, step: int, transfer: int, after: Sequence[int]) -> list[int]:
        parts = 1 if how.slice_bytes is None else -(-graph.transfers[transfer].size_bytes // how.slice_bytes)
        each, more = divmod(int(times.transfers[transfer]), parts)
        rank = (step, int(ranks[transfer]))
        return [add(Job(resource, each + (n < more), (*rank, n), tuple(after))) for n in range(parts)]

    before = updated = [list[int]() for _ in graph.transfers]
    """Of each transfer, the jobs that update it in the step before the last, and in the last."""
    ends: list[list[int]] = []
    for step in range(how.num_steps):
        awaited = before if how.ahead else updated
        barrier = [job for each in awaited for job in each]
        arrived = [sent(DOWN, step, r, barrier if how.has_barrier else awaited[r]) for r in range(len(graph.transfers))]
        computed: list[int] = []
        before, updated = updated, [[] for _ in graph.transfers]
        for number, stage in enumerate(used.stages):
            after = [computed[other] for other in stage.after] + [job for r in stage.needs for job in arrived[r]]
            computed.append(add(Job(COMPUTE, int(times.stages[number]), (step, number), tuple(after))))
            for r in stage.makes if how.is_training else ():
                updated[r] = sent(UP, step, r, (computed[-1],))  # an update takes no time beside what it waits for
        whole = [job for each in arrived for job in each] + computed
        ends.append([job for each in updated for job in each] + whole if how.is_training else whole)
    return jobs, ends


def finished(jobs: Sequence[Job], credits: dict[int, int]) -> list[int]:
    """When each job is done, in nanoseconds.

    Args:
        jobs: of any resources.
        credits: resource -> jobs that it is handed at a time, done in the order in which they were; 1 where it is not named.
    """
    waits, followers = [len(job.after) for job in jobs], [list[int]() for _ in jobs]
    for number, job in enumerate(jobs):
        for before in job.after:
            followers[before].append(number)
    resources = {job.resource for job in jobs}
    ready: dict[int, list[tuple[tuple[int, ...], int]]] = {resource: [] for resource in resources}
    handed: dict[int, deque[int]] = {resource: deque() for resource in resources}
    busy: set[int] = set()
    running: list[tuple[int, int]] = []
    done = [0] * len(jobs)

    def begin(resource: int, now: int) -> None:
        credit = credits.get(resource, 1)
        while ready[resource] and len(handed[resource]) < credit:
            handed[resource].append(heapq.heappop(ready[resource])[1])
        if handed[resource] and resource not in busy:
            busy.add(resource)
            heapq.heappush(running, (now + jobs[handed[resource][0]].nanoseconds, handed[resource][0]))

    for number, job in enumerate(jobs):
        if not waits[number]:
            heapq.heappush(ready[job.resource], (job.rank, number))
    for resource in resources:
        begin(resource, 0)
    while running:
        now = running[0][0]
        touched = set()
        while running and running[0][0] == now:
            _, number = heapq.heappop(running)
            done[number] = now
            resource = jobs[number].resource
            handed[resource].popleft()
            busy.discard(resource)
            touched.add(resource)
            for follower in followers[number]:
                waits[follower] -= 1
                if not waits[follower]:
                    heapq.heappush(ready[jobs[follower].resource], (jobs[follower].rank, follower))
                    touched.add(jobs[follower].resource)
        for resource in sorted(touched):
            begin(resource, now)
    assert not any(waits), "jobs wait for one another"
    return done


@dataclass(frozen=True)
class Bounds:
    """Of one step, in seconds."""

    upper_s: float
    """U: all jobs one after the other."""
    lower_s: float
    """L: the busiest resource."""
    chain_s: float
    """What transfers in the order of layers cannot beat, where each stage waits for the one before."""

    @property
    def gain(self) -> float:
        """S: no order is faster than another by more."""
        return (self.upper_s - self.lower_s) / self.lower_s

    def efficiency(self, makespan_s: float, *, chain: bool = False) -> float:
        """E: 1 at the bound (L, or the chain's), 0 where nothing overlaps."""
        best = self.chain_s if chain else self.lower_s
        return (self.upper_s - makespan_s) / max(self.upper_s - best, 1e-12)


def bounds(graph: Graph, times: Times, how: How) -> Bounds:
    """What a step takes at least and at most."""
    jobs, _ = step_jobs(graph, times, np.arange(len(graph.transfers)), how)
    loads: dict[int, int] = {}
    for job in jobs:
        loads[job.resource] = loads.get(job.resource, 0) + job.nanoseconds
    scale = 1e-9 / how.num_steps
    return Bounds(scale * sum(loads.values()), scale * max(loads.values()), _chain_s(graph, times, how))


def _chain_s(graph: Graph, times: Times, how: How) -> float:
    """max over k of what comes down up to stage k, and is computed from it on; when training, of what goes up after, too."""
    used = graph if how.is_training else graph.forward
    computing = times.stages[: len(used.stages)]
    left = np.cumsum(computing[::-1])[::-1]
    came, down = set[int](), 0
    best = int(left[0]) if len(left) else 0
    for number, stage in enumerate(used.stages):
        down += sum(int(times.transfers[r]) for r in set(stage.needs) - came)
        came |= set(stage.needs)
        best = max(best, down + int(left[number]))
    if (
        how.is_training
    ):  # the way back from the last transfer down: gradients as they are made, all that is left after stage k goes up
        first = best - int(left[0])
        up = sum(int(times.transfers[r]) for stage in used.stages for r in stage.makes)
        for number, stage in enumerate(used.stages):
            if stage.makes:
                computed = int(left[0] - left[number] + computing[number])
                best = max(best, first + computed + up)
                up -= sum(int(times.transfers[r]) for r in stage.makes)
    return 1e-9 * best
