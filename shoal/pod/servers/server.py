"""A parameter server: holds some of the transfers, adds up gradients, updates, and sends each worker what it needs in the order that it asked for.

    up line    of each worker: slices of gradients --whole--> Clocks --Update--> updating thread --new version--> down lines
    down line  of each worker: PULL (step, ranks) --Clocks: may it have them--> SendQueue --slice by slice, under credit--> worker

What is decided is in `clocks.py` and `schedule/sending.py`; here are the threads and the bytes. A transfer that is being sent stays as it was when it began, whatever
is updated meanwhile.

Guarantees:
    * Memory: two copies of its transfers, three where workers of synchronous training may ask ahead, and one gradient for each worker and transfer; a peer adds a header at most.
    * Synchronous: the same gradients give the same bits, whatever their order of arrival and that of transfers.
"""

import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final, final

import numpy as np

from shoal.errors import NetworkError, ProtocolError, TransportError
from shoal.local import Named
from shoal.pod.servers.clocks import Clocks, Update
from shoal.pod.servers.lines import ACK, PULL, PUSH, SILENCE_S, SLICE, Frame, Line
from shoal.pod.servers.outgoing import Outgoing
from shoal.pod.servers.packing import Packing
from shoal.pod.servers.updates import Updates
from shoal.schedule.sending import CREDIT_BYTES, SLICE_BYTES

LOOK_S: Final = 0.05
MOST_STRANGERS: Final = 32
"""Connections that have yet to show that they know the secret."""


@dataclass(frozen=True, kw_only=True)
class Serving:
    """How a server serves."""

    num_workers: int
    last_step: int | None = None
    """That all workers take; None: there is none."""
    staleness: int | None = 0
    """Steps a worker may be ahead of the slowest; 0: synchronous; None: any."""
    ahead: bool = False
    """Workers may ask for the parameters of a step that have not the last step's update in them."""
    has_barrier: bool = False
    """Nothing is sent for a step before all updates of the step before are made."""
    slice_bytes: int = SLICE_BYTES
    credit_bytes: int = CREDIT_BYTES
    silence_s: float = SILENCE_S


