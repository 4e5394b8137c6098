"""The examples with real data learn: each ends with a number that guessing does not reach."""

import ast
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

import shoal
from examples import credit, language, ranking, watch
from shoal.data import Examples, Federated, Population, load_federated
from shoal.errors import DataError


@pytest.fixture
def needs() -> object:
    """Skips where the data set cannot be had."""

    def needs(name: str) -> None:
        try:
            load_federated(name)
        except DataError as error:
            if "sha256" in str(error):
                raise
            pytest.skip(f"no source answered: {error}")

    return needs


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_watch_knows_exercises_on_a_wrist_it_has_never_seen(needs) -> None:  # type: ignore[no-untyped-def]
    needs("watch")
    assert watch.without("subject-10", rounds=12) > 0.65, "one exercise of seven is 0.14"


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_ranking_beats_what_is_popular(needs) -> None:  # type: ignore[no-untyped-def]
    needs("movielens-100k")
    learned, popular = ranking.run()
    assert learned > 2 * popular > 0.02


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_language_beats_the_frequencies_of_words(needs) -> None:  # type: ignore[no-untyped-def]
    needs("brown")
    learned, frequencies = language.run()
    assert learned < 0.8 * frequencies < 120


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_fifty_lenders_know_more_than_the_largest(needs) -> None:  # type: ignore[no-untyped-def]
    needs("loans")
    by_all, by_one, by_interest = credit.run(rounds=20)
    assert by_all > by_one + 0.05 and by_all > by_interest - 0.05 > 0.6


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_module_of_torch_s_is_better_when_it_comes_back() -> None:
    pytest.importorskip("torch", reason="the extra torch is not installed")
    from examples import torch_model

    try:
        shoal.data.load("digits")
    except DataError as error:
        pytest.skip(f"no source answered: {error}")
    before, after = torch_model.run(rounds=12)
    assert before < 0.3 and after > 0.85


def test_the_area_under_a_curve() -> None:
    labels = np.array([0, 1, 0, 1])
    assert credit.area_under_curve(np.array([0.1, 0.9, 0.2, 0.8]), labels) == 1.0
    assert credit.area_under_curve(np.array([0.1, 0.1, 0.1, 0.1]), labels) == 0.5
    assert credit.area_under_curve(np.array([0.1, 0.0, 0.2, 0.15]), labels) == 0.25


def made_like(name: str) -> Federated:
    """A handful of users in the form of the real data."""
    rng = np.random.default_rng(0)

    def examples(count: int) -> Examples:
        words = rng.integers(0, 4_000, (count, language.ROW + 1), dtype=np.int32)
        label = rng.integers(0, watch.EXERCISES, count, dtype=np.int32)
        fields = {
            "watch": {"window": rng.normal(size=(count, 100, 6)).astype(np.float32), "label": label},
            "brown": {"word": words[:, :-1], "label": words[:, 1:]},
            "movielens-100k": {"film": rng.integers(0, ranking.FILMS, count, dtype=np.int32)},
        }
        return Examples(fields[name])

    train, test = (Population.from_arrays({f"user-{n}": examples(count) for n in range(10)}) for count in (6, 4))
    if name == "watch":
        test = Population.from_arrays({"subject-10": examples(6)})
    return Federated(name=name, train=train, test=test, words=(), about="made")


@pytest.mark.parametrize(
    "example", [ranking, *(pytest.param(slow, marks=pytest.mark.slow) for slow in (watch, language))]
)
def test_examples_run_from_data_to_number(example: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shoal.data, "load_federated", made_like)
    task = example.task.replace(rounds=shoal.RoundPolicy(goal=2, minimum_group=2))
    monkeypatch.setattr(example, "task", task)
    if example is watch:
        assert 0 <= watch.without("subject-10", rounds=1) <= 1
    else:
        learned, guessed = example.run(rounds=1)
        assert np.isfinite(learned) and np.isfinite(guessed)


def test_a_history_is_what_was_seen_before() -> None:
    made = ranking.histories(np.arange(30), 2)
    assert made["label"].tolist() == [28, 29]
    assert made["history"][1].tolist() == list(range(10, 30)), "films 9 to 28, numbered from 1"
    assert ranking.histories(np.arange(2), 1)["history"][0].tolist() == [0] * 19 + [1]


def test_examples_say_how_they_are_run() -> None:
    for name in ("credit", "language", "ranking", "torch_model", "watch"):
        page = Path(__file__).parents[1] / "examples" / f"{name}.py"
        assert f"python examples/{name}.py" in (ast.get_docstring(ast.parse(page.read_text(encoding="utf-8"))) or "")
