"""Noise that cancels over the versions: as much as was said, the same when it is made again, of one run, for so many rounds."""

from dataclasses import replace

import numpy as np
import pytest

from shoal.aggregate.accumulator import Accumulator
from shoal.aggregate.choose import noised
from shoal.aggregate.commit import WeightedMean
from shoal.aggregate.correlated_noise import CorrelatedNoised, schedule_of
from shoal.errors import RoundError
from shoal.fixed import SumSpec
from shoal.policy import Correlated, Privacy, RoundPolicy, ServerRule
from shoal.privacy.correlated import fit_blt, tree_errors, tree_sensitivity
from shoal.record.memory import MemoryStore
from shoal.record.store import Blobs
from shoal.tensors import Entry, Index, TensorSpec

SIDE, ROUNDS, SEPARATION, GOAL = 100, 16, 4, 8
SPECS = tuple(
    SumSpec(tensor=TensorSpec(name=f"delta/params/{name}", shape=shape, dtype="float32"), bound=bound, weighted=True)
    for name, shape, bound in (("w", (SIDE, SIDE), 0.5), ("c", (3,), 0.01))
)
SHAPES = {"params/c": (3,), "params/w": (SIDE, SIDE)}


def privacy(kind: str) -> Privacy:
    return Privacy(clip_norm=0.5, noise_multiplier=2.0, correlated=Correlated(rounds=ROUNDS, kind=kind))  # type: ignore[arg-type]


def aggregator(kind: str = "blt", secret: bytes = b"s" * 32, run: str = "run") -> CorrelatedNoised:
    rounds = RoundPolicy(goal=GOAL, min_separation=SEPARATION)
    made = noised(WeightedMean(ServerRule()), privacy(kind), rounds, secret=secret, run=run, last_version=ROUNDS)
    assert isinstance(made, CorrelatedNoised)
    return made


def nothing() -> Accumulator:
    """The sum of devices that change nothing."""
    made = Accumulator.finest(SPECS, bits=32, max_weight=1, max_members=100)
    for _ in range(GOAL):
        made.add({spec.tensor.name: np.zeros(spec.tensor.shape, np.float32) for spec in SPECS}, weight=1)
    return made


def begun(blobs: Blobs) -> Index:
    return Index(
        tuple(
            Entry(TensorSpec(name=name, shape=shape, dtype="float32"), blobs.put(np.zeros(shape, np.float32).tobytes()))
            for name, shape in SHAPES.items()
        )
    )


def models(kind: str, *, restart_at: int = -1, steps: int = ROUNDS) -> list[np.ndarray]:
    """The model after each version, which is all noise: what the prefix sums have."""
    blobs, rule, made = MemoryStore().blobs, aggregator(kind), []
    model, state = begun(blobs), Index(())
    for step in range(steps):
        if step == restart_at:
            rule = aggregator(kind)
        model, state = rule.commit(nothing(), model, state, blobs)
        made.append(np.concatenate([blobs.view(entry.hash, entry.spec).reshape(-1) for entry in model]))
    return made


@pytest.mark.parametrize("kind", ["blt", "tree"])
def test_the_noise_in_the_model_is_what_the_strategy_says(kind: str) -> None:
    made = models(kind)
    schedule = schedule_of(Correlated(rounds=ROUNDS), SEPARATION)
    assert schedule.participations == 4
    if kind == "tree":
        expected = tree_errors(ROUNDS) * tree_sensitivity(schedule)
    else:
        blt = fit_blt(schedule)
        expected = blt.errors(ROUNDS) * blt.sensitivity(schedule)
    for step, model in enumerate(made):
        assert np.std(model) == pytest.approx(2.0 * 0.5 * expected[step] / GOAL, rel=0.04), step
    assert np.std(made[-1]) < 2.0 * 0.5 * 2.0 * np.sqrt(ROUNDS) / GOAL, (
        "less than noise of each round's own, for four releases"
    )


@pytest.mark.parametrize("kind", ["blt", "tree"])
def test_a_host_that_starts_again_draws_what_was_drawn(kind: str) -> None:
    for one, other in zip(models(kind), models(kind, restart_at=7), strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_commit_that_is_made_again_has_the_same_noise() -> None:
    blobs, rule = MemoryStore().blobs, aggregator()
    first, state = rule.commit(nothing(), begun(blobs), Index(()), blobs)
    tries = [rule.commit(nothing(), first, state, blobs)[0].root for _ in range(3)]
    assert len(set(tries)) == 1 and tries[0] != first.root
    assert rule.commit(nothing(), begun(blobs), Index(()), blobs)[0].root == first.root, "from the beginning, too"


def test_another_sum_never_has_the_same_noise() -> None:
    blobs, rule = MemoryStore().blobs, aggregator()
    first, state = rule.commit(nothing(), begun(blobs), Index(()), blobs)
    other = nothing()
    other.totals["delta/params/w"][0, 0] += 1000
    made = [rule.commit(sums, first, state, blobs)[0] for sums in (nothing(), other, nothing())]
    assert made[0].root == made[2].root
    one, two = (
        (blobs.view(e.hash, e.spec) - blobs.view(f.hash, f.spec))
        for model in made[:2]
        for e, f in [(model.entries[1], first.entries[1])]
    )
    assert abs(np.corrcoef(one.reshape(-1), two.reshape(-1))[0, 1]) < 0.5, (
        "what it takes back is the same, what is new is not"
    )
    assert np.std(one - two) > np.std(one) / 2


def test_each_run_has_noise_of_its_own() -> None:
    blobs = MemoryStore().blobs
    roots = {
        aggregator(secret=secret, run=run).commit(nothing(), begun(blobs), Index(()), blobs)[0].root
        for secret, run in ((b"s" * 32, "run"), (b"s" * 32, "other"), (b"t" * 32, "run"))
    }
    assert len(roots) == 3


def test_other_keys_are_told_and_so_is_the_end() -> None:
    blobs, rule = MemoryStore().blobs, aggregator()
    model, state = rule.commit(nothing(), begun(blobs), Index(()), blobs)
    with pytest.raises(RoundError, match="begun under other keys"):
        aggregator(secret=b"t" * 32).commit(nothing(), model, state, blobs)
    for _ in range(ROUNDS - 1):
        model, state = rule.commit(nothing(), model, state, blobs)
    with pytest.raises(RoundError, match=r"made for 16 rounds, which it has had"):
        rule.commit(nothing(), model, state, blobs)
    with pytest.raises(ValueError, match=r"at most 16 rounds, for which its noise is correlated, got 17"):
        noised(rule.inner, privacy("blt"), RoundPolicy(), secret=b"s" * 32, run="run", last_version=17)


def test_the_rule_s_own_state_is_left_to_it() -> None:
    blobs = MemoryStore().blobs
    rule = replace(aggregator(), inner=WeightedMean(ServerRule(kind="adam", learning_rate=0.01)))
    model, state = rule.commit(nothing(), begun(blobs), Index(()), blobs)
    names = [entry.spec.name for entry in state]
    assert names == sorted(names) and {"noise/seed", "noise/tags", "noise/strategy"} < set(names)
    assert any(name.startswith("m/") or "params/w" in name for name in names)
    rule.commit(nothing(), model, state, blobs)
