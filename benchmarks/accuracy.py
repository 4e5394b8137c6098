"""Quality of every algorithm beside federated averaging and central training, and whether its paper's claim is borne out.

Three problems: Fashion-MNIST over 100 users by Dirichlet(0.1) and Dirichlet(0.5), 20,000 images and a net of 6,634 parameters,
and MovieLens-100K by user, the next film by 28,604; 100 rounds. Three seeds each (another deal of images, other cohorts,
another initial model), after the settings of each algorithm, its learning rates among them, have been chosen from its grid on
a fourth seed and other central examples, by the measure of its claim (those for Dirichlet(0.5) are those for 0.1). A row has the rounds
to a target and the final quality (mean of the last evaluations) centrally; and the quality of the devices' own models, before
and after local training, on examples that they hold out (`accuracy_devices.py`). FedBuff's claim is about time: it and its
rival train in a virtual fleet of very different speeds.

E1: for each claim the table says whether it is borne out. Runs go through `shoal.simulate`, one to a core.
"""

import multiprocessing
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import asdict, dataclass
from math import isfinite
from typing import Any, Final

import numpy as np

from benchmarks.accuracy_algorithms import ALGORITHMS, Algorithm, Setting
from benchmarks.accuracy_problems import PROBLEMS, TUNING_SEED, Problem
from benchmarks.accuracy_runs import Outcome, run_central, run_one
from benchmarks.frame import Goal, run, table

SEEDS: Final = (1, 2, 3)
QUICK_ROWS: Final = 2
QUICK_ROUNDS: Final = 10


@dataclass(frozen=True)
class Row:
    """One algorithm on one problem."""

    problem: Problem
    algorithm: Algorithm
    setting: Setting
    outcomes: Sequence[Outcome]
    """By seed."""

    def values(self, measure: str) -> np.ndarray:
        """Of each seed."""
        return np.array([getattr(outcome, measure) for outcome in self.outcomes], float)


def measure(quick: bool) -> tuple[Sequence[Goal], dict[str, Any]]:
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as programs, _workers(programs) as pool:
        rows = list(_rows(pool, quick, begun))
        central = _central(pool, quick)
    verdicts = _tell(rows, central)
    judged = [verdict for verdict in verdicts if verdict["verdict"]]
    reproduced = sum(verdict["verdict"] == "yes" for verdict in judged)
    what = f"share of papers' claims that are judged ({reproduced} of {len(judged)} borne out; the table says which are not)"
    goal = Goal("E1", what, None if quick else len(judged) / len(verdicts), ">= 1")
    return [goal], {"rows": [_figures(row) for row in rows], "central": central, "claims": verdicts}


def _problems(quick: bool) -> Sequence[Problem]:
    return PROBLEMS[:1] if quick else PROBLEMS


def _workers(programs: str) -> ProcessPoolExecutor:
    """A process a core, each with that core alone; what they compile they share."""
    os.environ |= {"JAX_COMPILATION_CACHE_DIR": programs, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    context = multiprocessing.get_context("spawn")
    free = context.Queue()
    for core in cores:
        free.put(core)
    return ProcessPoolExecutor(len(cores), context, initializer=_take_core, initargs=(free,))


def _take_core(free: Any) -> None:
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {free.get()})


def _rows(pool: ProcessPoolExecutor, quick: bool, begun: float) -> Iterator[Row]:
    """Every problem: tunes all algorithms, then runs each with what was best."""
    best: dict[tuple[str, str], Setting] = {}
    for problem in _problems(quick):
        rounds = QUICK_ROUNDS if quick else problem.rounds
        algorithms = ALGORITHMS[:QUICK_ROWS] if quick else ALGORITHMS
        if not problem.tuned_as:
            best |= {(problem.name, name): found for name, found in _tuned(pool, problem, algorithms, rounds, quick)}
        seeds = SEEDS[:1] if quick else SEEDS
        runs: list[tuple[Algorithm, Setting, list[Future[Outcome]]]] = []
        for algorithm in algorithms:
            setting = best[problem.tuned_as or problem.name, algorithm.name]
            made = [pool.submit(run_one, problem.name, algorithm.name, setting, seed, rounds) for seed in seeds]
            runs.append((algorithm, setting, made))
        for algorithm, setting, made in runs:
            row = Row(problem, algorithm, setting, [each.result() for each in made])
            print(
                f"# {time.monotonic() - begun:.0f} s: {problem.name}, {algorithm.name} {setting}: {_told(row)}",
                flush=True,
            )
            yield row


def _tuned(
    pool: ProcessPoolExecutor, problem: Problem, algorithms: Sequence[Algorithm], rounds: int, quick: bool
) -> Iterator[tuple[str, Setting]]:
    """(algorithm, its best setting) on the tuning seed."""
    trials = {
        algorithm.name: [
            (setting, pool.submit(run_one, problem.name, algorithm.name, setting, TUNING_SEED, rounds))
            for setting in (algorithm.settings()[-1:] if quick else algorithm.settings())
        ]
        for algorithm in algorithms
    }
    for algorithm in algorithms:
        found = [(setting, trial.result()) for setting, trial in trials[algorithm.name]]
        yield algorithm.name, max(found, key=lambda pair: pair[1].merit(algorithm.measure))[0]


