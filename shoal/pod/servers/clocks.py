"""Who has sent what, which tensors may be updated, and who may have them: a server's decisions, without I/O.

    pushed(worker, transfer, step) --> updates to do now      updated(update) --> workers that waited for it may have it

    synchronous (staleness 0)   gradients of a step are added up in the order of workers and applied together; step t reads what t updates made
    bounded (staleness k)       each is applied as it comes; a worker may be k steps ahead of the slowest
    asynchronous (None)         each is applied as it comes; nobody waits for another

A worker says how many updates its parameters for a step are to have in them: as many as there are steps before it, or one less where it asks for them while it
computes that one (*ahead*).

Invariants:
    1. A worker's gradients of a transfer come for one step after another: none is counted twice, none left out.
    2. Synchronous: what is applied for step t is the sum of the workers' gradients of step t in the order of their numbers, whenever they came.
    3. Bounded: no worker is given a tensor for step t before the slowest has finished step t - k - 1.
    4. What a worker is given for step t has as many of its own gradients in it as it asked for: all of the steps before ("read my writes", Ho et al. 2013, "More
       effective distributed ML via a stale synchronous parallel parameter server", section 3), or all but the last. Synchronous: neither less nor more.
"""

from dataclasses import dataclass
from typing import final

from shoal import validate
from shoal.errors import ProtocolError


@dataclass(frozen=True, slots=True)
class Update:
    """To be applied now, in this order of workers."""

    transfer: int
    workers: tuple[int, ...]


@final
class Clocks:
    """Of the transfers of one server."""

    def __init__(self, transfers: tuple[int, ...], num_workers: int, *, staleness: int | None, first_step: int = 0, last_step: int | None = None) -> None:  # fmt: skip
        """
        Args:
            transfers: this server's.
            num_workers: all of them.
            staleness: steps that a worker may be ahead of the slowest; None: as many as it likes.
            first_step: of this life.
            last_step: that all take; what is asked for it is what came of all of them. None: there is no last.
        """
        validate.positive(num_workers=num_workers)
        if staleness is not None and staleness < 0:
            raise ValueError(f"Expected a staleness of 0 steps or more, got {staleness}.")
        self._num_workers, self._staleness = num_workers, staleness
        self._pushed = {transfer: [first_step] * num_workers for transfer in transfers}
        """Steps that each worker has sent gradients for."""
        self._applied = {transfer: [first_step] * num_workers for transfer in transfers}
        """Steps of each worker whose gradients are in what it would be given."""
        self._last_step = last_step

    def next_of(self, worker: int, transfer: int) -> int:
        """The step that its next gradient of a transfer is of. Raises ProtocolError for one that there is not."""
        if transfer not in self._pushed or not 0 <= worker < self._num_workers:
            raise ProtocolError(f"Expected a transfer of this server and a worker below {self._num_workers}, got {transfer} of {worker}.")  # fmt: skip
        return self._pushed[transfer][worker]

    def pushed(self, worker: int, transfer: int, step: int) -> Update | None:
        """A worker's gradient of a transfer is whole.

        Raises:
            ProtocolError: it is not of the step that is next.
        """
        wanted = self.next_of(worker, transfer)
        if step != wanted:
            raise ProtocolError(f"Expected worker {worker}'s gradient of transfer {transfer} for step {wanted}, got one for {step}.")  # fmt: skip
        self._pushed[transfer][worker] = step + 1
        if self._staleness != 0:
            return Update(transfer, (worker,))
        if min(self._pushed[transfer]) > step:
            return Update(transfer, tuple(range(self._num_workers)))
        return None

    def updated(self, update: Update) -> None:
        """It is applied."""
        for worker in update.workers:
            self._applied[update.transfer][worker] += 1

    def done(self, transfer: int) -> int:
        """Steps whose gradients of a transfer have been applied: all workers', or as many."""
        return sum(self._applied[transfer]) // self._num_workers

    def may_have(self, worker: int, transfer: int, step: int, updates: int) -> bool:
        """Whether a worker may read a transfer for a step, with so many updates in it."""
        if self._staleness == 0 or step == self._last_step:
            return self.done(transfer) >= updates
        has_own = self._applied[transfer][worker] >= updates
        return has_own and (self._staleness is None or min(self._applied[transfer]) >= step - self._staleness)

    def back(self, transfer: int, updates: int) -> int:
        """Updates that the newest has beyond those that are asked for, where they have to be as many."""
        return max(0, self.done(transfer) - updates) if self._staleness == 0 else 0

    def reached(self) -> int:
        """Steps that are done with every transfer: what a barrier waits for."""
        return min(self.done(transfer) for transfer in self._applied)
