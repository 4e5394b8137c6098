"""A pod whose members are killed, ours and torchft's: how much of the training is left.

Both train the same perceptron with two members on this machine, each on a core of its own, first undisturbed, then with a member killed
(SIGKILL) every two minutes, in turn. What is killed is started again at once. Goodput is examples that are in the model, by seconds, as a share of the
undisturbed rate of the same system: what was trained and lost again does not count. Undisturbed are the minute before the first kill, and each time
from half a minute after a kill to the next one: the machine's speed changes by more than kills cost. Every member has all of the
model and of the optimizer's state. Ours starts a new life from the state that the survivor rescued; torchft's surviving replica goes on alone, and the other takes
the model from it when it is back. torchft's lighthouse waits for nobody longer than
a second (its defaults are 5 and 60 s).

K1 is the goal's own measure, ten kills in twenty minutes, for each of the two: this run takes longer than others.
"""

import asyncio
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import frame
from benchmarks.frame import PEERS, Goal, table
from benchmarks.pod_elastic_common import BATCH, CALL, MEMBERS, reached
from shoal.pod.membership import PodPolicy
from shoal.pod.place import WorkerCommand, free_ports
from shoal.pod.supervisor import Supervisor

PEER = Path(__file__).parent / "peers" / "pod_elastic_torchft.py"
START_S = 120.0


@dataclass(frozen=True)
class Course:
    """What happens to both."""

    settle_s: float
    """After the first step, before anything is measured: spares get ready."""
    calm_s: float
    kills: int
    every_s: float
    over_s: float
    """After a kill, until it is taken to be over."""


FULL = Course(settle_s=30.0, calm_s=60.0, kills=10, every_s=120.0, over_s=30.0)
QUICK = Course(settle_s=4.0, calm_s=2.0, kills=1, every_s=6.0, over_s=2.0)


@dataclass(frozen=True)
class Measured:
    rate: float
    """Examples a second, undisturbed."""
    goodput: float
    """Share of it that is left."""
    standing_s: tuple[float, ...]
    """From each kill until there was more in the model than before."""
    back_s: tuple[float, ...]
    """From each kill until the killed member had made a step again."""


async def course(folder: Path, how: Course, say: Callable[[str], None]) -> Measured:
    """Measures what is being trained in a folder, and kills its members in turn."""

    def examples() -> int:
        return reached(folder)[1]

    async with asyncio.timeout(START_S):
        while not examples():
            await asyncio.sleep(0.05)
    calm, calm_s = 0, 0.0

    async def undisturbed(until_s: float) -> None:
        nonlocal calm, calm_s
        began_s, had = time.monotonic(), examples()
        await asyncio.sleep(max(0.0, until_s - began_s))
        calm, calm_s = calm + examples() - had, calm_s + time.monotonic() - began_s

    await asyncio.sleep(how.settle_s)
    await undisturbed(time.monotonic() + how.calm_s)
    say(f"{calm / calm_s:,.0f} examples/s undisturbed")
    standing, back, begun_s, before = [], [], time.monotonic(), examples()
    for number in range(how.kills):
        await undisturbed(begun_s + (number + 0.5) * how.every_s)
        stood_s, back_s = await _kill(folder, number % MEMBERS)
        standing.append(stood_s)
        back.append(back_s)
        say(
            f"kill {number + 1} of {how.kills}: more than before in {stood_s:.1f} s, the member is back in {back_s:.1f} s"
        )
        await asyncio.sleep(how.over_s)
    await undisturbed(begun_s + how.kills * how.every_s)
    rate = calm / calm_s
    goodput = (examples() - before) / (time.monotonic() - begun_s) / rate
    return Measured(rate, goodput, tuple(standing), tuple(back))


async def _kill(folder: Path, member: int) -> tuple[float, float]:
    """Seconds until there is more in the model than before, and until this member has made a step again."""
    had, written = reached(folder)[1] + CALL * MEMBERS * BATCH, folder / f"reached-{member}"
    os.kill(int((folder / f"pid-{member}").read_text()), signal.SIGKILL)
    struck_s = time.monotonic()
    await asyncio.sleep(0.05)
    last = written.stat().st_mtime_ns
    stood_s = back_s = 0.0
    async with asyncio.timeout(START_S):
        while not (stood_s and back_s):
            await asyncio.sleep(0.01)
            if not stood_s and reached(folder)[1] > had:
                stood_s = time.monotonic() - struck_s
            if not back_s and written.stat().st_mtime_ns > last:
                back_s = time.monotonic() - struck_s
    return stood_s, back_s


