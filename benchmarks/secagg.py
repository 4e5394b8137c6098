"""Secure groups: what a server and a member compute and send, with members lost where it costs the server most.

One group of 500 members and 100,000 values of 16 bits (25 bits with the room of a sum), a tenth of them lost after they have shared their
secrets: whole groups in one process, every message serialized, each sum compared with that of the survivors. Beside it Flower's SecAgg+ by
its own functions for as many neighbours and the same threshold (`peers/flwr_secagg.py`). The published
prototype of SecAgg (Bonawitz et al. 2017) took 62 s for the server, of other hardware.

Last a round of a live fleet, 64 devices over TLS, in clear and in secure groups.

S1: the server's and a member's processor seconds. S2: bytes that a member sends for a million values, over what the values themselves
take, and over a float32 update. S3: 5,000 members as ten groups.
"""

import json
import os
import random
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from math import ceil, log2
from pathlib import Path
from typing import Any, Final

import numpy as np

from benchmarks.frame import PEERS, Goal, percentile_interval, run, table
from benchmarks.round_latency import live_rounds
from benchmarks.secure_task import DEVICES
from benchmarks.simulation_turns import ROOT
from shoal.privacy import masks
from shoal.privacy.neighbours import Assumptions
from shoal.privacy.played import Played, play
from shoal.privacy.secure_terms import Segment, Terms

MEMBERS: Final = 500
SIZE: Final = 100_000
VALUE_BITS: Final = 16
COLLUDERS: Final = 0.1
TRIALS: Final = 7


