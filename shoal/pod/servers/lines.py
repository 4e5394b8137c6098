"""What workers and servers say to one another: frames over TCP, two connections for each pair, so that what goes up never waits for what comes down.

    down   worker: PULL (step; offset: updates that are to be in it; a rank for each transfer of this server), ACK      server: SLICE
    up     worker: PUSH                                                          server: ACK

Both sides prove that they know the pod's secret before anything else is read. A frame is a header of fixed size and at most `MOST_BYTES` that follow, which
are read straight to where they belong. What a peer says is checked against what it may say; anything else ends the connection.

What this does not protect: frames are neither hidden nor signed, as with gloo; keep the pod's network to itself.
"""

import hmac
import secrets
import socket
import struct
from contextlib import suppress
from dataclasses import dataclass
from hashlib import sha256
from typing import Final, Literal, Self, final

from shoal.errors import DeadlineExceeded, NetworkError, ProtocolError, TransportError

Role = Literal["down", "up"]
PULL, SLICE, PUSH, ACK = range(1, 5)
MOST_BYTES: Final = 1 << 22
SILENCE_S: Final = 60.0
"""After which a peer that is in the middle of something is given up."""
WAKE_BYTES: Final = 128 << 10
"""That whoever reads much waits for."""
_HEADER: Final = struct.Struct("<B3xIQQI")
_HELLO: Final = b"shoal servers 1\n"
_NONCE: Final = 16
_HANDSHAKE_S: Final = 10.0
_ROLES: Final[tuple[Role, ...]] = ("down", "up")


@dataclass(frozen=True, slots=True)
class Frame:
    """A header: what follows it has `size` bytes."""

    kind: int
    transfer: int = 0
    step: int = 0
    offset: int = 0
    size: int = 0


