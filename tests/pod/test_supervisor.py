"""Supervisors and workers as real processes: killed, stopped, failing, deaf; hosts that come, go, and are strangers."""

import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Coroutine
from pathlib import Path
from typing import Any

import psutil
import pytest

from shoal.errors import NetworkError, PodGaveUp, ProtocolError
from shoal.pod.follower import Follower
from shoal.pod.link import Link
from shoal.pod.membership import PodPolicy
from shoal.pod.place import WorkerCommand, free_ports
from shoal.pod.supervisor import Listen, Outcome, Supervisor

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
SECRET = b"a secret of this test"
FAST: dict[str, Any] = {"backoff_s": 0.01, "floor_s": 2.0, "lost_s": 6.0}

pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(sys.platform == "win32", reason="a pod needs process groups"),
]


def environ() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}


def plain(folder: Path, kind: str = "work", last: int = 30, **how: Any) -> WorkerCommand:
    command = [sys.executable, str(HERE / "plain_worker.py"), str(folder), kind, str(last)]
    return WorkerCommand(**{"command": command, "environ": environ(), "grace_s": 0.5, "has_spare": False, **how})


def run(work: Coroutine[Any, Any, Any]) -> Any:
    async def limited() -> Any:
        async with asyncio.timeout(40):
            return await work

    return asyncio.run(limited())


def step_of(folder: Path, process: int = 0) -> int:
    kept = folder / f"step-{process}"
    return int(kept.read_text() or -1) if kept.exists() else -1


async def until(what: Callable[[], Any]) -> Any:
    while not (found := what()):
        await asyncio.sleep(0.01)
    return found


