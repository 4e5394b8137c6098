"""A cluster from a fleet: central data pushed to devices, which then train; against training where the data are.

D1a: Fashion-MNIST, `shoal data push` to four `shoal data take`, then `shoal host` and four `shoal device` over the stores; real processes. The rival
is what a pod of four would do, as a plain JAX loop over all the data (there is no pod mode yet): the same model, optimizer and rate, as many batches, each
step on a batch of each device's. A round is 20 steps of each device. Accuracy on 10,000 test images, mean at the ends of the last five passes; the difference is paired by seed, over which
data, split, initial weights and order vary. Beside it a loop on one device's batches, which takes four times as many steps one after the other: what no
four machines can do at once.

D1b: bytes on the wire, of the bytes of the data's arrays: counted by a proxy between takers and server, both ways, HTTP/2 and all. The worse of
images and of random bytes, which nothing makes smaller. Beside it the same with kill -9 of the server and of a taker in mid-transfer, and the
speed without the proxy, of a server and four takers on one machine, to and from its disk.
"""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import jax
import jax.numpy as jnp
import numpy as np
from scipy.stats import t as student

import shoal
from benchmarks.dispatch_task import BATCH, DEVICES, RATE, STEPS
from benchmarks.dispatch_task import task as TASK
from benchmarks.frame import Goal, run, table
from shoal.data import npz

ROOT: Final = Path(__file__).parents[1]
IMAGES, PASSES, LAST, SEEDS = 12_000, 30, 5, tuple(range(11, 19))
ROUNDS_A_PASS: Final = IMAGES // (DEVICES * BATCH * STEPS)
WAIT_S: Final = 240.0


def measure(quick: bool) -> tuple[Sequence[Goal], dict[str, Any]]:
    moves = [_move(*each) for each in _moves(quick)]
    table(
        ["what", "MB", "on the wire", "of the data", "seconds", "of the slowest taker", "MB/s"],
        [[m.what, f"{m.size_bytes / 1e6:.1f}", "" if m.wire_bytes is None else f"{m.wire_bytes / 1e6:.2f}", "" if m.share is None else f"{m.share:.4f}", f"{m.seconds:.1f}", f"{m.taking_s:.1f}", f"{m.size_bytes / 1e6 / m.taking_s:.1f}"] for m in moves],
    )  # fmt: skip
    share = max(m.share for m in moves if m.share is not None and not m.kills)
    results = [] if quick else [_compare(seed) for seed in SEEDS]
    table(
        ["seed", "pushed", "central, batches of four devices", "central, four times the steps"],
        [[r.seed, f"{r.pushed:.4f}", f"{r.central:.4f}", f"{r.more_steps:.4f}"] for r in results],
    )
    mean, upper = _paired([100 * (r.central - r.pushed) for r in results])
    goals = [
        Goal("D1a", "points of accuracy below central training on as many batches of all devices, mean over seeds", mean, "<= 0.5", judged=upper),
        Goal("D1b", "bytes on the wire of one push, of the data's, the worse of two", share, "<= 1.1"),
    ]  # fmt: skip
    return goals, {"moves": [vars(m) for m in moves], "results": [vars(r) for r in results]}


def _paired(points: Sequence[float]) -> tuple[float | None, float | None]:
    """Mean, and the upper end of its 95 % interval (Student's t)."""
    if not points:
        return None, None
    mean, error = float(np.mean(points)), float(np.std(points, ddof=1)) / len(points) ** 0.5
    return mean, mean + float(student.ppf(0.975, len(points) - 1)) * error


# D1b.


@dataclass
class Move:
    """One push."""

    what: str
    kills: bool
    size_bytes: int
    wire_bytes: int | None
    """Both ways; None: not counted."""
    seconds: float
    """From the first taker's start to the last one's end, with what it takes to start them."""
    taking_s: float
    """Of the slowest taker, from its first call to its last."""

    @property
    def share(self) -> float | None:
        return None if self.wire_bytes is None else self.wire_bytes / self.size_bytes


def _moves(quick: bool) -> Sequence[tuple[str, dict[str, np.ndarray], bool, bool]]:
    """What is pushed, whether its bytes are counted, and whether processes are killed meanwhile."""
    noise = {"x": np.random.default_rng(0).integers(0, 256, ((8 if quick else 48) * 2500, 400), np.uint8)}
    if quick:
        return [("random bytes", noise, True, False)]
    images = dict(shoal.data.load("fashion-mnist").train.fields)
    return [
        ("images", images, True, False), ("random bytes", noise, True, False), ("random bytes, both killed", noise, True, True),
        ("images, no proxy", images, False, False), ("random bytes, no proxy", noise, False, False),
    ]  # fmt: skip


