"""`shoal data`: one line where it refuses; real processes that are killed; a fleet over what was pushed."""

import re
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from shoal.cli.data_argument import open_data
from shoal.data import ExampleStore, load

from .conftest import Process, Shoal
from .test_host_device import begin_host, last

Start = Callable[..., Process]
TICKET = "00" * 16


def rows(count: int) -> dict[str, np.ndarray]:
    return {"x": np.zeros((count, 2), np.float32), "y": np.arange(count, dtype=np.int64)}


def test_what_a_store_holds_is_shown(tmp_path: Path, shoal: Shoal) -> None:
    with ExampleStore(tmp_path / "a.examples", max_age_s=3600.0, max_bytes=1 << 20) as store:
        store.add(rows(3))
    made = shoal("data", "show", tmp_path / "a.examples")
    assert made.code == 0, made
    assert "3 examples, 48 B" in made.out and "field x: float32[2]" in made.out
    assert "limits: 60 min 0 s of age, 1.0 MiB" in made.out or "limits: 1 h 0 min of age, 1.0 MiB" in made.out
    shown = shoal("data", "show", tmp_path / "a.examples", "--json").json
    assert (shown["examples"], shown["size_bytes"], shown["limits"]["max_examples"]) == (3, 48, None)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["show", "none.examples"], "no example store at"),
        (["show", "me.npz"], "NAME.examples"),
        (["push", "me.npz", "--shards", "2", "--run", "r", "--address", "0.0.0.0"], "without encryption"),
        (["push", "me.npz", "--shards", "2", "--run", "r", "--port", "0", "--split", "dirichlet:1"], "the field 'label'"),
        (["push", "me.npz", "--shards", "9", "--run", "r", "--port", "0"], "num_users"),
        (["push", "none.npz", "--shards", "2", "--run", "r", "--port", "0"], "does not exist"),
        (["take", "--server", "here", "--ticket", TICKET, "--store", "a.examples"], "HOST:PORT"),
        (["take", "--server", "127.0.0.1:1", "--ticket", "xyz", "--store", "a.examples"], "--ticket of 32"),
        (["take", "--server", "127.0.0.1:1", "--ticket", TICKET, "--key", "ab", "--store", "a.examples"], "--key of 64"),
        (["take", "--server", "127.0.0.1:1", "--ticket", TICKET, "--store", "a.npz"], "NAME.examples"),
        (["take", "--server", "127.0.0.1:1", "--ticket", TICKET, "--store", "a.examples", "--server-name", "x"], "--ca"),
        (["take", "--server", "127.0.0.1:1", "--ticket", TICKET, "--store", "a.examples", "--patience", "0.1s"], "unavailable"),
    ],
)  # fmt: skip
def test_it_refuses_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shoal: Shoal, arguments: list[str], expected: str
) -> None:
    monkeypatch.chdir(tmp_path)
    np.savez(tmp_path / "me.npz", **rows(5))
    made = shoal("data", *arguments)
    assert made.code == 1 and made.out == "" and expected in last(made.err), made


def test_devices_of_a_store_refuse_what_is_for_other_data(tmp_path: Path, shoal: Shoal) -> None:
    made = shoal("device", "--server", "127.0.0.1:1", "--data", tmp_path / "a.examples")
    assert made.code == 1 and "no example store at" in last(made.err)
    made = shoal("device", "--server", "127.0.0.1:1", "--data", tmp_path / "a.examples", "--users", 3)
    assert made.code == 1 and "not for an example store" in last(made.err)


def test_a_simulation_takes_what_a_store_holds_now(tmp_path: Path) -> None:
    with ExampleStore(tmp_path / "anna.examples") as store:
        store.add(rows(3))
    population = open_data(str(tmp_path / "anna.examples"))
    assert population.sizes() == {"anna": 3} and population.spec()["x"] == ((2,), "float32")