async def ours(how: Course, *, has_spare: bool = True) -> Measured:
    """Our supervisor in this process, its workers beside."""
    with tempfile.TemporaryDirectory(prefix="pod-elastic-") as name:
        folder = Path(name)
        environ = {
            **os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1", "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "PYTHONPATH": str(Path(__file__).parent.parent),
        }  # fmt: skip
        command = [sys.executable, "-m", "benchmarks.pod_elastic_worker", name]
        lines: list[str] = []
        supervisor = Supervisor(
            WorkerCommand(command=command, environ=environ, has_spare=has_spare),
            local_workers=MEMBERS,
            policy=PodPolicy(hosts=MEMBERS, floor_s=10.0),
            output=lambda host, line: lines.append(line),
        )
        running = asyncio.create_task(supervisor.run())
        measuring = asyncio.create_task(course(folder, how, _say("ours" if has_spare else "ours, no warm spare")))
        await asyncio.wait([running, measuring], return_when=asyncio.FIRST_COMPLETED)
        if not measuring.done():
            measuring.cancel()
            print("\n".join(lines[-20:]), file=sys.stderr)
        supervisor.stop()
        await running
        return await measuring


async def torchft(how: Course) -> Measured:
    """torchft's lighthouse and replicas, each started again as soon as it ends."""
    python = PEERS / "torchft" / "bin" / "python"
    if not python.exists():
        raise SystemExit(f"torchft is not installed in {PEERS}: run benchmarks/peers/setup.sh torchft")
    with tempfile.TemporaryDirectory(prefix="pod-elastic-") as name, _lighthouse(python) as address:
        environ = {**os.environ, "TORCHFT_LIGHTHOUSE": address}
        ports = free_ports(MEMBERS)
        errors = (Path(name) / "errors").open("w+")

        async def keep(member: int) -> None:
            while True:
                process = await asyncio.create_subprocess_exec(
                    python, PEER, name, str(member), str(ports[member]), env=environ, stdout=errors, stderr=errors
                )
                try:
                    await process.wait()
                except asyncio.CancelledError:
                    process.kill()
                    await process.wait()
                    raise

        keeping = [asyncio.create_task(keep(member)) for member in range(MEMBERS)]
        try:
            return await course(Path(name), how, _say("torchft"))
        except TimeoutError:
            errors.seek(0)
            print(errors.read()[-3000:], file=sys.stderr)
            raise
        finally:
            for task in keeping:
                task.cancel()
            await asyncio.wait(keeping)
            errors.close()


@contextmanager
def _lighthouse(python: Path) -> Iterator[str]:
    (port,) = free_ports(1)
    flags = [
        "--min_replicas",
        "1",
        "--join_timeout_ms",
        "1000",
        "--heartbeat_timeout_ms",
        "1000",
        "--quorum_tick_ms",
        "50",
    ]
    process = subprocess.Popen(
        [python.with_name("torchft_lighthouse"), "--bind", f"[::]:{port}", *flags],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait()


def _say(who: str) -> Callable[[str], None]:
    return lambda text: print(f"[{who}] {text}", file=sys.stderr, flush=True)


def measure(quick: bool) -> tuple[list[Goal], dict[str, Any]]:
    how = QUICK if quick else FULL
    found = {"ours": asyncio.run(ours(how)), "torchft 0.2.0": asyncio.run(torchft(how))}
    if not quick:
        few = Course(settle_s=5.0, calm_s=10.0, kills=4, every_s=40.0, over_s=15.0)
        found["ours, no warm spare"] = asyncio.run(ours(few, has_spare=False))
    table(
        [
            "system",
            "examples/s undisturbed",
            "goodput",
            "median s to more than before",
            "median s to the member's next step",
        ],
        [[name, m.rate, m.goodput, median(m.standing_s), median(m.back_s)] for name, m in found.items()],
    )
    what = f"goodput under {how.kills} kills, one every {how.every_s:g} s, less torchft's"
    value = found["ours"].goodput - found["torchft 0.2.0"].goodput
    goals = [Goal("K1", what, None if quick else value, ">= 0")]
    return goals, {"systems": {name: asdict(m) for name, m in found.items()}}


if __name__ == "__main__":
    frame.run("pod_elastic", measure, __doc__ or "")