@final
class Line:
    """One connection, with blocking calls; one thread reads, one writes."""

    def __init__(self, connected: socket.socket, *, silence_s: float) -> None:
        """
        Args:
            connected: to the peer, who has proved who it is.
            silence_s: a peer that stops in the middle of a frame, takes nothing, or whose machine does not answer, is given up after so long. That it has
                nothing to say is no fault: it computes.
        """
        connected.settimeout(silence_s)
        connected.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        every_s = max(1, round(silence_s / 4))
        for name, value in (
            ("TCP_KEEPIDLE", every_s),
            ("TCP_KEEPINTVL", every_s),
            ("TCP_USER_TIMEOUT", round(1000 * silence_s)),
        ):
            if hasattr(socket, name):  # not everywhere
                connected.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
        connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket, self._silence_s, self._wakes_at = connected, silence_s, 1
        self._header = bytearray(_HEADER.size)

    def send(self, frame: Frame, data: memoryview | bytes = b"") -> None:
        """Raises NetworkError when the line is broken."""
        header = _HEADER.pack(frame.kind, frame.transfer, frame.step, frame.offset, len(data))
        parts = [memoryview(header), memoryview(data)] if len(data) else [memoryview(header)]
        try:
            while parts:
                sent = self._socket.sendmsg(parts)
                while parts and sent >= len(parts[0]):
                    sent -= len(parts.pop(0))
                if parts and sent:
                    parts[0] = parts[0][sent:]
        except OSError as error:
            raise self._broken(error) from error

    def receive(self) -> Frame:
        """The next header. Raises NetworkError when the line is broken, ProtocolError for what is none."""
        self.read_into(memoryview(self._header), is_patient=True)
        frame = Frame(*_HEADER.unpack(self._header))
        if frame.kind not in (PULL, SLICE, PUSH, ACK) or frame.size > MOST_BYTES:
            raise ProtocolError(f"Expected a frame of a kind 1 to 4 with at most {MOST_BYTES} bytes, got kind {frame.kind} with {frame.size}.")  # fmt: skip
        return frame

    def read_into(self, place: memoryview, *, is_patient: bool = False) -> None:
        """As many bytes as there is place for; `is_patient`: however long the first of them takes."""
        got, wake = 0, 1 if is_patient else WAKE_BYTES
        while got < len(place):
            try:
                self._wake_at(min(wake, len(place) - got))
                num = self._socket.recv_into(place[got:])
            except TimeoutError as error:
                if wake > 1:
                    wake = 1  # something may be there
                    continue
                if not is_patient or got:
                    raise self._broken(error) from error
                continue
            except OSError as error:
                raise self._broken(error) from error
            if not num:
                raise NetworkError("The other side is gone.")
            got += num

    def _wake_at(self, size: int) -> None:
        """Whoever reads is woken when so many bytes are there, not for each packet: that takes time from who computes."""
        if size != self._wakes_at:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, size)
            self._wakes_at = size

    def close(self) -> None:
        """From any thread; whoever reads or writes is told."""
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def _broken(self, error: OSError) -> TransportError:
        if isinstance(error, TimeoutError):
            return DeadlineExceeded(f"The other side did nothing for {self._silence_s:g} s.")
        return NetworkError(f"The connection broke: {error}")

    @classmethod
    def dialled(
        cls, host: str, port: int, secret: bytes, *, role: Role, worker: int, silence_s: float, source: str = ""
    ) -> Self:
        """A worker's side.

        Raises:
            NetworkError: nobody answers there.
            ProtocolError: it does not know the secret.
        """
        try:
            made = socket.create_connection((host, port), _HANDSHAKE_S, (source, 0) if source else None)
        except OSError as error:
            raise NetworkError(f"No server answers at {host}:{port}: {error}") from error
        with _closed_on_error(made):
            challenge = _read(made, len(_HELLO) + _NONCE)
            if not challenge.startswith(_HELLO):
                raise ProtocolError(f"{host}:{port} is no server of a pod.")
            said = secrets.token_bytes(_NONCE) + struct.pack("<BI", _ROLES.index(role), worker)
            made.sendall(said + hmac.digest(secret, b"worker" + challenge + said, sha256))
            proof = _read(made, sha256().digest_size)
            if not hmac.compare_digest(proof, hmac.digest(secret, b"server" + challenge + said, sha256)):
                raise ProtocolError(f"{host}:{port} does not know the pod's secret.")
            return cls(made, silence_s=silence_s)

    @classmethod
    def accepted(cls, made: socket.socket, secret: bytes, *, silence_s: float) -> tuple[Self, Role, int]:
        """A server's side, and who dialled.

        Raises:
            ProtocolError: it does not know the secret.
            NetworkError: it went away.
        """
        made.settimeout(_HANDSHAKE_S)
        with _closed_on_error(made):
            challenge = _HELLO + secrets.token_bytes(_NONCE)
            made.sendall(challenge)
            said = _read(made, _NONCE + 5)
            proof = _read(made, sha256().digest_size)
            if not hmac.compare_digest(proof, hmac.digest(secret, b"worker" + challenge + said, sha256)):
                raise ProtocolError("A peer does not know the pod's secret.")
            number, worker = struct.unpack("<BI", said[_NONCE:])
            if number >= len(_ROLES):
                raise ProtocolError(f"Expected a role below {len(_ROLES)}, got {number}.")
            made.sendall(hmac.digest(secret, b"server" + challenge + said, sha256))
            return cls(made, silence_s=silence_s), _ROLES[number], worker


def _read(made: socket.socket, size: int) -> bytes:
    found = b""
    while len(found) < size:
        more = made.recv(size - len(found))
        if not more:
            raise NetworkError("The other side is gone.")
        found += more
    return found


class _closed_on_error:
    """A socket that is closed, and errors of it as shoal's, if what is inside fails."""

    def __init__(self, made: socket.socket) -> None:
        self._made = made

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is None:
            return
        self._made.close()
        if isinstance(error, TimeoutError):
            raise DeadlineExceeded(f"The other side took longer than {_HANDSHAKE_S:g} s to say who it is.") from error
        if isinstance(error, OSError):
            raise NetworkError(f"The connection broke: {error}") from error
