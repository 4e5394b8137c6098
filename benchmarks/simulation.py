"""Seconds per round of simulation beside pfl, Flower and FedJAX: a CNN, LeNet, an MLP and no-op clients.

Every configuration has 1,000 users of 50 examples, cohorts of 50, batches of 10, one epoch, local rate 0.1 (LeNet 0.05), server rate 1, and
the same data and initial weights for all (`simulation_common.py`). Two systems at a time take turns at their rounds
(`simulation_turns.py`), the one that does not run is stopped (two processes of pfl keep half a core busy while they wait); a pair is a turn of each, the ratio the rival's seconds over ours.
Start-up and compilation (the first round less the median) are columns of their own. A ratio counts only if both learn the same
thing (see `agreement`). As pfl is run in two ways, ours has the layout that it chooses for a run of many
rounds, by a trial before that takes a minute. `--install` makes the rivals' environments ($SHOAL_PEERS, by default ~/.cache/shoal/peers).
"""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.frame import Goal, percentile_interval, run, table
from benchmarks.simulation_common import COHORT, CONFIGS, NETS, NO_OP, NOBODY, make_data, rounds_for
from benchmarks.simulation_turns import OURS, RIVALS, ROOT, Session, System, SystemFailed, alone, take_turns

QUICK_S = 42.0
"""Nothing new is begun, and nothing goes on, after so many seconds of a quick run."""
FULL_S = 1500.0
"""The same of a full run."""
SESSION_S = 420.0
"""A session of the full run that takes longer has failed."""
NOISE = 4.0
"""Standard deviations over seeds that a rival's curve may lie from the mean of ours."""
Curve = Sequence[tuple[int, float]]


@dataclass(frozen=True)
class Plan:
    """How a configuration is measured."""

    pairs: int
    evaluate_every: int
    turn: Mapping[str, int] = field(default_factory=dict)
    """System -> rounds of one turn; 1 where it is not named. Rounds of a few milliseconds make turns of several."""
    fewer: Mapping[str, int] = field(default_factory=dict)
    """Rival -> pairs, where its rounds are long."""


PLANS = {
    "cnn": Plan(7, 5, fewer={"flwr": 6}),
    "lenet": Plan(20, 5, fewer={"flwr": 12}),
    "mlp": Plan(20, 5, {"shoal": 4, "pfl": 2, "fedjax": 4}),
    NO_OP: Plan(20, 5, {"shoal": 8, "pfl": 4, "fedjax": 8}),
}
QUICK_PAIRS = 6
BOUNDS = {
    "pfl": dict(zip(CONFIGS, (1.3, 2, 5, 20), strict=True)),
    "flwr": dict(zip(CONFIGS, (2.5, 5, 25, 50), strict=True)),
}


@dataclass
class Row:
    """One rival at one configuration."""

    config: str
    rival: System
    session: Session | None = None
    missing: str = ""
    """Why there is no session."""
    agrees: str = ""
    """Empty, or why it does not count: its curve is another, or ours did not rest while it waited."""
    ratio: tuple[float, float, float] = (0.0, 0.0, 0.0)
    """Median and its 95 % interval."""

    @property
    def why(self) -> str:
        """Empty if the row counts."""
        return self.missing or self.agrees


def measure(quick: bool) -> tuple[Sequence[Goal], dict[str, Any]]:
    begun = time.monotonic()

    def left() -> float:
        return min(SESSION_S, (QUICK_S if quick else FULL_S) - (time.monotonic() - begun))

    rows: list[Row] = []
    ours_alone: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        make_data(Path(folder))
        peak = matmul_peak(0.5 if quick else 3.0)
        for config in (NO_OP, "mlp") if quick else CONFIGS:
            made = []
            if not quick:
                _choose_layout(config, Path(folder))
            for seed, rival in enumerate(_quick_rivals() if quick else RIVALS):
                made.append(_row(config, rival, seed, Path(folder), left(), quick))
                print(f"# {_told(made[-1])}", flush=True)
            _judge_curves(made)
            rows += made
            if not any(row.session for row in made):
                ours_alone |= _alone(config, Path(folder), left())
        peak = max(peak, matmul_peak(0.5 if quick else 3.0))
    _tables(rows, ours_alone)
    figures = {"rows": [_figures(row) for row in rows], "alone": ours_alone, "matmul_gflops": peak}
    cnn = [s for row in rows if row.config == "cnn" and row.session for s in row.session.ours["seconds"]]
    if cnn:
        reached = NETS["cnn"].flops_per_client * COHORT / float(np.median(cnn)) / 1e9
        figures |= {"cnn_gflops": reached, "cnn_share": reached / peak}
        print(f"cnn: {reached:.0f} GFLOP/s of the {peak:.0f} that a float32 matmul reaches here: {reached / peak:.0%}")
    else:
        print(f"a float32 matmul reaches {peak:.0f} GFLOP/s here")
    return _goals(rows, quick), figures


