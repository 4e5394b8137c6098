"""A worker's side: its assignment, its marks; and what two supervisors say to one another."""

import asyncio
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest

from shoal.errors import DeadlineExceeded, NetworkError, ProtocolError
from shoal.pod import link as links
from shoal.pod.link import Link, read_secret
from shoal.pod.membership_events import PAUSED, Mark
from shoal.pod.place import free_ports
from shoal.pod.worker import MARKS_FD, Assignment, Marks, Worker, attached
from shoal.pod.worker_process import parsed

SECRET = b"a secret of this test"


def test_an_assignment_goes_through_the_environment() -> None:
    given = Assignment(3, "10.0.0.1:7001", 4, 2)
    assert Assignment.from_environ(given.to_environ()) == given
    assert Assignment.from_environ({}) is None


@pytest.mark.parametrize(
    ("environ", "text"),
    [
        ({"SHOAL_POD_LIFE": "1"}, "Expected SHOAL_POD_COORDINATOR, SHOAL_POD_PROCESSES, SHOAL_POD_PROCESS beside"),
        (Assignment(1, "a:1", 1, 0).to_environ() | {"SHOAL_POD_PROCESS": "first"}, "to be whole numbers"),
        (Assignment(1, "a:1", 1, 0).to_environ() | {"SHOAL_POD_PROCESS": "1"}, "0 <= process_id <= 0"),
    ],
)
def test_half_an_assignment_is_refused(environ: dict[str, str], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        Assignment.from_environ(environ)


def test_without_a_supervisor_it_trains_alone() -> None:
    with attached() as pod:
        pod.initialize()
        pod.marks.doing("training")
        pod.marks.begin(1)
        pod.marks.done(1)
        assert (pod.assignment, pod.life, pod.marks.mark.step) == (None, 1, 1)
        assert not pod.agree_to_pause()
        pod.ask()
        assert pod.agree_to_pause()
        with pytest.raises(SystemExit) as ended:
            pod.pause()
        assert ended.value.code == PAUSED


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    """Its ends for reading and for writing."""
    read, write = os.pipe()
    os.set_blocking(write, False)
    yield read, write
    os.close(read)
    os.close(write)


def said(pipe: tuple[int, int]) -> list[Mark]:
    return [parsed(json.loads(line)) for line in os.read(pipe[0], 1 << 16).splitlines()]


def test_marks_say_where_it_is_and_leave_out_what_comes_too_fast(pipe: tuple[int, int]) -> None:
    now = [0.0]
    marks = Marks(pipe[1], now_s=lambda: now[0])
    marks.doing("training")
    for step in range(100):
        now[0] += 0.01
        marks.begin(step)
        marks.done(step)
    marks.beat()
    heard = said(pipe)
    assert heard[0] == Mark("training") and 10 < len(heard) < 30
    assert (heard[-1].step, heard[-1].begun) == (99, 99) and heard[-1].step_s == pytest.approx(0.01)


def test_what_is_no_step_is_in_no_steps_time() -> None:
    now = [0.0]
    marks = Marks(None, now_s=lambda: now[0])
    for step, pause in enumerate((1.0, 1.0, 500.0, 1.0)):
        if pause > 1:
            marks.doing("saving")
            marks.doing("training")
        now[0] += pause
        marks.done(step)
    marks.saved(3)
    assert marks.mark == Mark("training", step=3, saved=3, step_s=1.0)


def test_marks_never_wait_for_their_reader(pipe: tuple[int, int]) -> None:
    now = [0.0]
    marks = Marks(pipe[1], now_s=lambda: now[0])
    for step in range(2000):  # more than a pipe holds
        now[0] += 1.0
        marks.done(step)
    assert said(pipe)[0].step == 0
    marks.beat()
    read, write = os.pipe()
    os.close(read)
    Marks(write).beat()  # nobody reads: no error either
    os.close(write)


@pytest.mark.parametrize(
    "said",
    [7, {"doing": "nothing"}, {"doing": "training", "step": 1.5}, {"doing": "training", "step_s": -1.0}, {"step": 1}],
)
def test_what_is_no_mark_is_refused(said: Any) -> None:
    with pytest.raises((TypeError, ValueError)):
        parsed(said)


def test_it_goes_on_with_others_only_when_there_are_some(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[dict[str, Any]] = []
    monkeypatch.setattr("jax.distributed.initialize", lambda *given, **named: called.append(named))
    Worker(Assignment(1, "a:1", 1, 0), Marks(None)).initialize()
    assert called == []
    Worker(Assignment(1, "a:1", 2, 0), Marks(None)).initialize()
    assert called.pop()["process_id"] == 0  # it waits for nobody
    (port,) = free_ports(1)
    joining = threading.Thread(target=Worker(Assignment(1, f"127.0.0.1:{port}", 2, 1), Marks(None)).initialize)
    joining.start()
    time.sleep(0.1)
    assert called == [], "the first process does not listen yet"
    with socket.create_server(("127.0.0.1", port)):
        joining.join(10)
    (named,) = called
    assert (named["num_processes"], named["process_id"], named["heartbeat_timeout_seconds"]) == (2, 1, 10)


# Supervisors among themselves.


def run(work: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(work)


async def joined(secret: bytes = SECRET, silence_s: float = 5.0) -> tuple[Link, Link, asyncio.Server]:
    """Both sides of a link: who dialled, who was dialled."""
    accepted: asyncio.Future[Link] = asyncio.get_running_loop().create_future()

    async def come(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            accepted.set_result(await Link.accepted(reader, writer, SECRET, silence_s=silence_s))
        except ProtocolError:
            writer.close()

    (port,) = free_ports(1)
    server = await asyncio.start_server(come, "127.0.0.1", port, limit=links.LINE_BYTES)
    try:
        dialled = await Link.dialled("127.0.0.1", port, secret, silence_s=silence_s)
    except BaseException:
        server.close()
        raise
    return dialled, await accepted, server


def test_what_is_said_arrives_in_order_both_ways() -> None:
    async def talk() -> None:
        one, other, server = await joined()
        for number in range(3):
            one.send({"n": number})
            other.send({"m": number})
        assert [await other.receive() for _ in range(3)] == [{"n": 0}, {"n": 1}, {"n": 2}]
        assert await one.receive() == {"m": 0}
        assert one.peer == other.own_address == "127.0.0.1"
        await one.close()
        with pytest.raises(NetworkError):
            await other.receive()
        await other.close()
        server.close()

    run(talk())


@pytest.mark.parametrize("change", ["text", "repeat", "key"])
def test_a_line_that_was_changed_repeated_or_made_up_is_refused(change: str) -> None:
    async def tamper() -> None:
        one, other, server = await joined()
        if change == "key":
            one._send_key = b"another"
        if change == "repeat":
            one.send({"n": 1})
            one._num_sent = 0
            assert await other.receive() == {"n": 1}
        if change == "text":
            one._writer.write(links._mac(one._send_key, 0, b'{"n": 1}') + b' {"n": 2}\n')
        else:
            one.send({"n": 1})
        with pytest.raises(ProtocolError, match="not of the peer that knows the secret"):
            await other.receive()
        await one.close()
        await other.close()
        server.close()

    run(tamper())


def test_another_secret_opens_nothing() -> None:
    with pytest.raises(ProtocolError, match="has another secret than this host"):
        run(joined(b"another secret than that"))


def test_who_says_nothing_is_given_up() -> None:
    async def wait() -> None:
        one, other, server = await joined(silence_s=0.05)
        alive = asyncio.create_task(one.keep_alive())
        with pytest.raises(DeadlineExceeded, match="said nothing for"):
            await other.receive()
        alive.cancel()
        await asyncio.wait([alive])
        await one.close()
        await other.close()
        server.close()

    run(wait())


def test_the_secret_is_read_from_a_file_or_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "secret"
    path.write_bytes(SECRET + b"\n")
    assert read_secret(path) == SECRET
    monkeypatch.setenv("SHOAL_POD_SECRET", SECRET.decode())
    assert read_secret() == SECRET
    path.write_bytes(b"short")
    with pytest.raises(ValueError, match=r"at least 16 characters in .*secret, got 5\. Make one with"):
        read_secret(path)


SPARE = """
import json, os, sys, threading, time
from shoal.pod import worker

def priority():
    return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())

found = {}

def prepare():
    found["prepare"] = priority() - before, threading.current_thread() is threading.main_thread()
    if "--fail" in sys.argv:
        raise ImportError("there is no such module")
    if "--slow" in sys.argv and not found["prepare"][1]:
        time.sleep(600)

before = priority()
with worker.attached(prepare=prepare) as pod:
    print(json.dumps([found, priority() - before, pod.assignment.process_id]), flush=True)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="a thread has a priority of its own on Linux alone")
@pytest.mark.parametrize(
    ("is_spare", "flag"), [(True, ""), (False, ""), (True, "--fail"), (False, "--fail"), (True, "--slow")]
)
def test_a_spare_imports_behind_those_who_train(pipe: tuple[int, int], is_spare: bool, flag: str) -> None:
    assignment = Assignment(1, "a:1", 1, 0)
    environ = {**os.environ, MARKS_FD: str(pipe[1]), **({} if is_spare else assignment.to_environ())}
    told = {"assign": {name: getattr(assignment, name) for name in assignment.__dataclass_fields__}}
    words = [sys.executable, "-c", SPARE, flag]
    with subprocess.Popen(
        words, env=environ, pass_fds=(pipe[1],), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    ) as process:  # fmt: skip
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdin.write(json.dumps(told) + "\n")
        process.stdin.flush()  # and open: its end would be the supervisor's
        said, errors = process.stdout.readline(), process.stderr.read()
    if flag == "--fail" and not is_spare:
        assert "no such module" in errors
        return
    found, own, number = json.loads(said)
    # What fails beside is found out where it is needed; what takes too long is begun anew.
    assert found["prepare"] == ([19, False] if is_spare and flag != "--slow" else [0, True])
    assert (own, number) == (0, 0)


ENDED = """
import hashlib, os, signal, sys, time
from pathlib import Path
from shoal.pod import worker

def leave():
    with Path(sys.argv[1]).open("a") as file:
        file.write("left ")

with worker.attached() as pod:
    pod.at_end(leave)
    if sys.argv[2] == "fault":
        raise RuntimeError("a member is gone")
    if sys.argv[2] == "abort":
        os.abort()
    read, write = os.pipe()
    if not (child := os.fork()):
        os.write(write, b"x")
        time.sleep(600)
    os.read(read, 1)
    os.kill(child, signal.SIGTERM)
    assert os.waitpid(child, 0)[1] == signal.SIGTERM, "a process that was forked ends as usual"
    print("ready", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)  # as in a collective: no handler of Python's runs meanwhile
"""


@pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGTERM")
@pytest.mark.parametrize(("how", "code"), [("SIGTERM", 143), ("fault", 1), ("abort", 134)])
def test_a_worker_that_is_ended_does_first_what_is_to_be_done(
    pipe: tuple[int, int], tmp_path: Path, how: str, code: int
) -> None:
    environ = {**os.environ, MARKS_FD: str(pipe[1]), **Assignment(1, "a:1", 1, 0).to_environ()}
    with subprocess.Popen(
        [sys.executable, "-c", ENDED, str(tmp_path / "left"), how], env=environ, pass_fds=(pipe[1],), stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, start_new_session=True,
    ) as process:  # fmt: skip
        if how == "SIGTERM":
            assert process.stdout is not None
            assert process.stdout.readline() == b"ready\n"
            process.terminate()
        try:
            assert process.wait(20) == code
        finally:
            process.kill()
        assert process.stderr is not None
        assert how != "fault" or b"a member is gone" in process.stderr.read()
    assert (tmp_path / "left").read_text() == "left "
