"""The least of HTTP/2 and gRPC that a scripted device needs: so that thousands of them cost less than the server they load.

Sends prepared bytes on any number of streams of one connection, hands out whole messages. Not a client for anything
else: headers are not decoded, windows are opened wide once and never again, errors are ends.
"""

import asyncio
import struct
from typing import Final, Protocol

PREFACE: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, RESET, SETTINGS, PING, GO_AWAY, WINDOW = 0, 1, 3, 4, 6, 7, 8
END, ACK, END_HEADERS = 1, 1, 4
CANCEL: Final = struct.pack(">I", 8)
STREAM_WINDOW: Final = 1 << 20
CONNECTION_WINDOW: Final = 1 << 30


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    return struct.pack(">I", len(payload))[1:] + bytes((kind, flags)) + struct.pack(">I", stream) + payload


def call_headers(authority: str, path: str) -> bytes:
    """The header block of a gRPC call: nothing in it is indexed or compressed, so it is good for every stream."""
    fields = {":path": path, ":authority": authority, "te": "trailers", "content-type": "application/grpc"}
    literals = (b"\0" + bytes((len(n),)) + n.encode() + bytes((len(v),)) + v.encode() for n, v in fields.items())
    return b"\x83\x86" + b"".join(literals)  # :method POST, :scheme http


def message(data: bytes) -> bytes:
    """With the prefix that gRPC wants."""
    return b"\0" + struct.pack(">I", len(data)) + data


class Listener(Protocol):
    """Who is told what comes in."""

    def received(self, connection: "Connection", stream: int, data: bytes) -> None: ...
    def ended(self, connection: "Connection", stream: int) -> None: ...
    def lost(self, connection: "Connection") -> None: ...


class Connection(asyncio.Protocol):
    """One connection."""

    def __init__(self, listener: Listener) -> None:
        self._listener = listener
        self._transport: asyncio.WriteTransport
        self._unread = b""
        self._partial: dict[int, bytes] = {}
        self._next_stream = 1

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.WriteTransport)
        self._transport = transport
        settings = frame(SETTINGS, 0, 0, struct.pack(">HI", 4, STREAM_WINDOW))
        transport.write(PREFACE + settings + frame(WINDOW, 0, 0, struct.pack(">I", CONNECTION_WINDOW)))

    def open(self, headers: bytes, first: bytes) -> int:
        """Begins a call with its first message; returns the stream."""
        stream, self._next_stream = self._next_stream, self._next_stream + 2
        self._partial[stream] = b""
        self._transport.write(frame(HEADERS, END_HEADERS, stream, headers) + frame(DATA, 0, stream, message(first)))
        return stream

    def send(self, stream: int, data: bytes) -> None:
        self._transport.write(frame(DATA, 0, stream, message(data)))

    def cancel(self, stream: int) -> None:
        if self._partial.pop(stream, None) is not None:
            self._transport.write(frame(RESET, 0, stream, CANCEL))

    def close(self) -> None:
        self._partial.clear()
        self._transport.abort()

    def data_received(self, data: bytes) -> None:
        buffer, at = self._unread + data if self._unread else data, 0
        while len(buffer) - at >= 9:
            size = int.from_bytes(buffer[at : at + 3], "big")
            if len(buffer) - at < 9 + size:
                break
            stream = int.from_bytes(buffer[at + 5 : at + 9], "big")
            self._frame(buffer[at + 3], buffer[at + 4], stream, buffer[at + 9 : at + 9 + size])
            at += 9 + size
        self._unread = buffer[at:]

    def _frame(self, kind: int, flags: int, stream: int, payload: bytes) -> None:
        if kind == DATA and stream in self._partial:
            self._data(stream, payload)
        elif kind in (SETTINGS, PING) and not flags & ACK:
            self._transport.write(frame(kind, ACK, 0, payload if kind == PING else b""))
        is_end = kind == RESET or (kind in (DATA, HEADERS) and flags & END)
        if is_end and self._partial.pop(stream, None) is not None:
            self._listener.ended(self, stream)

    def _data(self, stream: int, payload: bytes) -> None:
        data = self._partial[stream] + payload
        while len(data) >= 5 and len(data) >= (size := 5 + int.from_bytes(data[1:5], "big")):
            whole, data = data[5:size], data[size:]
            self._partial[stream] = data
            self._listener.received(self, stream, whole)
            if stream not in self._partial:
                return  # it was cancelled
        self._partial[stream] = data

    def connection_lost(self, exc: Exception | None) -> None:
        self._listener.lost(self)
