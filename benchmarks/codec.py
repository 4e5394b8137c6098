"""Fewer bytes on the wire: what they cost in quality, how many are left, and how fast they are made.

C1: federated averaging with float32 both ways, and with `shoal.compressed(up="int8", down="bfloat16")`; Fashion-MNIST by 100 users of uneven labels
and MovieLens-100K by user. Quality is the mean of the last five evaluations, over three seeds; bytes to the target are the rounds that it took,
times what a round's members move: each version as it is sent to one who holds none, and updates of members, packed as on the wire (`bytes` of
eight members and every tenth version). The rival is float32 as everybody sends it, four bytes an element; float32 packed stands beside.

C2: bytes of float32 per second, one thread, of what a device and an Edge do with slices of 256 KiB: packing and unpacking, and
rounding the model. The lowest is judged. Rows that begin with "program" are parts of local training, compiled by XLA, and stand beside.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import jax
import jax.numpy as jnp
import numpy as np

import shoal
from benchmarks.accuracy_problems import Problem, fashion, movielens
from benchmarks.frame import Goal, run, table
from shoal.algorithms.compression import BFLOAT16, INT8, top_k
from shoal.codec.linear import block_length, rotate, rotate_back
from shoal.codec.packed import pack, unpack
from shoal.codec.rounding import Rounding, rounded
from shoal.fleet.configuration import round_seed
from shoal.fleet.host import run_seed
from shoal.plan.build import build
from shoal.plan.jax_runner import JaxRunner
from shoal.plan.train import train
from shoal.record.memory import MemoryStore
from shoal.record.tensor_blobs import view_tensors
from shoal.simulate.engine import simulate
from shoal.simulate.sent import model_as_sent
from shoal.tensors import Tensors, dtype_name

SEEDS: Final = (1, 2, 3)
LAST: Final = 5
EVERY: Final = 2
"""Rounds from one evaluation to the next."""
SLICE: Final = 256 << 10
MEMBERS: Final = 8
WEIGHED_EVERY: Final = 10
PROBLEMS: Final = ((fashion(0.5, target=0.76), 0.1), (movielens(target=0.05), 4.0))
WAYS: Final[dict[str, Callable[[shoal.Task], shoal.Task]]] = {
    "float32": lambda task: task,
    "int8 up, bfloat16 down": lambda task: shoal.compressed(task, "int8", down="bfloat16"),
    "rotated int8 up, int8 down": lambda task: shoal.compressed(task, "int8", down="int8", rotate=True),
    "top 5 % up, bfloat16 down": lambda task: shoal.compressed(task, "top_k", share=0.05, down="bfloat16"),
}
JUDGED: Final = "int8 up, bfloat16 down"


def measure(quick: bool) -> tuple[Sequence[Goal], dict[str, Any]]:
    speeds = list(_speeds(1 << (18 if quick else 22)))
    table(
        ["what", "MB/s of float32", "bytes of float32"],
        [[s.what, f"{s.rate:.0f}", "" if s.share is None else f"{s.share:.3f}"] for s in speeds],
    )
    slowest = min((speed for speed in speeds if not speed.what.startswith("program")), key=lambda speed: speed.rate)
    rows = [] if quick else [_row(problem, rate, way) for problem, rate in PROBLEMS for way in WAYS]
    table(
        ["problem", "sent", "quality", "±", "rounds to target", "up", "down", "down, held before", "bytes to target"],
        [row.cells(_plain(rows, row)) for row in rows],
    )
    judged = [(row, _plain(rows, row)) for row in rows if row.way == JUDGED]
    lost = max((100 * (plain.quality - row.quality) for row, plain in judged), default=None)
    left = max((row.to_target(raw=False) / plain.to_target(raw=True) for row, plain in judged), default=None)
    goals = [
        Goal("C1a", f"{JUDGED}: points of quality lost, the worse of two problems", lost, "<= 0.5"),
        Goal("C1b", f"{JUDGED}: bytes to the target, of float32's, the worse", left, "<= 0.35"),
        Goal("C2", f"bytes of float32 a second on one core, the slowest ({slowest.what})", None if quick else 1e6 * slowest.rate, ">= 500e6"),
    ]  # fmt: skip
    return goals, {"rows": [vars(row) for row in rows], "speeds": [vars(speed) for speed in speeds]}


# C1.


@dataclass(frozen=True)
class Row:
    """One problem, one way to send, over seeds."""

    problem: str
    way: str
    quality: float
    spread: float
    rounds: float
    """To the target, mean over seeds; those that do not reach it count all."""
    up: float
    """Bytes of an update on the wire."""
    down: float
    """Bytes of a version on the wire."""
    down_held: float
    """To who holds the version before."""
    raw: int
    """Bytes of the model in float32."""

    def to_target(self, *, raw: bool) -> float:
        return self.rounds * (2 * self.raw if raw else self.up + self.down)

    def cells(self, plain: "Row") -> list[str]:
        shares = [each / self.raw for each in (self.up, self.down, self.down_held)]
        whole = self.to_target(raw=False) / plain.to_target(raw=True)
        return [
            self.problem, self.way, f"{self.quality:.4f}", f"{self.spread:.4f}", f"{self.rounds:.0f}", *(f"{s:.3f}" for s in shares),
            f"{whole:.3f}",
        ]  # fmt: skip


def _plain(rows: Sequence[Row], row: Row) -> Row:
    return next(other for other in rows if other.problem == row.problem and other.way == "float32")


def _row(problem: Problem, rate: float, way: str) -> Row:
    task = WAYS[way](problem.make(rate))
    found = [_learned(task, problem, seed) for seed in SEEDS]
    weights = _weighed(task, problem, found[0][2])
    qualities = [quality for quality, _, _ in found]
    row = Row(
        problem=problem.name, way=way, quality=float(np.mean(qualities)), spread=float(np.std(qualities, ddof=1)),
        rounds=float(np.mean([rounds for _, rounds, _ in found])), **weights,
    )  # fmt: skip
    print(vars(row), flush=True)
    return row


def _learned(task: shoal.Task, problem: Problem, seed: int) -> tuple[float, float, MemoryStore]:
    data, store = problem.data(seed), MemoryStore()
    made = simulate(
        task, data.users, rounds=problem.rounds, seed=seed, held_out=data.test, evaluate_every=EVERY, store=store
    )
    curve = [(one.version, one.metrics[problem.quality]) for one in made.history if problem.quality in one.metrics]
    rounds = next((version for version, quality in curve if quality >= problem.target), problem.rounds)
    return float(np.mean([quality for _, quality in curve[-LAST:]])), float(rounds), store


def _weighed(task: shoal.Task, problem: Problem, store: MemoryStore) -> dict[str, Any]:
    """What versions and updates of a run take on the wire."""
    (row,) = store.runs()
    built = build(task, seed=SEEDS[0])
    manifest, runner = built.plan.manifest, JaxRunner(built.plan)
    users = problem.data(SEEDS[0]).users
    down, held, up = list[int](), list[int](), list[int]()
    for version in range(WEIGHED_EVERY, problem.rounds, WEIGHED_EVERY):
        models = [
            model_as_sent(store.blobs, store.get_commit(row.id, v).model, manifest) for v in (version - 1, version)
        ]
        (_, before), (root, now) = models
        down.append(_packed(now))
        held.append(_packed(now, before))
        runner.set_model(root, {name: np.asarray(value) for name, value in now.items()})
        for member in list(users)[:MEMBERS]:
            seed = round_seed(run_seed(SEEDS[0]), version)
            up.append(_packed(train(runner, manifest, root, users[member], None, seed=seed, member=member).sums))
    raw = sum(value.nbytes for value in view_tensors(store.blobs, store.get_commit(row.id, 1).model).values())
    return {"up": float(np.mean(up)), "down": float(np.mean(down)), "down_held": float(np.mean(held)), "raw": raw}


def _packed(tensors: Tensors, base: Tensors | None = None) -> int:
    return sum(
        len(pack(data[at : at + SLICE], dtype_name(value.dtype), None if held is None else held[at : at + SLICE]))
        for name, value in tensors.items()
        for data, held in [(np.asarray(value).tobytes(), None if base is None else np.asarray(base[name]).tobytes())]
        for at in range(0, len(data), SLICE)
    )


# C2.


@dataclass(frozen=True)
class Speed:
    """Of one step."""

    what: str
    rate: float
    """Megabytes of float32 a second."""
    share: float | None = None
    """What it leaves, of float32's bytes; None: that is not what it is for."""