def measure(quick: bool) -> tuple[Sequence[Goal], dict[str, Any]]:
    members, size = (60, 20_000) if quick else (MEMBERS, SIZE)
    rival_python = PEERS / "flwr" / "bin" / "python"
    trials, rivals = [], []
    for trial in range(1 if quick else TRIALS):
        trials.append(group(members, size, 0.1, seed=trial))
        if rival_python.exists() and (quick or trial < 2):
            rivals.append(_rival(str(rival_python), members, size, lost=members // 10))
    rows = [_row("ours", members, size, 0.1, trials)]
    rows += [["Flower", members, size, "10 %", *(min(rival[key] for rival in rivals) for key in ("server_s", "opening_s", "client_s")),
              rivals[0]["up_bytes"], "-"]] if rivals else []  # fmt: skip
    if not rivals:
        print(f"Flower is not installed in {PEERS} (benchmarks/peers/setup.sh flwr): its row is missing")
    many = (
        {}
        if quick
        else {
            share: [group(MEMBERS, SIZE, share, seed=100 + number) for number in range(10)] for share in (0.0, 0.1, 0.3)
        }
    )
    for share, groups in many.items():
        rows.append(_row("ours, ten groups", 10 * MEMBERS, SIZE, share, groups))
    live = {name: _live(name, 4 if quick else 15) for name in ("clear", "secure")}
    table(
        ["a live fleet, 64 devices x 100,000", "s a round (median)"],
        [[name, f"{seconds:.3f}"] for name, seconds in live.items()],
    )
    large = group(40 if quick else MEMBERS, 1_000_000, 0.0, seed=1, bits=_bits(MEMBERS))
    rows.append(_row("ours", 40 if quick else MEMBERS, 1_000_000, 0.0, [large]))
    table(
        [
            "",
            "members",
            "values",
            "lost",
            "server s",
            "opening s",
            "member s",
            "member sends, bytes",
            "masks taken off",
        ],
        rows,
    )
    print(_limit(trials[0], size))
    return _goals(trials, many, large, quick), {
        "graph": repr(_terms(members, size, 0.1).graph(members)),
        "server_s": [played.server_s for played in trials], "member_s": [played.member_s for played in trials],
        "flower": rivals, "ten_groups_server_s": {str(share): sum(each.server_s for each in groups) for share, groups in many.items()},
        "million_up_bytes": large.up_bytes, "live_round_s": live,
    }  # fmt: skip


def _goals(trials: Sequence[Played], many: dict[float, list[Played]], large: Played, quick: bool) -> list[Goal]:
    why = "it needs the full run" if quick else ""
    server, _, server_worst = percentile_interval([played.server_s for played in trials], 50)
    member, _, member_worst = percentile_interval([played.member_s for played in trials], 50)
    values = 1_000_000 * ceil(log2(MEMBERS * (2**VALUE_BITS - 1) + 1)) / 8
    ten = sum(played.server_s for played in many[0.1]) if many else None
    return [
        Goal("S1", "seconds of the server: 500 members, 100,000 values, a tenth lost", None if quick else server, "<= 2", why,
             judged=None if quick else server_worst),
        Goal("S1c", "seconds of a member of it", None if quick else member, "<= 0.5", why, judged=None if quick else member_worst),
        Goal("S2", "bytes sent for a million values over ceil(log2 range) / 8 each", large.up_bytes / values, "<= 1.25"),
        Goal("S2f", "bytes sent for a million values over a float32 update", large.up_bytes / 4e6, "<= 1"),
        Goal("S3", "server seconds for 5,000 members in ten groups, a tenth lost, over ten times S1",
             None if ten is None else ten / (10 * server), "<= 1.25", why),
    ]  # fmt: skip


def group(members: int, size: int, lost: float, *, seed: int, bits: int | None = None) -> Played:
    """A group, its sum checked against that of the survivors."""
    rng = np.random.default_rng(seed)
    values = rng.integers(
        0, 1 << VALUE_BITS, (8, size), np.uint32
    )  # members hold one of eight vectors: memory, not costs
    gone = rng.permutation(members)[: int(lost * members)]
    source: Callable[[int], bytes] = random.Random(seed).randbytes
    terms = _terms(members, size, max(lost, 0.1), bits)
    played = play(
        terms, lambda place: values[place % 8], members, random=source, lost=dict.fromkeys(gone.tolist(), "masked")
    )
    counts = np.bincount(np.array(played.survivors) % 8, minlength=8).astype(np.uint64)
    assert np.array_equal(played.total, np.sum(values * counts[:, None], axis=0).astype(np.uint32)), "the sum is wrong"
    return played


def _terms(members: int, size: int, dropouts: float, bits: int | None = None) -> Terms:
    return Terms(
        purpose=bytes(32), segments=(Segment(size=size, bits=bits or _bits(members)),), minimum=8,
        assumptions=Assumptions(colluders=COLLUDERS, dropouts=dropouts),
    )  # fmt: skip


def _live(name: str, rounds: int) -> float:
    """Median seconds of a round over loopback with TLS, without the first."""
    with tempfile.TemporaryDirectory() as folder:
        seconds, _ = live_rounds(Path(folder), f"secure_task.py:{name}", devices=DEVICES, rounds=rounds)
    return float(np.median(seconds[2:]))


def _bits(members: int) -> int:
    return (members * ((1 << VALUE_BITS) - 1)).bit_length()


def _row(who: str, members: int, size: int, lost: float, played: Sequence[Played]) -> list[Any]:
    each = len(played) if who != "ours" else 1
    total = [sum(getattr(one, key) for one in played) * each / len(played) for key in ("server_s", "opening_s")]
    return [who, members, size, f"{lost:.0%}", *total, max(one.member_s for one in played),
            max(one.up_bytes for one in played), sum(one.num_masks for one in played) * each // len(played)]  # fmt: skip


def _limit(played: Played, size: int) -> str:
    """How far the opening is from the speed at which this processor makes key stream."""
    total, keys = np.zeros(1 << 20, np.uint32), [(os.urandom(32), 1) for _ in range(64)]
    begun = time.process_time()
    masks.add_masks(total, keys)
    rate = 64 * total.nbytes / (time.process_time() - begun)
    needed = played.num_masks * 4 * size
    return f"masks: {rate / 1e9:.2f} GB/s here; {needed / 1e9:.2f} GB taken off, {needed / rate:.2f} of the {played.opening_s:.2f} s of the opening"


def _rival(python: str, members: int, size: int, *, lost: int) -> dict[str, Any]:
    graph = _terms(members, size, 0.1).graph(members)
    given = {
        "members": members,
        "neighbours": graph.degree // 2 * 2,
        "threshold": graph.threshold,
        "lost": lost,
        "size": size,
    }
    command = [
        python,
        str(ROOT / "benchmarks" / "peers" / "flwr_secagg.py"),
        *(f"--{key}={value}" for key, value in given.items()),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=900)
    if done.returncode:
        raise SystemExit(f"Flower's SecAgg+ failed: {done.stderr.strip().splitlines()[-1:]}")
    made: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return made


if __name__ == "__main__":
    run("secagg", measure, __doc__ or "")
