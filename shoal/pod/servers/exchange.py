"""A worker's lines to all servers, and the threads that keep them busy: what was asked for arrives whole, what is pushed leaves by rank.

pull(step, ranks) --> servers --slices by rank--> arrived             push --packed when it is there--> Outgoing, by rank --> servers
"""

import queue
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, final

import numpy as np

from shoal.errors import NetworkError, ProtocolError, TransportError
from shoal.local import Named
from shoal.pod.servers.lines import ACK, PULL, PUSH, SILENCE_S, SLICE, Frame, Line
from shoal.pod.servers.outgoing import Outgoing
from shoal.pod.servers.packing import Packing
from shoal.schedule.graph import Graph
from shoal.schedule.sending import CREDIT_BYTES, SLICE_BYTES


def share(graph: Graph, num_servers: int) -> list[int]:
    """The server of each transfer: the largest first, to the one that has least."""
    loads, made = [0] * num_servers, [0] * len(graph.transfers)
    for number in sorted(range(len(made)), key=lambda n: (-graph.transfers[n].size_bytes, n)):
        server = min(range(num_servers), key=lambda s: (loads[s], s))
        made[number] = server
        loads[server] += graph.transfers[number].size_bytes
    return made


@dataclass
class _Server:
    """One server, as a worker sees it."""

    down: Line
    up: Line
    transfers: list[int]
    gradients: Outgoing