def is_alive(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def pid_of(folder: Path, process: int, life: int = 1) -> int:
    """Of a worker in a life; 0: not there yet."""
    path = folder / f"pid-{process}"
    pid, found = (path.read_text().split() or ("0", "0")) if path.exists() else ("0", "0")
    return int(pid) if int(found) == life else 0


def test_it_trains_to_its_end_and_imports_no_jax(tmp_path: Path) -> None:
    supervisor = Supervisor(plain(tmp_path, last=3), local_workers=2)
    assert run(supervisor.run()) == Outcome(is_finished=True, num_lives=1, ended=())
    assert step_of(tmp_path, 0) == step_of(tmp_path, 1) == 3 and supervisor.snapshot().step == 3
    code = "import sys, shoal.pod.supervisor, shoal.pod.follower; print('jax' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "False"


def test_a_worker_that_always_fails_is_given_up_with_what_it_said(tmp_path: Path) -> None:
    lines: list[str] = []
    supervisor = Supervisor(
        plain(tmp_path, "fail"),
        local_workers=1,
        policy=PodPolicy(**FAST, lives_without_progress=2),
        output=lambda host, line: lines.append(line),
    )
    with pytest.raises(
        PodGaveUp,
        match=r"2 lives .* no further than its start; .*ended with code 1: .*ValueError: there is no such data",
    ):
        run(supervisor.run())
    assert lines.count("ValueError: there is no such data") == 2


@pytest.mark.parametrize(
    ("command", "why"),
    [
        (["/no/such/program"], "could not be started: .*No such file"),
        (None, "a mark that is none: Expected a mark as a JSON object"),
    ],
)
def test_a_worker_that_cannot_start_or_talks_nonsense_is_a_failure(
    tmp_path: Path, command: list[str] | None, why: str
) -> None:
    how = plain(tmp_path, "nonsense") if command is None else WorkerCommand(command=command)
    with pytest.raises(PodGaveUp, match=why):
        run(Supervisor(how, local_workers=1, policy=PodPolicy(lives_without_progress=1)).run())


def test_after_a_kill_all_start_again_from_their_spares(tmp_path: Path) -> None:
    async def kill_one() -> Outcome:
        supervisor = Supervisor(
            plain(tmp_path, last=9999, has_spare=True), local_workers=2, policy=PodPolicy(hosts=2, **FAST)
        )
        running = asyncio.create_task(supervisor.run())
        await until(lambda: (tmp_path / "imports").exists() and len(waiting(tmp_path)) == 4)
        spares, reached = waiting(tmp_path), step_of(tmp_path)
        os.kill(pid_of(tmp_path, 1), signal.SIGKILL)
        await until(lambda: pid_of(tmp_path, 1, life=2) and step_of(tmp_path) > reached + 3)
        assert str(pid_of(tmp_path, 1, life=2)) in spares
        supervisor.stop()
        return await running

    killed, stopped = run(kill_one()).ended
    assert len(killed.hosts) == 1 and killed.hosts[0].endswith("/1") and "SIGKILL" in killed.why
    assert stopped.life == 2
    assert not [pid for pid in waiting(tmp_path) if is_alive(int(pid))], "no spare is left behind"


def waiting(folder: Path) -> list[str]:
    """Ids of all workers and spares so far."""
    return (folder / "imports").read_text().split()


@pytest.mark.slow
def test_one_that_does_not_run_is_named_and_killed(tmp_path: Path) -> None:
    async def stop_one() -> Outcome:
        supervisor = Supervisor(
            plain(tmp_path, last=9999), local_workers=2, policy=PodPolicy(hosts=2, **FAST | {"floor_s": 1.0})
        )
        running = asyncio.create_task(supervisor.run())
        await until(lambda: min(step_of(tmp_path, 0), step_of(tmp_path, 1)) > 3)
        os.kill(pid_of(tmp_path, 0), signal.SIGSTOP)
        await until(lambda: pid_of(tmp_path, 0, life=2))
        supervisor.stop()
        return await running

    frozen, _ = run(stop_one()).ended
    assert [name[-2:] for name in frozen.hosts] == ["/0"]


def test_when_it_is_cancelled_it_leaves_nobody_deaf_or_not(tmp_path: Path) -> None:
    async def cancel() -> None:
        running = asyncio.create_task(Supervisor(plain(tmp_path, "deaf", last=9999), local_workers=1).run())
        await until(lambda: step_of(tmp_path) > 0)
        running.cancel()
        await asyncio.wait([running])
        assert running.cancelled() and not is_alive(pid_of(tmp_path, 0))

    run(cancel())


def test_stop_ends_it_with_an_outcome(tmp_path: Path) -> None:
    async def stop() -> Outcome:
        supervisor = Supervisor(plain(tmp_path, last=9999), local_workers=1)
        running = asyncio.create_task(supervisor.run())
        await until(lambda: step_of(tmp_path) > 0)
        supervisor.stop()
        return await running

    outcome = run(stop())
    assert not outcome.is_finished and [ended.why for ended in outcome.ended] == ["it was stopped"]


@pytest.mark.parametrize("ending", [signal.SIGKILL, signal.SIGINT])
def test_nobody_outlives_the_supervisor(tmp_path: Path, ending: signal.Signals) -> None:
    command = [*plain(tmp_path, "child", last=9999).command]
    process = subprocess.Popen(
        [sys.executable, str(HERE / "pod_supervisor.py"), "2", *command],
        env=environ(), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip

    async def strike() -> None:
        await until(lambda: min(step_of(tmp_path, 0), step_of(tmp_path, 1)) > 0)
        pids = [pid_of(tmp_path, n) for n in (0, 1)] + [int((tmp_path / f"child-{n}").read_text()) for n in (0, 1)]
        if ending == signal.SIGKILL:
            os.kill(pids[0], signal.SIGSTOP)  # one that cannot see that its supervisor is dead
        process.send_signal(ending)
        await until(lambda: not any(map(is_alive, pids)))

    try:
        run(strike())
        said, _ = process.communicate(timeout=10)
        assert said.startswith("stopped") or ending == signal.SIGKILL
    finally:
        process.kill()
        process.wait()


# Several machines.


def listening(port: int) -> Listen:
    return Listen(host="127.0.0.1", port=port, secret=SECRET)


async def with_first(
    folder: Path,
    work: Callable[[int, Supervisor, asyncio.TaskGroup], Awaitable[None]],
    *,
    last: int = 60,
    **policy: Any,
) -> Outcome:
    """Does something beside a supervisor with one worker, and waits for its outcome."""
    (port,) = free_ports(1)
    first = Supervisor(
        plain(folder, last=last), local_workers=1, policy=PodPolicy(**FAST | policy), listen=listening(port)
    )
    async with asyncio.TaskGroup() as tasks:
        running = tasks.create_task(first.run())
        await until(lambda: first.snapshot().hosts)  # it listens
        await work(port, first, tasks)
        outcome = await running
    return outcome


def follower(folder: Path, port: int, *, last: int = 60, secret: bytes = SECRET, **more: Any) -> Follower:
    return Follower(plain(folder, last=last), first=("127.0.0.1", port), secret=secret, **more)


def test_two_machines_train_together(tmp_path: Path) -> None:
    ends: list[bool] = []

    async def follow(port: int, first: Supervisor, tasks: asyncio.TaskGroup) -> None:
        async def other() -> None:
            ends.append(await follower(tmp_path, port, last=5, name="other").run())

        tasks.create_task(other())
        await until(lambda: first.snapshot().members)
        assert [name.split("/")[0] == "other" for name in first.snapshot().members] == [False, True]

    outcome = run(with_first(tmp_path, follow, last=5, hosts=2))
    assert outcome == Outcome(is_finished=True, num_lives=1, ended=()) and ends == [True]
    assert step_of(tmp_path, 0) == step_of(tmp_path, 1) == 5


@pytest.mark.slow
def test_a_machine_that_comes_late_is_taken_in_and_one_that_goes_is_done_without(tmp_path: Path) -> None:
    async def come_and_go(port: int, first: Supervisor, tasks: asyncio.TaskGroup) -> None:
        await until(lambda: step_of(tmp_path) > 2)
        other = asyncio.create_task(follower(tmp_path, port, last=9999).run())
        await until(lambda: step_of(tmp_path, 1) > 2)
        pid = pid_of(tmp_path, 1, life=2)
        other.cancel()
        await asyncio.wait([other])
        assert not is_alive(pid)
        await until(lambda: pid_of(tmp_path, 0, life=3))
        first.stop()

    paused, gone, _ = run(with_first(tmp_path, come_and_go, last=9999, lost_s=100.0)).ended
    assert paused.why == "it paused for others to join" and gone.why == f"{gone.hosts[0]} leaves"


@pytest.mark.slow
def test_a_machine_that_dies_is_done_without_once_its_workers_must_be_gone(tmp_path: Path) -> None:
    async def die(port: int, first: Supervisor, tasks: asyncio.TaskGroup) -> None:
        other = subprocess.Popen(
            [sys.executable, str(HERE / "pod_supervisor.py"), f"follow={port}", *plain(tmp_path, last=9999).command],
            env=environ() | {"SHOAL_POD_SECRET": SECRET.decode()},
        )
        await until(lambda: step_of(tmp_path, 1) > 2)
        pid, struck_s = pid_of(tmp_path, 1), time.monotonic()
        other.kill()
        other.wait()
        await until(lambda: not is_alive(pid))
        await until(lambda: pid_of(tmp_path, 0, life=2))
        assert time.monotonic() - struck_s > first.policy.lost_s
        first.stop()

    gone, _ = run(with_first(tmp_path, die, last=9999, hosts=2)).ended
    assert gone.hosts == ("other/0",) and gone.why == "other/0 is gone"


def test_strangers_do_not_get_in_and_do_no_harm(tmp_path: Path) -> None:
    async def knock(port: int, first: Supervisor, tasks: asyncio.TaskGroup) -> None:
        with pytest.raises(ProtocolError, match="has another secret than this host"):
            await follower(tmp_path, port, secret=b"another secret than that").run()
        for said in (b"x" * 100_000, b"GET / HTTP/1.1\r\n\r\n", b"[]\n", b'{"nonce": 7}\n', b""):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            hello = await reader.readline()
            assert b"shoal-pod" in hello and SECRET not in hello
            writer.write(said)
            if said:
                assert await reader.read() == b"", "it is told nothing"
            writer.close()
        assert len(first.snapshot().hosts) == 1
        first.stop()

    assert run(with_first(tmp_path, knock, last=9999)).num_lives == 1


def test_what_a_host_says_is_checked(tmp_path: Path) -> None:
    joined = {"host": "b", "address": "127.0.0.1", "devices": 1, "ports": [7001]}
    nonsense: list[tuple[dict[str, Any], str]] = [
        ({"joined": joined | {"ports": []}}, "1 to 64 ports"),
        ({"joined": joined | {"devices": 0}}, "devices to be a whole number"),
        ({"joined": joined | {"host": "b\n"}}, "a host's name"),
        ({"joined": joined | {"address": ""}}, "a host's address"),
        ({"joined": joined | {"more": 1}}, "unexpected keyword"),
        ({"exited": {"host": "b", "life": 1, "code": 1}}, "of a host of its own"),
        ({"marked": ["a", 1, {}]}, "of a host of its own"),
    ]

    async def say(port: int, first: Supervisor, tasks: asyncio.TaskGroup) -> None:
        for said, why in [*nonsense, ({"joined": joined | {"host": first.snapshot().hosts[0]}}, "already")]:
            link = await Link.dialled("127.0.0.1", port, SECRET, silence_s=5.0)
            link.send(said)
            assert why in (await link.receive())["refused"]
            await link.close()
        first.stop()

    assert run(with_first(tmp_path, say, last=9999)).num_lives == 1


def test_a_port_that_is_taken_is_said(tmp_path: Path) -> None:
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        listen = listening(other.getsockname()[1])
        with pytest.raises(NetworkError, match=r"Expected a port to listen at, got port="):
            run(Supervisor(plain(tmp_path), local_workers=1, listen=listen).run())


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        ({"local_workers": 0}, "local_workers to be a whole number of at least 1"),
        ({"local_workers": 1, "policy": PodPolicy(hosts=2)}, "at most 1 hosts, which is how many workers"),
        ({"local_workers": 1, "policy": PodPolicy(lost_s=1.0), "listen": listening(7070)}, "lost_s >= 5.5"),
    ],
)
def test_wrong_settings_are_refused(tmp_path: Path, wrong: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        Supervisor(plain(tmp_path), **wrong)


# With JAX.


def gloo(folder: Path, last: int) -> WorkerCommand:
    command = [sys.executable, str(HERE / "pod_worker.py"), str(folder), str(last), "0.02"]
    cache = {"JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    return WorkerCommand(command=command, environ={**environ(), **cache, "JAX_NUM_CPU_DEVICES": "1"})


@pytest.mark.slow
@pytest.mark.parametrize("ending", [signal.SIGKILL, signal.SIGSTOP])
def test_two_that_add_up_over_gloo_survive_it(tmp_path: Path, ending: signal.Signals) -> None:
    async def strike() -> Outcome:
        policy = PodPolicy(hosts=2, floor_s=3.0, backoff_s=0.1)
        supervisor = Supervisor(gloo(tmp_path, 150), local_workers=2, policy=policy)
        running = asyncio.create_task(supervisor.run())
        await until(lambda: supervisor.snapshot().step > 30)
        os.kill(int((tmp_path / "pid-1").read_text()), ending)
        struck = time.monotonic()
        await until(lambda: supervisor.snapshot().life == 2)
        assert time.monotonic() - struck < 6.0
        return await running

    outcome = run(strike())
    (ended,) = outcome.ended
    assert outcome.is_finished and outcome.num_lives == 2 and ended.hosts[0].endswith("/1")
    assert (tmp_path / "step").read_text() == "150"
    for process in (0, 1):  # the second life compiles nothing, in no process
        asked, found = (tmp_path / f"compiled-2-{process}").read_text().split()
        assert int(asked) == int(found) > 0
