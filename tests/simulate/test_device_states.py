"""What devices keep: whatever is killed when, they have what the last committed version left them."""

import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from shoal.errors import StoreError
from shoal.record.memory import MemoryStore
from shoal.record.sqlite import open_store
from shoal.record.tensor_blobs import view_tensors
from shoal.simulate import device_states
from shoal.simulate.device_states import DeviceStates
from shoal.simulate.engine import simulate
from shoal.tensors import Tensors, TensorSpec
from tests.algorithms.problem import population
from tests.simulate.killed_simulation import ROUNDS, SEED, chosen

SPECS = (
    TensorSpec(name="control/params/w", shape=(2, 3), dtype="float32"),
    TensorSpec(name="empty", shape=(0,), dtype="float32"),
    TensorSpec(name="rounds", shape=(), dtype="int32"),
)
MEMBERS = tuple(f"m{i}" for i in range(6))


class Killed(Exception):
    pass


def kept(version: int, member: str) -> Tensors:
    value = 10 * version + MEMBERS.index(member)
    return {s.name: np.full(s.shape, value, s.numpy_dtype) for s in SPECS}


def holds(states: DeviceStates, versions: dict[str, int]) -> None:
    """Each member has what it kept at that version, zeros at version 0."""
    for member in MEMBERS:
        expected = kept(versions[member], member) if versions.get(member) else {
            s.name: np.zeros(s.shape, s.numpy_dtype) for s in SPECS
        }  # fmt: skip
        found = states.read(member)
        if found is None and not versions.get(member):
            continue
        assert found is not None and list(found) == [s.name for s in SPECS]
        for name, value in expected.items():
            np.testing.assert_array_equal(found[name], value, err_msg=f"{name} of {member}")


def round_of(states: DeviceStates, version: int, members: tuple[str, ...]) -> None:
    states.settle(version - 1)
    with states.writing(version) as keep:
        for member in members:
            keep(member, kept(version, member))


@pytest.fixture(params=["on disk", "in memory"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path | None:
    return tmp_path / "states" if request.param == "on disk" else None


def test_a_round_s_states_count_from_its_commit_on(folder: Path | None) -> None:
    states = DeviceStates(SPECS, MEMBERS, folder)
    holds(states, {})
    round_of(states, 1, ("m0", "m3"))
    holds(states, {})
    round_of(states, 2, ("m3", "m5"))
    holds(states, {"m0": 1, "m3": 1})
    states.settle(2)
    holds(states, {"m0": 1, "m3": 2, "m5": 2})


def test_a_round_that_was_not_committed_leaves_nothing(folder: Path | None) -> None:
    states = DeviceStates(SPECS, MEMBERS, folder)
    round_of(states, 1, ("m0",))
    round_of(states, 2, ("m0", "m1"))
    states.settle(1)
    holds(states, {"m0": 1})


@pytest.mark.parametrize(
    ("at", "head"),
    [("laid down half", 1), ("laid down", 1), ("laid down", 2), ("taken in half", 2), ("taken in but for the end", 2)],
)
def test_killed_at_any_moment_devices_have_the_last_committed_state(
    at: str, head: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second round is killed; `head` is the version that the record had committed by then."""
    states = DeviceStates(SPECS, MEMBERS, tmp_path)
    round_of(states, 1, ("m0", "m1"))
    states.settle(1)
    if at == "laid down half":
        with pytest.raises(Killed), states.writing(2) as keep:
            keep("m1", kept(2, "m1"))
            raise Killed
    else:
        round_of(states, 2, ("m1", "m2"))

    def kill(*args: object, **named: object) -> None:
        raise Killed

    if at.startswith("taken in"):
        if at.endswith("half"):
            monkeypatch.setattr(device_states, "_sync", kill)
        else:
            monkeypatch.setattr(Path, "unlink", kill)
        with pytest.raises(Killed):
            states.settle(2)
        monkeypatch.undo()
    again = DeviceStates(SPECS, MEMBERS, tmp_path)
    again.settle(head)
    holds(again, {"m0": 1, "m1": 1} if head == 1 else {"m0": 1, "m1": 2, "m2": 2})
    round_of(again, head + 1, ("m4",))
    again.settle(head + 1)
    holds(again, {"m0": 1, "m1": head, "m4": head + 1} | ({"m2": 2} if head == 2 else {}))


def test_what_was_never_written_takes_no_disk(tmp_path: Path) -> None:
    spec = TensorSpec(name="control/params/w", shape=(1 << 16,), dtype="float32")
    members = tuple(map(str, range(100_000)))
    states = DeviceStates((spec,), members, tmp_path)
    with states.writing(1) as keep:
        keep("70000", {spec.name: np.ones(spec.shape, np.float32)})
    states.settle(1)
    found = states.read("70000")
    assert found is not None and found[spec.name].all()
    assert (tmp_path / "0.bin").stat().st_blocks * 512 < 1 << 20


@pytest.mark.parametrize("data", [b"", b"[]", b"{}", b"\xff"])
def test_states_that_nobody_can_tell_whose_they_are_are_refused(data: bytes, tmp_path: Path) -> None:
    DeviceStates(SPECS, MEMBERS, tmp_path)
    (tmp_path / "states.json").write_bytes(data)
    with pytest.raises(StoreError, match=r"states\.json cannot be read"):
        DeviceStates(SPECS, MEMBERS, tmp_path)


def test_states_of_others_are_refused(tmp_path: Path) -> None:
    DeviceStates(SPECS, MEMBERS, tmp_path)
    with pytest.raises(StoreError, match="states of other devices"):
        DeviceStates(SPECS, MEMBERS[::-1], tmp_path)
    with pytest.raises(StoreError, match="states of other tensors"):
        DeviceStates(SPECS[:1], MEMBERS, tmp_path)


def test_devices_that_keep_nothing_leave_nothing(tmp_path: Path) -> None:
    states = DeviceStates((), MEMBERS, tmp_path / "states")
    round_of(states, 1, MEMBERS)
    states.settle(1)
    assert states.read("m0") is None and not (tmp_path / "states").exists()


@pytest.mark.slow
@pytest.mark.integration
@pytest.mark.timeout(300)
def test_a_simulation_that_is_killed_again_and_again_has_the_bits_of_one_that_was_not(tmp_path: Path) -> None:
    """Killed while a round's states are laid down (1), while they are taken in (4), and while those of the next are (8)."""
    command = [sys.executable, "-m", "tests.simulate.killed_simulation", str(tmp_path)]
    for writes in (1, 4, 8):
        done = subprocess.run([*command, str(writes)], check=False, capture_output=True, text=True)
        assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
    done = subprocess.run([*command, "0"], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    store = open_store(tmp_path, read_only=True)
    commit = store.last_commit(store.runs()[0].id)
    assert commit is not None and commit.version == ROUNDS
    killed = view_tensors(store.blobs, commit.model)
    whole = simulate(
        chosen(), population(), rounds=ROUNDS, store=MemoryStore(), seed=SEED, backend="sequential"
    ).model  # fmt: skip
    assert list(killed) == list(whole)
    for name, value in whole.items():
        np.testing.assert_array_equal(killed[name], value, err_msg=name)
    store.close()
