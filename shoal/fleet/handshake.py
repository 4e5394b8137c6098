"""A look at a host's certificates before gRPC goes there: which it shows, and why it would not have us.

gRPC neither shows the certificates of a host that it does not trust nor says why a host ended a handshake; here Python's own TLS does
one handshake and hangs up. Blocking, for the start of a process. A host that stalls, drips or floods is left after a time and a size.
"""

import hashlib
import socket
import ssl
import time
from base64 import b64encode
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeVar
from urllib.parse import unquote_to_bytes

from cryptography import x509

from shoal.errors import NetworkError, ProtocolError, StoreError
from shoal.fleet.address import split
from shoal.fleet.proxy import Proxy, proxy_for

T = TypeVar("T")

TIMEOUT_S: Final = 20.0
"""For all of it, however little comes at a time."""
MAX_HANDSHAKE_BYTES: Final = 256 << 10
MAX_PROXY_ANSWER_BYTES: Final = 8 << 10
_DER: Final = 2


@dataclass(frozen=True)
class ClientCertificate:
    """PEM files that a device shows: its certificate (and chain), and the certificate's key."""

    certificate: Path
    key: Path

    def read(self) -> tuple[bytes, bytes]:
        """Key and chain. Raises StoreError where one cannot be read."""
        try:
            return self.key.read_bytes(), self.certificate.read_bytes()
        except OSError as error:
            raise StoreError(f"Cannot read the TLS file {error.filename}: {error.strerror}.") from error


def pinned_certificate(address: str, pin: bytes, *, timeout_s: float = TIMEOUT_S) -> bytes:
    """The certificate with that SHA-256 among those that a host shows, as PEM; nothing else of the host is believed.

    Raises:
        NetworkError: it cannot be reached, or does not get done in time.
        ProtocolError: it shows others.
    """
    context = _context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    with _Handshake(address, context, timeout_s=timeout_s) as shaken:
        for der in shaken.chain():
            if hashlib.sha256(der).digest() == pin:
                return _pem(der)
    raise ProtocolError(
        f"The host at {address} shows other certificates than the invitation names: somebody is in between, or it has new ones. "
        "Nothing was sent. Ask who invited you for a new line."
    )


def unreached(address: str, *, timeout_s: float = TIMEOUT_S) -> str:
    """Why nobody answers at host:port, in words; "" where somebody does."""
    try:
        _connected(address, proxy_for(address), time.monotonic() + timeout_s).close()
    except NetworkError as error:
        return str(error)
    return ""


def refusal(
    address: str, *, ca: bytes, client: ClientCertificate | None = None, server_name: str = "", timeout_s: float = TIMEOUT_S
) -> str:  # fmt: skip
    """Why host and device do not get on, in words; "" where they do, or nobody knows (it cannot be reached, or says nothing).

    Args:
        address: host:port.
        ca: PEM of what the host's certificate is to be signed by.
        client: what this device shows.
        server_name: in the host's certificate, where it is not the address's.
        timeout_s: for all of it.

    Raises:
        ValueError: one of the files is not what it should be.
    """
    context = _context()
    try:
        context.load_verify_locations(cadata=ca.decode("ascii"))
    except (ssl.SSLError, UnicodeDecodeError) as error:
        raise ValueError(f"Expected a PEM certificate of the host's authority, got something else: {error}.") from error
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN  # as gRPC has it: what is given is believed, root or not
    shown = "no certificate" if client is None else _load(context, client)
    try:
        with _Handshake(address, context, server_name=server_name, timeout_s=timeout_s) as shaken:
            if shaken.is_heard():
                return ""
    except _NotBelieved as error:
        return f"The certificate of {address} is not to be believed: {error}. Is the authority (--ca) the right one?"
    except NetworkError:
        return ""
    return (
        f"The host at {address} hangs up on this device, which shows {shown}. So does a host with --client-ca for which that is not "
        "enough: give --client-cert and --client-key that its authority made and that have not ended (shoal enrol tls-device)."
    )


class _NotBelieved(NetworkError):
    """The host's certificate cannot be verified."""