def _speeds(size: int) -> Sequence[Speed]:
    rng = np.random.default_rng(0)
    update = (rng.normal(0, 0.01, size) * np.exp(rng.normal(0, 0.5, size))).astype(np.float32)
    model = rng.normal(0, 0.05, size).astype(np.float32)
    after = (model + rng.normal(0, 0.002, size)).astype(np.float32)
    few = np.asarray(top_k(0.01).apply(jnp.asarray(update), jax.random.key(0)))
    made: list[Speed] = []
    for what, values, base in (
        ("bfloat16", rounded(update, "bfloat16"), None), ("int8", rounded(update, "int8"), None), ("top 1 %", few, None),
        ("bfloat16, a round later", rounded(after, "bfloat16"), rounded(model, "bfloat16")),
    ):  # fmt: skip
        made += _wire(what, values, base)
    roundings: tuple[Rounding, ...] = ("bfloat16", "int8")
    for rounding in roundings:
        made.append(Speed(f"round the model to {rounding}", _rate(lambda r=rounding: rounded(model, r), size)))  # type: ignore[misc]
    block = block_length(size)
    turned = rotate(update, block, seed=0, xp=np).astype(np.float64)
    made.append(Speed("program: rotate back, of a sum", _rate(lambda: rotate_back(turned, block, seed=0), size)))
    given, key = jnp.asarray(update), jax.random.key(0)
    for name, codec in (("int8", INT8), ("bfloat16", BFLOAT16), ("top 1 %", top_k(0.01))):
        program = jax.jit(codec.apply)
        made.append(Speed(f"program: {name}", _rate(lambda p=program: p(given, key).block_until_ready(), size)))  # type: ignore[misc]
    program = jax.jit(lambda values: rotate(values, block, seed=0, xp=jnp))
    made.append(Speed("program: rotate", _rate(lambda: program(given).block_until_ready(), size)))
    return made


def _wire(what: str, values: np.ndarray, base: np.ndarray | None) -> list[Speed]:
    data, held = values.tobytes(), None if base is None else base.tobytes()
    starts = range(0, len(data), SLICE)
    pieces = [(data[at : at + SLICE], None if held is None else held[at : at + SLICE]) for at in starts]
    packed = [pack(piece, "float32", before) for piece, before in pieces]
    share = sum(map(len, packed)) / len(data)
    return [
        Speed(f"pack {what}", _rate(lambda: [pack(piece, "float32", before) for piece, before in pieces], values.size), share),
        Speed(
            f"unpack {what}",
            _rate(lambda: [unpack(p, "float32", len(piece), before) for p, (piece, before) in zip(packed, pieces, strict=True)], values.size),
            share,
        ),
    ]  # fmt: skip


def _rate(work: Callable[[], Any], size: int) -> float:
    """Median of several, after a first."""
    work()
    seconds = []
    for _ in range(7):
        begun = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - begun)
    return 4e-6 * size / float(np.median(seconds))


if __name__ == "__main__":
    run("codec", measure, "What fewer bytes on the wire cost and leave.")
