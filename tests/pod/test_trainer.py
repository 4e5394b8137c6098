"""A training on a mesh: what it takes when, what it commits, and that it goes on as if it had never stopped."""

from functools import cache
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import pytest

import shoal
from shoal.data.store import Examples
from shoal.errors import DataError, StoreError
from shoal.pod.trainer import Trainer
from shoal.pod.training import Version, Watch
from tests.pod.test_step import task

MOMENTUM = optax.sgd(0.05, momentum=0.9)


def examples(count: int = 70, seed: int = 0) -> Examples:
    rng = np.random.default_rng(seed)
    return Examples({"x": rng.normal(size=(count, 6)).astype("f"), "y": rng.normal(size=(count, 3)).astype("f")})


def evaluate(params: Any, state: Any, batch: Any) -> dict[str, shoal.Sum]:
    made = task(MOMENTUM).losses(params, state, batch, jax.random.key(0))
    return {"error": shoal.Sum(made.per_example, jax.numpy.ones_like(made.per_example), (0.0, 1e3))}


def trained(
    mesh: str, *, until: int = 12, total: int = 12, folder: Path | None = None, **how: Any
) -> tuple[Any, list[Version]]:
    made = Trainer(
        task(MOMENTUM).replace(evaluate=evaluate),
        mesh=mesh,
        steps_per_call=2,
        devices=jax.devices()[: shoal.pod.MeshSpec.parse(mesh).num_devices],
        **how,
    )
    versions: list[Version] = []
    state = made.train(
        examples(), steps=total, commit_every=5, seed=3, held_out=examples(33, 1), folder=folder, 
        watch=Watch(on_version=versions.append, should_stop=lambda step: step >= until),
    )  # fmt: skip
    return {name: np.asarray(value) for name, value in made.whole(state).items()}, versions


@cache
def on_one_device() -> tuple[Any, list[Version]]:
    return trained("data=1")


def near(one: Any, other: Any) -> None:
    for name, value in one.items():
        np.testing.assert_allclose(value, other[name], rtol=1e-4, atol=1e-5, err_msg=name)


def test_versions_come_at_their_steps_with_metrics_of_all_examples() -> None:
    whole, versions = on_one_device()
    assert [(v.version, v.step, v.examples) for v in versions] == [(1, 5, 70), (2, 10, 70), (3, 12, 32)]
    near(whole, versions[-1].model)
    held_out = examples(33, 1)
    own = evaluate(whole_tree(whole), {"mean": whole["state/mean"]}, {**held_out.fields, "mask": np.ones(33, bool)})[
        "error"
    ]
    assert versions[-1].metrics["error"] == pytest.approx(float(np.mean(own.numerator)), rel=1e-5)


def whole_tree(flat: dict[str, Any]) -> Any:
    params = {"first": {}, "second": {}, "fixed": flat["params/fixed"]}
    for name in flat:
        if name.count("/") == 2:
            params[name.split("/")[1]][name.split("/")[2]] = flat[name]
    return params


def test_it_goes_on_as_if_it_had_not_stopped(tmp_path: Path) -> None:
    straight, versions = trained("slow=2,data=2", update="sharded")
    _, first = trained("slow=2,data=2", update="sharded", until=7, folder=tmp_path)
    found, rest = trained("slow=2,data=2", update="sharded", folder=tmp_path)
    assert [v.version for v in (*first, *rest)] == [1, 2, 3]
    assert rest[0].training == pytest.approx(versions[1].training), "the steps before the stop are in its metrics"
    for name, value in straight.items():
        np.testing.assert_array_equal(value, found[name], err_msg=name)


@pytest.mark.parametrize(
    ("mesh", "how"),
    [
        pytest.param("data=3", {"update": "sharded"}, marks=pytest.mark.slow),
        pytest.param(
            "data=2,model=2",
            {"update": "fully_sharded", "rules": {"params/first/kernel": "-,model"}},
            marks=pytest.mark.slow,
        ),
        pytest.param("data=1", {}, marks=pytest.mark.slow),
    ],
)
def test_it_goes_on_on_another_mesh(tmp_path: Path, mesh: str, how: dict[str, Any]) -> None:
    straight, _ = on_one_device()
    trained("data=4", update="sharded", until=6, folder=tmp_path)
    found, _ = trained(mesh, folder=tmp_path, **how)
    near(straight, found)


def test_a_batch_that_members_cannot_share_evenly_is_filled_up() -> None:
    straight, _ = on_one_device()
    found, _ = trained("data=3", accumulate=2)
    near(straight, found)


def test_what_would_take_other_steps_is_refused(tmp_path: Path) -> None:
    trained("data=1", until=6, folder=tmp_path)
    with pytest.raises(StoreError, match="batch_size=16, and would go on with 8"):
        trained("data=1", folder=tmp_path, batch_size=8)


def test_what_a_pod_cannot_do_is_said() -> None:
    with pytest.raises(ValueError, match=r"clipping and noise on a pod"):
        Trainer(task(MOMENTUM).replace(privacy=shoal.Privacy(clip_norm=1.0)))
    with pytest.raises(ValueError, match=r"Local\(holdout=0\) on a pod, got 0.2"):
        Trainer(task(MOMENTUM).replace(local=shoal.Local(optimizer=MOMENTUM, holdout=0.2)))
    with pytest.raises(ValueError, match="batch_size=0"):
        Trainer(task(MOMENTUM), batch_size=0)
    with pytest.raises(ValueError, match="plain steps on a pod, got scaffold"):
        Trainer(shoal.scaffold(task(optax.sgd(0.1)), devices=40))
    with pytest.raises(ValueError, match="Take update='replicated'"):
        Trainer(task(optax.adafactor(1e-2, min_dim_size_to_factor=2)), mesh="data=8", update="sharded")
    with pytest.raises(ValueError, match="mesh of 8 devices"):
        Trainer(task(MOMENTUM), mesh="data=3")
    with pytest.raises(DataError, match="has no evaluate"):
        Trainer(task(MOMENTUM), mesh="data=8").train(examples(), steps=1, commit_every=1, held_out=examples(4))
    with pytest.raises(DataError, match="reads field 'y'"):
        Trainer(task(MOMENTUM), mesh="data=8").train(Examples({"x": np.zeros((4, 6), "f")}), steps=1, commit_every=1)
