"""Serves a run under its lease: takes it, renews it beside the work, ends it; stops the work where it is lost.

The shell of `lease.py`. Renewals are a task of their own: they wait for no round.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import TypeVar, final

from shoal.clock import Clock
from shoal.errors import LeaseHeld, LeaseLost, StoreError
from shoal.fleet import lease as m
from shoal.record.store import LeaseRow, Store

log = logging.getLogger("shoal.host")

T = TypeVar("T")


@final
class LeaseKeeper:
    """See the module's text. One serves once."""

    def __init__(
        self,
        store: Store,
        run_id: str,
        *,
        clock: Clock,
        life_s: float = m.LIFE_S,
        alone: bool = False,
        waits: bool = False,
    ) -> None:
        """
        Args:
            store: the record.
            run_id: the run.
            clock: time.
            life_s: of the lease: so long after its holder's death another machine may take the run up.
            alone: the caller holds the folder's lock (`record.lock.only_writer`): a holder of this machine is dead, and
                need not be waited for.
            waits: whether to wait for another's lease to expire, once; else LeaseHeld at once.
        """
        self._store, self._run, self._clock, self._life_s = store, run_id, clock, life_s
        self._holder = m.holder_name()
        self._machine = m.LeaseMachine(self._holder, life_s=life_s, alone=alone, waits=waits)
        self._fence = 0
        self._wake_s = 0.0
        self._refused: StoreError | None = None
        """Why it was given up."""

    def take(self) -> None:
        """Takes the lease, for those who write before they `serve`; does nothing once it has it.

        Raises:
            LeaseHeld: another has it.
        """
        if self._machine.phase is m.Phase.IDLE:
            self._step(m.Begin())
        if self._machine.phase is m.Phase.WAITING:
            self._step(m.End())
        self._raise_refusal()

    async def serve(self, work: Callable[[], Awaitable[T]]) -> T:
        """Does the work under the lease.

        Raises:
            LeaseHeld: another has it; the work was not begun.
            LeaseLost: another has taken it; the work was cancelled.
        """
        if self._machine.phase is m.Phase.IDLE:
            self._step(m.Begin())  # not in a thread: nothing is served yet
        while self._machine.phase is m.Phase.WAITING:
            log.info("waiting for its lease to expire: %s", self._refused)
            await self._clock.sleep_until(self._wake_s)
            self._step(m.Tick())
        self._raise_refusal()
        working = asyncio.current_task()
        assert working is not None
        renewing = asyncio.create_task(self._renew(working))
        try:
            try:
                return await work()
            finally:
                renewing.cancel()
                await asyncio.gather(renewing, return_exceptions=True)
        except (asyncio.CancelledError, LeaseLost):
            if self._refused is None:
                raise
            working.uncancel()
            raise self._refused from None
        finally:
            self._step(m.End())

    async def _renew(self, working: "asyncio.Task[object]") -> None:
        while self._machine.phase is not m.Phase.OVER:
            await self._clock.sleep_until(self._wake_s)
            for command in self._machine.step(m.Tick(), self._clock.now_s()):
                assert isinstance(command, m.Renew)
                self._carry_on(await asyncio.to_thread(self._ask_to_renew))
        working.cancel()

    def _ask_to_renew(self) -> m.Event:
        try:
            self._store.renew_lease(self._run, self._fence, expires_s=self._clock.wall_s() + self._life_s)
        except LeaseLost as error:
            self._refused = error
            return m.Lost()
        except StoreError as error:
            log.error("the lease cannot be renewed, trying again: %s", error)
            return m.Unavailable()
        return m.Renewed()

    def _step(self, event: m.Event) -> None:
        answers: list[m.Event] = [event]
        while answers:
            answers += self._carry_on(answers.pop(0))

    def _carry_on(self, event: m.Event) -> list[m.Event]:
        """Steps the machine and does what needs no waiting; returns answers."""
        answers: list[m.Event] = []
        for command in self._machine.step(event, self._clock.now_s()):
            match command:
                case m.Take(instead_of):
                    answers.append(self._take(instead_of))
                case m.WakeAt(time_s):
                    self._wake_s = time_s
                case m.Release():
                    self._release()
                case m.GiveUp():
                    pass  # `_refused` says why
        return answers

    def _take(self, instead_of: LeaseRow | None) -> m.Event:
        now_s = self._clock.wall_s()
        try:
            self._fence = self._store.take_lease(
                self._run, holder=self._holder, now_s=now_s, life_s=self._life_s, instead_of=instead_of
            )
        except LeaseHeld as error:
            self._refused = error
            row = self._store.lease(self._run)
            assert row is not None
            return m.Held(row, row.expires_s - now_s)
        self._refused = None
        return m.Taken()

    def _release(self) -> None:
        try:
            self._store.end_lease(self._run, self._fence)
        except StoreError as error:  # it expires
            log.warning("the lease could not be ended: %s", error)

    def _raise_refusal(self) -> None:
        if self._refused is not None:
            raise self._refused
