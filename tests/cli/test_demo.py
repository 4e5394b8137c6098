"""The demo: what it shows, and, as real processes, that it trains, stops, goes on, and leaves nothing behind."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from io import StringIO
from pathlib import Path

import numpy as np
import psutil
import pytest
from rich.console import Console

from shoal import data
from shoal.cli import demo, demo_data
from shoal.cli.demo_fleet import ChildDied, News, Processes
from shoal.cli.demo_settings import DemoSettings
from shoal.cli.panel import View, Watch
from shoal.errors import DataError
from shoal.record.run import find_runs
from shoal.record.sqlite import open_store
from shoal.report.facts import read_facts

ROUNDS_S = 40.0
"""Longest wait for a version, on a busy machine."""


# What is shown.


def _view() -> View:
    view = View(title="demo", rounds=30)
    demo.learn(view, News("server", "round", {"phase": "reporting", "counted": 7, "goal": 20, "version": 3}))
    demo.learn(view, News("server", "commit", {"version": 4, "seconds": 2.0}))
    demo.learn(view, News("server", "evaluated", {"version": 4, "accuracy": 0.5}))
    for name in ("devices-1", "devices-2"):
        stages = {"waiting": 20, "training": 1, "told to come later": 4}
        said = {"stages": stages, "down_bytes": 1 << 20, "up_bytes": 10, "failures": 0, "last_error": ""}
        demo.learn(view, News(name, "devices", said))
    return view


def test_news_becomes_a_view() -> None:
    view = _view()
    assert view.version == 4 and view.left_s == 2.0 * 26
    assert view.stages() == {"waiting": 40, "training": 2, "other": 8}
    assert view.bytes_moved() == (2 << 20, 20)


def test_an_older_state_of_the_round_does_not_turn_the_version_back() -> None:
    view = _view()
    demo.learn(view, News("server", "round", {"phase": "committing", "counted": 20, "goal": 20, "version": 3}))
    assert view.version == 4 and view.phase == "committing"


@pytest.mark.parametrize("width", [60, 100, 200])
def test_the_panel_fits_and_says_it_all(width: int) -> None:
    out = StringIO()
    console = Console(file=out, force_terminal=True, width=width, color_system=None)
    view = _view()
    view.stage = "training"
    with Watch(view, console):
        pass
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]|\r", "", out.getvalue())
    for part in ("training", "round 5 of 30", "7/20", "40 waiting", "50.0%", "2.0 MiB"):
        assert part in text, part
    starts = [line.strip("│ ").split("  ")[0] for line in text.splitlines()]
    assert {"accuracy", "devices", "moved"} <= set(starts)
    assert max(map(len, text.splitlines())) <= min(width, 100)


def test_without_a_terminal_there_is_a_line_every_few_rounds() -> None:
    out = StringIO()
    view = View(title="demo", rounds=12, stage="training")
    with Watch(view, Console(file=out, width=60)) as watch:
        for version in range(13):
            view.version = version
            watch.changed()
            watch.changed()
    lines = out.getvalue().splitlines()
    assert len(lines) == 3
    assert "version 5 of 12" in lines[1] and "version 10 of 12" in lines[2]


def test_an_accuracy_of_an_older_version_is_said_to_be_that() -> None:
    out = StringIO()
    view = View(title="demo", rounds=12, stage="training", version=5, accuracy=[(3, 0.5)])
    with Watch(view, Console(file=out, width=200)) as watch:
        watch.changed()
        view.version = 10
        view.accuracy.append((10, 0.75))
        watch.changed()
    older, newest = out.getvalue().splitlines()
    assert "version 5 of 12, accuracy of version 3 50.0%" in older
    assert "version 10 of 12, accuracy 75.0%" in newest


# Data.


def test_small_pictures_are_enlarged_and_the_split_is_the_same_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    part = data.Examples(
        {
            "image": rng.integers(0, 255, (300, 8, 8, 1)).astype(np.uint8),
            "label": rng.integers(0, 10, 300).astype(np.int32),
        }
    )
    made = data.Dataset(name="digits", train=part, test=part, classes=tuple("0123456789"), about="Made up.")
    monkeypatch.setattr(data, "load_first", lambda names, say: made)
    settings, said = DemoSettings.of(rounds=None, quick=True), list[str]()
    first, second = (demo_data.load(settings, say=said.append) for _ in range(2))
    assert first.dataset.train.spec()["image"] == ((28, 28, 1), "uint8")
    assert len(first.population) == 20 and min(first.population.sizes().values()) >= 5
    assert first.population.sizes() == second.population.sizes()
    assert "uses digits instead" in said[0]


# Processes.


def test_a_child_that_dies_is_told_with_its_last_lines(tmp_path: Path) -> None:
    with Processes(tmp_path) as processes:
        processes.start("server", "shoal.cli.demo_server")
        processes.order("server", folder="nowhere")
        with pytest.raises(ChildDied, match=r"(?s)'server' ended with code 1.*does not exist"):
            while True:
                processes.news(timeout_s=20.0)


def test_a_child_ends_when_it_is_told_nothing(tmp_path: Path) -> None:
    with Processes(tmp_path) as processes:
        processes.start("device", "shoal.cli.demo_device")
        (pid,) = processes.pids().values()
        assert psutil.pid_exists(pid)
    assert not psutil.pid_exists(pid)


def test_there_must_be_a_demo_to_go_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="no demo to go on with"):
        demo.run(rounds=None, folder=None, resume=True, quick=True, json=False)
    with pytest.raises(DataError, match="which is no folder"):
        demo.run(rounds=None, folder=tmp_path / "x", resume=True, quick=True, json=False)


# The whole.


@pytest.fixture
def started(tmp_path: Path) -> Iterator[list["Started"]]:
    """Demos to be ended, whatever the test does."""
    begun: list[Started] = []
    yield begun
    for one in begun:
        one.kill_all()


class Started:
    """A quick demo in a process of its own."""

    def __init__(self, folder: Path, *words: str, rounds: int = 4) -> None:
        self.folder = folder
        self.process = subprocess.Popen(
            [sys.executable, "-m", "shoal.cli.demo", str(rounds), str(folder), *words],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env={**os.environ, "COLUMNS": "100"},
        )  # fmt: skip

    def family(self) -> list[psutil.Process]:
        """The processes under it, runners' children included."""
        return psutil.Process(self.process.pid).children(recursive=True)

    def until_started(self) -> list[psutil.Process]:
        """Waits until a server and two processes of devices are there; all that is under it then."""
        deadline = time.monotonic() + ROUNDS_S
        while time.monotonic() < deadline:
            assert self.process.poll() is None, self.process.communicate()[0]
            family = self.family()
            with suppress(psutil.NoSuchProcess):  # one has just ended
                names = [" ".join(one.cmdline()) for one in family]
                if [sum(part in name for name in names) for part in ("demo_server", "demo_device")] == [1, 2]:
                    return family
            time.sleep(0.05)
        raise AssertionError(f"no server and two processes of devices in {ROUNDS_S} s")

    def until_version(self, version: int) -> None:
        """Waits until the record has that version."""
        deadline = time.monotonic() + ROUNDS_S
        while time.monotonic() < deadline:
            assert self.process.poll() is None, self.process.communicate()[0]
            if (self.folder / "record.sqlite").exists() and (_last_version(self.folder) or 0) >= version:
                return
            time.sleep(0.1)
        raise AssertionError(f"no version {version} in {ROUNDS_S} s")

    def kill_all(self) -> None:
        if self.process.poll() is None:
            family = self.family()
            self.process.kill()
            for one in family:
                if one.is_running():
                    one.kill()
        self.process.communicate()