def begin_push(start: Start, tmp_path: Path, *options: object) -> tuple[Process, list[object]]:
    ready = tmp_path / "ready"
    ready.unlink(missing_ok=True)
    push = start(
        "data", "push", "name:digits", "--shards", 3, "--split", "dirichlet:1", "--run", tmp_path / "push", "--ready-file", ready, *options
    )  # fmt: skip
    push.until(lambda: ready.exists() and "--ticket" in push.text)
    ticket, key = re.findall(r"--(?:ticket|key) ([0-9a-f]+)", push.text)
    return push, ["data", "take", "--server", ready.read_text(), "--ticket", ticket, "--key", key]


@pytest.mark.slow
@pytest.mark.integration
@pytest.mark.timeout(240)
def test_central_data_become_a_fleet_whatever_is_killed(start: Start, tmp_path: Path, shoal: Shoal) -> None:
    push, take = begin_push(start, tmp_path, "--port", 0)
    first = start(*take, "--store", tmp_path / "0.examples")
    assert first.wait() == 0, first.text
    push.kill()
    push.wait()
    port = str(take[3]).rpartition(":")[2]
    second = start(*take, "--store", tmp_path / "1.examples")
    second.until((tmp_path / "1.examples").exists)
    second.kill()
    second.wait()
    push, again = begin_push(start, tmp_path, "--port", port)
    assert again == take and "goes on with the push" in push.text
    rest = [start(*take, "--store", tmp_path / f"{n}.examples") for n in (1, 2)]
    assert [process.wait() for process in (*rest, push)] == [0, 0, 0], (push.text, *(process.text for process in rest))
    assert "all 3 shards are held" in push.text
    stores = [ExampleStore(tmp_path / f"{n}.examples") for n in range(3)]
    pushed = np.concatenate([store.examples().fields["image"] for store in stores])
    for store in stores:
        store.close()
    whole = load("digits").train.fields["image"]
    assert len(pushed) == len(whole) and np.array_equal(np.sort(pushed.sum((1, 2, 3))), np.sort(whole.sum((1, 2, 3))))

    assert shoal("new", tmp_path / "digits.py").code == 0
    host, address = begin_host(
        start, tmp_path, tmp_path, tmp_path / "digits.py", "--rounds", 3, "--goal", 3, "--minimum-group", 3, "--over-selection", 1.0,
        "--held-out", "name:digits",
    )  # fmt: skip
    devices = [start("device", "--server", address, "--data", tmp_path / f"{n}.examples") for n in range(3)]
    assert host.wait() == 0, host.text
    assert [device.wait() for device in devices] == [0, 0, 0]


@pytest.mark.slow
@pytest.mark.integration
def test_both_sides_say_how_to_go_on_when_they_are_told_to_end(start: Start, tmp_path: Path) -> None:
    push, take = begin_push(start, tmp_path, "--port", 0)
    push.kill(signal.SIGINT)
    assert push.wait() == 130 and "stopped; 0 of 3 shards held" in last(push.text), push.text
    taker = start(*take, "--store", tmp_path / "a.examples")
    taker.until((tmp_path / "a.examples.part.lock").exists)
    taker.kill(signal.SIGTERM)
    assert taker.wait() == 143 and "Start the same command again" in last(taker.text), taker.text


@pytest.mark.slow
@pytest.mark.integration
def test_a_push_is_encrypted_and_another_push_has_no_room_in_its_folder(
    start: Start, tmp_path: Path, shoal: Shoal
) -> None:
    push, take = begin_push(start, tmp_path, "--port", 0, "--tls")
    plain = shoal(*take, "--store", tmp_path / "a.examples", "--patience", "0.5s")
    assert plain.code == 1, plain
    ca = ["--ca", tmp_path / "push" / "tls" / "ca.pem"]
    assert shoal(*take, *ca, "--store", tmp_path / "a.examples", "--stay", "--json").json["shards"] == 3
    assert push.wait() == 0, push.text
    other = shoal("data", "push", "name:digits", "--shards", 4, "--run", tmp_path / "push", "--port", 0)
    assert other.code == 1 and "holds another push" in last(other.err)
