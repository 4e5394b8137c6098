"""`shoal invite` and `shoal device --join`: one line between two machines."""

import shlex
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from threading import Thread

import pytest

from shoal.cli.host_checks import check_port, reserve
from shoal.cli.host_door import DoorFile
from shoal.cli.join import read_invitation
from shoal.cli.words import parse_duration
from shoal.fleet.device_secret import credential
from shoal.fleet.grpc_server import Tls
from shoal.fleet.invitation import Invitation
from shoal.fleet.members import Members
from shoal.fleet.tls import make_tls, pin_of
from shoal.fleet.wire import fleet_pb2 as pb

from .conftest import Process, Shoal

KEY = bytes(range(32))
MADE = make_tls(["train.example.org", "192.0.2.7"])
TLS = Tls(MADE[0], MADE[1] + MADE[2])


def door(folder: Path, *, address: str = "0.0.0.0", tls: Tls | None = TLS, populations: tuple[str, ...] = ("default",)) -> Path:  # fmt: skip
    """The folder of a host that listens there."""
    members = Members.of(folder) is not None
    DoorFile.of(address, 8500, key=KEY, tls=tls, populations=populations, members_only=members).write(folder)
    return folder


def invited(shoal: Shoal, *arguments: object) -> Invitation:
    made = shoal("invite", *arguments)
    assert made.code == 0, made
    return Invitation.parse(made.out)


@pytest.mark.parametrize(
    ("public", "address", "server_name"),
    [
        ("train.example.org", "train.example.org:8500", ""),
        ("192.0.2.7:443", "192.0.2.7:443", ""),
        ("other.example.org:443", "other.example.org:443", "train.example.org"),
        ("2001:db8::1", "[2001:db8::1]:8500", "train.example.org"),
        ("[2001:db8::1]:443", "[2001:db8::1]:443", "train.example.org"),
    ],
)
def test_a_line_says_where_the_host_is_and_what_to_believe(
    public: str, address: str, server_name: str, shoal: Shoal, tmp_path: Path
) -> None:
    made = invited(shoal, door(tmp_path), "--address", public)
    assert (made.address, made.server_name) == (address, server_name)
    assert (made.plan_key, made.pin, made.population) == (KEY, pin_of(TLS.chain), "default")
    assert made.token == b"" and made.expires_s == 0


def test_without_an_address_it_is_the_machines_own(shoal: Shoal, tmp_path: Path) -> None:
    host, _, port = invited(shoal, door(tmp_path)).address.rpartition(":")
    assert host not in ("0.0.0.0", "") and port == "8500"
    there = shoal("invite", door(tmp_path, address="127.0.0.1", tls=None))
    assert Invitation.parse(there.out).pin == b"" and "only this machine" in there.err


def test_members_are_invited_with_a_token_of_their_own(shoal: Shoal, tmp_path: Path) -> None:
    Members.begin(tmp_path)
    lines = [invited(shoal, door(tmp_path)) for _ in range(2)]
    assert lines[0].token != lines[1].token and len(lines[0].token) == 16
    assert 6.9 < (lines[0].expires_s - time.time()) / 86_400 <= 7.0
    told = shoal("invite", tmp_path, "--uses", 20, "--expires", "12h", "--json").json
    assert told["uses"] == 20 and 11.9 < (told["expires_s"] - time.time()) / 3_600 <= 12.0