def _last_version(folder: Path) -> int | None:
    try:
        found = find_runs(folder)
    except Exception:  # the record is being made
        return None
    return found[-1].last_version if found else None


def _gone(processes: list[psutil.Process], *, within_s: float) -> bool:
    _, alive = psutil.wait_procs(processes, timeout=within_s)
    return not [one for one in alive if one.is_running() and one.status() != psutil.STATUS_ZOMBIE]


def _need_data() -> None:
    try:
        data.load_first(demo_data.NAMES, progress=False)
    except DataError as error:
        pytest.skip(f"no data set can be had: {error}")


@pytest.mark.slow
@pytest.mark.integration
@pytest.mark.timeout(180)
def test_a_quick_demo_trains_and_reports(started: list[Started], tmp_path: Path) -> None:
    _need_data()
    demonstration = Started(tmp_path / "run", "json")
    started.append(demonstration)
    family = demonstration.until_started()
    demonstration.until_version(1)
    out = demonstration.process.communicate(timeout=120)[0]
    assert demonstration.process.returncode == 0, out
    found = json.loads(out.splitlines()[-1])
    assert found["rounds"] == 4 and found["accuracy"] > 0.3
    assert found["alone_accuracy"] < found["central_accuracy"] <= 1.0
    assert {path.name for path in (tmp_path / "run").iterdir()} >= {"CARD.md", "curves.png", "pictures.png"}
    assert not (tmp_path / "run" / demo.DATA).exists(), "the devices' files are removed"
    assert _gone(family, within_s=2.0)
    for part in ("Where the time went", "compute", "wire", "shoal.load(", "✓"):
        assert part in out
    store = open_store(tmp_path / "run", read_only=True)
    try:
        metrics = store.metrics(store.runs()[0].id)
        times = [row.time_s for row in metrics]
        measured = [(row.version, row.name) for row in metrics]
    finally:
        store.close()
    assert len(set(measured)) == len(measured), "nothing is measured twice"
    last = {name for version, name in measured if version == 4}
    assert {"watched/accuracy", "test/accuracy", "central/accuracy"} <= last and "accuracy" not in last
    assert times and 0.0 < min(times) <= max(times) < 60.0, "seconds since the run was created"
    assert "No differential privacy was used." in (tmp_path / "run" / "CARD.md").read_text()


