"""The model that a device keeps: the newest one, whole, its own leaves in it, there when no host is."""

import asyncio
import os
import stat
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import optax
import pytest

import shoal
from shoal.errors import DataError, PlanError
from shoal.fleet import kept_model
from shoal.fleet.device import Device
from shoal.fleet.device_host import DeviceHost
from shoal.fleet.host import Host
from shoal.fleet.keys import HostKeys
from shoal.fleet.link import LocalLink
from shoal.plan.build import Built, build
from shoal.plan.jax_runner import JaxRunner
from shoal.plan.plan import Plan
from shoal.plan.run_plan import begin_run
from shoal.plan.stablehlo import this_runtime
from shoal.record.memory import MemoryStore
from tests.algorithms.problem import D, E
from tests.algorithms.problem import task as linear

KEYS = HostKeys(bytes(range(64)))


def made(*, is_personal: bool = False, name: str = "linear") -> tuple[Built, Plan]:
    leaves = {"params/b": "private"} if is_personal else {}
    rounds = shoal.RoundPolicy(goal=2, minimum_group=2, over_selection=1.0)
    local = shoal.Local(optimizer=optax.sgd(0.1), batch_size=4)
    built = build(linear(name=name, rounds=rounds, local=local, leaves=leaves))
    return built, built.plan.sign(KEYS.signing)


def trained(plan: Plan, built: Built, folder: Path, *, rounds: int = 3) -> tuple[MemoryStore, str, JaxRunner]:
    """Two devices that keep their state in the folder."""
    runner, store, rng = JaxRunner(plan), MemoryStore(), np.random.default_rng(0)
    run_id = begin_run(store, plan, built.model, kind="host", rounds=rounds, seed=0)
    data = {
        name: shoal.data.Examples(
            {"x": rng.normal(size=(8, D)).astype(np.float32), "y": rng.normal(size=(8, E)).astype(np.float32)}
        )
        for name in ("anna", "bob")
    }

    async def serve() -> None:
        host = Host(store, run_id, KEYS, call_program=runner.call)
        shared = DeviceHost(make_runner=lambda plan: runner, runtime=this_runtime(), state_folder=folder)
        devices = [
            Device(name, lambda n=name: data[n], link=LocalLink(host.edge), host=shared, rng=np.random.default_rng(0))  # type: ignore[misc]
            for name in data
        ]
        running = asyncio.create_task(host.run())
        await asyncio.wait_for(asyncio.gather(running, *(device.run() for device in devices)), timeout=40)
        await host.edge.close()

    asyncio.run(serve())
    return store, run_id, runner


def offline(plan: Plan, folder: Path | None, key: bytes | None = None) -> DeviceHost:
    return DeviceHost(make_runner=JaxRunner, runtime=this_runtime(), state_folder=folder, trusted_key=key)


def test_the_newest_version_that_was_sent_answers_without_a_host(tmp_path: Path) -> None:
    built, plan = made()
    store, run_id, _ = trained(plan, built, tmp_path)
    x = np.random.default_rng(1).normal(size=(5, D)).astype(np.float32)
    predicted = asyncio.run(offline(plan, tmp_path).predict("anna", {"x": x}))
    kept = kept_model.find(tmp_path)
    assert (kept.run, kept.version, kept.name) == (run_id, 2, "linear"), "what the last round began with"
    sent = store.get_commit(run_id, 2).model
    model = {entry.spec.name: store.blobs.view(entry.hash, entry.spec) for entry in sent}
    assert all(np.array_equal(model[name], kept.tensors[name]) for name in model)
    np.testing.assert_allclose(predicted, x @ model["params/w"] + model["params/b"], rtol=1e-5)


def test_each_device_answers_with_leaves_of_its_own(tmp_path: Path) -> None:
    built, plan = made(is_personal=True)
    trained(plan, built, tmp_path)
    x = np.zeros((1, D), np.float32)
    host = offline(plan, tmp_path)
    answers = [asyncio.run(host.predict(name, {"x": x})) for name in ("anna", "bob", "nobody")]
    shared = kept_model.find(tmp_path).tensors["params/b"]
    np.testing.assert_allclose(answers[2][0], shared, rtol=1e-6)
    assert not np.allclose(answers[0], answers[1]) and not np.allclose(answers[0], answers[2])


