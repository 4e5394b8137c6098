"""How long a whole round takes when devices have nothing to compute: 20 one-parameter devices, durable commits, TLS.

A server process (`shoal host`) and a device process (`shoal device`, 20 devices) as a user starts them, over loopback.
A round is counted from one durable commit to the next: selection, assignment, training in the device's child process,
report, sum, commit with fsync. Known floors: rivals poll on timers of 0.5 s (NVFlare) and 3 s (Flower), and cannot be
below them by construction.
"""

import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.frame import Goal, percentile_interval, run, table
from shoal.record.sqlite import open_store

DEVICES = 20


def measure(quick: bool) -> tuple[Sequence[Goal], dict[str, Any]]:
    rounds = 100 if quick else 1000
    with tempfile.TemporaryDirectory() as folder:
        seconds, start_s = live_rounds(Path(folder), "one_parameter.py:task", devices=DEVICES, rounds=rounds)
    warm = seconds[20:]  # the first rounds start processes, connect and compile
    p50, p50_low, p50_high = percentile_interval(warm, 50)
    p99, p99_low, p99_high = percentile_interval(warm, 99)
    table(
        ["percentile", "ms", "95 % low", "95 % high"],
        [
            ["p50", p50 * 1e3, p50_low * 1e3, p50_high * 1e3],
            ["p99", p99 * 1e3, p99_low * 1e3, p99_high * 1e3],
        ],
    )
    print(f"start-up to the first commit: {start_s:.1f} s; rounds measured: {len(warm)}")
    goals = [
        Goal("L1", "p50 of a whole round of 20 one-parameter devices, ms", p50 * 1e3, "< 50", judged=p50_high * 1e3),
        Goal("L2", "p99 of the same, ms", p99 * 1e3, "< 150", judged=p99_high * 1e3),
    ]
    return goals, {"rounds": len(warm), "start_s": round(start_s, 2)}


def live_rounds(folder: Path, task: str, *, devices: int, rounds: int) -> tuple[list[float], float]:
    """Seconds of each round of a host and so many devices in another process, and from the start to the first commit.

    Args:
        folder: an empty one.
        task: in this folder, as file.py:name; its examples have one field `x`.
        devices: played by one process.
        rounds: that the host commits.
    """
    data, record, ready = folder / "data", folder / "run", folder / "ready"
    data.mkdir()
    for number in range(devices):
        np.savez(data / f"device-{number:03d}.npz", x=np.full(4, number, np.float32))
    shoal = [sys.executable, "-m", "shoal"]
    begun = time.time()
    host = subprocess.Popen(
        [
            *shoal,
            "host",
            str(Path(__file__).parent / task),
            "--rounds",
            str(rounds),
            "--port",
            "0",
            "--run",
            str(record),
            "--ready-file",
            str(ready),
            "--tls",
        ],
        stdout=subprocess.DEVNULL,
    )
    try:
        while not ready.exists():
            if host.poll() is not None:
                raise RuntimeError(f"the host ended with {host.returncode} before it was ready")
            time.sleep(0.02)
        ca = next(record.glob("**/ca.pem"))
        subprocess.run(
            [*shoal, "device", "--server", ready.read_text().strip(), "--data", str(data), "--ca", str(ca)],
            stdout=subprocess.DEVNULL,
            check=True,
            timeout=1000,
        )
        host.wait(timeout=30)
    finally:
        host.kill()
    store = open_store(record, read_only=True)
    try:
        times = [commit.created_s for commit in store.commits(store.runs()[-1].id)]
    finally:
        store.close()
    return [float(step) for step in np.diff(times)], times[1] - begun


if __name__ == "__main__":
    run("round_latency", measure, __doc__ or "")
