"""`shoal telemetry`, and telemetry as a user switches it on."""

import asyncio
import os
import re
import sqlite3
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from shoal.cli import host_process
from shoal.fleet.device_file import FILE_NAME
from shoal.fleet.telemetry_device import report_of
from shoal.fleet.telemetry_diary import Tell
from shoal.fleet.telemetry_link import GrpcTelemetryLink
from shoal.privacy.masks import public_key
from shoal.privacy.telemetry import DAY_S, ENTRIES, SCHEMA, UNITS, Day
from shoal.record.lock import only_writer
from shoal.record.sqlite import open_store
from shoal.record.store import TelemetryRow
from tests.record.builders import run_row

from .conftest import Process, Shoal

KEY = public_key(bytes(range(32))).hex()


@pytest.fixture
def told(tmp_path: Path) -> Path:
    """A run folder with telemetry of three days, the last in two batches."""
    store = open_store(tmp_path / "run")
    store.create_run(run_row())
    sums = np.where([entry.name == "hour/02" for entry in ENTRIES], 500, 40)
    for day, reports in ((20_000, 600), (20_001, 700), (20_002, 300), (20_002, 400)):
        row = TelemetryRow(
            day=day, schema=SCHEMA.hex(), reports=reports, noise=27.0, sums=tuple(int(each) for each in sums), time_s=1.0
        )  # fmt: skip
        store.add_telemetry("run", row)
    store.close()
    return tmp_path / "run"


def test_totals_are_told_with_their_errors(told: Path, shoal: Shoal) -> None:
    made = shoal("telemetry", "show", told)
    assert made.code == 0, made
    assert "2000 reports of 3 days, 2024-10-04 to 2024-10-06 (UTC)" in made.out
    line = next(line for line in made.out.splitlines() if line.startswith("hour/02"))
    assert line.split()[1:4] == ["2000", "±", "106"] and line.count("█") == 40  # 1.96 x 27 x sqrt(4)
    assert "epsilon 1.1; all 3: 2; at delta 1e-06" in made.out


@pytest.mark.slow
def test_the_hours_can_be_drawn(told: Path, shoal: Shoal, tmp_path: Path) -> None:
    made = shoal("telemetry", "show", told, "--plot", tmp_path / "hours.png")
    assert made.code == 0 and (tmp_path / "hours.png").stat().st_size > 1000, made


def test_the_last_days_alone_and_as_json(told: Path, shoal: Shoal) -> None:
    made = shoal("telemetry", "show", told, "--days", 1, "--json").json
    assert made["reports"] == 700 and made["days"] == ["2024-10-06"]
    assert made["totals"]["hour/02"] == {"value": 1000, "standard_error": pytest.approx(27.0 * 2**0.5)}
    assert made["totals"]["trained"]["standard_error"] == pytest.approx(
        27.0 * 2**0.5 * UNITS[[e.name for e in ENTRIES].index("trained")]
    )


def test_a_run_without_telemetry_says_how_to_get_some(tmp_path: Path, shoal: Shoal) -> None:
    store = open_store(tmp_path)
    store.create_run(run_row())
    store.close()
    made = shoal("telemetry", "show", tmp_path)
    assert made.code and "--telemetry" in made.err and "up to two days after it" in made.err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["device", "--server", "127.0.0.1:1", "--data", "x", "--telemetry", KEY], "--state"),
        (
            ["device", "--server", "127.0.0.1:1", "--data", "x", "--state", "k", "--telemetry", "00" * 32],
            "shoal telemetry helper",
        ),
        (
            ["device", "--server", "127.0.0.1:1", "--data", "x", "--state", "k", "--telemetry", "on"],
            "shoal telemetry helper",
        ),
        (["host", "x.py", "--rounds", "1", "--telemetry", "here"], "HOST:PORT"),
        (["host", "x.py", "--rounds", "1", "--telemetry", "a:1", "--edges", "2"], "no --edges"),
        (["host", "x.py", "--rounds", "1", "--telemetry", "a:1", "--telemetry-ca", "missing.pem"], "missing.pem"),
        (["telemetry", "helper", "folder", "--address", "0.0.0.0"], "without encryption"),
    ],
)
def test_what_does_not_fit_is_refused_in_words(arguments: list[str], words: str, shoal: Shoal) -> None:
    made = shoal(*arguments)
    assert made.code and words in made.err, made


def test_a_helper_is_served_by_one_process(shoal: Shoal, tmp_path: Path) -> None:
    with only_writer(tmp_path):  # flock is held by a descriptor, not by a process
        made = shoal("telemetry", "helper", tmp_path, "--port", 0)
    assert made.code and "is being written by another process" in made.err


def test_a_host_that_is_taken_up_again_takes_telemetry_again(tmp_path: Path) -> None:
    """With the command that it says itself, which `shoal host` understands."""
    settings = host_process.Settings(
        folder=tmp_path, run_ids=("run",), rounds=None, address="127.0.0.1", port=1, held_out="", ready_file=None, make_tls=False,
        tls_cert=None, tls_key=None, resumed=False, telemetry="helper:8600", telemetry_ca=tmp_path / "ca.pem",
    )  # fmt: skip
    again = settings.again()
    assert again[again.index("--telemetry") + 1] == "helper:8600"
    assert again[again.index("--telemetry-ca") + 1] == str(tmp_path / "ca.pem")


@pytest.mark.slow
@pytest.mark.integration
def test_a_host_with_a_helper_keeps_sums_when_its_run_ends(
    place: Path, start: Callable[..., Process], shoal: Shoal, tmp_path: Path
) -> None:
    """As processes; devices with telemetry on, and reports as devices would send them when their slots come."""

    def listening(process: Process) -> str:
        process.until(lambda: "listening on" in process.text and "devices:" in process.text)
        found = re.search(r"listening on (\S+)", process.text)
        assert found is not None
        return found[1]

    helper = start("telemetry", "helper", tmp_path / "helper", "--port", 0, "--minimum", 3, "--noise", 1)
    at = listening(helper)
    key = re.search(r"--telemetry ([0-9a-f]{64})", helper.text)
    assert key is not None
    run = tmp_path / "run"
    host = start("host", place / "line.py", "--rounds", 2, "--port", 0, "--run", run, "--telemetry", at)
    server = listening(host)

    async def tell() -> None:
        for _ in range(5):
            told = Tell(int(time.time() // DAY_S) - 1, Day(hours=frozenset({3})))
            await GrpcTelemetryLink(server).tell(report_of(told, bytes.fromhex(key[1]), os.urandom))

    asyncio.run(tell())
    devices = start(
        "device", "--server", server, "--data", place / "users", "--in-process", "--state", tmp_path / "kept", "--telemetry", key[1]
    )  # fmt: skip
    assert devices.wait() == 0, devices.text
    assert host.wait() == 0, host.text
    made = shoal("telemetry", "show", run, "--json").json
    assert made["reports"] == 5 and abs(made["totals"]["hour/03"]["value"] - 5) <= 8
    with closing(sqlite3.connect(tmp_path / "kept" / FILE_NAME)) as kept:
        assert kept.execute("SELECT COUNT(*) FROM fact WHERE name LIKE 'telemetry %'").fetchone() == (6,)
