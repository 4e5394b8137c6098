"""Two ends joined by a link whose rate is shaped in both directions.

With root, `ip` and `tc` the ends are network namespaces and the kernel shapes (`tbf`). Without, both are on the loopback, and what goes between them passes a relay of this
process, which takes some of the processor that the ends compute on: `Link.kind` says which it is.
"""

import asyncio
import os
import shutil
import subprocess
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Final, Protocol, runtime_checkable

BURST_BYTES: Final = 96 << 10
"""More than the 64 KiB that the kernel hands on in one piece: else each is cut into packets, which takes a processor."""
QUEUE_BYTES: Final = 1 << 20
RELAYED_BYTES: Final = 64 << 10
"""That a relay takes at a time."""
_SIDES: Final = (("shoal-a", "shoal-va", "10.99.7.1"), ("shoal-b", "shoal-vb", "10.99.7.2"))


@runtime_checkable
class Link(Protocol):
    """Its ends are 0, where servers listen, and 1."""

    kind: str
    """How it is made."""
    address: str
    """That servers at end 0 are to listen on."""

    def command(self, end: int, words: Sequence[str]) -> list[str]:
        """To be run at one end."""
        ...

    def over(self, port: int) -> tuple[str, int]:
        """Where end 1 finds what listens on a port of end 0."""
        ...

    def shape(self, bytes_per_s: float | None) -> None:
        """The rate in each direction; None: as fast as it goes."""
        ...


@contextmanager
def shaped_link() -> Iterator[Link]:
    """The best that can be had here."""
    if why := _why_relayed():
        with Relay(why) as relay:
            yield relay
        return
    _clear()
    try:
        (a, va, ip_a), (b, vb, ip_b) = _SIDES
        for space in (a, b):
            _run(["ip", "netns", "add", space])
        _run(["ip", "link", "add", va, "type", "veth", "peer", "name", vb])
        for space, device, address in ((a, va, ip_a), (b, vb, ip_b)):
            _run(["ip", "link", "set", device, "netns", space])
            _run(["ip", "-n", space, "addr", "add", f"{address}/24", "dev", device])
            for each in (device, "lo"):
                _run(["ip", "-n", space, "link", "set", each, "up"])
        yield _Namespaces()
    finally:
        _clear()


class _Namespaces:
    kind = "two network namespaces, shaped by tbf"
    address = _SIDES[0][2]

    def command(self, end: int, words: Sequence[str]) -> list[str]:
        return ["ip", "netns", "exec", _SIDES[end][0], *words]

    def over(self, port: int) -> tuple[str, int]:
        return self.address, port

    def shape(self, bytes_per_s: float | None) -> None:
        for space, device, _ in _SIDES:
            inside = ["ip", "netns", "exec", space, "tc", "qdisc"]
            with suppress(subprocess.CalledProcessError):
                _run([*inside, "del", "dev", device, "root"])
            if bytes_per_s is not None:
                rate = f"{8 * bytes_per_s:.0f}bit"
                _run([*inside, "add", "dev", device, "root", "tbf", "rate", rate, "burst", str(BURST_BYTES), "limit", str(QUEUE_BYTES)])  # fmt: skip


class Bucket:
    """Says when bytes may go on, at a rate; all connections of one direction share it."""

    def __init__(self) -> None:
        self.bytes_per_s: float | None = None
        self._free_s = 0.0

    def wait_s(self, size: int, now_s: float) -> float:
        """Seconds until so many more are through."""
        if self.bytes_per_s is None:
            return 0.0
        self._free_s = max(self._free_s, now_s - BURST_BYTES / self.bytes_per_s) + size / self.bytes_per_s
        return max(0.0, self._free_s - now_s)


class Relay:
    address = "127.0.0.1"

    def __init__(self, why: str) -> None:
        self.kind = f"the loopback, shaped by a relay, because {why}"
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._there, self._back = Bucket(), Bucket()
        self._listening: list[asyncio.Server] = []

    def __enter__(self) -> "Relay":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        async def end() -> None:
            for server in self._listening:
                server.close()
            running = asyncio.all_tasks() - {asyncio.current_task()}
            for each in running:
                each.cancel()
            await asyncio.gather(*running, return_exceptions=True)
            await asyncio.sleep(0)  # what they closed is closed in the loop's next turn

        asyncio.run_coroutine_threadsafe(end(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def command(self, end: int, words: Sequence[str]) -> list[str]:
        return list(words)

    def over(self, port: int) -> tuple[str, int]:
        async def listen() -> int:
            async def relayed(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
                there, out = await asyncio.open_connection(self.address, port, limit=RELAYED_BYTES)
                with suppress(asyncio.CancelledError):  # at the end; asyncio would report it
                    await asyncio.gather(_pass_on(reader, out, self._there), _pass_on(there, writer, self._back))
                out.close()
                writer.close()

            made = await asyncio.start_server(relayed, self.address, 0, limit=RELAYED_BYTES)
            self._listening.append(made)
            return int(made.sockets[0].getsockname()[1])

        return self.address, asyncio.run_coroutine_threadsafe(listen(), self._loop).result()

    def shape(self, bytes_per_s: float | None) -> None:
        self._there.bytes_per_s = self._back.bytes_per_s = bytes_per_s


async def _pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, bucket: Bucket) -> None:
    with suppress(OSError):
        while data := await reader.read(RELAYED_BYTES):
            await asyncio.sleep(bucket.wait_s(len(data), asyncio.get_running_loop().time()))
            writer.write(data)
            await writer.drain()
    with suppress(OSError):
        writer.write_eof()


def _why_relayed() -> str:
    missing = [name for name in ("ip", "tc") if shutil.which(name) is None]
    if missing:
        return f"there is no {' and no '.join(missing)} here"
    if os.geteuid() != 0:
        return "it takes root to make network namespaces"
    return ""


def _clear() -> None:
    for space, _, _ in _SIDES:
        with suppress(subprocess.CalledProcessError):
            _run(["ip", "netns", "del", space])


def _run(words: list[str]) -> None:
    subprocess.run(words, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
