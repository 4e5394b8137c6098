"""`shoal edge` and `shoal host --edges`: real processes, some of them killed."""

import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from shoal.cli.edge_process import _Restarts
from shoal.errors import NetworkError
from shoal.fleet.tls import make_tls
from shoal.record.lock import only_writer
from shoal.record.run import open_run

from .conftest import Process, Shoal, write_users

Start = Callable[..., Process]


def processes(folder: Path, command: str) -> list[psutil.Process]:
    """Those that run `shoal COMMAND` for a run folder."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        if command in words[1:5] and any(str(folder) in word for word in words):
            found.append(process)
    return found


@pytest.fixture
def run_folder(tmp_path: Path) -> Iterator[Path]:
    """Whatever serves it at the end is killed: Edges outlive their host, and start another."""
    folder = tmp_path / "run"
    yield folder
    (folder / "restart.json").unlink(missing_ok=True)
    for command in ("edge", "host"):
        for process in processes(folder, command):
            process.kill()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("--coordinator", "nowhere", "--credential", "k"), "--coordinator HOST:PORT"),
        (("--coordinator", "10.0.0.1:5", "--credential", "k"), "--ca"),
        (("--coordinator", "127.0.0.1:5", "--credential", "k", "--address", "0.0.0.0"), "--tls"),
        (("--coordinator", "127.0.0.1:5", "--credential", "k", "--public", "x"), "--public HOST:PORT"),
        (
            ("--coordinator", "127.0.0.1:5", "--credential", "nothing.key"),
            "nothing.key: No such file or directory. `shoal host`",
        ),
        (("--coordinator", "127.0.0.1:5", "--credential", __file__), "Expected 64 hexadecimal digits"),
    ],
)
def test_an_edge_refuses_in_one_line(arguments: tuple[object, ...], expected: str, shoal: Shoal) -> None:
    made = shoal("edge", "--port", 0, *arguments)
    assert made.code == 1 and expected in made.err and "Traceback" not in made.err, made


def test_several_tasks_have_one_edge(shoal: Shoal) -> None:
    made = shoal("host", "a.py", "b.py", "--rounds", 1, "--edges", 2)
    assert made.code == 1 and "one TASK" in made.err


@pytest.mark.slow
@pytest.mark.integration
@pytest.mark.timeout(120)
def test_an_edge_attaches_and_the_run_ends_for_all(start: Start, place: Path, tmp_path: Path, run_folder: Path) -> None:
    write_users(tmp_path / "users", 6)
    host = start("host", place / "line.py", "--rounds", 5, "--port", 0, "--edge-port", 0, "--run", run_folder, "--tls")
    host.until(lambda: "devices:" in host.text)
    attach = host.text.partition("--coordinator ")[2].split()[0]
    ca = run_folder / "tls" / "ca.pem"
    edge = start(
        "edge", "--coordinator", attach, "--credential", run_folder / "edges.key", "--ca", ca, "--port", 0,
        "--tls-key", run_folder / "tls" / "server.key", "--tls-cert", run_folder / "tls" / "server.pem",
    )  # fmt: skip
    edge.until(lambda: "listening on" in edge.text)
    address = edge.text.partition("listening on ")[2].split()[0]
    device = start("device", "--server", address, "--ca", ca, "--data", tmp_path / "users")
    assert host.wait() == 0, host.text
    assert edge.wait() == 0, edge.text
    assert device.wait() == 0, device.text
    with open_run(run_folder) as run:
        assert [commit.version for commit in run.store.commits(run.id)] == list(range(6))


@pytest.mark.slow
@pytest.mark.integration
def test_a_run_of_edges_that_is_over_is_resumed_and_ends(
    start: Start, place: Path, tmp_path: Path, run_folder: Path
) -> None:
    write_users(tmp_path / "users", 6)
    host = start("host", place / "line.py", "--rounds", 2, "--port", 0, "--edges", 1, "--run", run_folder)
    host.until(lambda: "listening on" in host.text)
    device = start(
        "device", "--server", host.text.partition("listening on ")[2].split()[0], "--data", tmp_path / "users"
    )
    assert host.wait() == 0 and device.wait() == 0, host.text
    again = start("host", "--resume", "--run", run_folder, "--port", 0, "--edges", 1)
    assert again.wait() == 0, again.text


@pytest.mark.slow
@pytest.mark.integration
@pytest.mark.timeout(180)
def test_a_killed_host_is_started_again_by_its_edges_and_a_killed_edge_by_the_host(
    start: Start, place: Path, tmp_path: Path, run_folder: Path
) -> None:
    write_users(tmp_path / "users", 12)
    host = start("host", place / "line.py", "--rounds", 100_000, "--port", 0, "--edges", 2, "--run", run_folder)
    host.until(lambda: "listening on" in host.text)
    address = host.text.partition("listening on ")[2].split()[0]
    start("device", "--server", address, "--data", tmp_path / "users")
    host.until(lambda: reached(run_folder) >= 3)

    for command in ("edge", "host", "edge"):
        victim = processes(run_folder, command)[0]
        victim.kill()
        if command == "host":
            assert host.wait() == -signal.SIGKILL
        last = reached(run_folder)
        until(lambda last=last: reached(run_folder) >= last + 3)  # type: ignore[misc]
    until(lambda: len(processes(run_folder, "edge")) == 2 and len(processes(run_folder, "host")) == 1)

    processes(run_folder, "host")[0].terminate()
    until(lambda: not processes(run_folder, "edge") and not processes(run_folder, "host"))
    with open_run(run_folder) as run:
        assert run.row.status == "stopped"
        assert [c.version for c in run.store.commits(run.id)] == list(range(reached(run_folder) + 1))
    assert not (run_folder / "restart.json").exists()


@pytest.mark.slow
@pytest.mark.integration
@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    "secured",
    [("--tls", "--edge-address", "0.0.0.0"), ("--address", "0.0.0.0", "--insecure"), ("--tls-cert",), ("--client-ca",)],
)
def test_edges_of_a_host_reach_it_however_it_is_secured(
    secured: tuple[str, ...], start: Start, place: Path, tmp_path: Path, run_folder: Path
) -> None:
    if secured == ("--client-ca",):  # which Edges have no certificate of
        (tmp_path / "ca.pem").write_bytes(make_tls(["example.org"])[2])
        secured = ("--address", "0.0.0.0", "--client-ca", str(tmp_path / "ca.pem"))
    if secured == ("--tls-cert",):
        key, chain, _ = make_tls(["example.org"])
        (tmp_path / "key.pem").write_bytes(key)
        (tmp_path / "cert.pem").write_bytes(chain)
        secured = ("--tls-cert", str(tmp_path / "cert.pem"), "--tls-key", str(tmp_path / "key.pem"))
    host = start("host", place / "line.py", "--rounds", 5, "--port", 0, "--edges", 1, "--run", run_folder, *secured)
    host.until(lambda: "devices:" in host.text)  # it waits for its Edges before that
    host.kill()
    log = run_folder / "host.log"  # of the one that the Edge starts
    until(lambda: log.exists() and "devices:" in log.read_text())
    for process in processes(run_folder, "host"):
        process.terminate()
    until(lambda: not processes(run_folder, "edge") and not processes(run_folder, "host"))


def test_an_edge_starts_no_host_that_was_ended(tmp_path: Path) -> None:
    with only_writer(tmp_path):
        pass
    with pytest.raises(NetworkError, match="has ended"):
        _Restarts(tmp_path)()


def test_an_edge_whose_run_folder_is_gone_ends(tmp_path: Path) -> None:
    _Restarts(tmp_path)()  # nothing was left there yet: it waits on
    with pytest.raises(NetworkError, match="is gone, and its host with it"):
        _Restarts(tmp_path / "gone")()


def reached(folder: Path) -> int:
    with open_run(folder) as run:
        return run.store.last_version(run.id) or 0


def until(seen: Callable[[], bool], timeout_s: float = 60.0) -> None:
    end_s = time.monotonic() + timeout_s
    while not seen():
        assert time.monotonic() < end_s, f"not in {timeout_s} s"
        time.sleep(0.1)
