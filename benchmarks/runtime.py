"""A device without JAX: how fast it trains, what it takes to install, what it takes while it waits.

R1: one member's training (begin, three blocks of four steps, finish) in the child process of a device, by IREE's native code and by XLA, in turns:
seconds of computing as the child tells them, at the same number of threads. The device takes the best variant that its processor runs; `x86_64-linux`
alone, which any x86-64 with AVX2 runs, stands beside, and so does what compiling took. The worst ratio is judged, at the worse end of its interval.

R2: bytes of everything but Python itself, pip and setuptools. `pip install` is what a fresh environment holds after `pip install packaging/shoal-device`,
compiled Python included; `bundle` is what `packaging/shoal-device/bundle.py OUT --without-blas $SHOAL_PEERS/wheels` makes, with a NumPy without BLAS: the first time that takes a
compiler and minutes.
"""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import optax
from flax import nnx

import shoal
from benchmarks.device_idle import PACKAGE, device_environment
from benchmarks.frame import PEERS, Goal, percentile_interval, run, table
from shoal.plan.build import Built, build
from shoal.plan.child import ChildRunner
from shoal.plan.child_engines import EngineName
from shoal.plan.iree_targets import TARGETS, this_runtime
from shoal.tensors import Tensors

BLOCKS: Final = 3
B: Final = 32
K: Final = 4
PAIRS: Final = 20
THREADS: Final = (1, 2)
ENGINES: Final[tuple[EngineName, ...]] = ("iree", "jax")
OTHER_THAN_SHOAL: Final = ("pip", "setuptools", "pkg_resources", "_distutils_hack", "distutils-precedence")


class Mlp(nnx.Module):
    """784 to 256 to 10."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.hidden, self.out = nnx.Linear(784, 256, rngs=rngs), nnx.Linear(256, 10, rngs=rngs)

    def __call__(self, image: Any) -> Any:
        return self.out(nnx.relu(self.hidden(image.reshape(image.shape[0], -1))))


class Cnn(nnx.Module):
    """Two convolutions of 3 x 3 with 16 and 32 channels, each with max pooling, and a linear layer."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.first, self.second = nnx.Conv(1, 16, (3, 3), rngs=rngs), nnx.Conv(16, 32, (3, 3), rngs=rngs)
        self.out = nnx.Linear(7 * 7 * 32, 10, rngs=rngs)

    def __call__(self, image: Any) -> Any:
        x = nnx.max_pool(nnx.relu(self.first(image)), (2, 2), (2, 2))
        x = nnx.max_pool(nnx.relu(self.second(x)), (2, 2), (2, 2))
        return self.out(x.reshape(x.shape[0], -1))


MODELS: Final[dict[str, Any]] = {"MLP": Mlp, "CNN": Cnn}


def measure(quick: bool) -> tuple[Sequence[Goal], dict[str, Any]]:
    speeds = list(_speeds(quick))
    judged = [speed for speed in speeds if speed.variant == "best"]
    worst = max(judged, key=lambda speed: speed.high)
    installed = None if quick else _installed()
    why = "a quick run is short" if quick else ""
    goals = [
        Goal("R1", "training by IREE, times XLA's, the worst of CNN and MLP at 1 and 2 threads", worst.ratio, "<= 1.3", why, worst.high),
        *_size_goals(installed),
    ]  # fmt: skip
    return goals, {"speeds": [vars(speed) for speed in speeds], "installed": installed}


# R1.


@dataclass(frozen=True)
class Speed:
    """One model, one variant, one number of threads."""

    model: str
    variant: str
    threads: int
    compile_s: float
    """By IREE, of the four programs for its target; in full runs with an empty cache."""
    iree_ms: float
    """Of one step, median."""
    xla_ms: float
    ratio: float
    """Median over pairs."""
    low: float
    high: float


def _speeds(quick: bool) -> Iterator[Speed]:
    for model in MODELS:
        for variant in ("best",) if quick else ("best", "AVX2"):
            with nullcontext() if quick else _empty_cache():
                begun = time.perf_counter()
                plain = _built(model, ())
                plain_s = time.perf_counter() - begun
                built = _built(model, _targets(variant))
                compile_s = time.perf_counter() - begun - 2 * plain_s
            for threads in THREADS[:1] if quick else THREADS:
                speed = _speed(model, variant, built, plain, threads, compile_s, pairs=5 if quick else PAIRS)
                _show(speed)
                yield speed


