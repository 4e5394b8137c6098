"""What a server needs to take in updates of a 200 MB model from 10 and from 50 devices at once.

The server is a process of its own (`shoal host`); the devices are scripted: they push a prepared update of the full size
through the same wire, all at the same time, over TLS. Anonymous memory (what cannot be dropped and read again) of all
the server's processes is read every 20 ms, and the same server's before the first device counts as idle.
"""

import asyncio
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from benchmarks.frame import Goal, run, table
from shoal.fleet.grpc_link import GrpcLink
from shoal.fleet.wire import fleet_pb2 as pb
from shoal.plan.manifest import Manifest
from shoal.tensors import Index, Tensors, to_bytes

MODEL_MB = 200
SLICE_BYTES = 64 << 10


def measure(quick: bool) -> tuple[Sequence[Goal], dict[str, Any]]:
    model_mb = 20 if quick else MODEL_MB
    rows, above = [], {}
    for devices in (10, 50):
        with tempfile.TemporaryDirectory() as folder:
            idle, peak, seconds = _serve(Path(folder), devices, model_mb)
        above[devices] = (peak - idle) / (model_mb * 1e6)
        rate = devices * model_mb / seconds
        rows.append([devices, idle / 1e6, peak / 1e6, above[devices], seconds, rate])
    table(["devices", "idle MB", "peak MB", "above idle / model", "round s", "MB/s in"], rows)
    why = f"the model has {model_mb} MB" if quick else ""
    apart = 100 * abs(above[50] - above[10]) / above[10]
    goals = [
        Goal("M1", "anonymous memory above idle over the model's size, worst", max(above.values()), "<= 3.5", why=why),
        Goal("M2", "difference between 10 and 50 devices, %", apart, "<= 5", why=why),
    ]
    return goals, {"rows": rows}


def _serve(folder: Path, devices: int, model_mb: int) -> tuple[float, float, float]:
    record, ready = folder / "run", folder / "ready"
    task = str(Path(__file__).parent / "large_model.py") + ":task"
    command = [
        sys.executable,
        "-m",
        "shoal",
        "host",
        task,
        "--rounds",
        "1",
        "--port",
        "0",
        "--tls",
        "--run",
        str(record),
    ]
    environment = {**os.environ, "SHOAL_BENCHMARK_DEVICES": str(devices), "SHOAL_BENCHMARK_MB": str(model_mb)}
    host = subprocess.Popen([*command, "--ready-file", str(ready)], stdout=subprocess.DEVNULL, env=environment)
    try:
        while not ready.exists():
            if host.poll() is not None:
                raise RuntimeError(f"the host ended with {host.returncode} before it was ready")
            time.sleep(0.05)
        time.sleep(1.0)
        idle = _anonymous_bytes(host.pid)
        watch = _Watch(host.pid)
        ca = next(record.glob("**/ca.pem")).read_bytes()
        begun = time.perf_counter()
        asyncio.run(_devices(ready.read_text().strip(), ca, devices))
        seconds = time.perf_counter() - begun
        host.wait(timeout=60)
        return idle, watch.stop(), seconds
    finally:
        host.kill()


async def _devices(address: str, ca: bytes, devices: int) -> None:
    shared = _Shared()
    async with asyncio.TaskGroup() as group:
        for number in range(devices):
            group.create_task(_device(address, ca, f"device-{number:02d}", shared))


class _Shared:
    """The update, made once: all devices send the same one."""

    def __init__(self) -> None:
        self.lock = asyncio.Lock()
        self.update: Tensors = {}
        self.root = ""

    async def make(self, link: GrpcLink, assigned: pb.Assigned) -> None:
        async with self.lock:
            if self.root:
                return
            pieces = [p.data async for p in link.pull(pb.PullRequest(token=assigned.token, hash=assigned.plan))]
            manifest = Manifest.parse(b"".join(pieces))
            rng = np.random.default_rng(0)
            for spec in manifest.update:
                values = rng.standard_normal(spec.shape).astype(spec.numpy_dtype)
                self.update[spec.name] = np.asarray(np.abs(values)) if spec.name.startswith("metric") else values
            self.root = Index.of(self.update, manifest.update).root


async def _device(address: str, ca: bytes, name: str, shared: _Shared) -> None:
    link = GrpcLink(address, ca=ca, server_name="localhost")
    runtime = pb.RuntimeInfo(kind="stablehlo", version=[1, 17, 0], calling_convention=9, platforms=["cpu"])
    async with link.session() as stream:
        await stream.send(pb.FromDevice(check_in=pb.CheckIn(device_id=name, runtime=runtime)))
        assigned = (await stream.receive()).assigned
        await shared.make(link, assigned)
        await link.push(_slices(assigned.token, shared.update))
        await stream.send(pb.FromDevice(report=pb.Report(token=assigned.token, root=shared.root, weight=1)))
        answer = await stream.receive()
        if answer.WhichOneof("kind") != "counted":
            raise RuntimeError(f"the update was not counted: {answer}")
    await link.close()


async def _slices(token: pb.Token, update: Tensors) -> AsyncIterator[pb.PushSlice]:
    first: pb.Token | None = token
    for name, value in update.items():
        data = memoryview(to_bytes(value))
        for offset in range(0, len(data), SLICE_BYTES):
            yield pb.PushSlice(token=first, tensor=name, offset=offset, data=bytes(data[offset : offset + SLICE_BYTES]))
            first = None


class _Watch:
    """Reads the memory of a process tree until it is stopped; keeps the largest."""

    def __init__(self, pid: int) -> None:
        self._pid, self._stop, self._peak = pid, threading.Event(), 0.0
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._stop.wait(0.02):
            self._peak = max(self._peak, _anonymous_bytes(self._pid))

    def stop(self) -> float:
        self._stop.set()
        self._thread.join()
        return self._peak


def _anonymous_bytes(pid: int) -> float:
    total = 0
    try:
        processes = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
        for process in processes:
            lines = Path(f"/proc/{process.pid}/smaps_rollup").read_text(encoding="ascii").splitlines()
            total += sum(int(line.split()[1]) for line in lines if line.startswith("Anonymous:"))
    except (psutil.NoSuchProcess, OSError):
        return 0.0
    return total * 1024.0


if __name__ == "__main__":
    run("server_memory", measure, __doc__ or "")
