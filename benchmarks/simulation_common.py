"""What every system of the `simulation` benchmark is given alike: data, nets, initial weights, and when to run.

Needs NumPy alone, because rivals import it in environments of their own. The data are made once from one seed and read
through memory maps. Images are ten smooth prototypes under noise as large as they are weak, and a tenth of the labels are
wrong: learnable, yet with a floor that no system can fall below by chance.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

USERS, EACH, COHORT, BATCH, STEPS = 1000, 50, 50, 10, 5
SERVER_RATE = 1.0
CENTRAL = 1000
"""Examples on which versions are evaluated."""
CLASSES = 10

NOBODY = "nobody is there to take turns with"

Weights = dict[str, np.ndarray]


@dataclass(frozen=True)
class Net:
    """A net as its sizes; every system builds it of its own layers."""

    convolutions: tuple[tuple[int, int], ...] = ()
    """(kernel side, channels), `VALID`, each with a ReLU."""
    pool_each: bool = False
    """Max pooling by two after every convolution, or only after the last."""
    hidden: tuple[int, ...] = ()
    """Widths of the dense layers before the last, each with a ReLU."""
    dropout: tuple[float, float] | None = None
    """Before the first and before the last dense layer."""
    flops_per_client: float = 0.0
    """Forward and backward over a member's examples, where the share of the peak is told."""
    local_rate: float = 0.1
    """Such that the loss falls smoothly: where it rests on a plateau first, the seed says for how long."""


NETS: dict[str, Net] = {
    "cnn": Net(((3, 32), (3, 64)), False, (128,), (0.25, 0.5), 5.06e9),
    "lenet": Net(((5, 6), (5, 16)), True, (120, 84), local_rate=0.05),
    "mlp": Net((), False, (32,)),
}
NO_OP = "no-op"
"""One parameter, drawn to the mean of the examples: what is left of a round when there is nothing to compute."""
CONFIGS = (*NETS, NO_OP)


def local_rate(config: str) -> float:
    """Of the members' SGD."""
    return NETS[config].local_rate if config in NETS else 0.1


def sides(net: Net, side: int = 32, channels: int = 3) -> tuple[int, int]:
    """Side and channels of the image that reaches the first dense layer."""
    for number, (kernel, made) in enumerate(net.convolutions):
        side, channels = side - kernel + 1, made
        if net.pool_each or number == len(net.convolutions) - 1:
            side //= 2
    return side, channels


def weights(config: str) -> Weights:
    """The initial weights: name -> array; kernels (height, width, in, out) and (in, out), images height, width, channels."""
    if config == NO_OP:
        return {"w": np.zeros((), np.float32)}
    net, rng, channels = NETS[config], np.random.default_rng(1), 3
    made: Weights = {}
    for number, (kernel, out) in enumerate(net.convolutions):
        shape = (kernel, kernel, channels, out)
        made |= _layer(f"conv{number}", shape, kernel**2 * channels, kernel**2 * out, rng)
        channels = out
    side, channels = sides(net)
    wide = side * side * channels
    for number, out in enumerate((*net.hidden, CLASSES)):
        made |= _layer(f"dense{number}", (wide, out), wide, out, rng)
        wide = out
    return made


def _layer(name: str, shape: tuple[int, ...], fan_in: int, fan_out: int, rng: np.random.Generator) -> Weights:
    limit = (6.0 / (fan_in + fan_out)) ** 0.5  # Glorot
    kernel = rng.uniform(-limit, limit, shape).astype(np.float32)
    return {f"{name}/kernel": kernel, f"{name}/bias": np.zeros(shape[-1], np.float32)}