@final
class Exchange:
    """A worker's lines to all servers."""

    def __init__(
        self, addresses: Sequence[tuple[str, int]], secret: bytes, *, worker: int, packings: Sequence[Packing], owners: Sequence[int],
        slice_bytes: int = SLICE_BYTES, credit_bytes: int = CREDIT_BYTES, silence_s: float = SILENCE_S,
    ) -> None:  # fmt: skip
        """
        Args:
            addresses: host and port of each server.
            secret: the pod's.
            worker: its number.
            packings: of all transfers.
            owners: server of each transfer.
            slice_bytes, credit_bytes: of gradients; see `schedule/sending.py`.
            silence_s: after which a server that neither sends nor takes anything is given up.

        Raises:
            TransportError: a server is not there, or knows another secret.
        """
        self.packings, self._owners = packings, owners
        self._changed = threading.Condition()
        self._is_closed = False
        self._fault: BaseException | None = None
        self.arrived: queue.SimpleQueue[tuple[int, np.ndarray] | None] = queue.SimpleQueue()
        """Transfers that are whole; None: something broke."""
        self._servers: list[_Server] = []
        self._to_push: queue.SimpleQueue[tuple[int, int, int, Named] | None] = queue.SimpleQueue()
        self._on_the_way: set[int] = set()
        """Transfers with a gradient that is not acknowledged: their next waits for it."""
        self._unsent = 0
        """Gradients that were pushed and are not acknowledged."""
        try:
            for number, (host, port) in enumerate(addresses):
                down, up = (Line.dialled(host, port, secret, role=role, worker=worker, silence_s=silence_s) for role in ("down", "up"))  # fmt: skip
                mine = [transfer for transfer, owner in enumerate(owners) if owner == number]
                gradients = Outgoing(up, PUSH, self._changed, slice_bytes=slice_bytes, credit_bytes=credit_bytes)
                self._servers.append(_Server(down, up, mine, gradients))
        except BaseException:
            self.close()
            raise
        self._step = 0
        self._first_slice: tuple[int, float] | None = None
        """Bytes, and when they were there."""
        self._last_slice_s = 0.0
        self._threads = [threading.Thread(target=self._pack, daemon=True)]
        for server in self._servers:
            for target in (self._take, self._send, self._hear):
                self._threads.append(threading.Thread(target=self._guarded, args=(target, server), daemon=True))
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        """Ends all lines."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        self._to_push.put(None)
        for server in self._servers:
            server.down.close()
            server.up.close()

    def pull(self, step: int, ranks: np.ndarray, *, updates: int | None = None) -> None:
        """Asks for all transfers, to come by rank, with so many updates in them; None: of all steps before."""
        self._step, self._first_slice = step, None
        for server in self._servers:
            data = np.asarray(ranks[server.transfers], "<i4").tobytes()
            server.down.send(Frame(PULL, step=step, offset=step if updates is None else updates), data)

    def last_pull(self) -> tuple[int, float]:
        """Bytes after the first slice of what was asked for last, and seconds from then to its end."""
        assert self._first_slice is not None, "nothing has come"
        size, at = self._first_slice
        return sum(packing.size_bytes for packing in self.packings) - size, self._last_slice_s - at

    def push(self, transfer: int, step: int, gradients: Named, rank: int) -> None:
        """Sends a transfer's gradients when they are there."""
        with self._changed:
            self._unsent += 1
        self._to_push.put((transfer, step, rank, gradients))

    def next_arrived(self) -> tuple[int, np.ndarray]:
        """The next transfer that is whole. Raises what broke, if something did."""
        found = self.arrived.get()
        if found is None:
            self._raise()
        assert found is not None
        return found

    def arrived_now(self) -> tuple[int, np.ndarray] | None:
        """A transfer that is whole, if there is one. Raises what broke, if something did."""
        try:
            found = self.arrived.get_nowait()
        except queue.Empty:
            return None
        if found is None:
            self._raise()
        return found

    def flushed(self) -> None:
        """Waits until all gradients have been taken. Raises what broke, if something did."""
        with self._changed:
            self._changed.wait_for(lambda: self._is_broken or not self._unsent)
        if self._is_broken:
            self._raise()

    @property
    def _is_broken(self) -> bool:
        return self._is_closed or self._fault is not None

    def _raise(self) -> None:
        if self._fault is not None:
            raise self._fault
        raise NetworkError("The exchange is closed.")

    def _guarded(self, target: Any, server: _Server) -> None:
        try:
            target(server)
        except (TransportError, ValueError) as error:
            with self._changed:
                self._fault = self._fault or error
                self._changed.notify_all()
            self.arrived.put(None)

    def _take(self, server: _Server) -> None:
        """Parameters of one server."""
        places: dict[int, np.ndarray] = {}
        got: dict[int, int] = {}
        while True:
            frame = server.down.receive()
            number = frame.transfer
            if frame.kind != SLICE or number not in server.transfers or frame.step != self._step:
                raise ProtocolError(f"Expected a slice of step {self._step}, got kind {frame.kind} of transfer {number} of step {frame.step}.")  # fmt: skip
            if not frame.offset:
                places[number], got[number] = self.packings[number].empty(), 0
            place = places.get(number)
            if place is None or frame.offset != got[number] or frame.offset + frame.size > len(place) or not frame.size:
                raise ProtocolError(f"Expected the next slice of transfer {number}, got {frame.size} bytes at {frame.offset}.")  # fmt: skip
            server.down.read_into(place.data[frame.offset : frame.offset + frame.size])
            got[number] += frame.size
            self._last_slice_s = time.perf_counter()
            self._first_slice = self._first_slice or (frame.size, self._last_slice_s)
            server.down.send(Frame(ACK, number, frame.step, frame.size))
            if got[number] == len(place):
                self.arrived.put((number, places.pop(number)))

    def _pack(self) -> None:
        """Gradients, in the order in which they are made, wait here to be there; then they go into their server's queue."""
        while (found := self._to_push.get()) is not None:
            transfer, step, rank, gradients = found
            try:
                data = self.packings[transfer].packed(gradients)
            except Exception as error:  # XLA's, of the computation
                with self._changed:
                    self._fault = self._fault or error
                    self._changed.notify_all()
                self.arrived.put(None)
                return
            server = self._servers[self._owners[transfer]]
            with self._changed:
                while transfer in self._on_the_way and not self._is_broken:
                    self._changed.wait()
                if self._is_broken:
                    return
                self._on_the_way.add(transfer)
                server.gradients.put(
                    transfer, step, data, step * len(self.packings) + rank
                )  # what is left of a step goes before the next

    def _send(self, server: _Server) -> None:
        server.gradients.send(lambda: not self._is_broken)

    def _hear(self, server: _Server) -> None:
        """Acknowledgements."""
        acknowledged = dict.fromkeys(server.transfers, 0)
        while True:
            frame = server.up.receive()
            if frame.kind != ACK or frame.transfer not in acknowledged:
                raise ProtocolError(f"Expected an acknowledgement, got a frame of kind {frame.kind}.")
            with self._changed:
                server.gradients.acknowledged(frame.offset)
                acknowledged[frame.transfer] += frame.offset
                if acknowledged[frame.transfer] == self.packings[frame.transfer].size_bytes:
                    acknowledged[frame.transfer] = 0
                    self._unsent -= 1
                    self._on_the_way.discard(frame.transfer)
                self._changed.notify_all()


def rate(exchange: Exchange, step: int, ranks: np.ndarray) -> tuple[int, float]:
    """Bytes and seconds of all parameters coming down while nothing else is done, from the first slice on; nothing may have been asked for."""
    exchange.pull(step, ranks)
    whole(exchange)
    return exchange.last_pull()


def whole(exchange: Exchange) -> dict[str, np.ndarray]:
    """All parameters that were asked for."""
    made: dict[str, np.ndarray] = {}
    for _ in exchange.packings:
        transfer, data = exchange.next_arrived()
        made |= exchange.packings[transfer].unpacked(data)
    return made
