"""What supervisors of a pod say to one another: lines of JSON over TCP, between two that know the same secret.

Each side proves that it knows the secret by an HMAC over both sides' nonces, which shows nothing of it. From the proofs' keys follows one for
each direction, and every line carries a MAC over its number and text: a line can be neither made, changed, left out nor repeated by one that does not
know the secret. It can be read: nothing of it is secret.

Guarantees:
    * Whoever does not know the secret is heard for `HANDSHAKE_S` at most, and costs at most `LINE_BYTES` of memory.
    * A peer that says nothing for `silence_s` is given up.

What this does not protect: the workers' own traffic. XLA's coordination service and gloo know no secret; keep the pod's network to itself.
"""

import asyncio
import hashlib
import hmac
import json
import os
import secrets
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, Final, Self, final

from shoal.errors import DeadlineExceeded, NetworkError, ProtocolError

SECRET_VARIABLE: Final = "SHOAL_POD_SECRET"
SHORTEST_SECRET: Final = 16
LINE_BYTES: Final = 1 << 14
HANDSHAKE_S: Final = 10.0
ALIVE_S: Final = 1.0
"""A side that has nothing to say says so as often."""
_HELLO: Final = "shoal-pod 1"
_NONCE_BYTES: Final = 16


def read_secret(path: Path | None = None) -> bytes:
    """The pod's secret: of a file, or of the environment's `SHOAL_POD_SECRET`.

    Raises:
        ValueError: there is none, or it is too short.
    """
    where = str(path) if path else f"the variable {SECRET_VARIABLE}"
    text = path.read_bytes() if path else os.environ.get(SECRET_VARIABLE, "").encode()
    secret = text.strip()
    if len(secret) < SHORTEST_SECRET:
        raise ValueError(
            f"Expected a secret of at least {SHORTEST_SECRET} characters in {where}, got {len(secret)}. Make one with: "
            'python -c "import secrets; print(secrets.token_urlsafe())"; every host of the pod needs the same.'
        )
    return secret


@final
class Link:
    """One side of a connection; made by `accepted` or `dialled`."""

    def __init__(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, keys: tuple[bytes, bytes], silence_s: float
    ) -> None:
        self._reader, self._writer, self._silence_s = reader, writer, silence_s
        self._send_key, self._receive_key = keys
        self._num_sent = self._num_received = 0

    @classmethod
    async def accepted(
        cls, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, secret: bytes, *, silence_s: float
    ) -> Self:
        """The side that was dialled.

        Raises:
            ProtocolError: the other does not know the secret.
            NetworkError: the connection broke, or it said nothing.
        """
        nonce = secrets.token_hex(_NONCE_BYTES)
        async with _handshake():
            await _write(writer, {"hello": _HELLO, "nonce": nonce})
            other = _mapping(await _line(reader))
            nonces = f"{nonce} {_text(other, 'nonce')}"
            _check(_proof(secret, "dialled", nonces), _text(other, "proof"))
            await _write(writer, {"proof": _proof(secret, "accepted", nonces)})
        return cls(reader, writer, (_key(secret, "to dialled", nonces), _key(secret, "to accepted", nonces)), silence_s)

    @classmethod
    async def dialled(cls, host: str, port: int, secret: bytes, *, silence_s: float) -> Self:
        """The side that dials.

        Raises:
            ProtocolError: the other does not know the secret, or is no pod.
            NetworkError: nobody answers there, or the connection broke.
        """
        writer: asyncio.StreamWriter | None = None
        try:
            async with _handshake():
                reader, writer = await asyncio.open_connection(host, port, limit=LINE_BYTES)
                other = _mapping(await _line(reader))
                if other.get("hello") != _HELLO:
                    raise ProtocolError(f"{host}:{port} is no supervisor of a pod that speaks {_HELLO!r}.")
                own = secrets.token_hex(_NONCE_BYTES)
                nonces = f"{_text(other, 'nonce')} {own}"
                await _write(writer, {"nonce": own, "proof": _proof(secret, "dialled", nonces)})
                answer = await reader.readline()
                if not answer:
                    raise ProtocolError(f"{host}:{port} has another secret than this host, or has too many strangers.")
                _check(_proof(secret, "accepted", nonces), _text(_mapping(answer), "proof"))
        except BaseException:
            if writer is not None:
                writer.close()
            raise
        keys = _key(secret, "to accepted", nonces), _key(secret, "to dialled", nonces)
        return cls(reader, writer, keys, silence_s)

    @property
    def peer(self) -> str:
        """Its address."""
        name = self._writer.get_extra_info("peername")
        return str(name[0]) if name else ""

    @property
    def own_address(self) -> str:
        """Of this side."""
        return str(self._writer.get_extra_info("sockname")[0])

    def send(self, said: Mapping[str, Any]) -> None:
        """Says something, of less than `LINE_BYTES`; it is lost if the link breaks."""
        text = json.dumps(said).encode()
        mac = _mac(self._send_key, self._num_sent, text)
        self._num_sent += 1
        self._writer.write(mac + b" " + text + b"\n")

    async def receive(self) -> dict[str, Any]:
        """What the other says next. Raises ProtocolError where that is nonsense, NetworkError where it says no more."""
        while True:
            try:
                async with asyncio.timeout(self._silence_s):
                    line = await _line(self._reader)
            except TimeoutError as error:
                raise DeadlineExceeded(f"{self.peer} said nothing for {self._silence_s:g} s.") from error
            mac, _, text = line.rstrip(b"\n").partition(b" ")
            if not hmac.compare_digest(mac, _mac(self._receive_key, self._num_received, text)):
                raise ProtocolError(f"A line from {self.peer} is not of the peer that knows the secret.")
            self._num_received += 1
            if (said := _mapping(text)) != {}:
                return said

    async def keep_alive(self) -> None:
        """Says again and again that this side is there, until cancelled or the link breaks. A peer that does not read is given up, too."""
        while True:
            self.send({})
            try:
                async with asyncio.timeout(self._silence_s):
                    await self._writer.drain()
            except (TimeoutError, OSError) as error:
                self._writer.transport.abort()
                raise NetworkError(f"{self.peer} does not read what it is told.") from error
            await asyncio.sleep(ALIVE_S)

    async def close(self) -> None:
        """What was said is still sent, where that takes no longer than a moment."""
        with suppress(OSError, TimeoutError):
            async with asyncio.timeout(ALIVE_S):
                await self._writer.drain()
        self._writer.close()


