"""Enrolment: a certificate is for one key, one population, one time, and secrets are not written over."""

from pathlib import Path

import pytest

from shoal.errors import DataError
from shoal.fleet.enrolment import Enrolled, certify, make_secret, public_key, read_secret


def test_a_device_is_enrolled(tmp_path: Path) -> None:
    authority, device = make_secret(tmp_path / "a"), make_secret(tmp_path / "keys" / "d")
    assert read_secret(tmp_path / "a") == authority and (tmp_path / "a").stat().st_mode & 0o077 == 0
    text = certify(authority, public_key(device), population="watches", until_s=100.0)
    enrolled = Enrolled.of(device, f" {text}\n", population="watches", wall_s=99.0)
    assert enrolled.authority.key.public_bytes_raw() == public_key(authority)
    assert enrolled.identity.public == public_key(device)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"wall_s": 100.0}, "has ended"),
        ({"population": "phones"}, "population 'phones'"),
        ({"secret": b"x" * 32}, "not for this device's key"),
        ({"certificate": "ab"}, "208 hexadecimal digits"),
        ({"certificate": "none"}, "208 hexadecimal digits"),
    ],
)
def test_another_s_certificate_is_refused(changes: dict[str, object], text: str) -> None:
    made = certify(b"a" * 32, public_key(b"d" * 32), population="watches", until_s=100.0)
    given = {"secret": b"d" * 32, "certificate": made, "population": "watches", "wall_s": 99.0, **changes}
    secret, certificate = given.pop("secret"), given.pop("certificate")
    with pytest.raises(DataError, match=text):
        Enrolled.of(secret, certificate, **given)  # type: ignore[arg-type]


def test_a_secret_is_not_written_over(tmp_path: Path) -> None:
    make_secret(tmp_path / "a")
    with pytest.raises(DataError, match="is there already"):
        make_secret(tmp_path / "a")
    (tmp_path / "b").write_text("x")
    with pytest.raises(DataError, match="a file that `shoal enrol` made"):
        read_secret(tmp_path / "b")