def make_data(folder: Path) -> None:
    """Writes the data of all configurations: `image`, `label`, `number` of users and `central_…`."""
    rng = np.random.default_rng(0)
    prototypes = np.kron(rng.standard_normal((CLASSES, 8, 8, 3)), np.ones((1, 4, 4, 1))).astype(np.float32)
    for prefix, users in (("", USERS), ("central_", CENTRAL // EACH)):
        shown = rng.integers(0, CLASSES, (users, EACH))
        wrong = rng.random((users, EACH)) < 0.1
        label = np.where(wrong, rng.integers(0, CLASSES, (users, EACH)), shown).astype(np.int32)
        images = np.lib.format.open_memmap(
            folder / f"{prefix}image.npy", mode="w+", dtype=np.float32, shape=(users, EACH, 32, 32, 3)
        )
        for user in range(users):
            noise = rng.standard_normal((EACH, 32, 32, 3), dtype=np.float32)
            images[user] = 0.6 * prototypes[shown[user]] + noise
        images.flush()
        np.save(folder / f"{prefix}label.npy", label)
        np.save(folder / f"{prefix}number.npy", (3.0 + rng.standard_normal((users, EACH))).astype(np.float32))
    for config in CONFIGS:
        arrays: dict[str, Any] = dict(weights(config))
        np.savez(folder / f"{config}.npz", **arrays)


@dataclass(frozen=True)
class Data:
    """What members hold and what is evaluated on."""

    x: np.ndarray
    """(users, examples, height, width, channels), or (users, examples) numbers."""
    y: np.ndarray
    """(users, examples) labels; of no use where there is nothing to classify."""
    central_x: np.ndarray
    central_y: np.ndarray
    weights: Weights


def load_data(folder: Path, config: str) -> Data:
    """The data of one configuration, memory-mapped."""
    read = "number" if config == NO_OP else "image"
    x, central_x = (np.load(folder / f"{prefix}{read}.npy", mmap_mode="r") for prefix in ("", "central_"))
    y, central_y = (np.load(folder / f"{prefix}label.npy") for prefix in ("", "central_"))
    with np.load(folder / f"{config}.npz") as kept:
        given = dict(kept)
    return Data(x, y, central_x.reshape(-1, *central_x.shape[2:]), central_y.reshape(-1), given)


def parse() -> argparse.Namespace:
    """The arguments of every system's program."""
    parser = argparse.ArgumentParser(description="Simulates rounds and prints one JSON line.")
    parser.add_argument("--config", choices=CONFIGS, required=True)
    parser.add_argument("--rounds", type=int, required=True)
    parser.add_argument("--data", type=Path, required=True, help="folder of make_data")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--evaluate-every", type=int, default=5)
    parser.add_argument(
        "--turn", type=int, default=0, help="timed rounds after which to wait for a line on standard input"
    )
    parser.add_argument(
        "--begun", type=float, default=time.time(), help="when the process was started, seconds of Unix time"
    )
    return parser.parse_args()


def is_timed(number: int, evaluate_every: int) -> bool:
    """Whether a round counts: the first compiles, and a system may evaluate within the rounds that are evaluated."""
    return number > 1 and number % evaluate_every != 0


def rounds_for(timed: int, evaluate_every: int) -> int:
    """The rounds to run for so many timed ones, the last being evaluated."""
    number = 1
    while timed > 0:
        number += 1
        timed -= is_timed(number, evaluate_every)
    return -(-number // evaluate_every) * evaluate_every


@dataclass
class Pace:
    """Takes the time of rounds, from the end of one to the end of the next; lets the other system have its turn between.

    After the first round and then after every `turn` timed ones it prints what it has and waits for a line, so two systems
    on one machine can take turns at their rounds without starting anew.
    """

    given: argparse.Namespace
    startup_s: float = 0.0
    first_s: float = 0.0
    number: int = 0
    seconds: list[float] = field(default_factory=list)
    """Of timed rounds."""
    curve: list[tuple[int, float]] = field(default_factory=list)
    """(round, central loss)."""
    _mark: float = 0.0
    _told: int = 0

    def begin(self, loss: Callable[[], float] | None = None) -> None:
        """Before the first round: everything is loaded; `loss` is that of the initial weights."""
        self.startup_s = time.time() - self.given.begun
        if loss is not None:
            self.curve.append((0, loss()))
        self._mark = time.perf_counter()

    def round(self, loss: Callable[[], float]) -> bool:
        """At the end of a round; returns whether it was the last. `loss` evaluates the model, outside the time."""
        took = time.perf_counter() - self._mark
        self.number += 1
        if self.number == 1:
            self.first_s = took
        if is_timed(self.number, self.given.evaluate_every):
            self.seconds.append(took)
        if self.number % self.given.evaluate_every == 0:
            self.curve.append((self.number, float(loss())))
        over = bool(self.number >= self.given.rounds)
        if not over:
            self._wait()
        self._mark = time.perf_counter()
        return over

    def _wait(self) -> None:
        fresh = self.seconds[self._told :]
        if not self.given.turn or not (self.number == 1 or len(fresh) == self.given.turn):
            return
        print("TURN " + json.dumps(fresh), flush=True)
        self._told = len(self.seconds)
        if not sys.stdin.readline():
            raise SystemExit(NOBODY)

    def finish(self) -> None:
        """Prints the JSON line."""
        steady = float(np.median(self.seconds)) if self.seconds else 0.0
        told = {
            "startup_s": self.startup_s,
            "compile_s": max(0.0, self.first_s - steady),
            "seconds": self.seconds,
            "curve": self.curve,
        }
        print(json.dumps(told), flush=True)
