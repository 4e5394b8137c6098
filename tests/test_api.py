"""The short way: simulate, load, predict, save, start from saved weights."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import shoal
from shoal.errors import DataError
from shoal.simulate.engine import Simulation


def line_task() -> shoal.Task:
    """y = w x + b."""

    def loss(params, state, batch, key):  # type: ignore[no-untyped-def]
        return jnp.square(params["w"] * batch["x"] + params["b"] - batch["y"])

    def evaluate(params, state, batch):  # type: ignore[no-untyped-def]
        error = jnp.abs(params["w"] * batch["x"] + params["b"] - batch["y"])
        return {"error": shoal.Sum(error, jnp.ones_like(error), (0.0, 100.0))}

    return shoal.Task(
        name="line",
        init=lambda key: {"w": jnp.zeros(()), "b": jnp.zeros(())},
        loss=loss,
        evaluate=evaluate,
        predict=lambda params, state, batch: params["w"] * batch["x"] + params["b"],
        batch={"x": ((), "float32"), "y": ((), "float32")},
        local=shoal.Local(optimizer=optax.sgd(0.05), batch_size=4, epochs=2),
        rounds=shoal.RoundPolicy(goal=3, minimum_group=3),
    )


def members(num: int = 5) -> dict[str, dict[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    xs = [rng.uniform(-2, 2, 5 + i).astype(np.float32) for i in range(num)]
    return {f"m{i}": {"x": x, "y": 3 * x + 1} for i, x in enumerate(xs)}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    held_out = members(1)["m0"]
    seen = []
    result = shoal.simulate(line_task(), members(), rounds=30, folder=folder, held_out=held_out, on_round=seen.append)
    assert result.version == 30 and [r.version for r in seen] == list(range(1, 31))
    assert result.history[-1].metrics["error"] < 0.05 < result.history[0].metrics["error"]
    return folder


def test_a_run_is_loaded_and_predicts_without_its_source(trained: Path, tmp_path: Path) -> None:
    model = shoal.load(trained)
    assert (model.name, model.version) == ("line", 30)
    assert model.predict({"x": np.array([0.0, 1.0], np.float32)}) == pytest.approx([1, 4], abs=0.1)
    assert model.evaluate(members()["m1"])["error"] < 0.1
    assert shoal.load(trained, version=0).predict({"x": np.ones(1, np.float32)}) == pytest.approx([0.0])
    with pytest.raises((DataError, shoal.errors.StoreError), match="31"):
        shoal.load(trained, version=31)
    with pytest.raises(DataError, match="Pass a mapping"):
        model.predict(np.ones(3, np.float32))
    with pytest.raises(DataError, match=r"reads x; x is missing \(given: y\)"):
        model.predict({"y": np.ones(3, np.float32)})


def test_saved_weights_start_another_run(trained: Path, tmp_path: Path) -> None:
    model = shoal.load(trained)
    model.save(tmp_path / "line.safetensors")
    task = line_task()
    again = task.replace(init=shoal.from_safetensors(tmp_path / "line.safetensors", task.init))
    assert again.variables(jax.random.key(0)).params["w"] == model.tensors["params/w"]


def test_foreign_names_are_translated_and_leftovers_refused(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    path = tmp_path / "foreign.safetensors"
    save_file({"layer.slope": np.array(2.0, np.float32), "offset": np.zeros((), np.float32)}, path)
    task = line_task()
    rename = {r"layer\.slope": "params/w", "offset": "params/b"}
    assert shoal.from_safetensors(path, task.init, rename=rename)(jax.random.key(0)).params["w"] == 2.0
    with pytest.raises(DataError, match=r"not expected: layer\.slope, offset"):
        shoal.from_safetensors(path, task.init)(jax.random.key(0))
    with pytest.raises(DataError, match="safetensors"):
        shoal.from_safetensors(tmp_path / "absent", task.init)


def test_too_few_members_are_refused() -> None:
    with pytest.raises(DataError, match="at least 3 members"):
        shoal.simulate(line_task(), members(2), rounds=1)


def test_a_folder_that_holds_a_run_is_refused(trained: Path) -> None:
    before = (trained / "record.sqlite").read_bytes()
    with pytest.raises(ValueError, match="holds a run already"):
        shoal.simulate(line_task(), members(), rounds=1, folder=trained)
    assert (trained / "record.sqlite").read_bytes() == before


def test_what_is_left_of_a_run_is_printed_in_one_line() -> None:
    made = Simulation("1m8", None, {"params/w": np.zeros((100, 100))}, 3)
    assert "array" not in repr(made) and "version=3" in repr(made)