def test_another_host_that_names_its_run_alike_has_no_leaves_of_it_and_takes_no_model_s_place(tmp_path: Path) -> None:
    built, plan = made(is_personal=True)
    _, run_id, _ = trained(plan, built, tmp_path)
    other = built.plan.sign(HostKeys(bytes(64)).signing)
    kept_model.keep(tmp_path, other, built.model, run=run_id, version=99)
    x = {"x": np.zeros((1, D), np.float32)}
    with pytest.raises(DataError, match="there are several: name one with --task or --key"):
        asyncio.run(offline(other, tmp_path).predict("anna", x))
    assert kept_model.find(tmp_path, key=plan.public_key).version == 2
    predicted = asyncio.run(offline(other, tmp_path, key=other.public_key).predict("anna", x))
    np.testing.assert_allclose(predicted[0], built.model["params/b"], rtol=1e-6)


def test_an_older_version_takes_nobody_s_place(tmp_path: Path) -> None:
    built, plan = made()
    for version, expected in ((3, 3), (2, 3), (4, 4)):
        kept_model.keep(tmp_path, plan, built.model, run="a", version=version)
        assert kept_model.find(tmp_path).version == expected
    kept_model.keep(tmp_path, plan, built.model, run="another", version=0)
    assert kept_model.find(tmp_path).run == "another"


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX permissions")
def test_nobody_else_may_read_it(tmp_path: Path) -> None:
    built, plan = made()
    kept_model.keep(tmp_path, plan, built.model, run="a", version=1)
    modes = [stat.S_IMODE(path.stat().st_mode) for path in sorted(tmp_path.rglob("*"))]
    assert modes == [0o700, 0o600], "the folder and the model"


def test_a_write_that_was_cut_leaves_the_version_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built, plan = made()
    kept_model.keep(tmp_path, plan, built.model, run="a", version=1)

    def dies(file: int) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(os, "fsync", dies)
    with pytest.raises(OSError, match="no space"):
        kept_model.keep(tmp_path, plan, built.model, run="a", version=2)
    assert kept_model.find(tmp_path).version == 1
    assert len(list((tmp_path / "models").iterdir())) == 1, "what was begun takes no room"


@pytest.mark.skipif(os.name != "posix", reason="rights as POSIX has them")
def test_only_the_owner_can_read_a_model(tmp_path: Path) -> None:
    built, plan = made()
    kept_model.keep(tmp_path, plan, built.model, run="a", version=1)
    (path,) = (tmp_path / "models").iterdir()
    assert [each.stat().st_mode & 0o777 for each in (path.parent, path)] == [0o700, 0o600]


def test_a_file_that_was_changed_is_refused(tmp_path: Path) -> None:
    built, plan = made()
    kept_model.keep(tmp_path, plan, built.model, run="a", version=1)
    (path,) = (tmp_path / "models").iterdir()
    data = path.read_bytes()
    for broken in (data[:-1], data[:100], b"", data.replace(b'"training"', b'"tra1ning"')):
        path.write_bytes(broken)
        with pytest.raises(PlanError, match=r"kept in|signed|hash|Expected"):
            kept_model.find(tmp_path)
        kept_model.keep(tmp_path, plan, built.model, run="a", version=2)
        path.write_bytes(data)


def test_which_model_is_meant_is_asked(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is none yet"):
        kept_model.find(tmp_path)
    for name in ("one", "two"):
        built, plan = made(name=name)
        kept_model.keep(tmp_path, plan, built.model, run="a", version=1)
    with pytest.raises(DataError, match=r"--key: one \(--key \w+\), two"):
        kept_model.find(tmp_path)
    assert kept_model.find(tmp_path, "two").name == "two"
    with pytest.raises(DataError, match="task 'three'"):
        kept_model.find(tmp_path, "three")
    with pytest.raises(DataError, match="keeps its state in a folder"):
        asyncio.run(offline(plan, None).predict("anna", {}))


def test_models_of_so_many_tasks_are_kept(tmp_path: Path) -> None:
    built, plan = made()
    for number in range(kept_model.MOST_TASKS + 3):
        named = replace(plan, manifest=replace(plan.manifest, task=f"task-{number}")).sign(KEYS.signing)
        kept_model.keep(tmp_path, named, built.model, run="a", version=1)
    assert len(list((tmp_path / "models").iterdir())) == kept_model.MOST_TASKS
