"""`shoal host` and `shoal device`: what they refuse, and as real processes over sockets."""

import asyncio
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import numpy as np
import psutil
import pytest

from shoal.cli import device_process
from shoal.data.store import Population
from shoal.errors import DataError
from shoal.fleet.device import Device
from shoal.record.run import find_runs, open_run
from shoal.record.sqlite import open_store

from .conftest import LINE, Process, Shoal, write_users

Start = Callable[..., Process]


def last(text: str) -> str:
    assert "Traceback" not in text, text
    return text.strip().splitlines()[-1]


# What is refused, in this process.


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("line.py",), "--rounds"),
        (("line.py", "--rounds", 1, "--order"), "several tasks"),
        (("a.py", "b.py", "--rounds", 1, "--order", "--weight", "a=2"), "not both"),
        (("a.py", "--rounds", 1, "--weight", "a=-2"), "TASK=NUMBER"),
        (("a.py", "--rounds", 1, "--set", "a.speed=2"), "TASK.NAME=VALUE"),
        (("a.py", "--rounds", 1, "--set", "a.goal=many"), "a.goal=NUMBER"),
        (("a.py", "--rounds", 1, "--population", "=x"), "--population NAME"),
        (("--resume", "--run", "x", "--order", "--set", "a.goal=3"), "--order, --set"),
        (("line.py", "--rounds", 1, "--members-only", "--insecure"), "--insecure"),
        (("line.py", "--rounds", 1, "--client-ca", "ca.pem"), "--tls"),
        (("line.py", "--rounds", 1, "--address", "0.0.0.0", "--insecure", "--client-ca", "ca.pem"), "--insecure"),
        (("line.py", "--rounds", 1, "--tls-cert", "c.pem"), "--tls-key"),
        (("line.py", "--rounds", 1, "--tls", "--tls-cert", "c", "--tls-key", "k"), "not both"),
        (("--resume", "--port", 0), "--run"),
        (("--resume", "--run", "nowhere", "--port", 0), "nowhere"),
        (("--resume", "--run", "x", "--goal", 3, "--seed", 2), "--goal, --seed"),
        (("--resume", "--run", "x", "--events-kept", 0), "--events-kept"),
        (("--resume", "--run", "x", "--keep", "5"), "--keep"),
        (("line.py", "--rounds", 1, "--keep", "all"), "RECENT:EVERY"),
        (("line.py", "--rounds", 1, "--address", "no.such.name.invalid", "--insecure"), "--address"),
    ],
)
def test_a_host_refuses_in_one_line(
    arguments: tuple[object, ...], expected: str, shoal: Shoal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    made = shoal("host", *arguments)
    assert made.code == 1 and made.out == "" and expected in last(made.err), made
    assert list(tmp_path.iterdir()) == []


@pytest.mark.integration
def test_a_port_in_use_is_said_before_a_run_is_begun(shoal: Shoal, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        made = shoal("host", "line.py", "--rounds", 1, "--port", port, "--run", tmp_path / "run")
    assert made.code == 1 and f"127.0.0.1:{port}" in last(made.err) and "--port" in made.err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((), "--data"),
        (("--data", "nowhere"), "does not exist"),
        (("--data", "users", "--key", "abc"), "64 hexadecimal"),
        (("--data", "users", "--memory", "much"), "4GiB"),
        (("--data", "users", "--memory", "3"), "1MiB"),
        (("--data", "users", "--ca", "nothing.pem"), "nothing.pem"),
        (("--data", "users", "--server-name", "x"), "--ca"),
        (("--data", "users", "--client-cert", "x.pem"), "--client-key"),
        (("--data", "users", "--client-cert", "x.pem", "--client-key", "x.key"), "--ca"),
        (("--data", "users", "--pseudonyms", "often"), "12h or 7d"),
        (("--data", "users", "--pseudonyms", "1s"), "60s"),
        (("--data", "users", "--pseudonyms", "1d", "--member", "x", "--certificate", "y"), "--member"),
        (("--data", "users", "--join", "shoal1:x"), "--server"),
        (("--data", "users", "--first", 5, "--count", 3), "users 5 to 7"),
        (("--data", "users", "--first", 6), "users from 6 on"),
        (("--data", "users", "--when", "sunny"), "charging | idle | unmetered"),
        (("--data", "users", "--priority", "highest"), "lowest, low or normal"),
        (("--data", "users", "--rest", "soon"), "12h or 7d"),
        (("--data", "users", "--per-day", "joules=3"), "cpu | bytes | battery | memory"),
        (("--data", "users", "--per-day", "cpu=1h", "--per-day", "cpu=2h"), "each once"),
        (("--data", "users", "--per-day", "battery=150%"), "battery=5%"),
        (("--data", "users", "--max-temperature", "-3"), "celsius > 0"),
    ],
)
def test_a_device_refuses_in_one_line(
    arguments: tuple[object, ...], expected: str, shoal: Shoal, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)
    made = shoal("device", "--server", "127.0.0.1:1", *arguments)
    assert made.code == 1 and made.out == "" and expected in last(made.err), made