def _central(pool: ProcessPoolExecutor, quick: bool) -> dict[str, list[float]]:
    """Problem -> final quality of central training, of each seed, at the best of the rates."""
    made = {}
    for problem in _problems(quick):
        epochs = 2 if quick else problem.central_epochs
        rates = (1.0,) if quick else (0.1, 0.3, 1.0)
        trials = {rate: pool.submit(run_central, problem.name, rate, TUNING_SEED, epochs) for rate in rates}
        best = max(trials, key=lambda rate: trials[rate].result())
        runs = [pool.submit(run_central, problem.name, best, seed, epochs) for seed in (SEEDS[:1] if quick else SEEDS)]
        made[problem.name] = [each.result() for each in runs]
    return made


def verdict(claims: str, measure: str, row: np.ndarray, beside: np.ndarray) -> str:
    """`yes`, or what was found instead, from the values of each seed.

    `better` is borne out by a mean that is better by more than the standard error of the difference; `as good` by one that is
    worse by no more than twice that error, or a hundredth of the rival's. For rounds and seconds less is better, and infinity is
    a target not reached.
    """
    if np.isnan(row).any() or np.isnan(beside).any():
        return ""
    sign = -1.0 if measure in ("rounds", "seconds") else 1.0
    if not np.isfinite(row).all() or not np.isfinite(beside).all():
        reached, others = (int(np.isfinite(values).sum()) for values in (row, beside))
        if reached == others:
            return "no: neither always reaches the target"
        return "yes" if reached > others else "no: it does not always reach the target"
    apart = sign * (row - beside)
    error = float(apart.std(ddof=1)) / len(apart) ** 0.5 if len(apart) > 1 else 0.0
    mean = float(apart.mean())
    if claims == "as good":
        return "yes" if mean >= -max(2 * error, 0.01 * abs(float(beside.mean()))) else f"no: worse by {-mean:.3g}"
    if mean > error:
        return "yes"
    return f"no: worse by {-mean:.3g}" if mean < -error else "no: as good"


def _tell(rows: Sequence[Row], central: dict[str, list[float]]) -> list[dict[str, Any]]:
    """Prints a table for each problem; the verdicts."""
    verdicts = []
    for problem in dict.fromkeys(row.problem for row in rows):
        here = {row.algorithm.name: row for row in rows if row.problem is problem}
        print(
            f"\n{problem.name}: {problem.quality}, {problem.rounds} rounds; central training {_spread(central[problem.name])}"
        )
        lines: list[list[object]] = []
        for name, row in here.items():
            said = _verdict(row, here)
            if said is not None:
                verdicts.append({"problem": problem.name, "algorithm": name, **said})
            claim = f"{row.algorithm.claims} {row.algorithm.measure} than {said['beside']}" if said else "-"
            lines.append([
                name, _setting(row.setting), *(_spread(row.values(m)) for m in ("rounds", "quality", "sent", "reached")),
                _spread(row.values("seconds")), claim.replace("good reached than", "good reached as"), said["verdict"] if said else "-",
            ])  # fmt: skip
        header = [
            "algorithm",
            "setting",
            f"rounds to {problem.target}",
            "final",
            "devices: as sent",
            "own",
            "virtual s",
        ]
        table([*header, "claim", "borne out"], lines)
    return verdicts


def _verdict(row: Row, here: dict[str, Row]) -> dict[str, str] | None:
    """None where the paper claims nothing here."""
    algorithm = row.algorithm
    if algorithm.name == algorithm.beside or algorithm.where not in row.problem.name or algorithm.claims == "nothing":
        return None
    other = here.get(algorithm.beside)
    if other is None:
        return {"beside": algorithm.beside, "verdict": ""}
    found = other.values(algorithm.versus or algorithm.measure)
    return {
        "beside": algorithm.beside,
        "verdict": verdict(algorithm.claims, algorithm.measure, row.values(algorithm.measure), found),
    }


def _spread(values: Any) -> str:
    """Mean and standard deviation over seeds."""
    made = np.asarray(values, float)
    if np.isnan(made).all():
        return "-"
    if not np.isfinite(made).all():
        return f"{int(np.isfinite(made).sum())} of {len(made)} reach it"
    return f"{made.mean():.4g} ± {made.std():.2g}"


def _setting(setting: Setting) -> str:
    return ", ".join(f"{name} {value:g}" for name, value in setting.items())


def _told(row: Row) -> str:
    return f"{row.algorithm.measure} {_spread(row.values(row.algorithm.measure))}"


def _figures(row: Row) -> dict[str, Any]:
    """As JSON, which knows neither NaN nor infinity."""
    outcomes = [
        {
            name: value if not isinstance(value, float) or isfinite(value) else None
            for name, value in asdict(outcome).items()
        }
        for outcome in row.outcomes
    ]
    return {
        "problem": row.problem.name,
        "algorithm": row.algorithm.name,
        "setting": dict(row.setting),
        "outcomes": outcomes,
    }


if __name__ == "__main__":
    run("accuracy", measure, __doc__ or "")
