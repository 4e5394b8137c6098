"""SCAFFOLD's control variates: what they are, and that nothing else sees them."""

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

import shoal
from shoal.local import local_rule
from shoal.plan.build import build
from shoal.record.run import latest_run
from shoal.record.sqlite import open_store
from shoal.record.tensor_blobs import view_tensors
from tests.algorithms.problem import MEMBERS, population, task


def test_the_controls_are_neither_evaluated_nor_exported(tmp_path: Path) -> None:
    made = shoal.simulate(
        shoal.scaffold(task(), devices=5), population(), rounds=2, folder=tmp_path, held_out=population()[MEMBERS[0]]
    )
    found = latest_run(tmp_path)
    store = open_store(found.path, read_only=True)
    tensors = view_tensors(store.blobs, store.get_commit(found.run.id, 2).model)
    assert any(np.any(value) for name, value in tensors.items() if name.startswith("control/"))
    store.close()
    model = shoal.load(tmp_path)
    assert sorted(made.model) == sorted(model.tensors) == ["params/b", "params/w"]
    model.save(tmp_path / "model.safetensors")
    assert sorted(load_file(tmp_path / "model.safetensors")) == ["params/b", "params/w"]
    x = np.ones((1, 3), np.float32)
    expected = x @ model.tensors["params/w"] + model.tensors["params/b"]
    np.testing.assert_allclose(model.predict({"x": x}), expected, rtol=1e-6)


def test_an_evaluation_takes_over_the_versions_of_it() -> None:
    held_out = shoal.Local(batch_size=4, holdout=0.2)
    train = shoal.scaffold(task(local=held_out), devices=5)
    assert local_rule(shoal.evaluation(train)).broadcast == local_rule(train).broadcast


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="devices >= goal=3, got devices=2"):
        shoal.scaffold(task(), devices=2)
    with pytest.raises(ValueError, match="plain local training for scaffold"):
        shoal.scaffold(shoal.scaffold(task(), devices=5), devices=5)
    with pytest.raises(ValueError, match="a task that trains"):
        shoal.fedprox(shoal.evaluation(task(local=shoal.Local(holdout=0.2))))
    with pytest.raises(ValueError, match="has fedprox already"):
        shoal.fedprox(shoal.fedprox(task()))
    with pytest.raises(ValueError, match="mu >= 0"):
        shoal.fedprox(task(), mu=-1.0)


def test_it_goes_with_fedprox_in_either_order() -> None:
    either = [shoal.fedprox(shoal.scaffold(task(), devices=5)), shoal.scaffold(shoal.fedprox(task()), devices=5)]
    models = [build(made).plan.manifest.broadcast for made in either]
    assert models[0] == models[1]
