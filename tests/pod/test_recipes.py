"""The recipes of `examples/pod`: full sizes are those of the papers; small ones train alike on one device and on a mesh, and in simulation."""

import importlib
from typing import Any

import jax
import numpy as np
import pytest

import shoal
from shoal.data import Population
from shoal.local import model_shape, named
from shoal.lora import with_adapters
from shoal.pod.collectives import Members
from shoal.pod.mesh import MeshSpec
from shoal.pod.rules import specs
from shoal.pod.step import Program

NAMES = ("bert", "decoder", "dlrm", "mlp", "resnet", "unet")
MESHES = {"decoder": "data=2,model=2", "dlrm": "data=2,model=2", "unet": "data=2,space=2"}
MILLIONS = {"bert": 334, "decoder": 124, "dlrm": 26_000, "mlp": 5.8, "resnet": 25.56, "unet": 28.95}


def recipe(name: str) -> Any:
    return importlib.import_module(f"examples.pod.{name}")


def fields(task: shoal.Task, size: int, *, seed: int = 0) -> dict[str, np.ndarray]:
    """Examples of which nothing can be learned, with ids that every table has."""
    rng = np.random.default_rng(seed)

    def drawn(shape: tuple[int, ...], dtype: str) -> np.ndarray:
        return (
            rng.integers(0, 3, (size, *shape)).astype(dtype)
            if dtype == "int32"
            else rng.random((size, *shape)).astype(dtype)
        )

    return {name: drawn(*spec) for name, spec in task.batch.items()}


def shapes(task: shoal.Task) -> dict[str, tuple[int, ...]]:
    return {name: leaf.shape for name, leaf in named(model_shape(task).params, "params").items()}


@pytest.mark.parametrize("name", NAMES)
def test_the_full_size_is_that_of_the_paper(name: str) -> None:
    made = shapes(recipe(name).make("full"))
    assert sum(int(np.prod(shape)) for shape in made.values()) / 1e6 == pytest.approx(MILLIONS[name], rel=0.02)


@pytest.mark.parametrize("name", ["decoder", "dlrm"])
def test_rules_fit_the_full_size(name: str) -> None:
    made = recipe(name)
    split = specs(made.RULES, shapes(made.make("full")), MeshSpec.parse("data=2,model=4"), what="rules")
    assert sum(any(spec) for spec in split.values()) == {"decoder": 4 * 12, "dlrm": 13}[name]


def test_bert_s_rate_is_the_paper_s() -> None:
    rate = recipe("bert").rate
    found = [float(rate(step)) for step in (0, 100, 560)]
    np.testing.assert_allclose(found, [0.00288293 * 76 / 287, 0.00288293 * 176 / 287, 0.0], rtol=1e-6)


def test_adapters_alone_are_learned() -> None:
    task = with_adapters(recipe("decoder").adapters)
    learned = {name for name in shapes(task) if task.leaf_rule(name) != "frozen"}
    assert learned and all("lora" in name for name in learned), "and each of them is of attention"
    assert all("/qkv" in name or "/out" in name for name in learned)


def trained(task: shoal.Task, text: str, made: Any, steps: int = 2) -> Any:
    spec = MeshSpec.parse(text)
    rules = specs(made.RULES, shapes(task), spec, what="rules") if "model" in text else {}
    inside = {name: shape for name, (shape, _) in task.batch.items()}
    inputs = specs(made.INPUTS, inside, spec, what="inputs") if "space" in text else {}
    mesh, members = spec.build(jax.devices()[: spec.num_devices]), Members(spec)
    program = Program(task, mesh, members, "sharded", rules, inputs, group=members.num)
    state = program.begin(jax.random.key(0))
    batch = {name: value[None] for name, value in fields(task, 8).items()}
    mask = np.arange(8)[None] < 7
    step = jax.jit(program.steps, donate_argnums=0)
    for _ in range(steps):
        state, metrics = step(state, batch, mask, np.array([1, 2], np.uint32))
    return {name: np.asarray(value) for name, value in {**state["params"], **state["state"], **metrics}.items()}


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", NAMES)
def test_a_mesh_makes_what_one_device_makes(name: str) -> None:
    made = recipe(name)
    expected = trained(made.task, "data=1", made)
    found = trained(made.task, MESHES.get(name, "data=4"), made)
    for each, value in expected.items():
        assert np.isfinite(value).all(), each
        np.testing.assert_allclose(found[each], value, rtol=1e-3, atol=1e-4, err_msg=each)


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", NAMES)
def test_it_runs_in_simulation(name: str) -> None:
    task = recipe(name).task
    users = Population.from_arrays({f"user{n}": fields(task, 8, seed=n) for n in range(2)})
    small = task.replace(
        local=shoal.Local(optimizer=task.local.optimizer, batch_size=4),
        rounds=shoal.RoundPolicy(goal=2, over_selection=1.0, minimum_group=2),
    )
    made = shoal.simulate(small, users, rounds=1)
    assert np.isfinite(made.history[-1].metrics["train/loss"])