@pytest.mark.parametrize("server", ["localhost", "localhost:", "localhost:0", ":80", "localhost:x", "localhost:99999"])
def test_a_device_needs_host_and_port(server: str, shoal: Shoal) -> None:
    made = shoal("device", "--server", server, "--data", "users")
    assert made.code == 1 and "HOST:PORT" in last(made.err)


def test_users_without_examples_are_named_once(caplog: pytest.LogCaptureFixture) -> None:
    none, some = {"x": np.zeros(0, np.float32)}, {"x": np.zeros(2, np.float32)}
    population = Population.from_arrays({"a": some, "b": none, "c": some, "d": none})
    assert device_process.choose(population, first=0, count=None) == ("a", "c")
    assert caplog.messages == ["b and d are left out: no examples"]


def test_users_whose_data_do_not_fit_leave_the_others_alone_and_are_named(caplog: pytest.LogCaptureFixture) -> None:
    async def plays(error: Exception | None) -> None:
        if error is not None:
            raise error

    async def over(*errors: Exception | None) -> None:
        status = asyncio.create_task(asyncio.sleep(60))
        playing = {
            asyncio.create_task(plays(error)): cast(Device, SimpleNamespace(device_id=f"user-{number}"))
            for number, error in enumerate(errors)
        }
        try:
            await device_process._until_over(playing, status)
        finally:
            status.cancel()

    asyncio.run(over(None, DataError("odd 1"), DataError("odd 2"), DataError("odd 3")))
    first, whole = caplog.messages
    assert first.startswith("a user is left out: odd") and "user-1" in whole and "user-2 and user-3" in whole
    with pytest.raises(DataError, match="odd"):
        asyncio.run(over(DataError("odd 1"), DataError("odd 2")))


# Real processes.


def begin_host(start: Start, place: Path, tmp_path: Path, *options: object) -> tuple[Process, str]:
    ready = tmp_path / "ready"
    ready.unlink(missing_ok=True)
    host = start("host", *options, "--run", tmp_path / "run", "--port", 0, "--ready-file", ready)
    host.until(ready.exists)
    return host, ready.read_text()


def versions(folder: Path, task: str = "line") -> int:
    store = open_store(folder, read_only=True)
    try:
        return store.last_version(next(run.id for run in store.runs() if run.name == task)) or 0
    finally:
        store.close()


def modules_of(process: Process) -> str:
    """The shared libraries that a process has loaded: a Python that imported JAX has jaxlib's."""
    return "\n".join(entry.path for entry in psutil.Process(process.popen.pid).memory_maps())


@pytest.mark.slow
@pytest.mark.integration
@pytest.mark.timeout(180)
def test_two_device_processes_train_digits_to_the_end(start: Start, tmp_path: Path, shoal: Shoal) -> None:
    assert shoal("new", tmp_path / "digits.py").code == 0
    host, address = begin_host(
        start, tmp_path, tmp_path, tmp_path / "digits.py", "--rounds", 6, "--goal", 8, "--over-selection", 1.0,
        "--held-out", "name:digits",
    )  # fmt: skip
    devices = [
        start("device", "--server", address, "--data", "name:digits", "--users", 16, "--first", first, "--count", 8)
        for first in (0, 8)
    ]
    host.until(lambda: "version 1/6" in host.text)
    if sys.platform == "linux":
        assert all("jaxlib" not in modules_of(process) for process in (host, *devices))
    assert host.wait() == 0, host.text
    assert [device.wait() for device in devices] == [0, 0]
    assert re.search(r"version 1/6  \d+ updates, [\d,]+ uses of examples  ", host.text)
    assert "listening on 127.0.0.1:" in host.text and "where the time went" in host.text
    assert all("the run is over" in device.text for device in devices)
    with open_run(tmp_path / "run") as run:
        assert run.row.status == "finished" and run.store.last_version(run.id) == 6
        at, accuracy = run.history("accuracy")
        assert at[-1] == 6 and accuracy[-1] > 0.8
        assert {row.scope for row in run.store.metrics(run.id, "accuracy")} == {"server"}
        assert all(row.counted >= 8 for row in run.store.rounds(run.id))


