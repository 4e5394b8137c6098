"""Scripted devices for `fleet_load`: a process of its own that holds sessions and plays them with prepared bytes.

Started with a JSON object of `Orders` as its argument. Prints `ready` when the Edge has heard all its sessions. On its
standard input `report` lets those who are assigned report, from then on, and `count` makes it print as JSON how many
messages of each kind came, errors among them; it ends with its standard input.
"""

import asyncio
import json
import resource
import ssl
import sys
from collections import Counter
from dataclasses import asdict, dataclass
from typing import Final

from benchmarks.http2 import Connection, call_headers
from shoal.fleet.wire import fleet_pb2 as pb

PATH: Final = "/shoal.fleet.v1.Fleet/Session"
CONNECTING: Final = 200
"""Connections that are being made at once."""


@dataclass(frozen=True, kw_only=True)
class Orders:
    """What the devices of a process do."""

    port: int
    ca: str
    """PEM; empty: no TLS."""
    name: str
    """Device ids begin with it."""
    sessions: int
    """Held at once."""
    connections: int
    """That carry them."""
    stay: bool
    """Each device stays; else it goes when it is counted, and the next one comes on a stream of its own."""
    update_root: str
    update: str
    """What a report holds beside its token: hex of a serialized `Report`."""


class Devices:
    """All sessions of the process."""

    def __init__(self, orders: Orders) -> None:
        self.orders, self.headers = orders, call_headers(f"127.0.0.1:{orders.port}", PATH)
        self.heard: Counter[str] = Counter()
        self.waiting: list[tuple[Connection, int, bytes]] = []
        self.may_report = False
        self.held = asyncio.Event()
        """The Edge has answered every session."""
        self._update = bytes.fromhex(orders.update)
        self._open = self._come = 0
        self._stopping = False
        runtime = pb.RuntimeInfo(kind="stablehlo", version=[1, 17, 0], calling_convention=9, platforms=["cpu"])
        self._check_in = pb.CheckIn(device_id="x", runtime=runtime, stay=orders.stay)

    async def connect(self) -> None:
        room = asyncio.Semaphore(CONNECTING)
        connections = await asyncio.gather(*(self._connect(room) for _ in range(self.orders.connections)))
        for number in range(self.orders.sessions):
            self._begin(connections[number % len(connections)])
            if number % CONNECTING == 0:
                await asyncio.sleep(0)

    async def _connect(self, room: asyncio.Semaphore) -> Connection:
        context = None
        if self.orders.ca:
            context = ssl.create_default_context(cadata=self.orders.ca)
            context.set_alpn_protocols(["h2"])
        async with room:
            _, made = await asyncio.get_running_loop().create_connection(
                lambda: Connection(self), "127.0.0.1", self.orders.port,
                ssl=context, server_hostname="localhost" if context else None,
            )  # fmt: skip
        return made

    def _begin(self, connection: Connection) -> None:
        self._come += 1
        self._open += 1
        self._check_in.device_id = f"{self.orders.name}-{self._come}"
        stream = connection.open(self.headers, pb.FromDevice(check_in=self._check_in).SerializeToString())
        if self._come <= self.orders.sessions:
            connection.send(stream, PING)

    def received(self, connection: Connection, stream: int, data: bytes) -> None:
        kind = _kind(data)
        self.heard[kind] += 1
        if kind == "ping":
            if self.heard["ping"] == self.orders.sessions:
                self.held.set()
        elif kind == "assigned":
            if self.may_report:
                self._report(connection, stream, data)
            else:
                self.waiting.append((connection, stream, data))
        elif kind == "counted" and not self.orders.stay:
            connection.cancel(stream)
            self._next(connection)
        elif kind == "finished":
            connection.cancel(stream)
            self._stopping = True
            self._next(connection)

    def let_report(self) -> None:
        """From now on who is assigned reports."""
        self.may_report = True
        waiting, self.waiting = self.waiting, []
        for connection, stream, data in waiting:
            self._report(connection, stream, data)

    def _report(self, connection: Connection, stream: int, assigned: bytes) -> None:
        token = _token(assigned)
        body = b"\x0a" + _varint(len(token)) + token + self._update
        connection.send(stream, b"\x12" + _varint(len(body)) + body)

    def _next(self, connection: Connection) -> None:
        self._open -= 1
        if not self._stopping:
            self._begin(connection)

    def ended(self, connection: Connection, stream: int) -> None:
        if not self._stopping:
            self.heard["ended by the server"] += 1
        self._next(connection)

    def lost(self, connection: Connection) -> None:
        if not self._stopping:
            self.heard["connection lost"] += 1


PING: Final = pb.FromDevice(ping=pb.Ping()).SerializeToString()
_KINDS: Final = {field.number: field.name for field in pb.FromEdge.DESCRIPTOR.fields}


def _kind(data: bytes) -> str:
    return _KINDS[data[0] >> 3]


def _token(data: bytes) -> bytes:
    """The serialized token of a serialized `FromEdge(assigned=Assigned(token=…))`."""
    _, at = _number(data, 1)
    assert data[at] == 0x0A, "the token is written first"
    size, at = _number(data, at + 1)
    return data[at : at + size]


def _number(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at


def _varint(value: int) -> bytes:
    made = b""
    while value >= 0x80:
        made, value = made + bytes((value & 0x7F | 0x80,)), value >> 7
    return made + bytes((value,))


async def _play(orders: Orders) -> None:
    devices = Devices(orders)
    await devices.connect()
    await devices.held.wait()
    print("ready", flush=True)
    lines = asyncio.get_running_loop()
    while line := (await lines.run_in_executor(None, sys.stdin.readline)).strip():
        if line == "report":
            devices.let_report()
        elif line == "count":
            print(json.dumps(devices.heard), flush=True)


def main() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    asyncio.run(_play(Orders(**json.loads(sys.argv[1]))))


def argument(orders: Orders) -> str:
    """As this process reads them."""
    return json.dumps(asdict(orders))


if __name__ == "__main__":
    main()
