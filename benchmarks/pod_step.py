"""A step of the pod beside plain JAX, PyTorch DDP and FSDP2: two processes, a core each, sums over loopback by gloo.

All do the same to the same first weights and batches: an MLP by Adam, a decoder-only language model by AdamW, and in JAX by LAMB. They take turns
at a few steps; a pair is a turn of two of them in one cycle, and cycles go forwards and backwards by turns. The ratio is the median of the
pairs, judged by the worse end of its 95 % interval, and it counts only where the losses are the same. Compilation (the first step) has
a column of its own, and so has the processor's time: on a machine that does other things, too, that is what to look at.

Z1: ours over plain `jax.jit` with shardings (data parallel, GSPMD, donated), at the worst of the three: the default update, and the best.
Z2: ours (the default) over DDP and over FSDP2 (`fully_shard`, a layer at a time), each eager with fused Adam(W), the worse of the two models.
Beside: what LAMB takes of a step more than plain SGD does. How sums are taken is what the start-up's self-check chooses on this machine.

Rivals: `benchmarks/peers/setup.sh torch`.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np

from benchmarks.frame import Goal, percentile_interval, run, table
from benchmarks.pod_step_crew import JAX, TORCH, Crew, System, Turn

WAYS: Final = ("replicated", "sharded", "fully_sharded")
DEFAULT: Final = "sharded"
CYCLES: Final = 24
QUICK_CYCLES: Final = 8
LIMIT_S: Final = 240.0
STEPS: Final = {"mlp": 6, "decoder": 3}
"""Of a turn."""
SAME: Final = 0.01
"""Largest difference of losses, as a share, that rounding explains after so many steps."""


@dataclass
class Entry:
    """One system that trains one model in one way."""

    system: System
    way: str
    optimizer: str
    first_s: float = 0.0
    turns: list[Turn] = field(default_factory=list)

    def cells(self, model: str) -> list[object]:
        steps = [
            f"{1e3 * np.median([getattr(turn, what) for turn in self.turns]):.1f}" for what in ("seconds", "worked")
        ]
        return [model, self.optimizer, self.name, *steps, f"{self.first_s:.1f}", f"{self.turns[-1].loss:.4f}"]

    @property
    def name(self) -> str:
        return self.way if self.way not in WAYS else f"ours, {self.way}"


@dataclass(frozen=True)
class Ratio:
    """Seconds of one over those of another, of pairs."""

    model: str
    optimizer: str
    ours: str
    rival: str
    value: float
    low: float
    high: float


def measure(quick: bool) -> tuple[Sequence[Goal], dict[str, Any]]:
    measured = {model: _cycles(model, _entries(model, quick), quick) for model in (("mlp",) if quick else STEPS)}
    table(
        ["model", "optimizer", "system", "ms a step", "ms of a core", "first step, s", "loss"],
        [entry.cells(model) for model, (entries, _) in measured.items() for entry in entries],
    )
    ratios = [ratio for model, (entries, _) in measured.items() for ratio in _ratios(model, entries)]
    table(
        ["model", "optimizer", "ours", "rival", "ours / rival", "from", "to"],
        [[r.model, r.optimizer, r.ours, r.rival, f"{r.value:.3f}", f"{r.low:.3f}", f"{r.high:.3f}"] for r in ratios],
    )
    shares = {model: _shares(entries) for model, (entries, _) in measured.items()}
    for model, each in shares.items():
        for way, share in each.items():
            print(f"{model}: LAMB takes {share:.1%} of a step more than SGD, {way}")
    told = {model: how for model, (_, how) in measured.items()}
    print(f"sums over members by: {told}")
    return _goals(ratios, quick), {
        "ratios": [vars(r) for r in ratios],
        "lamb_shares": shares,
        "how": told,
        "rows": _figures(measured),
    }


def _entries(model: str, quick: bool) -> list[Entry]:
    first = "adam" if model == "mlp" else "adamw"
    ways = (DEFAULT,) if quick else WAYS
    made = [Entry(JAX, way, first) for way in ("plain", *ways)] + [Entry(TORCH, way, first) for way in ("ddp", "fsdp2")]
    if not quick:
        lamb = ("plain", *WAYS) if model == "decoder" else WAYS[:2]
        made += [Entry(JAX, way, "lamb") for way in lamb] + [Entry(JAX, way, "sgd") for way in WAYS[:2]]
    return made


def _cycles(model: str, entries: list[Entry], quick: bool) -> tuple[list[Entry], str]:
    """All entries' turns, and how sums were taken."""
    with ExitStack() as stack:
        crews = {system.name: stack.enter_context(Crew(system, model, LIMIT_S)) for system in (JAX, TORCH)}
        how = {name: crew.wait() for name, crew in crews.items()}
        for entry in entries:
            entry.first_s = crews[entry.system.name].turn(entry.way, entry.optimizer, 1).seconds
            crews[entry.system.name].turn(entry.way, entry.optimizer, 1)  # the second is not like the others either
            print(f"# {model}, {entry.optimizer}, {entry.name}: ready", flush=True)
        cycles = QUICK_CYCLES if quick else CYCLES
        for number in range(cycles):
            for entry in entries if number % 2 == 0 else reversed(entries):
                entry.turns.append(crews[entry.system.name].turn(entry.way, entry.optimizer, STEPS[model]))
            if (number + 1) % 8 == 0:
                print(f"# {model}: {number + 1} cycles of {cycles}", flush=True)
    return entries, how[JAX.name]


