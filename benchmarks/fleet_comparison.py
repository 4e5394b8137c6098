"""Central training, naive federated averaging, ours, and ours without one of its parts, over networks, availability and labels.

A virtual fleet of 1,000 devices trains a small net on handwritten digits (100 users); rounds of 20 updates. What each costs
is measured until the model is as good as `TARGET` says: virtual time, device-seconds of training that are in no commit, bytes.
Networks are slow for the model at hand: it is taken to have 4 MB. Measured for each of 27 cells: three networks x three kinds of
availability x three skews of labels, over `SEEDS`.

- *central*: all examples in one place; no devices, so no virtual time: what its accuracy is after as many passes.
- *naive*: as many selected as are wanted, a long static window, losses not replaced, late work discarded, nobody told that
  a round has closed, no pace steering.
- *ours*: 1.3 times the goal, adaptive windows, losses replaced, late work patched in, pace steering.
- *less selection*: ours without over-selection; *less late*: late work discarded; *less abort*: devices that are not needed
  hear of it only when they report; *less pace*: devices come every minute, whatever the host says.

C1 counts the cells where ours is neither the quickest nor within noise of it: the mean of its logarithmic times is more than
`MOST_ERRORS` standard errors above the best. The error comes from the spread of seeds over all cells and methods; there are 135
comparisons, the largest of which is by chance about 2.6 errors. The table says which cells they are. Steering and telling cost no
time where devices are many; what they save are check-ins and training, which the other columns and `fleet_waste` show.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any, Final

import numpy as np
import optax

import shoal
from benchmarks.frame import Goal, run, table
from benchmarks.small_net import Digits
from benchmarks.virtual_run import Curve, Problem, train
from shoal.plan.train import evaluate
from shoal.plan.train import train as train_alone
from shoal.policy import Late, RoundPolicy
from shoal.simulate.virtual_population import Network, VirtualPopulation

USERS: Final = 100
TARGET: Final = 0.85
LIMIT_S: Final = 4 * 3600.0
SEEDS: Final = (0, 1, 2)
MODEL_BYTES: Final = 4 << 20
RATE: Final = 0.6
MOST_ERRORS: Final = 3.0
Times = dict[str, dict[str, list[float]]]
"""Cell -> method -> virtual seconds to the target, by seed."""

WIFI, LTE, OLD = (
    Network(),
    Network(name="lte", down_mbit_s=20.0, up_mbit_s=5.0),
    Network(name="3g", down_mbit_s=2.0, up_mbit_s=0.5),
)
NETWORKS: Final = {
    "wifi": (WIFI,),
    "mixed": (replace(WIFI, share=0.6), replace(LTE, share=0.3), replace(OLD, share=0.1)),
    "slow": (replace(LTE, share=0.3), replace(OLD, share=0.7)),
}
AVAILABILITY: Final[dict[str, dict[str, float]]] = {
    "always": {"window_hours": 24.0, "daily_swing": 1.0, "drop_out": 0.02},
    "daily": {"window_hours": 6.0, "daily_swing": 4.0, "drop_out": 0.08},
    "scarce": {"window_hours": 1.0, "daily_swing": 4.0, "drop_out": 0.2},
}
LABELS: Final = {"even": 100.0, "skewed": 0.5, "strongly": 0.1}
"""Alpha of the Dirichlet split."""

OURS: Final = RoundPolicy(
    goal=20, over_selection=1.3, selection_window_s=60.0, reporting_window_s=300.0, late=Late.patch(max_staleness=5)
)
NAIVE: Final = RoundPolicy(
    goal=20, over_selection=1.0, minimum_fraction=0.5, selection_window_s=60.0, reporting_window_s=300.0, adaptive=False
)
METHODS: Final[dict[str, dict[str, Any]]] = {
    "naive": {"policy": NAIVE, "hears_losses": False, "aborts": False, "steers": False},
    "ours": {"policy": OURS},
    "less selection": {"policy": replace(OURS, over_selection=1.0)},
    "less late": {"policy": replace(OURS, late=Late())},
    "less abort": {"policy": OURS, "aborts": False},
    "less pace": {"policy": OURS, "steers": False},
}


@dataclass(frozen=True)
class Cell:
    """Where devices are, when, and what they have."""

    network: str
    availability: str
    labels: str

    def population(self, seed: int) -> VirtualPopulation:
        return VirtualPopulation(
            devices=1_000,
            seed=seed,
            networks=NETWORKS[self.network],
            **AVAILABILITY[self.availability],
        )


@dataclass(frozen=True)
class Cost:
    """What a method took to the target."""

    time_s: float
    wasted: float
    """Share of the device-seconds of training, losses of the devices' own making apart."""
    megabytes: float
    """Of the model as it is taken to be."""

    @classmethod
    def of(cls, curve: Curve) -> "Cost":
        seconds = curve.tally.seconds
        return cls(curve.time_to(TARGET), curve.tally.wasted, (seconds["bytes_down"] + seconds["bytes_up"]) / 1e6)