@final
class Server:
    """Of some transfers. Use as a context, or close it."""

    def __init__(
        self,
        updates: Updates,
        params: Named,
        opt: Mapping[int, Sequence[Any]],
        packings: Mapping[int, Packing],
        how: Serving,
        *,
        secret: bytes,
        address: tuple[str, int] = ("127.0.0.1", 0),
        first_step: int = 0,
        on_update: Callable[[], None] = lambda: None,
    ) -> None:
        """
        Args:
            updates: the optimizer, cut.
            params: name -> tensor, of all that it holds.
            opt: transfer -> its leaves of the optimizer's state.
            packings: of the transfers that it holds.
            how: it serves.
            secret: the pod's.
            address: to listen at.
            first_step: that has yet to be taken.
            on_update: called after each update, in the updating thread.
        """
        self._updates, self._how, self._secret, self._packings = updates, how, secret, dict(packings)
        self._on_update = on_update
        self._params = {number: packings[number].packed(params) for number in packings}
        self._before: dict[int, np.ndarray] = {}
        """What they were before the last update, where workers may ask ahead."""
        self._opt = {number: list(opt[number]) for number in packings}
        self._gradients = {number: [packing.empty() for _ in range(how.num_workers)] for number, packing in packings.items()}  # fmt: skip
        self._clocks = Clocks(
            tuple(packings), how.num_workers, staleness=how.staleness, first_step=first_step, last_step=how.last_step
        )
        self._is_pending = {(number, worker): False for number in packings for worker in range(how.num_workers)}
        self._due: deque[Update] = deque()
        self._changed = threading.Condition()
        self._is_closed = False
        self._reached, self._num_left = first_step, 0
        self.fault: BaseException | None = None
        """What ended the updating thread."""
        self._lines: set[Line] = set()
        self._strangers = threading.BoundedSemaphore(MOST_STRANGERS)
        self._listening = socket.create_server(address, backlog=MOST_STRANGERS)
        self.port: int = self._listening.getsockname()[1]
        self._threads = [threading.Thread(target=target, daemon=True) for target in (self._accept, self._update)]
        for thread in self._threads:
            thread.start()

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends all lines and threads."""
        with self._changed:
            self._is_closed = True
            lines = list(self._lines)
            self._changed.notify_all()
        with suppress(OSError):
            self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()
        for line in lines:
            line.close()
        for thread in self._threads:
            thread.join()

    def reached(self) -> tuple[int, bool]:
        """Steps that are done with every transfer, and whether the last one has just been. For the updating thread."""
        step = self._clocks.reached()
        is_new, self._reached = step > self._reached, step
        return step, is_new

    def held(self) -> tuple[Named, dict[int, list[Any]]]:
        """Parameters, and each transfer's leaves of the optimizer's state. For the updating thread: nothing changes meanwhile."""
        params: Named = {}
        for number, data in self._params.items():
            params |= self._packings[number].unpacked(data)
        return params, self._opt

    def until_left(self) -> None:
        """Waits until all workers have come and gone. Raises what ended the updating thread, if something did."""
        with self._changed:
            self._changed.wait_for(lambda: self.fault is not None or self._num_left == self._how.num_workers)
        if self.fault is not None:
            raise self.fault

    def abort(self, error: BaseException) -> None:
        """Ends it for all, because of an error elsewhere."""
        with self._changed:
            self.fault = self.fault or error
            self._changed.notify_all()

    # Who comes.

    def _accept(self) -> None:
        while not self._is_closed:
            try:
                made, _ = self._listening.accept()
            except OSError:  # closed, or no descriptor is left
                if not self._is_closed:
                    time.sleep(LOOK_S)
                continue
            if not self._strangers.acquire(blocking=False):
                made.close()
                continue
            threading.Thread(target=self._meet, args=(made,), daemon=True).start()

    def _meet(self, made: socket.socket) -> None:
        try:
            line, role, worker = Line.accepted(made, self._secret, silence_s=self._how.silence_s)
        except TransportError:
            return
        finally:
            self._strangers.release()
        with self._changed:
            if self._is_closed or worker >= self._how.num_workers:
                line.close()
                return
            self._lines.add(line)
        try:
            if role == "up":
                self._hear(line, worker)
            else:
                self._serve(line, worker)
        except (TransportError, ValueError):
            pass  # its worker is told by the end of the line, and its supervisor by the end of the worker
        finally:
            with self._changed:
                self._lines.discard(line)
                self._num_left += role == "up"
                self._changed.notify_all()
            line.close()

    # Up.

    def _hear(self, line: Line, worker: int) -> None:
        """Gradients of one worker."""
        got = dict.fromkeys(self._packings, 0)
        while True:
            frame = line.receive()
            if frame.kind != PUSH:
                raise ProtocolError(f"Expected a slice of a gradient, got a frame of kind {frame.kind}.")
            number, size = frame.transfer, frame.size
            if frame.step != self._clocks.next_of(worker, number):
                raise ProtocolError(f"Expected a gradient for step {self._clocks.next_of(worker, number)}, got {frame.step}.")  # fmt: skip
            whole = self._packings[number].size_bytes
            if frame.offset != got[number] or not 0 < size <= whole - frame.offset:
                raise ProtocolError(f"Expected a slice at {got[number]} of {whole} bytes, got {size} at {frame.offset}.")  # fmt: skip
            if not frame.offset:
                self._until_applied(worker, number)
            line.read_into(self._gradients[number][worker].data[frame.offset : frame.offset + size])
            line.send(Frame(ACK, number, frame.step, size))
            got[number] += size
            if got[number] == whole:
                got[number] = 0
                self._pushed(worker, number, frame.step)

    def _pushed(self, worker: int, number: int, step: int) -> None:
        with self._changed:
            self._is_pending[number, worker] = True
            update = self._clocks.pushed(worker, number, step)
            if update is not None:
                self._due.append(update)
            self._changed.notify_all()

    def _until_applied(self, worker: int, number: int) -> None:
        """Until a worker's last gradient of a transfer is not needed any more."""
        with self._changed:
            self._changed.wait_for(
                lambda: self._is_closed or self.fault is not None or not self._is_pending[number, worker]
            )
            if self._is_closed or self.fault is not None:
                raise NetworkError("The server is closed.")

    def _update(self) -> None:
        try:
            while True:
                with self._changed:
                    self._changed.wait_for(lambda: self._is_closed or self._due)
                    if self._is_closed:
                        return
                    update = self._due.popleft()
                self._apply(update)
        except BaseException as error:
            with self._changed:
                self.fault = error
                self._changed.notify_all()

    def _apply(self, update: Update) -> None:
        number, packing = update.transfer, self._packings[update.transfer]
        buffers = self._gradients[number]
        total = packing.unpacked(buffers[update.workers[0]])
        for worker in update.workers[1:]:  # in their order, so that the sum has the same bits
            more = packing.unpacked(buffers[worker])
            total = {name: np.add(total[name], more[name]) for name in total}
        reached, opt = self._updates.updated(number, total, packing.unpacked(self._params[number]), self._opt[number])
        data = packing.packed(reached)
        with self._changed:
            if self._how.ahead and self._how.staleness == 0:
                self._before[number] = self._params[number]
            self._params[number], self._opt[number] = data, opt
            for worker in update.workers:
                self._is_pending[number, worker] = False
            self._clocks.updated(update)
            self._changed.notify_all()
        self._on_update()

    # Down.

    def _serve(self, line: Line, worker: int) -> None:
        """Parameters for one worker."""
        how, is_over = self._how, False
        wanted: dict[int, tuple[int, int, int]] = {}
        """Transfer -> (step, updates, rank), of what may not be sent yet."""
        outgoing = Outgoing(line, SLICE, self._changed, slice_bytes=how.slice_bytes, credit_bytes=how.credit_bytes)

        def is_open() -> bool:
            self._put_ready(worker, wanted, outgoing)
            return not (is_over or self._is_closed or self.fault is not None)

        def send() -> None:
            try:
                with suppress(TransportError):
                    outgoing.send(is_open)
            finally:
                line.close()

        sender = threading.Thread(target=send, daemon=True)
        sender.start()
        try:
            while True:
                frame = line.receive()
                ranks = np.empty(len(self._packings), "<i4")
                if frame.kind == PULL and frame.size == ranks.nbytes:
                    line.read_into(ranks.view(np.uint8).data)
                with self._changed:
                    if frame.kind == ACK:
                        outgoing.acknowledged(frame.offset)
                    elif frame.kind == PULL and frame.size == ranks.nbytes:
                        if wanted or not outgoing.is_empty:
                            raise ProtocolError("Expected a pull after the last one was taken.")
                        if not 0 <= frame.step - frame.offset <= how.ahead:
                            raise ProtocolError(f"Expected a pull for step {frame.step} with the updates before it, got {frame.offset}.")  # fmt: skip
                        wanted |= {n: (frame.step, frame.offset, int(rank)) for n, rank in zip(self._packings, ranks, strict=True)}  # fmt: skip
                        self._changed.notify_all()
                    else:
                        raise ProtocolError(f"Expected a pull of {len(self._packings)} transfers, got kind {frame.kind}.")  # fmt: skip
        finally:
            with self._changed:
                is_over = True
                self._changed.notify_all()
            sender.join()

    def _put_ready(self, worker: int, wanted: dict[int, tuple[int, int, int]], outgoing: Outgoing) -> None:
        """What may be sent by now goes out."""
        for number, (step, updates, rank) in list(wanted.items()):
            is_early = self._how.has_barrier and self._clocks.reached() < updates
            if not is_early and self._clocks.may_have(worker, number, step, updates):
                del wanted[number]
                back = self._clocks.back(number, updates)
                held = (self._params, self._before)[back].get(number) if back < 2 else None
                if held is None:
                    raise ProtocolError(
                        f"Expected a pull of what is here or was before, got one of {back} updates ago."
                    )
                outgoing.put(number, step, held, rank)
