"""SIMULATED: what ordering transfers gains with 1 to 256 workers and 1 to 32 servers, where that ends and why. No machine is measured.

Each worker and each server has one line each way of the same rate, and a slice goes over the sender's and then the receiver's; a server sends the slices of all
workers by rank, equal ones in turns. Times are those of VGG-16 at one worker: parameters take as long to come down as the way forward takes, the way back twice
that. Workers of `random` have an order each. Synchronous, without a barrier; the mean of two steps after the first.

The gain is seconds of a step at random order over seconds by TAC. It is bounded by 1 + S: where all workers' bytes take much longer than computing, or much
shorter, there is nothing to hide one behind the other.
"""

from collections.abc import Sequence
from typing import Any, Final

import numpy as np

from benchmarks.frame import Goal, run, table
from shoal.pod.servers.exchange import share
from shoal.schedule.fast_tac import fast_tac
from shoal.schedule.graph import Graph, Stage, Times, Transfer
from shoal.schedule.makespan import Job, finished

WORKERS: Final = (1, 2, 4, 8, 16, 32, 64, 128, 256)
SERVERS: Final = (1, 2, 4, 8, 16, 32)
STEPS: Final = 3
PARTS: Final = 40
"""Slices of all parameters together, about."""
VGG_MB: Final = (0.007, 0.15, 0.3, 0.6, 1.2, 2.4, 2.4, 4.7, 9.4, 9.4, 9.4, 9.4, 9.4, 411.0, 67.1, 16.4)
VGG_GFLOPS: Final = (0.17, 3.7, 1.85, 3.7, 1.85, 3.7, 3.7, 1.85, 3.7, 3.7, 0.92, 0.92, 0.92, 0.2, 0.03, 0.01)
"""Of its 16 layers, forwards, on an image."""
FORWARD_NS: Final = 10**9


def vgg() -> tuple[Graph, Times]:
    """The graph of a step, and its times at one worker."""
    num = len(VGG_MB)
    transfers = tuple(Transfer(name=f"layer{n:02d}", size_bytes=round(1e6 * size)) for n, size in enumerate(VGG_MB))
    forward = [Stage(name=f"forward{n}", after=(n - 1,) if n else (), needs=(n,)) for n in range(num)]
    back = [Stage(name=f"back{n}", after=(num + at - 1,), makes=(n,)) for at, n in enumerate(reversed(range(num)))]
    shares, sizes = np.array(VGG_GFLOPS) / sum(VGG_GFLOPS), np.array(VGG_MB) / sum(VGG_MB)
    computing = np.concatenate([shares, 2 * shares[::-1]])
    times = Times(np.maximum(1, (FORWARD_NS * sizes).astype(np.int64)), (FORWARD_NS * computing).astype(np.int64))
    return Graph(transfers=transfers, stages=tuple(forward + back)), times


def makespan(graph: Graph, times: Times, ranks: Sequence[np.ndarray], num_servers: int, *, is_training: bool) -> float:
    """Seconds of a step.

    Args:
        graph, times: of one worker.
        ranks: of each worker.
        num_servers: that share the transfers.
        is_training: with the way back.
    """
    num_workers, owners = len(ranks), share(graph, num_servers)
    used = graph.stages if is_training else graph.forward.stages
    jobs: list[Job] = []
    line = {"server out": 0, "server in": num_servers, "worker in": 2 * num_servers, "worker out": 2 * num_servers + num_workers, "compute": 2 * num_servers + 2 * num_workers}  # fmt: skip

    def add(where: str, number: int, nanoseconds: int, rank: tuple[int, ...], after: Sequence[int]) -> int:
        jobs.append(Job(line[where] + number, nanoseconds, rank, tuple(after)))
        return len(jobs) - 1

    def sent(
        out: str, into: str, ends: tuple[int, int], rank: tuple[int, ...], transfer: int, after: Sequence[int]
    ) -> list[int]:
        parts = max(1, round(PARTS * int(times.transfers[transfer]) / int(times.transfers.sum())))
        each = int(times.transfers[transfer]) // parts
        found = []
        for part in range(parts):
            first = add(out, ends[0], each, (*rank, part), after)
            found.append(add(into, ends[1], each, (*rank, part), [first]))
        return found

    updated: list[list[int]] = [[] for _ in graph.transfers]
    ends: list[list[int]] = []
    for step in range(STEPS):
        last: list[int] = []
        gradients: list[list[int]] = [[] for _ in graph.transfers]
        for worker in range(num_workers):
            order = ranks[worker]
            arrived = [
                sent("server out", "worker in", (owners[r], worker), (step, int(order[r]), worker), r, updated[r])
                for r in range(len(graph.transfers))
            ]
            computed: list[int] = []
            for number, stage in enumerate(used):
                after = [computed[before] for before in stage.after] + [job for r in stage.needs for job in arrived[r]]
                if step and not is_training:
                    after.append(ends[-1][worker])
                computed.append(add("compute", worker, int(times.stages[number]), (step, number), after))
                for r in stage.makes if is_training else ():
                    gradients[r] += sent("worker out", "server in", (worker, owners[r]), (step, int(order[r]), worker), r, [computed[-1]])  # fmt: skip
            last.append(computed[-1])
        updated = gradients if is_training else [[] for _ in graph.transfers]
        ends.append([job for each in gradients for job in each] if is_training else last)
    done = finished(jobs, {})
    at = [max(done[job] for job in each) for each in ends]
    return 1e-9 * (at[-1] - at[0]) / (STEPS - 1)


def measure(quick: bool) -> tuple[Sequence[Goal], dict[str, Any]]:
    graph, times = vgg()
    tac = fast_tac(graph.forward, Times(times.transfers, times.stages[: graph.num_forward]))
    found: dict[str, dict[str, float]] = {}
    for mode in ("inference", "training"):
        cells = {}
        for num_servers in SERVERS[:3] if quick else SERVERS:
            for num_workers in WORKERS[:4] if quick else WORKERS:
                rng = np.random.default_rng(num_workers)
                drawn = [rng.permutation(len(graph.transfers)) for _ in range(num_workers)]
                is_training = mode == "training"
                random = makespan(graph, times, drawn, num_servers, is_training=is_training)
                ours = makespan(graph, times, [tac] * num_workers, num_servers, is_training=is_training)
                cells[f"{num_workers} workers, {num_servers} servers"] = random / ours
        found[mode] = cells
        print(f"SIMULATED, {mode}: seconds of random order over TAC's; rows are servers, columns workers")
        shown = [
            [servers, *(cells.get(f"{workers} workers, {servers} servers", float("nan")) for workers in WORKERS)]
            for servers in SERVERS
            if f"1 workers, {servers} servers" in cells
        ]
        table(["servers", *map(str, WORKERS)], shown)
    ends = {
        mode: max(
            (int(name.split()[0]) for name, gain in cells.items() if gain >= 1.05 and name.endswith(", 1 servers")),
            default=0,
        )
        for mode, cells in found.items()
    }
    for mode, workers in ends.items():
        print(
            f"{mode}, one server: the gain is 5 % or more up to {workers} workers; beyond, its line is busy whatever the order, and workers wait for all of it"
        )
    return [], {"simulated": True, "gains": found, "ends": ends}


if __name__ == "__main__":
    run("schedule_scale", measure, __doc__ or "")