def _quick_rivals() -> list[System]:
    return [rival for rival in RIVALS if rival.workers == 1 and rival.environment != "flwr"]


def _row(config: str, rival: System, seed: int, folder: Path, limit_s: float, quick: bool) -> Row:
    row = Row(config, rival)
    if not rival.is_installed:
        row.missing = f"{rival.environment} is not installed (python -m benchmarks.simulation --install)"
        return row
    if limit_s < 8.0:
        row.missing = "no time left"
        return row
    plan = PLANS[config]
    pairs = QUICK_PAIRS if quick else plan.fewer.get(rival.environment, plan.pairs)
    try:
        row.session = take_turns(
            rival, pairs=pairs, ours_arguments=_arguments(config, OURS, pairs, seed, folder),
            rival_arguments=_arguments(config, rival, pairs, seed, folder), limit_s=limit_s,
        )  # fmt: skip
    except SystemFailed as error:
        row.missing = str(error)
        return row
    row.ratio = percentile_interval(row.session.ratios, 50)
    return row


def _choose_layout(config: str, folder: Path) -> None:
    """A run that means to be long keeps the layout that its trial finds for the next; it ends where it would wait for its turn."""
    given = {"config": config, "rounds": 100_000, "data": folder, "seed": 0, "turn": 1, "evaluate-every": 100_000}
    words = [word for name, value in given.items() for word in (f"--{name}", str(value))]
    try:
        told = subprocess.run(
            [*OURS.command(), *words], check=False, stdin=subprocess.DEVNULL, capture_output=True, text=True, cwd=ROOT,
            timeout=SESSION_S,
        ).stderr  # fmt: skip
    except subprocess.TimeoutExpired:
        told = f"it took more than {SESSION_S:g} s"
    if NOBODY not in told:
        print(f"# {config}: no layout was chosen, ours has its default: {told[-300:]}", flush=True)


def _arguments(config: str, system: System, pairs: int, seed: int, folder: Path) -> list[str]:
    plan = PLANS[config]
    turn = plan.turn.get(system.environment or system.name, 1)
    rounds = rounds_for(pairs * turn, plan.evaluate_every)
    given = {"config": config, "rounds": rounds, "data": folder, "seed": seed, "turn": turn}
    given["evaluate-every"] = plan.evaluate_every
    return [word for name, value in given.items() for word in (f"--{name}", str(value))]


def _alone(config: str, folder: Path, limit_s: float) -> dict[str, Any]:
    """Ours, where no rival can be run beside it."""
    if limit_s < 8.0:
        return {}
    try:
        return {config: alone(_arguments(config, OURS, QUICK_PAIRS, 0, folder), QUICK_PAIRS, limit_s)}
    except SystemFailed as error:
        return {config: {"missing": str(error)}}


def agreement(ours: Sequence[Curve], rival: Curve) -> str:
    """Empty if a rival's loss curve is one of ours but for the seed, else why not.

    Central losses are compared as logarithms at the rounds that all have. Ours ran with one seed per session: their standard
    deviation, pooled over those rounds, is the seed noise. The rival's curve may lie `NOISE` of it from the mean of ours at
    every round (times sqrt(1 + 1/n) for the mean's own error). The loss must fall by a fifth, and the noise must be small beside the
    fall, or the comparison would say nothing.
    """
    if len(ours) < 2:
        return "seed noise needs two sessions"
    curves = [dict(curve) for curve in (*ours, rival)]
    rounds = sorted(set.intersection(*(set(curve) for curve in curves)) - {0})
    first = dict(rival)[0]
    logs = np.log([[curve[number] for number in rounds] for curve in curves])
    fell = float(np.log(first) - logs[-1, -1])
    if not fell > np.log(1.25):
        return f"its loss does not fall ({first:.3f} to {np.exp(logs[-1, -1]):.3f})"
    noise = float(np.sqrt(np.var(logs[:-1], axis=0, ddof=1).mean()))
    allowed = NOISE * noise * (1 + 1 / len(ours)) ** 0.5
    if allowed > 0.5 * fell:
        return f"seed noise ({allowed:.3f}) hides the fall ({fell:.3f} in the logarithm)"
    apart = float(np.abs(logs[-1] - logs[:-1].mean(axis=0)).max())
    return "" if apart <= allowed else f"its loss curve lies {apart / noise:.1f} standard deviations from ours"


def _judge_curves(rows: Sequence[Row]) -> None:
    ours = [row.session.ours["curve"] for row in rows if row.session]
    for row in rows:
        if row.session:
            row.agrees = agreement(ours, row.session.rival["curve"])