@pytest.mark.slow
@pytest.mark.integration
@pytest.mark.timeout(180)
def test_one_host_serves_two_tasks_and_goes_on_with_both(
    start: Start, place: Path, tmp_path: Path, shoal: Shoal
) -> None:
    (tmp_path / "other.py").write_text(LINE.replace('name="line"', 'name="other"'))
    host, address = begin_host(
        start, place, tmp_path, place / "line.py", tmp_path / "other.py", "--rounds", 100_000, "--weight", "line=2",
        "--set", "other.rounds=5", "--set", "other.minimum-group=2", "--set", "other.goal=2", "--population", "homes",
    )  # fmt: skip
    lost = shoal("device", "--server", address, "--data", place / "users", "--in-process", "--population", "cars")
    assert lost.code == 1 and "population 'homes'" in last(lost.err), lost
    device = start("device", "--server", address, "--data", place / "users", "--population", "homes")
    host.until(lambda: "line  version      3/" in host.text and "other  version 5/5" in host.text)
    # The line is told before the record has it that the run is over.
    host.until(lambda: "finished" in [found.status for found in find_runs(tmp_path / "run")])
    host.kill(signal.SIGTERM)
    assert host.wait(20) == 143 and "--resume" in last(host.text), host.text
    host, _ = begin_host(start, place, tmp_path, "--resume", "--rounds", versions(tmp_path / "run", "line") + 3)
    device.kill(signal.SIGTERM)
    device = start(
        "device", "--server", (tmp_path / "ready").read_text(), "--data", place / "users", "--population", "homes"
    )
    assert host.wait() == 0, host.text
    assert device.wait() == 0, device.text
    assert "other" not in host.text, "it was finished before"
    store = open_store(tmp_path / "run", read_only=True)
    assert {(run.name, run.status, run.population) for run in store.runs()} == {
        ("line", "finished", "homes"), ("other", "finished", "homes"),
    }  # fmt: skip
    store.close()


@pytest.mark.slow
@pytest.mark.integration
@pytest.mark.timeout(180)
def test_a_killed_host_goes_on_from_the_last_version(start: Start, place: Path, tmp_path: Path, shoal: Shoal) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    host = start(
        "host", place / "line.py", "--rounds", 2000, "--port", port, "--run", tmp_path / "run", "--events-kept", 4
    )
    host.until(lambda: "listening" in host.text)
    device = start("device", "--server", f"127.0.0.1:{port}", "--data", place / "users")
    host.until(lambda: "version    5/2000" in host.text)
    host.kill()
    host.wait()
    assert [run.status for run in find_runs(tmp_path / "run")] == ["stopped (died)"]
    reached = versions(tmp_path / "run")
    assert reached >= 5
    resumed = start("host", "--resume", "--run", tmp_path / "run", "--port", port, "--rounds", reached + 10)
    assert resumed.wait() == 0, resumed.text
    assert device.wait() == 0, device.text
    with open_run(tmp_path / "run") as run:
        commits = list(run.store.commits(run.id))
        assert [commit.version for commit in commits] == list(range(reached + 11))
        assert run.row.status == "finished"
        rounds = [row.number for row in run.store.rounds(run.id)]
        logs = [number for number in rounds if run.store.round_log(run.id, number) is not None]
        assert logs == rounds[-4:] and run.row.config["events_kept"] == 4
    finished = start("host", "--resume", "--run", tmp_path / "run", "--port", port)
    assert finished.wait() == 0 and f"has version {reached + 10} of {reached + 10} already" in finished.text, (
        finished.text
    )
    shown = shoal("runs", "show", tmp_path / "run").out
    assert "-v[]+^" in shown and "fetch and train" in shown
    assert "it was to commit, because: goal" in shoal("replay", tmp_path / "run", "--round", rounds[-1]).out
    assert "was committed after" in shoal("runs", "explain", tmp_path / "run", "--round", rounds[-1]).out