def measure(quick: bool) -> tuple[Sequence[Goal], dict[str, Any]]:
    cells = [Cell(n, a, labels) for labels in LABELS for n in NETWORKS for a in AVAILABILITY]
    if quick:
        cells = [Cell("mixed", "daily", "skewed")]
    for labels in {cell.labels for cell in cells}:
        print(f"central, labels {labels}: accuracy {_central(labels):.3f}")
    rows: list[list[object]] = []
    times: Times = {}
    for cell in cells:
        costs = {name: [_cost(cell, name, seed) for seed in SEEDS[: 1 if quick else None]] for name in METHODS}
        name = f"{cell.network}, {cell.availability}, {cell.labels}"
        times[name] = {method: [cost.time_s for cost in of] for method, of in costs.items()}
        rows.append(
            [
                name,
                *(
                    f"{_median(of, 'time_s'):.0f} s {100 * _median(of, 'wasted'):.0f} % {_median(of, 'megabytes'):.0f}"
                    for of in costs.values()
                ),
            ]
        )
    print(f"to accuracy {TARGET}: time, wasted, MB; medians over {1 if quick else len(SEEDS)} seeds")
    table(["network, availability, labels", *METHODS], rows)
    behind = [] if quick else _behind(times)
    if not quick:
        print(*(behind or ["ours is best or within noise everywhere"]), sep="\n")
    what = "cells of 27 in which ours is neither the quickest nor within noise of it"
    why = "a quick run has one cell and one seed" if quick else ""
    return [Goal("C1", what, float(len(behind)), "<= 0", why=why)], {"times": times, "behind": behind}


def _median(costs: Sequence[Cost], what: str) -> float:
    return float(np.median([getattr(cost, what) for cost in costs]))


def _behind(times: Times) -> list[str]:
    """The cells in which ours is neither best nor within noise, and by what; see the module's text."""
    logs = {
        name: {method: np.log(np.minimum(of, LIMIT_S)) for method, of in cell.items()} for name, cell in times.items()
    }
    # One spread for all, as a share: three seeds alone say little of their own.
    spread = float(np.sqrt(np.mean([np.var(of, ddof=1) for cell in logs.values() for of in cell.values()])))
    error = spread * float(np.sqrt(2 / len(SEEDS)))
    found = []
    for name, cell in logs.items():
        best = min(cell, key=lambda method: float(np.mean(cell[method])))
        errors = float(np.mean(cell["ours"]) - np.mean(cell[best])) / error
        if errors > MOST_ERRORS:
            found.append(f"{name}: {best} is quicker by {errors:.1f} standard errors")
    print(
        f"seeds differ by {100 * spread:.0f} %; a difference of two means has a standard error of {100 * error:.0f} %"
    )
    return found


def _cost(cell: Cell, method: str, seed: int) -> Cost:
    curve = train(
        cell.population(seed), until_s=LIMIT_S, target=TARGET, problem=partial(digits, cell.labels),
        model_bytes=MODEL_BYTES, update_bytes=MODEL_BYTES, **METHODS[method],
    )  # fmt: skip
    return Cost.of(curve)


@cache
def digits(labels: str) -> Problem:
    """The handwritten digits over users, by skew of labels."""
    loaded = shoal.data.load("digits")
    rng = np.random.default_rng(0)
    split = shoal.data.dirichlet(loaded.train.fields["label"], USERS, alpha=LABELS[labels], rng=rng, min_examples=4)
    return Problem(_task(), shoal.data.Population.from_split(loaded.train, split), loaded.test)


def _task() -> shoal.Task:
    return shoal.Task.from_flax(
        Digits,
        name="digits",
        loss="softmax_cross_entropy",
        batch={"image": ((8, 8, 1), "uint8"), "label": ((), "int32")},
        local=shoal.Local(optimizer=optax.sgd(RATE), batch_size=8, steps_per_block=4),
    )


def _central(labels: str) -> float:
    """The accuracy of 30 passes over all examples in one place."""
    problem = digits(labels)
    manifest, runner, model = problem.plan(OURS, server_rate=1.0).manifest, problem.runner, problem.model
    everything = shoal.data.Examples(
        {
            name: np.concatenate([np.asarray(problem.users[user].fields[name]) for user in problem.users.ids])
            for name in ("image", "label")
        }
    )
    for number in range(30):
        runner.set_model(f"central-{number}", model)
        update = train_alone(
            runner, manifest, f"central-{number}", everything, None, seed=bytes(32), member=str(number)
        )
        model = {name: value + update.sums[f"delta/{name}"] for name, value in model.items()}
    runner.set_model("central", model)
    return float(evaluate(runner, manifest, "central", problem.test)["accuracy"])


if __name__ == "__main__":
    run("fleet_comparison", measure, __doc__ or "")
