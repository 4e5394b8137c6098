"""What `benchmarks/pod_step.py` makes of seconds: ratios of pairs, and goals that the worst of them decides."""

import numpy as np
import pytest

from benchmarks.pod_step import JAX, TORCH, Entry, Ratio, _goals, _ratios, _shares
from benchmarks.pod_step_common import BATCH, MEMBERS, batches, part, weights
from benchmarks.pod_step_crew import System, Turn


def entry(system: System, way: str, optimizer: str, *seconds: float, loss: float = 1.0) -> Entry:
    return Entry(system, way, optimizer, turns=[Turn(each, each, loss) for each in seconds])


def test_ratios_are_of_pairs_with_the_same_optimizer() -> None:
    plain, ddp = entry(JAX, "plain", "adam", 2.0, 4.0), entry(TORCH, "ddp", "adam", 4.0, 8.0)
    made = _ratios(
        "mlp", [plain, entry(JAX, "sharded", "adam", 1.0, 2.0), entry(JAX, "sharded", "lamb", 9.0, 9.0), ddp]
    )
    assert [(r.rival, r.value, r.low, r.high) for r in made] == [("plain", 0.5, 0.5, 0.5), ("ddp", 0.25, 0.25, 0.25)]


def test_a_ratio_of_what_did_not_learn_the_same_is_none() -> None:
    with pytest.raises(ValueError, match="the same loss of mlp after turn 0"):
        _ratios("mlp", [entry(JAX, "sharded", "adam", 1.0), entry(JAX, "plain", "adam", 1.0, loss=1.2)])


def test_lamb_s_share_is_what_it_adds_to_sgd() -> None:
    entries = [
        entry(JAX, "sharded", "lamb", 2.0, 4.0),
        entry(JAX, "sharded", "sgd", 1.5, 3.0),
        entry(JAX, "replicated", "sgd", 1.0),
    ]
    assert _shares(entries) == {"sharded": 0.25}


def test_the_worst_training_decides() -> None:
    def ratio(model: str, ours: str, rival: str, value: float) -> Ratio:
        return Ratio(model, "adam", ours, rival, value, value - 0.01, value + 0.01)

    ratios = [
        ratio(m, "sharded", rival, 0.9 + n / 10)
        for n, m in enumerate(("mlp", "decoder"))
        for rival in ("plain", "ddp", "fsdp2")
    ]
    ratios += [ratio("decoder", "fully_sharded", "plain", 0.8)]
    met = {goal.id: (goal.value, goal.met) for goal in _goals(ratios, False)}
    assert met == {"Z1a": (1.0, True), "Z1b": (0.9, True), "Z2a": (1.0, False), "Z2b": (1.0, False)}
    assert all(goal.met is None for goal in _goals(ratios, True))


@pytest.mark.parametrize("model", list(BATCH))
def test_members_share_a_batch(model: str) -> None:
    batch = batches(model)[0]
    parts = [part(batch, rank) for rank in range(MEMBERS)]
    assert all(len(each) == BATCH[model] for each in batch.values())
    np.testing.assert_array_equal(np.concatenate([p["x"] for p in parts]), batch["x"])
    assert all(value.dtype == np.float32 for value in weights(model).values())
