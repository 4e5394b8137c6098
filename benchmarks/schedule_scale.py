"""SIMULATED: what ordering transfers gains with 1 to 256 workers and 1 to 32 servers, where that ends and why. No machine is measured.

Each worker and each server has one line each way of the same rate, and a slice goes over the sender's and then the receiver's; a server sends a slice to each worker
in turn, of those that go to a worker by rank. Times are those of a chain of 16 equal layers, and of VGG-16, three quarters of whose bytes are one of its last layers; tensors whole, or large ones in pieces, as
`staged.py` takes them apart. At one worker parameters take as long to come down as the way forward takes, the way back takes twice that. Each worker of `random` has an order of its own.
Inference: a worker asks for parameters when it is done with the step before. Training: synchronous; by TAC a tensor comes down when all its gradients are up, in random order when
all gradients of all tensors are (a barrier, as published), or, in the third table, as by TAC.
A step is the mean of two, after a first one, and over several draws of orders where workers are few.

The gain is seconds of a step in random order over seconds by TAC. No order is faster than the busiest line or processor, so the gain is at most seconds in random order over the
time that this is busy for: the limit is printed beside it. For inference it ends where servers' lines are busy in whatever order, all workers' bytes taking so much
longer than computing that there is nothing to hide. In training there is something to gain beyond: what goes up and what comes down go at a time only in an order that all keep,
and only for tensors that are whole on the server while others are on their way.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any, Final

import numpy as np

from benchmarks.frame import Goal, run, table
from shoal.pod.servers.exchange import share
from shoal.schedule.fast_tac import fast_tac
from shoal.schedule.graph import Graph, Stage, Times, Transfer
from shoal.schedule.makespan import Job, finished
from shoal.schedule.staged import num_pieces

WORKERS: Final = (1, 2, 4, 8, 16, 32, 64, 128, 256)
SERVERS: Final = (1, 2, 4, 8, 16, 32)
STEPS: Final = 3
DRAWS: Final = 32
"""Of orders, over all workers: 32 of one, one of 32."""
PARTS: Final = 40
"""Slices of all parameters together, about."""
VGG_MB: Final = (0.007, 0.15, 0.3, 0.6, 1.2, 2.4, 2.4, 4.7, 9.4, 9.4, 9.4, 9.4, 9.4, 411.0, 67.1, 16.4)
VGG_GFLOPS: Final = (0.17, 3.7, 1.85, 3.7, 1.85, 3.7, 3.7, 1.85, 3.7, 3.7, 0.92, 0.92, 0.92, 0.2, 0.03, 0.01)
"""Of its 16 layers, forwards, on an image."""
FORWARD_NS: Final = 10**9
ROWS: Final = 4096
"""Of a tensor."""
MODES: Final = {"inference": (False, False), "training": (True, True), "training, no barrier": (True, False)}
"""Name -> has a way back, has a barrier between steps where orders are random."""
PAYS: Final = 1.05


NETS: Final[dict[str, tuple[Sequence[float], Sequence[float]]]] = {
    "equal layers": ((9.4,) * 16, (1.0,) * 16), "VGG-16": (VGG_MB, VGG_GFLOPS),
}  # fmt: skip


def chain(megabytes: Sequence[float], gflops: Sequence[float], *, in_pieces: bool) -> tuple[Graph, Times]:
    """The graph of a step, and its times at one worker."""
    num = len(megabytes)
    pieces = [num_pieces(round(1e6 * size), ROWS) if in_pieces else 1 for size in megabytes]
    transfers, of = list[Transfer](), list[tuple[int, ...]]()
    for n, size in enumerate(megabytes):
        of.append(tuple(range(len(transfers), len(transfers) + pieces[n])))
        transfers += [Transfer(name=f"layer{n:02d}[{at:02d}]", size_bytes=round(1e6 * size / pieces[n])) for at in range(pieces[n])]  # fmt: skip
    forward = [Stage(name=f"forward{n}", after=(n - 1,) if n else (), needs=of[n]) for n in range(num)]
    back = [Stage(name=f"back{n}", after=(num + at - 1,), makes=of[n]) for at, n in enumerate(reversed(range(num)))]
    shares, sizes = np.array(gflops) / sum(gflops), np.array([each.size_bytes for each in transfers])
    computing = np.concatenate([shares, 2 * shares[::-1]])
    times = Times(np.maximum(1, (FORWARD_NS * sizes / sizes.sum()).astype(np.int64)), (FORWARD_NS * computing).astype(np.int64))  # fmt: skip
    return Graph(transfers=tuple(transfers), stages=tuple(forward + back)), times


def makespan(
    graph: Graph,
    times: Times,
    ranks: Sequence[np.ndarray],
    num_servers: int,
    *,
    is_training: bool,
    has_barrier: bool = False,
) -> tuple[float, float]:
    """Seconds of a step, and those that its busiest line or processor works.

    Args:
        graph, times: of one worker.
        ranks: of each worker.
        num_servers: that share the transfers.
        is_training: with the way back.
        has_barrier: no parameter comes down before all gradients are up.
    """
    num_workers, num_transfers, owners = len(ranks), len(graph.transfers), share(graph, num_servers)
    used = graph.stages if is_training else graph.forward.stages
    parts = np.maximum(1, np.rint(PARTS * times.transfers / times.transfers.sum())).astype(int)
    jobs: list[Job] = []
    line = {"server out": 0, "server in": num_servers, "worker in": 2 * num_servers, "worker out": 2 * num_servers + num_workers, "compute": 2 * num_servers + 2 * num_workers, "update": 2 * num_servers + 3 * num_workers}  # fmt: skip

    def add(where: str, number: int, nanoseconds: int, rank: tuple[int, ...], after: Sequence[int]) -> int:
        jobs.append(Job(line[where] + number, nanoseconds, rank, tuple(after)))
        return len(jobs) - 1

    def turns(order: np.ndarray) -> list[int]:
        """The first turn of each transfer, of those that its server gives a worker."""
        given, first = [0] * num_servers, [0] * num_transfers
        for number in np.argsort(order):
            first[number] = given[owners[number]]
            given[owners[number]] += int(parts[number])
        return first

    def sent(out: tuple[str, int], into: tuple[str, int], step: int, turn: int, worker: int, transfer: int, after: Sequence[int]) -> list[int]:  # fmt: skip
        each = int(times.transfers[transfer]) // int(parts[transfer])
        found = []
        for part in range(int(parts[transfer])):
            rank = (step, turn + part, worker)
            found.append(add(*into, each, rank, [add(*out, each, rank, after)]))
        return found

    first_turns = [turns(order) for order in ranks]
    updated: list[list[int]] = [[] for _ in graph.transfers]
    ends: list[list[int]] = []
    for step in range(STEPS):
        last: list[int] = []
        gradients: list[list[int]] = [[] for _ in graph.transfers]
        for worker, turn in enumerate(first_turns):
            begun = [] if is_training or not step else [ends[-1][worker]]
            arrived = [
                sent(("server out", owners[r]), ("worker in", worker), step, turn[r], worker, r, updated[r] or begun)
                for r in range(num_transfers)
            ]
            computed: list[int] = []
            for number, stage in enumerate(used):
                after = [computed[before] for before in stage.after] + [job for r in stage.needs for job in arrived[r]]
                computed.append(add("compute", worker, int(times.stages[number]), (step, number), after))
                for r in stage.makes if is_training else ():
                    gradients[r] += sent(("worker out", worker), ("server in", owners[r]), step, turn[r], worker, r, [computed[-1]])  # fmt: skip
            last.append(computed[-1])
        if is_training:
            updated = [[add("update", r, 0, (step,), each)] for r, each in enumerate(gradients)]
            if has_barrier:
                updated = [
                    [add("update", num_transfers, 0, (step,), [job for each in updated for job in each])]
                ] * num_transfers
        ends.append([job for each in updated for job in each] if is_training else last)
    done, busy = finished(jobs, {}), Counter[int]()
    for job in jobs:
        busy[job.resource] += job.nanoseconds
    at = [max(done[job] for job in each) for each in ends]
    return 1e-9 * (at[-1] - at[0]) / (STEPS - 1), 1e-9 * max(busy.values()) / STEPS


def cell(sizes: tuple[Sequence[float], Sequence[float]], num_workers: int, num_servers: int, mode: str) -> dict[str, float]:  # fmt: skip
    """Seconds of a step in random order, by TAC, by TAC in pieces, and those that its busiest line or processor works."""
    is_training, has_barrier = MODES[mode]
    rng, found = np.random.default_rng(num_workers), dict[str, float]()
    graph, times = chain(*sizes, in_pieces=False)
    random = []
    for _ in range(max(1, DRAWS // num_workers)):
        drawn = [rng.permutation(len(graph.transfers)) for _ in range(num_workers)]
        random.append(makespan(graph, times, drawn, num_servers, is_training=is_training, has_barrier=has_barrier)[0])
    found["random"] = float(np.mean(random))
    for name, in_pieces in (("tac", False), ("pieces", True)):
        graph, times = chain(*sizes, in_pieces=in_pieces)
        tac = fast_tac(graph.forward, Times(times.transfers, times.stages[: graph.num_forward]))
        found[name], found["busy"] = makespan(graph, times, [tac] * num_workers, num_servers, is_training=is_training)
    return found


def measure(quick: bool) -> tuple[Sequence[Goal], dict[str, Any]]:
    servers, workers = (SERVERS[:3], WORKERS[:4]) if quick else (SERVERS, WORKERS)
    found: list[dict[str, Any]] = []
    for net, sizes in NETS.items():
        for mode in MODES:
            cells = {(few, many): cell(sizes, many, few, mode) for few in servers for many in workers}
            found += [{"net": net, "mode": mode, "servers": few, "workers": many, **each} for (few, many), each in cells.items()]  # fmt: skip
            print(f"SIMULATED, {net}, {mode}: seconds of random order over TAC's, over TAC's in pieces, and what no order gains more than; rows are servers, columns workers")  # fmt: skip
            shown = {key: [each["random"] / each[name] for name in ("tac", "pieces", "busy")] for key, each in cells.items()}  # fmt: skip
            table(
                ["servers", *map(str, workers)],
                [[few, *(" ".join(f"{value:.2f}" for value in shown[few, many]) for many in workers)] for few in servers],
            )  # fmt: skip
            for few in servers:
                most = max((many for many in workers if shown[few, many][1] >= PAYS), default=0)
                then = next((many for many in workers if many > most), None)
                why = "" if then is None else f"; with {then} the busiest line works {cells[few, then]['busy'] / cells[few, then]['pieces']:.0%} of the time"  # fmt: skip
                print(f"{few} servers: {PAYS - 1:.0%} or more are gained in pieces up to {most} workers{why}")
    return [], {"simulated": True, "cells": found}


if __name__ == "__main__":
    run("schedule_scale", measure, __doc__ or "")