def _move(what: str, fields: dict[str, np.ndarray], counted: bool, kills: bool) -> Move:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        npz.write(folder / "all.npz", fields)
        size = sum(array.nbytes for array in fields.values())
        push = _push(folder, seed=0, port=0)
        proxy = _Proxy(int(push.address.rpartition(":")[2])) if counted else None
        begun = time.perf_counter()
        takers = [_take(folder, push, number, proxy) for number in range(DEVICES)]
        if kills:
            assert proxy is not None
            _until(lambda: proxy.num_bytes > size / 2, "half of the data")
            takers[0].send_signal(signal.SIGKILL)
            push.process.send_signal(signal.SIGKILL)
            push.process.wait()
            takers[0].wait()
            push = _push(folder, seed=0, port=int(push.address.rpartition(":")[2]))
            takers[0] = _take(folder, push, 0, proxy)
        _end(takers)
        seconds = time.perf_counter() - begun
        _end([push.process])
        _check(folder, fields)
        taking_s = max(_said(folder / f"take{number}.log")["total_seconds"] for number in range(DEVICES))
        made = Move(what, kills, size, proxy.num_bytes if proxy else None, seconds, taking_s)
        print(vars(made), flush=True)
        return made


def _said(log: Path) -> dict[str, Any]:
    """The JSON that a command ended with."""
    text = log.read_text()
    made: dict[str, Any] = json.loads(text[text.index("{") : text.rindex("}") + 1])
    return made


def _check(folder: Path, fields: dict[str, np.ndarray]) -> None:
    """All is there, once."""
    parts = []
    for number in range(DEVICES):
        with shoal.data.ExampleStore(folder / f"{number}.examples") as store:
            parts.append(store.examples())
    whole = shoal.data.Examples.concatenate(parts)
    for name, array in fields.items():
        arrived, sent = (
            np.sort(each.reshape(len(each), -1).sum(1, dtype=np.float64)) for each in (whole.fields[name], array)
        )
        assert np.array_equal(arrived, sent), f"{name} did not arrive whole"


class _Proxy:
    """Passes bytes on and counts them."""

    def __init__(self, port: int) -> None:
        self._to, self.num_bytes = port, 0
        self._lock = threading.Lock()
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listening.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            near, _ = self._listening.accept()
            try:
                far = socket.create_connection(("127.0.0.1", self._to))
            except OSError:
                near.close()
                continue
            for source, sink in ((near, far), (far, near)):
                threading.Thread(target=self._pass_on, args=(source, sink), daemon=True).start()

    def _pass_on(self, source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(1 << 18):
                with self._lock:
                    self.num_bytes += len(data)
                sink.sendall(data)
        for each in (source, sink):
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)


# D1a.


@dataclass
class Result:
    """Accuracies of one seed."""

    seed: int
    pushed: float
    central: float
    more_steps: float


def _compare(seed: int) -> Result:
    loaded = shoal.data.load("fashion-mnist")
    chosen = np.sort(np.random.default_rng(seed).permutation(len(loaded.train))[:IMAGES])
    train, test = shoal.data.Examples(loaded.train.take(chosen)), loaded.test
    made = Result(
        seed, _trained_on_devices(train, test, seed), _central(train, test, seed, DEVICES * BATCH), _central(train, test, seed, BATCH)
    )  # fmt: skip
    print(vars(made), flush=True)
    return made


def _trained_on_devices(train: shoal.data.Examples, test: shoal.data.Examples, seed: int) -> float:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        npz.write(folder / "all.npz", train.fields)
        push = _push(folder, seed=seed, port=0)
        _end([*(_take(folder, push, number, None) for number in range(DEVICES)), push.process])
        ready = folder / "host.ready"
        task = f"{Path(__file__).parent / 'dispatch_task.py'}:task"
        host = _start(
            folder, "host", "host", task, "--rounds", PASSES * ROUNDS_A_PASS, "--seed", seed, "--port", 0, "--run", folder / "run",
            "--ready-file", ready,
        )  # fmt: skip
        _until(ready.exists, "the host")
        devices = [
            _start(folder, f"device{n}", "device", "--server", ready.read_text(), "--data", folder / f"{n}.examples", "--in-process", "--threads", 1)
            for n in range(DEVICES)
        ]  # fmt: skip
        _end([host, *devices])
        # Versions of a few rounds' work each are not all evaluated by the host, which does that beside the rounds.
        ends = [(PASSES - before) * ROUNDS_A_PASS for before in range(LAST)]
        return float(np.mean([_accuracy(shoal.load(folder / "run", version=end), test) for end in ends]))