@asynccontextmanager
async def _handshake() -> AsyncIterator[None]:
    """A limit to its time, and errors of the connection as shoal's."""
    try:
        async with asyncio.timeout(HANDSHAKE_S):
            yield
    except TimeoutError as error:
        raise DeadlineExceeded(f"The other side took longer than {HANDSHAKE_S:g} s to say who it is.") from error
    except OSError as error:
        raise NetworkError(f"The connection broke: {error}") from error


async def _line(reader: asyncio.StreamReader) -> bytes:
    try:
        line = await reader.readline()
    except ValueError as error:  # longer than the reader's limit
        raise ProtocolError(f"Expected lines of at most {LINE_BYTES} bytes, got a longer one.") from error
    except OSError as error:
        raise NetworkError(f"The connection broke: {error}") from error
    if not line.endswith(b"\n"):
        raise NetworkError("The other side is gone.")
    return line


async def _write(writer: asyncio.StreamWriter, said: Mapping[str, Any]) -> None:
    writer.write(json.dumps(said).encode() + b"\n")
    await writer.drain()


def _mapping(line: bytes) -> dict[str, Any]:
    try:
        said = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ProtocolError(f"Expected a line of JSON, got {line[:80]!r}.") from error
    if not isinstance(said, dict):
        raise ProtocolError(f"Expected a JSON object, got {line[:80]!r}.")
    return said


def _text(said: Mapping[str, Any], name: str) -> str:
    value = said.get(name)
    if not isinstance(value, str) or not value.isascii():
        raise ProtocolError(f"Expected {name} to be text, got {str(value)[:80]!r}.")
    return value


def _check(proof: str, shown: str) -> None:
    if not hmac.compare_digest(proof, shown):
        raise ProtocolError("The other side does not know the pod's secret.")


def _proof(secret: bytes, role: str, nonces: str) -> str:
    return _key(secret, f"proof of {role}", nonces).hex()


def _key(secret: bytes, what: str, nonces: str) -> bytes:
    return hmac.digest(secret, f"{_HELLO} {what} {nonces}".encode(), hashlib.sha256)


def _mac(key: bytes, number: int, text: bytes) -> bytes:
    return hmac.digest(key, number.to_bytes(8, "big") + text, hashlib.sha256).hex().encode()
