"""The short way: simulate, load, predict, save, start from saved weights."""

import contextlib
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

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


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"rounds": 0}, "rounds to be a whole number of at least 1, got rounds=0"),
        ({"evaluate_every": 0}, "evaluate_every=0"),
        ({"leave_out": 1.0}, "a share of the users above 0 and below 1, or ids, got 1.0"),
    ],
)
def test_wrong_arguments_are_refused(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=re.escape(says)):
        shoal.simulate(line_task(), members(), **{"rounds": 1, **changes})


def test_members_may_be_numbered_and_held_out_by_member() -> None:
    numbered: Any = dict(enumerate(members().values()))
    made = shoal.simulate(line_task(), numbered, rounds=1, held_out=members(4), progress=False)
    assert set(made.history[0].members) < {"0", "1", "2", "3", "4"}
    assert {"error", "error/p10", "error/p90"} <= set(made.history[0].metrics)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"leaves": {"*": "frozen"}}, "a parameter of task 'line' that is learned"),
        ({"loss": lambda params, state, batch, key: batch["z"]}, "failed on a batch of x float32[4], y float32[4]"),
        ({"loss": lambda params, state, batch, key: jnp.ones_like(batch["x"], jnp.int32)}, "of a floating type"),
    ],
)
def test_a_task_that_cannot_be_says_why(changes: dict[str, object], says: str) -> None:
    with pytest.raises((ValueError, TypeError), match=re.escape(says)):
        shoal.simulate(line_task().replace(**changes), members(), rounds=1)


def test_the_place_of_a_mistake_in_a_loss_is_told() -> None:
    def wrong(params: Any, state: Any, batch: Any, key: Any) -> Any:
        return params["v"]

    with pytest.raises(ValueError, match=rf"line {wrong.__code__.co_firstlineno + 1} of .*test_api.py: KeyError: 'v'"):
        shoal.simulate(line_task().replace(loss=wrong), members(), rounds=1)


WRONG = """
import optax, shoal
from tests.test_api import line_task, members

def said(wrong):
    try:
        wrong()
    except (TypeError, ValueError) as error:
        return str(error)

task = line_task()
for wrong in (
    lambda: task.replace(server="adam"),
    lambda: task.replace(init={"w": 1}),
    lambda: task.replace(batch={"x": (5,)}),
    lambda: shoal.Local(optimizer=0.1),
    lambda: shoal.fedprox(task, mu="a"),
    lambda: shoal.simulate(task, members(), rounds=1.5),
    lambda: shoal.simulate(task, members(), rounds=1, backend="squential"),
    lambda: shoal.simulate(task, members(), rounds=1, leave_out=1),
):
    print(said(wrong))
"""


def test_what_is_of_the_wrong_kind_is_said_in_our_words() -> None:
    """In a process of its own: here every call is checked by its annotations already."""
    told = subprocess.run([sys.executable, "-c", WRONG], capture_output=True, text=True, check=True).stdout.splitlines()
    assert told == [
        "Expected server of task 'line' to be a rule such as shoal.server.adam(1e-2), or an optax transformation, got 'adam'.",
        "Expected init of task 'line' to be a function, got dict.",
        "Expected batch['x'] to be (shape of one example, dtype), such as ((5,), 'float32'), got (5,).",
        "Expected optimizer to be an optax transformation, such as optax.sgd(0.1), got optimizer=0.1.",
        "Expected mu >= 0, got mu='a'.",
        "Expected rounds to be a whole number of at least 1, got rounds=1.5.",
        "Expected backend to be one of fused | sequential, got backend='squential'.",
        "Expected a share of the users above 0 and below 1, or ids, got 1.",
    ]


@pytest.fixture
def hears_ctrl_c() -> Iterator[None]:
    """As in a terminal, though a shell that runs the tests in its background had it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_ends_a_simulation_though_a_library_swallowed_it(hears_ctrl_c: None) -> None:
    def swallow(result: object) -> None:
        with contextlib.suppress(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt, match="stopped at version 1 of 50"):
        shoal.simulate(line_task(), members(), rounds=50, on_round=swallow)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