@pytest.mark.slow
@pytest.mark.integration
@pytest.mark.timeout(180)
def test_after_a_kill_nothing_is_left_and_it_goes_on(started: list[Started], tmp_path: Path) -> None:
    _need_data()
    first = Started(tmp_path, rounds=40)
    started.append(first)
    first.until_version(2)
    family = first.family()
    assert len(family) >= 5, "a server, two device processes, their runners"
    first.process.send_signal(signal.SIGKILL)
    assert _gone(family, within_s=5.0)
    reached = _last_version(tmp_path)
    assert reached is not None and reached >= 2

    second = Started(tmp_path, "resume", "json", rounds=reached + 2)
    started.append(second)
    out = second.process.communicate(timeout=120)[0]
    assert second.process.returncode == 0, out
    assert json.loads(out.splitlines()[-1])["rounds"] == reached + 2
    store = open_store(tmp_path, read_only=True)
    try:
        (row,) = store.runs()
        assert [commit.version for commit in store.commits(row.id)] == list(range(reached + 3))
        assert len([event for event in store.events(row.id) if event.kind == "session"]) == 2
    finally:
        store.close()
    seconds = list(read_facts(tmp_path).seconds.values())
    assert seconds == sorted(seconds) and len(seconds) == reached + 2


@pytest.mark.slow
@pytest.mark.integration
@pytest.mark.timeout(120)
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_told_to_end_it_ends_soon_and_says_how_to_go_on(
    started: list[Started], tmp_path: Path, number: int, code: int
) -> None:
    _need_data()
    demonstration = Started(tmp_path, rounds=40)
    started.append(demonstration)
    demonstration.until_version(1)
    family, told_s = demonstration.family(), time.monotonic()
    demonstration.process.send_signal(number)
    out = demonstration.process.communicate(timeout=30)[0]
    assert time.monotonic() - told_s < 4.0
    assert demonstration.process.returncode == code, out
    assert f"shoal demo --run {tmp_path} --resume" in out
    assert "Traceback" not in out
    assert _gone(family, within_s=1.0)
    assert find_runs(tmp_path)[-1].run.status == "stopped"
    assert not (tmp_path / demo.DATA).exists()


@pytest.mark.slow
@pytest.mark.integration
@pytest.mark.timeout(120)
def test_a_server_that_is_killed_ends_the_demo_at_once(started: list[Started], tmp_path: Path) -> None:
    _need_data()
    demonstration = Started(tmp_path, rounds=40)
    started.append(demonstration)
    demonstration.until_version(1)
    family = demonstration.family()
    (server,) = [one for one in family if "demo_server" in " ".join(one.cmdline())]
    server.kill()
    out = demonstration.process.communicate(timeout=30)[0]
    assert demonstration.process.returncode == 1
    assert "The process 'server' was ended by signal 9" in out and "--resume" in out
    assert _gone(family, within_s=3.0)
