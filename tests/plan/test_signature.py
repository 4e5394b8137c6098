"""A plan's signature, checked here and in a process that ends."""

import subprocess
import sys
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from shoal.errors import DeviceError
from shoal.plan import signature
from shoal.plan.signature import is_good, is_good_apart

KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
PUBLIC = KEY.public_key().public_bytes_raw()
MESSAGE = b"a plan" * 100_000


@pytest.mark.integration
def test_both_ways_say_the_same() -> None:
    signed = KEY.sign(MESSAGE)
    assert is_good(PUBLIC, signed, MESSAGE) and is_good_apart(PUBLIC, signed, MESSAGE)
    other = bytes([signed[0] ^ 1]) + signed[1:]
    for key, signature_, message in (
        (PUBLIC, other, MESSAGE),
        (PUBLIC, signed, MESSAGE[:-1]),
        (bytes(32), signed, MESSAGE),
    ):
        assert not is_good(key, signature_, message) and not is_good_apart(key, signature_, message)


@pytest.mark.parametrize(
    ("key", "signed"), [(b"", bytes(64)), (PUBLIC, b""), (PUBLIC + b"x", bytes(63)), (PUBLIC, bytes(65))]
)
def test_what_has_another_length_is_none(key: bytes, signed: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "run", None)  # none is started
    assert not is_good(key, signed, b"m") and not is_good_apart(key, signed, b"m")


@pytest.mark.integration
def test_a_process_that_fails_is_no_word_on_the_signature(monkeypatch: pytest.MonkeyPatch) -> None:
    signed = KEY.sign(b"m")
    monkeypatch.setenv("PYTHONPATH", "/nowhere")
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    with pytest.raises(DeviceError, match="could not be checked"):
        is_good_apart(PUBLIC, signed, b"m")


@pytest.mark.integration
def test_no_folder_of_that_name_says_what_is_signed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "shoal" / "plan"
    package.mkdir(parents=True)
    for name in ("shoal/__init__.py", "shoal/plan/__init__.py", "shoal/plan/signature.py"):
        (tmp_path / name).write_text("import sys; sys.exit(4)\n")
    monkeypatch.chdir(tmp_path)
    assert not is_good_apart(PUBLIC, bytes(64), b"m")
    assert is_good_apart(PUBLIC, KEY.sign(b"m"), b"m")


@pytest.mark.integration
def test_a_program_that_does_something_else_and_ends_well_has_not_said_yes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    app = tmp_path / "app"
    app.write_text("#!/bin/sh\nexit 0\n")
    app.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(app))
    with pytest.raises(DeviceError, match="ended with 0"):
        is_good_apart(PUBLIC, bytes(64), b"m")


def test_nor_is_one_that_ends_in_an_error_or_takes_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: object, **given: object) -> subprocess.CompletedProcess[bytes]:
        return subprocess.CompletedProcess(
            [], 1, b"", b"Traceback\nModuleNotFoundError: No module named 'cryptography'\n"
        )

    def lingers(*args: object, **given: object) -> subprocess.CompletedProcess[bytes]:
        raise subprocess.TimeoutExpired("python", signature.APART_S)

    for run, words in ((fails, "No module named 'cryptography'"), (lingers, "timed out")):
        monkeypatch.setattr(subprocess, "run", run)
        with pytest.raises(DeviceError, match=words):
            is_good_apart(PUBLIC, bytes(64), b"m")
