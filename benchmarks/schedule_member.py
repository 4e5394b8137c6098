"""One side of `schedule`: the server, or the worker. Told what to do by lines of JSON, answers by lines of JSON.

server  {"net", "mode"}                        -> {"ports": variant -> port}
worker  {"net", "mode", "servers"}              -> {"forward_s", "step_s", "bytes", "transfers", "stages", "first_s"}: alone, nothing being sent
        {"run": cycles, "systems": […]}         -> what each system took, and what was predicted
        {"ahead": cycles, "steps": number}      -> seconds of a step, of so many in a row, in order and ahead
"""

import argparse
import json
import sys
import time
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final

import jax
import numpy as np

from benchmarks.schedule_nets import BATCH, task_of
from shoal.local import Named, named
from shoal.pod.servers.exchange import Exchange, rate
from shoal.pod.servers.one_step import Following, taken
from shoal.pod.servers.packing import Packing
from shoal.pod.servers.server import Server, Serving
from shoal.pod.servers.updates import Updates
from shoal.schedule import orders
from shoal.schedule.fast_tac import fast_tac
from shoal.schedule.graph import Times
from shoal.schedule.guard import Guard
from shoal.schedule.makespan import How, bounds, makespan_s
from shoal.schedule.oracle import Oracle
from shoal.schedule.staged import JOINED_BYTES, Run, Step

SECRET: Final = b"nobody else is on this line"
WHOLE_BYTES: Final = 4 << 20
SLICE_BYTES, CREDIT_BYTES = 128 << 10, 512 << 10
EVERYTHING: Final = 1 << 40
ALONE_STEPS: Final = 8
TURN_STEPS: Final = {"inference": 1, "training": 2}

VARIANTS: Final[dict[str, dict[str, Any]]] = {
    "barrier": {"slice_bytes": WHOLE_BYTES, "credit_bytes": WHOLE_BYTES, "has_barrier": True},
    "free": {"slice_bytes": WHOLE_BYTES, "credit_bytes": WHOLE_BYTES, "has_barrier": False},
    "sliced": {"slice_bytes": SLICE_BYTES, "credit_bytes": CREDIT_BYTES, "has_barrier": False},
    "ahead": {"slice_bytes": SLICE_BYTES, "credit_bytes": CREDIT_BYTES, "has_barrier": False, "ahead": True},
    "blob": {"slice_bytes": WHOLE_BYTES, "credit_bytes": WHOLE_BYTES, "has_barrier": True},
}
"""How a server sends."""
SYSTEMS: Final = {
    "random": "barrier", "tree": "barrier", "layer": "barrier", "tic": "barrier", "tac": "barrier", "one blob": "blob", "layer, free": "free",
    "tac, slices": "sliced",
}  # fmt: skip
"""Name -> variant."""


@dataclass(frozen=True)
class Net:
    """A net, cut."""

    name: str
    is_training: bool
    is_blob: bool

    @cached_property
    def step(self) -> Step:
        joined = EVERYTHING if self.is_blob else JOINED_BYTES
        return Step(task_of(self.name), BATCH[self.name], is_training=self.is_training, joined_bytes=joined)

    @cached_property
    def params(self) -> Named:
        variables = task_of(self.name).variables(jax.random.key(0))
        return {name: np.asarray(value) for name, value in named(variables.params, "params").items()}

    @cached_property
    def packings(self) -> list[Packing]:
        return [Packing(names, self.params) for names in self.step.staged.members]

    @cached_property
    def _inputs(self) -> tuple[Any, ...]:
        rng = np.random.default_rng(0)
        batch: Named = {"mask": np.ones(BATCH[self.name], bool)}
        for name, (shape, dtype) in self.step.task.batch.items():
            size = (BATCH[self.name], *shape)
            batch[name] = (
                rng.integers(0, 10, size).astype(dtype) if dtype == "int32" else rng.normal(size=size).astype(dtype)
            )
        made: tuple[Any, ...] = jax.device_put(({}, {}, batch, np.float32(BATCH[self.name]), np.zeros(2, np.uint32)))
        return made

    def begun(self) -> Run:
        """A step, whose parameters are yet to come."""
        return self.step.begin(*self._inputs)