def _ratios(model: str, entries: Sequence[Entry]) -> list[Ratio]:
    """Of each of ours over each rival with the same optimizer."""
    made = []
    for rival in (entry for entry in entries if entry.way not in WAYS):
        for ours in (entry for entry in entries if entry.way in WAYS and entry.optimizer == rival.optimizer):
            _check_same(model, ours, rival)
            pairs = [one.seconds / other.seconds for one, other in zip(ours.turns, rival.turns, strict=True)]
            made.append(Ratio(model, ours.optimizer, ours.way, rival.way, *percentile_interval(pairs, 50)))
    return made


def _check_same(model: str, ours: Entry, rival: Entry) -> None:
    """Raises ValueError where they have not learned the same: a ratio would say nothing."""
    for number, (one, other) in enumerate(zip(ours.turns, rival.turns, strict=True)):
        if abs(one.loss - other.loss) > SAME * max(1.0, other.loss):
            raise ValueError(
                f"Expected {ours.name} and {rival.name} to have the same loss of {model} after turn {number}, got {one.loss:.5f} and {other.loss:.5f}."
            )


def _shares(entries: Sequence[Entry]) -> dict[str, float]:
    """Way -> what LAMB adds to a step of SGD, as a share of LAMB's step; the median of pairs."""
    by = {(entry.way, entry.optimizer): entry.turns for entry in entries}
    made = {}
    for way in WAYS:
        if (way, "lamb") in by and (way, "sgd") in by:
            pairs = zip(by[way, "lamb"], by[way, "sgd"], strict=True)
            made[way] = float(np.median([1 - sgd.seconds / lamb.seconds for lamb, sgd in pairs]))
    return made


def _goals(ratios: Sequence[Ratio], quick: bool) -> list[Goal]:
    plain = [ratio for ratio in ratios if ratio.rival == "plain"]
    kinds = {(ratio.model, ratio.optimizer) for ratio in plain}
    best = [min((r for r in plain if (r.model, r.optimizer) == kind), key=lambda r: r.value) for kind in kinds]
    default = [ratio for ratio in ratios if ratio.ours == DEFAULT]
    judged = (
        ("Z1a", f"seconds of a step, ours ({DEFAULT}, the default) over plain JAX, the worst of {len(kinds)} trainings", [r for r in default if r.rival == "plain"], "<= 1.03"),
        ("Z1b", "the same of our best update", best, "<= 1.03"),
        ("Z2a", "seconds of a step, ours (the default) over DDP, the worse model", [r for r in default if r.rival == "ddp"], "< 1"),
        ("Z2b", "the same over FSDP2", [r for r in default if r.rival == "fsdp2"], "< 1"),
    )  # fmt: skip
    made = []
    for name, what, group, bound in judged:
        worst = max(group, key=lambda ratio: ratio.high)
        made.append(Goal(name, what, None if quick else worst.value, bound, judged=None if quick else worst.high))
    return made


def _figures(measured: dict[str, tuple[list[Entry], str]]) -> list[dict[str, Any]]:
    return [
        {
            "model": model, "optimizer": entry.optimizer, "system": entry.name, "first_s": entry.first_s,
            "seconds": [turn.seconds for turn in entry.turns], "worked": [turn.worked for turn in entry.turns],
        }
        for model, (entries, _) in measured.items()
        for entry in entries
    ]  # fmt: skip


if __name__ == "__main__":
    run(
        "pod_step",
        measure,
        "A step of the pod beside plain JAX, DDP and FSDP2. Example: python -m benchmarks.pod_step --quick",
    )