def _accuracy(model: shoal.Model, test: shoal.data.Examples) -> float:
    return float(np.mean(model.predict(test.fields["image"]).argmax(-1) == test.fields["label"]))


def _central(train: shoal.data.Examples, test: shoal.data.Examples, seed: int, batch: int) -> float:
    """A plain loop: as many passes over the data as the fleet's rounds, in batches of that many."""
    key = jax.random.key(seed)
    start = TASK.init(key)
    fields = {name: jnp.asarray(array) for name, array in train.fields.items()}

    def loss(params: Any, one: dict[str, jax.Array]) -> jax.Array:
        made = TASK.loss(params, start.state, _unmasked(one), key)
        return jnp.mean(made.per_example)

    @jax.jit
    def epoch(params: Any, order: jax.Array) -> Any:
        def step(params: Any, indices: jax.Array) -> tuple[Any, None]:
            slope = jax.grad(loss)(params, {name: array[indices] for name, array in fields.items()})
            return jax.tree.map(lambda value, by: value - RATE * by, params, slope), None

        return jax.lax.scan(step, params, order)[0]

    assert TASK.evaluate is not None
    evaluate, everything = (
        jax.jit(TASK.evaluate),
        _unmasked({name: jnp.asarray(array) for name, array in test.fields.items()}),
    )
    rng, params, accuracies = np.random.default_rng(seed), start.params, []
    for _ in range(PASSES):
        params = epoch(params, jnp.asarray(rng.permutation(len(train)).reshape(-1, batch)))
        found = evaluate(params, start.state, everything)["accuracy"]
        accuracies.append(float(jnp.sum(found.numerator) / jnp.sum(found.denominator)))
    return float(np.mean(accuracies[-LAST:]))


def _unmasked(batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
    return {**batch, "mask": jnp.ones(len(batch["label"]), bool)}


# Processes.


@dataclass
class _Push:
    process: "subprocess.Popen[bytes]"
    address: str
    ticket: str
    key: str


def _push(folder: Path, *, seed: int, port: int) -> _Push:
    ready, log = folder / "push.ready", folder / "push.log"
    ready.unlink(missing_ok=True)
    process = _start(
        folder, "push", "data", "push", folder / "all.npz", "--shards", DEVICES, "--seed", seed, "--run", folder / "push", "--port", port,
        "--ready-file", ready, "--json",
    )  # fmt: skip
    _until(lambda: ready.exists() or process.poll() is not None, "the push")
    said = dict(re.findall(r"--(ticket|key) ([0-9a-f]+)", log.read_text()))
    if not said:
        sys.exit(f"the push did not begin:\n{log.read_text()[-2000:]}")
    return _Push(process, ready.read_text(), said["ticket"], said["key"])


def _take(folder: Path, push: _Push, number: int, proxy: _Proxy | None) -> "subprocess.Popen[bytes]":
    return _start(
        folder, f"take{number}", "data", "take", "--server", proxy.address if proxy else push.address, "--ticket", push.ticket, "--key", push.key,
        "--store", folder / f"{number}.examples", "--json",
    )  # fmt: skip


def _start(folder: Path, name: str, *arguments: object) -> "subprocess.Popen[bytes]":
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with (folder / f"{name}.log").open("wb") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "shoal", *map(str, arguments)], stdout=log, stderr=log, cwd=ROOT, env=environment
        )


def _end(processes: Sequence["subprocess.Popen[bytes]"]) -> None:
    """Waits; a process that fails ends the benchmark."""
    end_s = time.monotonic() + WAIT_S
    try:
        for process in processes:
            if process.wait(max(0.1, end_s - time.monotonic())):
                sys.exit(f"{process.args!r} ended with {process.returncode}")
    finally:
        for process in processes:
            process.kill()
            process.wait()


def _until(true: Callable[[], bool], what: str) -> None:
    end_s = time.monotonic() + WAIT_S
    while not true():
        if time.monotonic() > end_s:
            sys.exit(f"{what} did not come within {WAIT_S:.0f} s")
        time.sleep(0.01)


if __name__ == "__main__":
    run("dispatch", measure, "Training on pushed data, and what the push costs.")