def nets(asked: dict[str, Any]) -> tuple[Net, Net]:
    is_training = asked["mode"] == "training"
    return Net(asked["net"], is_training, False), Net(asked["net"], is_training, True)


def serve(address: str) -> None:
    servers: list[Server] = []
    for line in sys.stdin:
        for server in servers:
            server.close()
        net, blob = nets(json.loads(line))
        servers = []
        for name, how in VARIANTS.items():
            mine = blob if name == "blob" else net
            updates = Updates(mine.step.task.local.optimizer, mine.params, mine.step.staged.members)
            parts = dict(enumerate(updates.begin(mine.params)))
            servers.append(
                Server(
                    updates, mine.params, parts, dict(enumerate(mine.packings)), Serving(num_workers=1, **how), secret=SECRET, address=(address, 0)
                )
            )  # fmt: skip
        print(json.dumps({"ports": dict(zip(VARIANTS, (server.port for server in servers), strict=True))}), flush=True)


class Worker:
    """The worker's side of one net in one mode."""

    def __init__(self, asked: dict[str, Any]) -> None:
        self.net, self.blob = nets(asked)
        self._is_training = self.net.is_training
        self._rng = np.random.default_rng(0)
        self.exchanges, self._steps = {}, dict.fromkeys(VARIANTS, 0)
        for name, how in VARIANTS.items():
            mine = self.blob if name == "blob" else self.net
            owners = [0] * len(mine.packings)
            sizes = {"slice_bytes": how["slice_bytes"], "credit_bytes": how["credit_bytes"]}
            self.exchanges[name] = Exchange(
                [tuple(asked["servers"][name])],
                SECRET,
                worker=0,
                packings=mine.packings,
                owners=owners,
                **sizes,
            )
        self.oracle = Oracle(self.net.step.staged.costs)
        begun = time.perf_counter()
        for name in VARIANTS:
            self._turn(name, orders.layer(self._of(name).step.staged.graph), 2)
        self.first_s = time.perf_counter() - begun

    def close(self) -> None:
        for exchange in self.exchanges.values():
            exchange.close()

    def _of(self, variant: str) -> Net:
        return self.blob if variant == "blob" else self.net

    def _turn(self, variant: str, ranks: np.ndarray, num_steps: int, *, is_alone: bool = False) -> float:
        """Seconds of a step, of some in a row."""
        net, exchange = self._of(variant), self.exchanges[variant]
        begun = time.perf_counter()
        exchange.pull(self._steps[variant], ranks)
        for number in range(num_steps):
            is_last = number == num_steps - 1
            step = self._steps[variant]
            is_early = bool(VARIANTS[variant].get("ahead"))
            following = Following(ranks, is_early) if self._is_training and not is_last else None
            if not self._is_training and number:
                exchange.pull(step, ranks)
            run = net.begun()
            seen = taken(
                run, net.step.staged, exchange, step=step, ranks=ranks, following=following, is_alone=is_alone
            )  # fmt: skip
            if is_alone:
                for stage, seconds in enumerate(seen.stages):
                    self.oracle.saw_stage(stage, seconds)
            jax.block_until_ready(run.outputs())
            self._steps[variant] += self._is_training
        return (time.perf_counter() - begun) / num_steps

    def alone(self) -> dict[str, Any]:
        """Stages by themselves, and what travels."""
        graph = self.net.step.staged.graph
        for _ in range(ALONE_STEPS):
            self._turn("barrier", orders.layer(graph), 1, is_alone=True)
        times = self.oracle.times(graph)
        return {
            "forward_s": 1e-9 * float(times.stages[: graph.num_forward].sum()), "step_s": 1e-9 * float(times.stages.sum()),
            "bytes": int(graph.sizes.sum()), "transfers": len(graph.transfers), "stages": len(graph.stages), "first_s": self.first_s,
        }  # fmt: skip

    def run(self, cycles: int, systems: list[str]) -> dict[str, Any]:
        graph, mode = self.net.step.staged.graph, "training" if self._is_training else "inference"
        layer = orders.layer(graph)
        self.oracle.bytes_per_s = type(self.oracle.bytes_per_s)()
        for _ in range(3):
            size, seconds = rate(self.exchanges["sliced"], self._steps["sliced"], layer)
            self.oracle.saw_sent(size, seconds)
            self._turn("barrier", layer, 1, is_alone=True)
        times = self.oracle.times(graph)
        begun = time.perf_counter()
        tac = fast_tac(graph.forward, Times(times.transfers, times.stages[: graph.num_forward]))
        ordering_s = time.perf_counter() - begun
        ranks = {"tree": orders.tree(graph), "tic": orders.tic(graph), "tac": tac, "tac, slices": tac}
        seconds_of: dict[str, list[float]] = {system: [] for system in systems}
        for cycle in range(cycles):
            for system in systems if cycle % 2 == 0 else systems[::-1]:
                variant = SYSTEMS[system]
                if system == "one blob":
                    chosen = np.zeros(1, np.int64)
                else:
                    chosen = orders.random(graph, self._rng) if system == "random" else ranks.get(system, layer)
                seconds_of[system].append(self._turn(variant, chosen, TURN_STEPS[mode]))
        predicted = {}
        for system in systems:
            how = self._how(SYSTEMS[system])
            if system == "random":
                drawn = np.random.default_rng(1)
                predicted[system] = float(
                    np.mean([makespan_s(graph, times, orders.random(graph, drawn), how) for _ in range(20)])
                )
            elif system != "one blob":
                predicted[system] = makespan_s(graph, times, ranks.get(system, layer), how)
        how = self._how("sliced")
        found = bounds(graph, times, How(slice_bytes=SLICE_BYTES, is_training=self._is_training))
        gain = makespan_s(graph, times, layer, how) / predicted["tac, slices"] - 1
        guard = Guard(gain, spent_s=ordering_s)
        for ours, other in zip(seconds_of["tac, slices"], seconds_of["layer, free"], strict=True):
            guard.took("ours", ours)
            guard.took("layer", other)
        return {
            "seconds": seconds_of, "predicted": predicted, "upper_s": found.upper_s, "lower_s": found.lower_s, "chain_s": found.chain_s,
            "ordering_s": ordering_s, "bytes_per_s": self.oracle.bytes_per_s.value(), "guard": vars(guard.verdict), "predicted_gain": gain,
        }  # fmt: skip

    def run_ahead(self, cycles: int, num_steps: int) -> dict[str, Any]:
        """The order of layers, with parameters of all updates or of all but the last."""
        layer = orders.layer(self.net.step.staged.graph)
        seconds: dict[str, list[float]] = {"sliced": [], "ahead": []}
        for cycle in range(cycles):
            for variant in seconds if cycle % 2 == 0 else reversed(seconds):
                seconds[variant].append(self._turn(variant, layer, num_steps))
        return {"seconds": seconds}

    def _how(self, variant: str) -> How:
        sends = VARIANTS[variant]
        steps = TURN_STEPS["training"] + 1 if self._is_training else 1
        credit = max(1, sends["credit_bytes"] // sends["slice_bytes"])
        return How(
            slice_bytes=sends["slice_bytes"],
            credit=credit,
            is_training=self._is_training,
            has_barrier=sends["has_barrier"],
            num_steps=steps,
        )


def work() -> None:
    worker: Worker | None = None
    for line in sys.stdin:
        asked = json.loads(line)
        if "run" in asked:
            assert worker is not None
            made = worker.run(asked["run"], asked["systems"])
        elif "ahead" in asked:
            assert worker is not None
            made = worker.run_ahead(asked["ahead"], asked["steps"])
        else:
            if worker is not None:
                worker.close()
            worker = Worker(asked)
            made = worker.alone()
        print(json.dumps(made), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--serve", metavar="ADDRESS", default="", help="be the server, at this address; else the worker"
    )
    given = parser.parse_args()
    if given.serve:
        serve(given.serve)
    else:
        work()


if __name__ == "__main__":
    main()
