"""What a worker that ends unwell leaves to the next life: the last state that is known to be right, whole or not at all."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from shoal.errors import StoreError
from shoal.pod import rescue
from shoal.pod.rescue import Rescue
from shoal.pod.trainer import Trainer
from shoal.pod.training import Progress, Training, Version, Watch
from shoal.pod.worker import Assignment, Marks, Worker
from tests.pod.test_step import task
from tests.pod.test_trainer import MOMENTUM, evaluate, examples

ABOUT = {"version": 3, "sums": {"loss": float("inf")}}


def trainer(mesh: str, **how: Any) -> Trainer:
    made = task(MOMENTUM).replace(evaluate=evaluate)
    return Trainer(made, mesh=mesh, steps_per_call=2, devices=jax.devices()[: int(mesh.partition("=")[2])], **how)


def state_of(made: Trainer) -> Any:
    return made.program.begin(jax.random.key(0))


def rescued(folder: Path, state: Any, step: int = 7) -> None:
    keeper = Rescue(folder)
    keeper.hold(step, state, ABOUT)
    keeper.write()


def read(folder: Path, made: Trainer, step: int = 7) -> Any:
    like = jax.eval_shape(made.program.beginning, jax.random.key(0))
    return rescue.read(folder, step, like, made.program.shardings)


@pytest.mark.parametrize(
    ("mesh", "update"), [("data=2", "replicated"), ("data=3", "sharded"), ("data=3", "fully_sharded")]
)
def test_what_is_rescued_is_read_on_any_mesh(tmp_path: Path, mesh: str, update: Any) -> None:
    first, other = trainer("data=2", update="replicated"), trainer(mesh, update=update)
    rescued(tmp_path, state_of(first))
    assert rescue.agreed(tmp_path, beyond=6) == 7
    found, about = read(tmp_path, other)
    assert about == ABOUT
    jax.tree.map(np.testing.assert_array_equal, found, state_of(other))
    assert jax.tree.map(lambda leaf: leaf.sharding, found) == other.program.shardings
    assert rescue.agreed(tmp_path, beyond=7) is None


def test_the_first_who_writes_is_the_only_one_and_what_it_left_half_done_is_no_state(tmp_path: Path) -> None:
    (tmp_path / rescue.PARTIAL).touch()
    rescued(tmp_path, state_of(trainer("data=1")))
    assert [path.name for path in tmp_path.iterdir()] == [rescue.PARTIAL]
    assert rescue.agreed(tmp_path, beyond=-1) is None
    assert not [*tmp_path.iterdir()]


def test_what_somebody_wrote_is_not_written_again(tmp_path: Path) -> None:
    state = state_of(trainer("data=1"))
    rescued(tmp_path, state, 7)
    (tmp_path / f"7{rescue.SUFFIX}").write_bytes(b"as it was")
    for step in (7, 6):
        rescued(tmp_path, state, step)
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"as it was"]


def test_what_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(TypeError):
        Rescue(tmp_path)._write_to(tmp_path / "x", [b"head", object()])  # type: ignore[list-item]
    assert not [*tmp_path.iterdir()]


def test_a_state_that_is_too_large_is_not_held(monkeypatch: pytest.MonkeyPatch) -> None:
    state = state_of(trainer("data=2"))
    assert rescue.can_hold(state)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    monkeypatch.setattr(rescue, "LARGEST_BYTES", size - 1)
    assert not rescue.can_hold(state)


def test_a_broken_one_is_passed_over(tmp_path: Path) -> None:
    state = state_of(trainer("data=1"))
    rescued(tmp_path, state, 4)
    for step, change in (
        (5, lambda data: data[:-1]),
        (6, lambda data: data[:200] + b"\0" + data[201:]),
        (8, lambda data: b""),
    ):
        rescued(tmp_path, state, step)
        path = tmp_path / f"{step}{rescue.SUFFIX}"
        path.write_bytes(change(path.read_bytes()))
    assert rescue.agreed(tmp_path, beyond=-1) == 4
    assert [path.name for path in tmp_path.iterdir()] == [f"4{rescue.SUFFIX}"]
    rescue.forget(tmp_path, up_to=3)
    assert rescue.agreed(tmp_path, beyond=3) == 4
    rescue.forget(tmp_path, up_to=4)
    assert not [*tmp_path.iterdir()]


def test_one_of_another_optimizer_is_refused(tmp_path: Path) -> None:
    state = state_of(trainer("data=1"))
    rescued(tmp_path, state | {"scale": {"factor": jnp.ones(())}})
    with pytest.raises(
        StoreError, match=r"What was rescued of step 7 .* of another model or optimizer: it has \['scale/factor'\]"
    ):
        read(tmp_path, trainer("data=1"))


def test_nothing_is_written_before_there_is_something(tmp_path: Path) -> None:
    Rescue(tmp_path).write()
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("update", ["replicated", "sharded"])
def test_a_training_goes_on_from_the_call_that_failed(
    tmp_path: Path, update: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All devices are this process's: pieces, too, are all here."""
    monkeypatch.setattr(Worker, "_heed_signals", lambda self: None)
    pod, begun = Worker(Assignment(1, "127.0.0.1:1", 1, 0), Marks(None)), list[int]()

    def go(folder: Path | None, versions: list[Version], **watch: Any) -> None:
        watch = {"on_call": lambda progress: begun.append(progress.step), "on_version": versions.append, **watch}
        trainer("data=2", update=update).train(
            examples(), steps=12, commit_every=6, checkpoint_every=6, seed=3, held_out=examples(33, 1), folder=folder, watch=Watch(**watch)
        )  # fmt: skip

    def fail(progress: Progress) -> None:
        if progress.step == 10:
            raise RuntimeError("a member is gone")

    whole, broken = list[Version](), list[Version]()
    go(None, whole)
    begun.clear()
    with pytest.raises(RuntimeError):
        go(tmp_path / "c", broken, pod=pod, on_call=fail)
    go(tmp_path / "c", broken)
    assert begun == [10, 12]  # the checkpoint is of step 6, 8 were known to be done
    assert [told(version) for version in broken] == [told(version) for version in whole]
    for name, value in whole[-1].model.items():
        np.testing.assert_array_equal(value, broken[-1].model[name])
    assert not [*(tmp_path / "c").glob("*rescue*")]


@pytest.mark.parametrize(("is_first", "step"), [(True, 6), (False, 4)])
def test_only_who_writes_versions_knows_that_one_is_written(
    tmp_path: Path, is_first: bool, step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Worker, "_heed_signals", lambda self: None)
    pod = Worker(Assignment(1, "127.0.0.1:1", 1, 0), Marks(None))

    def fail(progress: Progress) -> None:
        if progress.step == 8:
            raise RuntimeError("the first is gone, perhaps before version 1 was written")

    training = Training(
        trainer("data=1"), examples(), None, steps=12, commit_every=6, checkpoint_every=12, seed=3, folder=tmp_path, watch=Watch(pod=pod, on_call=fail)
    )  # fmt: skip
    training._is_first = is_first
    with pytest.raises(RuntimeError):
        training.run()
    assert rescue.agreed(tmp_path, beyond=-1) == step


def told(version: Version) -> Any:
    return version.version, version.step, version.examples, version.training, version.metrics