@pytest.mark.slow
@pytest.mark.integration
@pytest.mark.timeout(180)
def test_a_killed_device_does_not_stop_the_others(start: Start, place: Path, tmp_path: Path) -> None:
    write_users(tmp_path / "users", 6)
    host, address = begin_host(start, place, tmp_path, place / "line.py", "--rounds", 300, "--reporting-window", 5)
    lost = start("device", "--server", address, "--data", tmp_path / "users", "--count", 3)
    start("device", "--server", address, "--data", tmp_path / "users", "--first", 3)
    host.until(lambda: "version  20/300" in host.text)
    lost.kill()
    assert host.wait(120) == 0, host.text


@pytest.mark.slow
@pytest.mark.integration
@pytest.mark.timeout(180)
def test_a_device_that_was_suspended_or_whose_conditions_end_comes_back(
    start: Start, place: Path, tmp_path: Path
) -> None:
    conditions, kept = tmp_path / "conditions.json", tmp_path / "kept"
    host, address = begin_host(start, place, tmp_path, place / "line.py", "--rounds", 100_000, "--reporting-window", 2)
    conditions.write_text('{"charging": true}')
    device = start(
        "device", "--server", address, "--data", place / "users", "--state", kept, "--when", "charging",
        "--probe", f"file:{conditions}", "--settle", "0.1s", "--per-day", "cpu=1h",
    )  # fmt: skip
    host.until(lambda: "version      3/" in host.text)
    second = start("device", "--server", address, "--data", place / "users", "--state", kept)
    assert second.wait(20) == 1 and "another process" in last(second.text)
    device.kill(signal.SIGSTOP)
    time.sleep(4.0)
    before = versions(tmp_path / "run")
    device.kill(signal.SIGCONT)
    host.until(lambda: versions(tmp_path / "run") > before + 3)
    conditions.write_text('{"charging": false}')
    device.until(lambda: "rests: it is not charging" in device.text)
    time.sleep(1.0)
    resting = versions(tmp_path / "run")
    conditions.write_text("{")
    device.until(lambda: "to give JSON" in device.text)
    assert versions(tmp_path / "run") == resting
    conditions.write_text('{"charging": true}')
    host.until(lambda: versions(tmp_path / "run") > resting + 3)
    device.kill(signal.SIGTERM)
    assert device.wait(20) == 143 and "What is in hand is kept" in last(device.text), device.text
    host.kill(signal.SIGTERM)


@pytest.mark.slow
@pytest.mark.integration
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_host_that_is_told_to_end_says_how_to_go_on(
    number: int, code: int, start: Start, place: Path, tmp_path: Path
) -> None:
    host, address = begin_host(start, place, tmp_path, place / "line.py", "--rounds", 100_000)
    device = start("device", "--server", address, "--data", place / "users")
    host.until(lambda: "version      3/" in host.text)
    host.kill(number)
    assert host.wait(20) == code, host.text
    assert "--resume" in last(host.text) and str(tmp_path / "run") in last(host.text)
    with open_run(tmp_path / "run") as run:
        assert run.row.status == "stopped"
    device.kill(number)
    assert device.wait(20) == code and "start the same command again" in last(device.text), device.text


@pytest.mark.slow
@pytest.mark.integration
def test_tls_is_made_for_a_run_and_a_stranger_is_not_believed(
    start: Start, place: Path, tmp_path: Path, shoal: Shoal
) -> None:
    host, address = begin_host(start, place, tmp_path, place / "line.py", "--rounds", 3, "--tls")
    key = host.text.split("--key ")[1].split()[0]
    ca = tmp_path / "run" / "tls" / "ca.pem"
    assert (tmp_path / "run" / "tls" / "server.key").stat().st_mode & 0o777 == 0o600
    plain = shoal("device", "--server", address, "--data", place / "users", "--in-process", "--patience", 1)
    assert plain.code == 1 and "--ca" in last(plain.err), plain
    wrong = shoal(
        "device", "--server", address, "--data", place / "users", "--in-process", "--ca", ca, "--key", "00" * 32
    )
    assert wrong.code == 1 and "trusts" in last(wrong.err), wrong
    right = shoal(
        "device", "--server", address, "--data", place / "users", "--in-process", "--ca", ca, "--key", key, "--json"
    )  # fmt: skip
    assert right.code == 0 and right.json["counted"] >= 9, right
    assert host.wait(20) == 0, host.text