def _targets(variant: str) -> tuple[str, ...]:
    """Of this machine's family: the best that it runs, or the first."""
    here = this_runtime()
    names = [name for name, target in TARGETS.items() if here.runs(target.needs(here.version))]
    if not names:
        raise SystemExit(f"Nothing is compiled for this machine, {here}.")
    return (names[-1],) if variant == "best" else (names[0],)


def _built(model: str, targets: Sequence[str]) -> Built:
    task = shoal.Task.from_flax(
        MODELS[model], name=model.lower(), loss="softmax_cross_entropy", batch={"image": ((28, 28, 1), "uint8"), "label": ((), "int32")},
        local=shoal.Local(optimizer=optax.sgd(0.05), batch_size=B, steps_per_block=K, max_examples=B * K * BLOCKS),
    )  # fmt: skip
    return build(task, iree=targets)


def _speed(
    model: str, variant: str, built: Built, plain: Built, threads: int, compile_s: float, *, pairs: int
) -> Speed:
    taken: dict[EngineName, list[float]] = {engine: [] for engine in ENGINES}
    with (
        ChildRunner(built.plan, threads=threads, engine="iree", priority="normal") as iree,
        ChildRunner(plain.plan, threads=threads, priority="normal") as xla,
    ):
        for runner in (iree, xla):
            runner.set_model("model", built.model)
        for pair in range(-2, pairs):  # the first two warm up
            for engine in ENGINES[:: 1 if pair % 2 else -1]:
                seconds = _train(iree if engine == "iree" else xla)
                if pair >= 0:
                    taken[engine].append(seconds / (BLOCKS * K))
    ratios = np.array(taken["iree"]) / np.array(taken["jax"])
    ratio, low, high = percentile_interval(ratios.tolist(), 50.0)
    iree_ms, xla_ms = (1e3 * float(np.median(each)) for each in taken.values())
    return Speed(model, variant, threads, compile_s, iree_ms, xla_ms, ratio, low, high)


def _train(runner: ChildRunner) -> float:
    rng = np.random.default_rng(0)
    runner.begin("model", {})
    for _ in range(BLOCKS):
        batch: Tensors = {
            "image": rng.integers(0, 256, (K, B, 28, 28, 1)).astype(np.uint8),
            "label": rng.integers(0, 10, (K, B)).astype(np.int32),
        }
        runner.block(batch, np.ones((K, B), bool), np.array([1, 2], np.uint32))
    return float(runner.finish().seconds["compute"])


def _show(speed: Speed) -> None:
    table(
        ["model", "code", "threads", "compiled in", "IREE, ms a step", "XLA, ms a step", "IREE / XLA", "95 %"],
        [[speed.model, speed.variant, speed.threads, f"{speed.compile_s:.1f} s", f"{speed.iree_ms:.3f}", f"{speed.xla_ms:.3f}",
          f"{speed.ratio:.2f}", f"{speed.low:.2f} to {speed.high:.2f}"]],
    )  # fmt: skip


@contextmanager
def _empty_cache() -> Iterator[None]:
    before = os.environ.get("SHOAL_CACHE")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["SHOAL_CACHE"] = folder
        try:
            yield
        finally:
            os.environ.pop("SHOAL_CACHE")
            if before is not None:
                os.environ["SHOAL_CACHE"] = before


# R2.


def _installed() -> dict[str, dict[str, float]]:
    """Way to install -> package -> MB."""
    found = {"pip install": _packages(device_environment())}
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "bundle"
        subprocess.run([sys.executable, PACKAGE / "bundle.py", out, "--without-blas", PEERS / "wheels"], check=True)
        found["bundle"] = _packages(out)
    for way, packages in found.items():
        most = sorted(packages.items(), key=lambda item: -item[1])
        print(f"{way}: {sum(packages.values()):.1f} MB: " + ", ".join(f"{name} {size:.1f}" for name, size in most[:10]))
    return found


def _packages(folder: Path) -> dict[str, float]:
    found: dict[str, float] = {}
    for path in folder.rglob("*"):
        name = path.relative_to(folder).parts[0].split(".")[0]
        if path.is_file() and not path.is_symlink() and not name.startswith(OTHER_THAN_SHOAL):
            found[name] = found.get(name, 0.0) + path.stat().st_size / 1e6
    return found


def _size_goals(installed: dict[str, dict[str, float]] | None) -> Iterator[Goal]:
    totals = {way: sum(packages.values()) for way, packages in (installed or {}).items()}
    yield Goal("R2", "MB that `pip install` of shoal-device takes", totals.get("pip install"), "<= 80")
    yield Goal("R2b", "MB of the bundle, NumPy without BLAS", totals.get("bundle"), "<= 80")


if __name__ == "__main__":
    run("runtime", measure, __doc__ or "")