def test_a_member_is_removed(shoal: Shoal, tmp_path: Path) -> None:
    members = Members.begin(tmp_path)
    made = invited(shoal, door(tmp_path))
    shown = pb.CheckIn(device_id="anna", credential=credential(made.token, bytes(32)))
    assert members.refusal(shown, time.time()) == ""
    assert "anna is no member" in shoal("invite", tmp_path, "--remove", "anna").out
    assert "was removed" in members.refusal(shown, time.time())
    nobody = shoal("invite", tmp_path, "--remove", "bert")
    assert nobody.code == 1 and "'bert'" in nobody.err


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("nowhere",), "start it first"),
        (("run", "--uses", 2), "--members-only"),
        (("run", "--population", "watches"), "default | phones"),
        (("run",), "default | phones"),
        (("run", "--population", "phones", "--expires", "soon"), "12h"),
        (("run", "--population", "phones", "--address", "x:0"), "HOST:PORT"),
    ],
)
def test_what_cannot_be_invited_to_is_said(
    arguments: tuple[object, ...], expected: str, shoal: Shoal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    door(tmp_path / "run", populations=("default", "phones"))
    made = shoal("invite", *arguments)
    assert made.code == 1 and made.out == "" and expected in made.err and made.err.count("\n") == 1, made


def line(**changes: object) -> str:
    return Invitation(**{"address": "127.0.0.1:1", "population": "default", "plan_key": KEY, **changes}).text  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("--join", line()[:-5]), "cut short"),
        (("--join", "shoal9:abc"), "another version of shoal"),
        (("--join", line(expires_s=1_000)), "ended on 1970-01-01"),
        (("--join", line(), "--server", "127.0.0.1:1", "--key", "00" * 32), "--server, --key"),
        (("--join", line(), "--population", "x"), "--population"),
        (("--join", line(token=b"t" * 16), "--pseudonyms", "1d"), "members only"),
        (("--join", line(pin=b"p" * 32), "--patience", 0), "Cannot reach 127.0.0.1:1"),
    ],
)
def test_a_line_that_is_of_no_use_is_said(
    arguments: tuple[object, ...], expected: str, shoal: Shoal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    made = shoal("device", "--data", "users", *arguments)
    assert made.code == 1 and made.out == "" and expected in made.err.splitlines()[-1], made


def test_who_came_in_by_a_line_may_come_again_when_it_has_ended(tmp_path: Path) -> None:
    authority = MADE[2]
    ended = line(token=b"t" * 16, pin=pin_of(authority), expires_s=1_000)
    with pytest.raises(ValueError, match="ended on 1970-01-01"):
        read_invitation(ended, {}, state=tmp_path)
    (tmp_path / f"authority-{pin_of(authority).hex()[:16]}.pem").write_bytes(authority)
    assert read_invitation(ended, {}, state=tmp_path).token == b"t" * 16
    with pytest.raises(ValueError, match="ended on 1970-01-01"):
        read_invitation(line(expires_s=1_000), {}, state=tmp_path)


def test_a_line_that_is_kept_is_none_of_who_names_a_host_otherwise_and_a_broken_one_is_said(
    shoal: Shoal, tmp_path: Path
) -> None:
    (tmp_path / "invitation").write_text(line() + "\n")
    device = ("device", "--data", "users", "--state", tmp_path)
    made = shoal(*device, "--key", KEY.hex())
    assert made.code == 1 and "Leave out --key" in made.err and "--state folder keeps" in made.err, made
    (tmp_path / "invitation").write_bytes(b"\xff\xfe")
    made = shoal(*device)
    assert made.code == 1 and "Error:" not in made.err and "shoal1:" in made.err, made


def test_a_device_without_tls_is_told_that_its_host_may_have_it(shoal: Shoal, place: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as host:
        Thread(target=_hang_up_on_all, args=(host,), daemon=True).start()
        made = shoal("device", "--server", f"127.0.0.1:{host.getsockname()[1]}", "--data", place / "users", "--in-process", "--patience", 1)  # fmt: skip
        host.shutdown(socket.SHUT_RDWR)
    assert made.code == 1 and "If it has TLS, give --join LINE, or --ca FILE." in made.err, made
    assert "no TLS" not in made.err, "nobody is on the way"


def _hang_up_on_all(host: socket.socket) -> None:
    """As TLS does to who speaks none."""
    with suppress(OSError):
        while True:
            there, _ = host.accept()
            there.recv(1024)
            there.close()


def test_a_host_elsewhere_is_gone_to_without_tls_only_if_that_is_asked_for(shoal: Shoal, place: Path) -> None:
    asked = ("device", "--server", "192.0.2.254:1", "--data", place / "users", "--in-process", "--first", 99)
    made = shoal(*asked)
    assert made.code == 1 and "whoever is on the way to 192.0.2.254:1" in made.err, made
    assert "users from 99 on" in shoal(*asked, "--insecure").err


def test_tls_authorities_are_one_command_each(shoal: Shoal, tmp_path: Path) -> None:
    assert shoal("enrol", "tls-authority", tmp_path / "tls").out.strip() == str(tmp_path / "tls" / "ca.pem")
    server = shoal("enrol", "tls-server", tmp_path / "tls", "train.example.org", "192.0.2.7", "--into", tmp_path)
    assert shlex.split(server.out) == [
        "--tls-cert", str(tmp_path / "train.example.org.pem"), "--tls-key", str(tmp_path / "train.example.org.key"),
    ]  # fmt: skip
    device = shoal("enrol", "tls-device", tmp_path / "tls", "anna", "--json").json
    assert Path(device["certificate"]).exists() and Path(device["key"]).exists()
    again = shoal("enrol", "tls-authority", tmp_path / "tls")
    assert again.code == 1 and "not written over" in again.err


def test_a_low_port_that_is_not_allowed_is_said_how_to_have(monkeypatch: pytest.MonkeyPatch) -> None:
    def bind(self: socket.socket, address: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(socket.socket, "bind", bind)
    for ask in (check_port, reserve):
        with pytest.raises(ValueError, match=r"0\.0\.0\.0:443: permission denied\..*CAP_NET_BIND_SERVICE"):
            ask("0.0.0.0", 443)


@pytest.mark.parametrize("text", ["", "7", "d", "-1d", "0s", "nan h", "1e999d", "7 days"])
def test_what_is_no_time_is_said(text: str) -> None:
    with pytest.raises(ValueError, match="such as 90s"):
        parse_duration(text)


@pytest.mark.slow
@pytest.mark.integration
def test_a_second_machine_needs_one_line(
    start: Callable[..., Process], shoal: Shoal, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, ready = tmp_path / "run", tmp_path / "ready"
    host = start(
        "host", place / "line.py", "--rounds", 3, "--address", "0.0.0.0", "--port", 0, "--run", run, "--members-only",
        "--ready-file", ready,
    )  # fmt: skip
    host.until(ready.exists)
    assert f"shoal invite {run}" in host.text
    text = invited(shoal, run, "--uses", 6).text
    assert Invitation.parse(text).plan_key.hex() in host.text, "which shoal predict asks for, of native code"
    monkeypatch.chdir(tmp_path)
    stranger = shoal("device", "--join", line(address=Invitation.parse(text).address), "--data", place / "users", "--in-process", "--patience", 2)  # fmt: skip
    assert stranger.code == 1, "neither its certificate nor a token"
    joined = shoal("device", "--join", text, "--data", place / "users", "--in-process", "--json")
    assert joined.code == 0 and joined.json["counted"] == 9, joined
    assert len(list((tmp_path / "shoal-device").glob("authority-*.pem"))) == 1
    assert host.wait(20) == 0, host.text
    assert (tmp_path / "shoal-device" / "invitation").stat().st_mode & 0o777 == 0o600
    again = shoal("device", "--state", "shoal-device", "--data", place / "users", "--in-process", "--patience", 1)
    assert again.code == 1 and Invitation.parse(text).address in again.err, "it has kept the line"


@pytest.mark.parametrize(("server", "lacks"), [("train.example.org:8500", "--insecure"), ("127.0.0.1:8500", "--state")])
def test_a_device_goes_without_tls_to_this_machine_alone(server: str, lacks: str, shoal: Shoal) -> None:
    made = shoal("device", "--server", server, "--data", "x", "--telemetry", "ab" * 32)
    assert made.code == 1 and lacks in made.err


@pytest.mark.slow
@pytest.mark.integration
def test_a_line_pasted_once_too_often_is_refused_and_so_is_who_shows_no_certificate(
    start: Callable[..., Process], shoal: Shoal, place: Path, tmp_path: Path
) -> None:
    run, ready, tls = tmp_path / "run", tmp_path / "ready", tmp_path / "tls"
    assert shoal("enrol", "tls-authority", tls).code == 0
    server = shoal("enrol", "tls-server", tls, "127.0.0.1").out.split()
    client = shoal("enrol", "tls-device", tls, "anna").out.split()
    host = start(
        "host", place / "line.py", "--rounds", 100, "--port", 0, "--run", run, "--members-only", "--ready-file", ready,
        "--client-ca", tls / "ca.pem", *server,
    )  # fmt: skip
    host.until(ready.exists)
    text = invited(shoal, run).text
    device = ("device", "--join", text, "--data", place / "users", "--count", 1, "--in-process", "--patience", 5)
    bare = shoal(*device, "--state", tmp_path / "a")
    assert bare.code == 1 and "hangs up on this device, which shows no certificate" in bare.err, bare
    first = start(*device, *client, "--state", tmp_path / "a")
    members = run / "members" / "members.jsonl"
    first.until(members.exists)
    second = shoal(*device, *client, "--state", tmp_path / "b", "--first", 1)
    assert second.code == 1 and "an invitation with a use left: this one was for 1" in second.err, second
    imposter = shoal(*device, *client, "--state", tmp_path / "c")
    assert imposter.code == 1, "the same name with another secret"
    first.kill()
    again = start(*device, *client, "--state", tmp_path / "a")
    again.until(lambda: "device" in again.text)
    assert len(members.read_text().splitlines()) == 1