@pytest.mark.slow
@pytest.mark.integration
def test_an_optax_server_rule_runs_in_a_child(start: Start, place: Path, tmp_path: Path, shoal: Shoal) -> None:
    source = LINE.replace('    name="line",', '    name="line",\n    server=optax.adam(0.3),')
    (tmp_path / "adam.py").write_text(source)
    host, address = begin_host(start, place, tmp_path, tmp_path / "adam.py", "--rounds", 3)
    device = shoal("device", "--server", address, "--data", place / "users", "--in-process")
    assert device.code == 0 and host.wait(20) == 0, (device, host.text)
    with open_run(tmp_path / "run") as run:
        assert len(run.store.get_commit(run.id, 3).server_state.specs) > 0


@pytest.mark.slow
@pytest.mark.integration
def test_processes_end_with_their_parent(place: Path, tmp_path: Path) -> None:
    ready = tmp_path / "ready"
    command = [
        sys.executable, "-m", "shoal.cli.main", "host", str(place / "line.py"), "--rounds", "9", "--port", "0",
        "--run", str(tmp_path / "run"), "--ready-file", str(ready), "--with-parent",
    ]  # fmt: skip
    source = f"import subprocess, time; p = subprocess.Popen({command!r}); print(p.pid, flush=True); time.sleep(60)"
    with (tmp_path / "log").open("w") as log:
        parent = subprocess.Popen([sys.executable, "-c", source], stdout=subprocess.PIPE, stderr=log, text=True)
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        end_s = time.monotonic() + 40
        while not ready.exists() and time.monotonic() < end_s:
            time.sleep(0.05)
        assert ready.exists(), (tmp_path / "log").read_text()
        parent.kill()
        parent.wait()
        parent.stdout.close()
        while _lives(pid) and time.monotonic() < end_s + 20:
            time.sleep(0.05)
    assert not _lives(pid)


def _lives(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_the_host_imports_no_jax() -> None:
    source = "import sys, shoal.cli.host_process, shoal.cli.device_process; print('jax' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", source], capture_output=True, text=True, check=True, env=dict(os.environ)
    )
    assert done.stdout.strip() == "False"


LONG = """
import jax.numpy as jnp, optax, shoal
task = shoal.Task(
    name="long", init=lambda key: {"w": jnp.zeros(())},
    loss=lambda params, state, batch, key: jnp.square(params["w"] - batch["x"]), batch={"x": ((), "float32")},
    local=shoal.Local(
        optimizer=optax.sgd(1e-6), batch_size=8, steps_per_block=1, max_examples=1 << 22, partial="fednova"
    ),
    rounds=shoal.RoundPolicy(goal=1, over_selection=1.0, minimum_group=1),
)
"""


@pytest.mark.slow
@pytest.mark.integration
@pytest.mark.timeout(180)
def test_a_device_that_is_told_to_end_reports_the_steps_it_did(start: Start, tmp_path: Path) -> None:
    """Its training would take minutes; the round is committed when it has left."""
    (tmp_path / "long.py").write_text(LONG)
    (tmp_path / "data").mkdir()
    np.savez(tmp_path / "data" / "anna.npz", x=np.ones(4_000_000, np.float32))
    host = start(
        "host", "long.py", "--rounds", 1, "--port", 0, "--run", tmp_path / "run", "--ready-file", tmp_path / "ready"
    )
    host.until((tmp_path / "ready").exists)
    device = start("device", "--server", (tmp_path / "ready").read_text().strip(), "--data", tmp_path / "data")
    device.until(lambda: "1 training" in device.text)
    device.kill(signal.SIGTERM)
    assert device.wait() == 143 and host.wait() == 0, device.text
    with open_run(tmp_path / "run") as run:
        commit = run.store.last_commit(run.row.id)
        assert commit is not None
        assert (commit.version, commit.members, commit.weight) == (1, 1, 4_000_000)
