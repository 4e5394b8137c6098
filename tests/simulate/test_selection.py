"""Who is drawn: right in the mean, the same for the same seed, honest on a fleet."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

import shoal
from shoal.errors import BudgetSpent
from shoal.plan.build import build
from shoal.plan.run_plan import begin_run
from shoal.policy import RoundPolicy, Selection
from shoal.privacy import accounting
from shoal.record.memory import MemoryStore
from shoal.simulate import engine, fused
from shoal.simulate.engine import simulate
from shoal.simulate.fused import Layout
from shoal.simulate.selection import redrawn, select
from tests.fleet import toy
from tests.simulate.test_engine import population, task

MEMBERS = tuple(f"m{i}" for i in range(30))
SIZES = np.arange(1, 31) * 3
DRAWS = 3000


def policy(kind: str, **changes: object) -> RoundPolicy:
    settings = {"goal": 9, "minimum_group": 2, "selection": Selection(kind=kind), **changes}  # type: ignore[arg-type]
    return RoundPolicy(**settings)  # type: ignore[arg-type]


def drawn(chosen: RoundPolicy) -> list[tuple[str, ...]]:
    return [select(chosen, MEMBERS, SIZES, number.to_bytes(32, "little")) for number in range(DRAWS)]


@pytest.mark.parametrize("kind", ["uniform", "by_size", "poisson"])
def test_each_member_is_drawn_as_often_as_it_should_be(kind: str) -> None:
    cohorts = drawn(policy(kind))
    counts = Counter(member for cohort in cohorts for member in cohort)
    expected = 9 * DRAWS * (SIZES / SIZES.sum() if kind == "by_size" else np.full(30, 1 / 30))
    for member, times in zip(MEMBERS, expected, strict=True):
        assert abs(counts[member] - times) < 5 * np.sqrt(times), member
    assert cohorts == drawn(policy(kind))


def test_uniform_cohorts_have_no_one_twice_and_are_of_the_goal_s_size() -> None:
    assert {(len(cohort), len(set(cohort))) for cohort in drawn(policy("uniform"))} == {(9, 9)}


def test_who_was_in_a_version_rests_and_everybody_has_a_turn() -> None:
    chosen = policy("uniform", goal=7, min_separation=4)
    cohorts = [
        select(chosen, MEMBERS, SIZES, number.to_bytes(32, "little"), version=number, run_seed=b"one")
        for number in range(200)
    ]
    for number, cohort in enumerate(cohorts):
        assert len(set(cohort)) == 7
        for other in cohorts[number + 1 : number + 4]:
            assert not set(cohort) & set(other)
    assert {member for cohort in cohorts for member in cohort} == set(MEMBERS)
    assert cohorts[0] != select(chosen, MEMBERS, SIZES, (0).to_bytes(32, "little"), version=0, run_seed=b"other")


def test_noise_for_devices_that_rest_lasts_for_all_rounds() -> None:
    rounds, goal = 6, 2
    resting = RoundPolicy(goal=goal, over_selection=1.0, minimum_group=2, min_separation=3)
    noise = accounting.calibrate(8.0, 1e-6, releases=accounting.participations(rounds, 3))
    local = replace(task().local, weighting="uniform")
    private = shoal.Privacy(clip_norm=1.0, noise_multiplier=noise, epsilon=8.0, delta=1e-6)
    chosen = task(rounds=resting, privacy=private, local=local)
    assert shoal.simulate(chosen, population(), rounds=rounds, seed=1).model
    with pytest.raises(BudgetSpent):
        shoal.simulate(chosen, population(), rounds=rounds + 1, seed=1)


def test_a_population_too_small_to_rest_is_refused() -> None:
    rounds = policy("uniform", goal=3, min_separation=10)
    with pytest.raises(shoal.errors.DataError, match=r"at least 30 members for goal=3 and min_separation=10"):
        simulate(task(rounds=rounds), population(), rounds=1, store=MemoryStore())


def test_sizes_of_poisson_cohorts_spread_as_they_should_and_keep_the_smallest_group() -> None:
    sizes = [len(cohort) for cohort in drawn(policy("poisson"))]
    assert np.var(sizes) == pytest.approx(9 * (1 - 9 / 30), rel=0.15)
    assert min(len(cohort) for cohort in drawn(policy("poisson", minimum_group=7))) == 7


def test_drawn_by_size_the_mean_is_right_for_all_examples_pooled() -> None:
    values = np.random.default_rng(0).normal(size=30)
    of = dict(zip(MEMBERS, values, strict=True))
    means = [np.mean([of[member] for member in cohort]) for cohort in drawn(policy("by_size"))]
    pooled = np.sum(values * SIZES) / SIZES.sum()
    assert abs(np.mean(means) - pooled) < 5 * np.std(means) / np.sqrt(DRAWS)


@pytest.mark.parametrize("kind", ["by_size", "poisson"])
def test_simulation_honours_them(kind: str) -> None:
    chosen = task(
        rounds=policy(kind, goal=3), leaves={"params/b": "private"},
        local=replace(task().local, weighting="uniform"),
    )  # fmt: skip
    made = [
        simulate(chosen, population(), rounds=5, store=MemoryStore(), seed=2, backend=name)  # type: ignore[arg-type]
        for name in ("fused", "sequential")
    ]
    assert [r.members for r in made[0].history] == [r.members for r in made[1].history]
    for name, value in made[1].model.items():
        np.testing.assert_allclose(made[0].model[name], value, rtol=1e-5, atol=1e-6)
    if kind == "by_size":
        assert any(len(set(r.members)) < 3 for r in made[0].history), "somebody was drawn twice"
    else:
        assert len({len(r.members) for r in made[0].history}) > 1


def test_cohorts_of_many_sizes_run_few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "cached", lambda key: Layout(devices=1, together=1))
    compiled = list[str]()
    monkeypatch.setattr(fused.log, "info", lambda text, *args: compiled.append(text))
    made = simulate(task(rounds=policy("poisson", goal=9)), population(30), rounds=10, store=MemoryStore(), seed=2)
    sizes = {len(r.members) for r in made.history}
    assert len(sizes) >= 5 and len([text for text in compiled if text.startswith("compiled")]) <= 2


def test_who_is_drawn_twice_takes_no_other_program(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "cached", lambda key: Layout(devices=1, together=1))
    compiled = list[str]()
    monkeypatch.setattr(fused.log, "info", lambda text, *args: compiled.append(text))
    uniform = replace(task().local, weighting="uniform")
    made = simulate(
        task(rounds=policy("by_size", goal=5), local=uniform), population(), rounds=8, store=MemoryStore(), seed=2
    )
    assert len({len(set(r.members)) for r in made.history}) > 1 and len(compiled) == 1


def test_control_variates_are_of_devices_that_are_drawn_once() -> None:
    uniform = replace(task().local, weighting="uniform")
    with pytest.raises(ValueError, match="SCAFFOLD"):
        shoal.scaffold(task(rounds=policy("by_size", goal=3), local=uniform), devices=6)
    with pytest.raises(ValueError, match="SCAFFOLD"):
        shoal.scaffold(task(), devices=6).replace(rounds=policy("by_size", goal=3))


def test_examples_must_not_count_twice() -> None:
    with pytest.raises(ValueError, match="weighting='uniform'"):
        task(rounds=policy("by_size", goal=3))


@pytest.mark.parametrize(("kind", "unknown"), [("by_size", "how many examples"), ("poisson", "how many devices")])
def test_a_host_says_what_it_cannot_do(kind: str, unknown: str) -> None:
    chosen = task(rounds=policy(kind, goal=3), local=shoal.Local(weighting="uniform", batch_size=4))
    built = build(chosen)
    with pytest.raises(ValueError, match=f"is for simulation: a host does not know {unknown}"):
        begin_run(MemoryStore(), built.plan.sign(toy.KEYS.signing), built.model, kind="host", rounds=1, seed=0)


def test_the_chance_of_another_poisson_draw() -> None:
    few = RoundPolicy(goal=10, minimum_group=8, over_selection=1.0, selection=Selection.poisson())
    many = RoundPolicy(goal=600, minimum_group=8, over_selection=1.0, selection=Selection.poisson())
    assert redrawn(few, 100) > 0.1, "no Poisson sample: nothing may be claimed for it"
    assert redrawn(many, 3000) < 2.0**-40
