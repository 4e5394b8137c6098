"""What attacks find, with and without protection.

U1: a picture read back out of what a round of devices has sent (Fashion-MNIST, a net whose first layer is dense; `shoal.audit.inversion`), by
structural similarity with the nearest picture of any device in the round: 1 is the picture itself. *Guessed*: by the neuron that moved
most. *Known*: by the neuron that gives it best, as somebody would find who knows what a picture looks like; goals are judged by that. Rows: one
device (its bare update), a group of 8 (the smallest by default) and of 32, and noise of the clip norm; each device one example and one
step, or 20 examples in batches of 5. 20 trials, medians.

U2: the lower bound on epsilon from one run among canaries (`shoal.audit.audited`) in 20 runs with noise, beside what the ledger says; and in 20
whose noise was left out while the ledger says the same.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final
from unittest.mock import patch

import jax
import jax.numpy as jnp
import numpy as np
import optax

import shoal
from benchmarks.frame import Goal, run, table
from shoal.aggregate.noised import Noised
from shoal.audit.audited import audited
from shoal.audit.inversion import best_similarity, dense_input
from shoal.data import Examples, Population
from shoal.policy import Privacy, RoundPolicy
from shoal.record.memory import MemoryStore
from shoal.record.tensor_blobs import view_tensors
from shoal.simulate.engine import simulate

TRIALS: Final = 20
RUNS: Final = 20
HIDDEN: Final = 64
CANARIES: Final = 400
WIDTH: Final = 500


def measure(quick: bool) -> tuple[Sequence[Goal], dict[str, Any]]:
    read = [inverted(case, 2 if quick else TRIALS) for case in CASES[: 2 if quick else None]]
    table(
        ["round", "examples, steps", "noise", "guessed", "known"],
        [[r.case.name, r.case.local, f"{r.case.noise:g}", f"{r.guessed:.3f}", f"{r.known:.3f}"] for r in read],
    )
    noisy, broken = (bounds(3 if quick else RUNS, leaves_out=leaves_out) for leaves_out in (False, True))
    claimed = noisy[0][1]
    table(
        ["noise", "epsilon of the ledger", "bounds: median", "least", "largest", "above the ledger's"],
        [[name, f"{claimed:.3f}", *(f"{q:.3f}" for q in np.quantile([b for b, _ in found], [0.5, 0, 1])),
          f"{sum(b > c for b, c in found)} of {len(found)}"] for name, found in (("drawn", noisy), ("left out", broken))],
    )  # fmt: skip
    by_name = {(r.case.name, r.case.local, r.case.noise): r.known for r in read}
    goals = [
        Goal("U1a", "similarity of what is read from a bare update (one example, one step)", by_name[ONE], ">= 0.9"),
        Goal("U1b", "the same from the sum of a group of 8", by_name[GROUP], "<= 0.3"),
        Goal("U1c", "the same from one update with noise of the clip norm", by_name.get(NOISE), "<= 0.3"),
        Goal("U2a", "runs of which the bound lies below the ledger's epsilon", sum(b <= c for b, c in noisy) / len(noisy), ">= 1",
             why="it needs the full run" if quick else ""),
        Goal("U2b", "runs without noise that are caught", sum(b > c for b, c in broken) / len(broken), ">= 1",
             why="it needs the full run" if quick else ""),
    ]  # fmt: skip
    figures = {
        "inversion": [{"round": r.case.name, "local": r.case.local, "noise": r.case.noise, "guessed": r.guessed, "known": r.known} for r in read],
        "bounds": {"ledger": claimed, "with_noise": [b for b, _ in noisy], "left_out": [b for b, _ in broken]},
    }  # fmt: skip
    return goals, figures


# Reading pictures.


@dataclass(frozen=True)
class Case:
    """A kind of round."""

    name: str
    devices: int
    each: int
    batch: int
    noise: float

    @property
    def local(self) -> str:
        return f"{self.each}, {self.each // self.batch}"


@dataclass(frozen=True)
class Read:
    """Medians over trials."""

    case: Case
    guessed: float
    known: float


CASES: Final = (
    Case("one device", 1, 1, 1, 0.0),
    Case("a group of 8", 8, 1, 1, 0.0),
    Case("a group of 32", 32, 1, 1, 0.0),
    Case("one device", 1, 1, 1, 1.0),
    Case("a group of 8", 8, 1, 1, 1.0),
    Case("one device", 1, 20, 5, 0.0),
    Case("a group of 8", 8, 20, 5, 0.0),
    Case("a group of 8", 8, 20, 5, 1.0),
)
ONE, GROUP, NOISE = ("one device", "1, 1", 0.0), ("a group of 8", "1, 1", 0.0), ("one device", "1, 1", 1.0)


def inverted(case: Case, trials: int) -> Read:
    """What is read from rounds of that kind."""
    train = shoal.data.load("fashion-mnist").train
    found = []
    for trial in range(trials):
        at = (
            np.random.default_rng(trial)
            .permutation(60_000)[: case.devices * case.each]
            .reshape(case.devices, case.each)
        )
        users = Population.from_split(Examples(train.fields), {f"{i:02d}": rows for i, rows in enumerate(at)})
        store = MemoryStore()
        made = simulate(_pictures(case), users, rounds=1, seed=trial, store=store)
        before, after = (view_tensors(store.blobs, store.get_commit(made.run_id, version).model) for version in (0, 1))
        kernel, bias = (after[name] - before[name] for name in ("params/first/kernel", "params/first/bias"))
        pictures = [train.fields["image"][i, :, :, 0] / 255.0 for i in at.reshape(-1)]
        shown = [(kernel[:, j] / bias[j]).reshape(28, 28) for j in range(HIDDEN) if bias[j]]
        guessed = best_similarity(dense_input(kernel, bias).reshape(28, 28), pictures)
        found.append((guessed, max(best_similarity(each, pictures) for each in shown)))
    guessed, known = np.median(found, axis=0)
    return Read(case, float(guessed), float(known))


def _pictures(case: Case) -> shoal.Task:
    def init(key: jax.Array) -> Any:
        one, two = jax.random.split(key)
        return {
            "first": {"kernel": jax.random.normal(one, (784, HIDDEN)) / 28, "bias": jnp.zeros(HIDDEN)},
            "last": {"kernel": jax.random.normal(two, (HIDDEN, 10)) / 8, "bias": jnp.zeros(10)},
        }

    def loss(params: Any, state: Any, batch: Any, key: Any) -> Any:
        x = batch["image"].reshape(-1, 784).astype("float32") / 255.0
        hidden = jax.nn.relu(x @ params["first"]["kernel"] + params["first"]["bias"])
        scores = hidden @ params["last"]["kernel"] + params["last"]["bias"]
        return optax.softmax_cross_entropy_with_integer_labels(scores, batch["label"])

    return shoal.Task(
        name="pictures", init=init, loss=loss, batch={"image": ((28, 28, 1), "uint8"), "label": ((), "int32")},
        local=shoal.Local(optimizer=optax.sgd(0.1), batch_size=case.batch, steps_per_block=1, weighting="uniform"),
        rounds=RoundPolicy(goal=case.devices, minimum_group=1, over_selection=1.0),
        privacy=Privacy(clip_norm=1.0, noise_multiplier=case.noise),
    )  # fmt: skip


# Bounding epsilon.


def bounds(runs: int, *, leaves_out: bool) -> list[tuple[float, float]]:
    """(lower bound, what the ledger says) of each run."""
    rng = np.random.default_rng(0)
    users = Population.from_arrays({
        f"{i:02d}": {"x": rng.standard_normal((8, WIDTH)).astype(np.float32), "y": rng.integers(0, 4, 8).astype(np.int32)}
        for i in range(40)
    })  # fmt: skip
    found = []
    for seed in range(runs):
        if leaves_out:
            with patch.object(Noised, "noised", lambda self, sums, base: sums):
                made = audited(_linear(), users, rounds=2, canaries=CANARIES, seed=seed)
        else:
            made = audited(_linear(), users, rounds=2, canaries=CANARIES, seed=seed)
        assert made.claimed is not None
        found.append((made.bound.epsilon, made.claimed))
    return found


def _linear() -> shoal.Task:
    def loss(params: Any, state: Any, batch: Any, key: Any) -> Any:
        return optax.softmax_cross_entropy_with_integer_labels(batch["x"] @ params["w"], batch["y"])

    return shoal.Task(
        name="linear", init=lambda key: {"w": jnp.zeros((WIDTH, 4))}, loss=loss,
        batch={"x": ((WIDTH,), "float32"), "y": ((), "int32")},
        local=shoal.Local(optimizer=optax.sgd(0.1), batch_size=4, steps_per_block=1, weighting="uniform", max_examples=8),
        rounds=RoundPolicy(goal=20, minimum_group=8), privacy=Privacy(clip_norm=1.0, noise_multiplier=3.0),
    )  # fmt: skip


if __name__ == "__main__":
    run("audit", measure, "What attacks find, with and without protection.")