def _goals(rows: Sequence[Row], quick: bool) -> list[Goal]:
    goals = []
    for letter, name in (("P", "pfl"), ("F", "flwr")):
        for number, config in enumerate(CONFIGS, 1):
            chosen = [row for row in rows if row.config == config and row.rival.environment == name]
            what = f"{config}: seconds per round of {name} over ours" + (", its better way" if name == "pfl" else "")
            goals.append(_goal(f"{letter}{number}", what, f">= {BOUNDS[name][config]}", chosen, quick))
    chosen = [row for row in rows if row.rival.environment == "fedjax"]
    goals.append(_goal("J1", "seconds per round of fedjax over ours, the worst configuration", ">= 1", chosen, quick))
    chosen = [row for row in rows if row.config in ("cnn", "lenet") and row.rival.environment == "pfl"]
    goals.append(
        _gpu_goal("G1", "cnn and lenet on a GPU: seconds per round of pfl over ours, the worse", ">= 10", chosen, quick)
    )
    return goals


def _gpu_goal(id: str, what: str, bound: str, rows: Sequence[Row], quick: bool) -> Goal:
    import jax

    if jax.default_backend() == "cpu":
        return Goal(id, what, None, bound, "this machine has no GPU that JAX can use")
    return _goal(id, what, bound, rows, quick)


def _goal(id: str, what: str, bound: str, rows: Sequence[Row], quick: bool) -> Goal:
    """Judged by the rival's best row."""
    if quick:
        return Goal(id, what, None, bound)
    if whys := [f"{row.config}, {row.rival.name}: {row.why}" for row in rows if row.why]:
        return Goal(id, what, None, bound, "; ".join(whys))
    value, low, _ = min(row.ratio for row in rows)
    return Goal(id, what, value, bound, judged=min(low, *(row.ratio[1] for row in rows)))


def matmul_peak(lasting_s: float) -> float:
    """GFLOP/s of the fastest float32 matmul on all cores, by NumPy's and by JAX's."""
    import jax

    side = 2048
    a = np.random.default_rng(0).standard_normal((side, side), dtype=np.float32)
    there, product = jax.numpy.asarray(a), jax.jit(lambda a: a @ a)
    ways: tuple[Callable[[], Any], ...] = (lambda: a @ a, lambda: product(there).block_until_ready())
    best = float("inf")
    for way in ways:
        way()
        until = time.perf_counter() + lasting_s / len(ways)
        while (begun := time.perf_counter()) < until:
            way()
            best = min(best, time.perf_counter() - begun)
    return 2 * side**3 / best / 1e9


def _tables(rows: Sequence[Row], ours_alone: Mapping[str, Any]) -> None:
    header = ("config", "system", "s/round", "ours", "ratio", "95 % low", "high", "start s", "compile s", "MiB",
              "ours: start s", "compile s", "MiB", "final loss", "ours", "counts")  # fmt: skip
    made: list[list[object]] = []
    for row in rows:
        cells: list[object] = [row.config, row.rival.name]
        if row.session is None:
            made.append([*cells, *["-"] * (len(header) - 3), row.missing])
            continue
        ours, rival = row.session.ours, row.session.rival
        cells += [_median(rival), _median(ours), *row.ratio, *(_costs(rival)), *(_costs(ours))]
        made.append([*cells, rival["curve"][-1][1], ours["curve"][-1][1], row.agrees or "yes"])
    for config, ours in ours_alone.items():
        if "missing" in ours:
            made.append([config, "shoal alone", *["-"] * (len(header) - 3), ours["missing"]])
        else:
            cells = [config, "shoal alone", "-", _median(ours), *["-"] * 6, *_costs(ours)]
            made.append([*cells, "-", ours["curve"][-1][1], "-"])
    table(header, made)


def _median(told: Mapping[str, Any]) -> float:
    return float(np.median(told["seconds"]))


def _costs(told: Mapping[str, Any]) -> tuple[float, float, float]:
    return told["startup_s"], told["compile_s"], round(told["peak_mib"])


def _told(row: Row) -> str:
    if row.session is None:
        return f"{row.config}, {row.rival.name}: {row.missing}"
    return (
        f"{row.config}, {row.rival.name}: {_median(row.session.rival):.4g} s a round, ours {_median(row.session.ours):.4g}; "
        f"ratio {row.ratio[0]:.3g} ({row.ratio[1]:.3g} to {row.ratio[2]:.3g})"
    )


def _figures(row: Row) -> dict[str, Any]:
    made: dict[str, Any] = {"config": row.config, "rival": row.rival.name, "why_not": row.why}
    if row.session is not None:
        made |= {
            "ratio": row.ratio,
            "ratios": row.session.ratios,
            "ours": row.session.ours,
            "rival_told": row.session.rival,
        }
    return made


def install() -> None:
    """Makes an environment for each rival; one that cannot be made is said."""
    script = Path(__file__).parent / "peers" / "setup.sh"
    for name in dict.fromkeys(rival.environment for rival in RIVALS):
        done = subprocess.run(["sh", str(script), name], check=False, env={**os.environ, "PYTHON": sys.executable})
        print(f"{name}: {'installed' if done.returncode == 0 else 'could not be installed'}", flush=True)


if __name__ == "__main__":
    if "--install" in sys.argv[1:]:
        install()
    else:
        run("simulation", measure, __doc__ or "")