class _Handshake:
    """A TLS connection that was just made. Bounded in time and size."""

    def __init__(self, address: str, context: ssl.SSLContext, *, server_name: str = "", timeout_s: float) -> None:
        self._address, self._ends_s = address, time.monotonic() + timeout_s
        self._heard = 0
        self._raw = _connected(address, proxy_for(address), self._ends_s)
        self._in, self._out = ssl.MemoryBIO(), ssl.MemoryBIO()
        name = server_name or split(address)[0]
        self._tls = context.wrap_bio(self._in, self._out, server_hostname=name)
        try:
            self._shake()
        except BaseException:
            self._raw.close()
            raise

    def _shake(self) -> None:
        def step() -> bool:
            self._tls.do_handshake()
            return True

        try:
            done = self._do(step)
        except ssl.SSLCertVerificationError as error:
            raise _NotBelieved(error.verify_message.rstrip(".")) from error
        except ssl.SSLError as error:
            raise NetworkError(f"No TLS handshake with {self._address}: {error.reason or error}.") from error
        if done is None:
            raise NetworkError(f"{self._address} has hung up during the TLS handshake.")

    def __enter__(self) -> "_Handshake":
        return self

    def __exit__(self, *_: object) -> None:
        self._raw.close()

    def chain(self) -> list[bytes]:
        """The certificates that the host has shown, DER, its own first."""
        # `get_unverified_chain` of the public object came with Python 3.13.
        shown = self._tls._sslobj.get_unverified_chain() or ()  # type: ignore[attr-defined]
        return [certificate.public_bytes(_DER) for certificate in shown]

    def is_heard(self) -> bool:
        """Whether the host goes on: HTTP/2 has it speak at once. Raises NetworkError where it is silent."""
        try:
            return bool(self._do(lambda: self._tls.read(1)))
        except ssl.SSLError:  # an alert: in TLS 1.3 what a device shows is judged after its handshake
            return False

    def _do(self, step: Callable[[], T]) -> T | None:
        """A step of TLS, fed until it is done; None where the host has hung up. Raises ssl.SSLError where TLS fails."""
        while True:
            try:
                made = step()
            except ssl.SSLWantReadError:
                self._send()
                self._feed()
            except (ssl.SSLEOFError, ssl.SSLZeroReturnError):
                return None
            else:
                self._send()
                return made

    def _send(self) -> None:
        if self._out.pending:
            _send(self._raw, self._out.read(), self._address, self._ends_s)

    def _feed(self) -> None:
        data = _received(self._raw, self._address, self._ends_s)
        self._heard += len(data)
        if self._heard > MAX_HANDSHAKE_BYTES:
            raise NetworkError(f"{self._address} says more than a TLS handshake may take.")
        if data:
            self._in.write(data)
        else:
            self._in.write_eof()


def _context() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["h2"])
    return context


def _load(context: ssl.SSLContext, client: ClientCertificate) -> str:
    """Has the context show it; what it is, in words."""
    _, chain = client.read()
    try:
        made = x509.load_pem_x509_certificate(chain)
        context.load_cert_chain(client.certificate, client.key)
    except (ssl.SSLError, ValueError) as error:
        raise ValueError(
            f"Expected a PEM certificate in {client.certificate} and its key in {client.key}, got something else: {error}."
        ) from error
    subject, issuer = made.subject.rfc4514_string(), made.issuer.rfc4514_string()
    return f"the certificate {subject} of {issuer}, good until {made.not_valid_after_utc:%Y-%m-%d}"


def _connected(address: str, proxy: Proxy | None, ends_s: float) -> socket.socket:
    goal = split(address) if proxy is None else (proxy.host, proxy.port)
    try:
        raw = socket.create_connection(goal, timeout=_left_s(address, ends_s))
    except OSError as error:
        where = address if proxy is None else f"the proxy {proxy.host}:{proxy.port}"
        raise NetworkError(f"Cannot reach {where}: {(error.strerror or str(error)).lower()}.") from error
    if proxy is not None:
        try:
            _tunnel(raw, address, proxy, ends_s)
        except BaseException:
            raw.close()
            raise
    return raw


def _tunnel(raw: socket.socket, address: str, proxy: Proxy, ends_s: float) -> None:
    """Has a proxy connect us on (RFC 9110, section 9.3.6)."""
    user = b64encode(unquote_to_bytes(proxy.user)).decode()
    credentials = f"Proxy-Authorization: Basic {user}\r\n" if user else ""
    _send(raw, f"CONNECT {address} HTTP/1.1\r\nHost: {address}\r\n{credentials}\r\n".encode(), address, ends_s)
    answer = b""
    while not answer.endswith(b"\r\n\r\n") and len(answer) < MAX_PROXY_ANSWER_BYTES:
        data = _received(raw, address, ends_s, size=1)  # what follows the answer is the host's
        answer += data
        if not data:
            break
    status = answer.partition(b"\r\n")[0].decode("latin-1")
    if not (answer.startswith(b"HTTP/1.") and status.split(" ")[1:2] == ["200"] and answer.endswith(b"\r\n\r\n")):
        raise NetworkError(
            f"The proxy {proxy.host}:{proxy.port} does not connect to {address}: {status[:80]!r}. Hosts to be reached without it "
            "are named in no_proxy."
        )


def _send(raw: socket.socket, data: bytes, address: str, ends_s: float) -> None:
    raw.settimeout(_left_s(address, ends_s))
    try:
        raw.sendall(data)
    except OSError as error:
        raise NetworkError(f"The connection to {address} broke: {(error.strerror or str(error)).lower()}.") from error


def _received(raw: socket.socket, address: str, ends_s: float, *, size: int = 16 << 10) -> bytes:
    """What has come; empty at the end. Raises NetworkError where nothing comes in time."""
    raw.settimeout(_left_s(address, ends_s))
    try:
        return raw.recv(size)
    except TimeoutError:
        raise NetworkError(f"{address} is silent.") from None
    except OSError:  # reset: an end as well
        return b""


def _left_s(address: str, ends_s: float) -> float:
    left_s = ends_s - time.monotonic()
    if left_s <= 0.0:
        raise NetworkError(f"{address} does not get done with its TLS handshake in time.")
    return left_s


def _pem(der: bytes) -> bytes:
    return ssl.DER_cert_to_PEM_cert(der).encode()
