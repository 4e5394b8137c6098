"""Trains a task with servers that hold the model and workers that have examples: who is who, what a step is, versions, checkpoints.

    process 0 .. N-1        workers; the first evaluates versions and writes the record
    process N .. N+M-1      servers, each with its share of the transfers

In one process alone servers and workers are threads of it, which is for trying out. All processes work the same out of the task: the stages, the transfers, who
holds which. The order in which transfers go is each worker's own affair: found by measuring its first steps (`choice.py`), and given up where it does not pay.
"""

import secrets
import socket
import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, final

import jax
import numpy as np

from shoal import validate
from shoal.data.store import Examples
from shoal.errors import DataError, ShoalError, StoreError
from shoal.local import Named, named
from shoal.pod.order import Order
from shoal.pod.piecewise import acts_on_elements
from shoal.pod.servers.checkpoints import Parts
from shoal.pod.servers.choice import Choice
from shoal.pod.servers.exchange import Exchange, share
from shoal.pod.servers.packing import Packing
from shoal.pod.servers.server import Server, Serving
from shoal.pod.servers.updates import Updates
from shoal.pod.servers.worker import Course, WorkerTraining
from shoal.pod.trainer import conform, refuse
from shoal.pod.training import Watch
from shoal.schedule import ORDER_NAMES, OrderName
from shoal.schedule.sending import CREDIT_BYTES, SLICE_BYTES
from shoal.schedule.staged import JOINED_BYTES, PIECE_BYTES, Step
from shoal.task import Task


@dataclass(frozen=True, kw_only=True)
class Roles:
    """How many of each."""

    workers: int
    servers: int

    def __post_init__(self) -> None:
        """Raises ValueError where there is none of a kind."""
        validate.positive(workers=self.workers, servers=self.servers)


@final
class ServerTrainer:
    """A task with its servers and workers, ready to be trained."""

    def __init__(
        self, task: Task, *, workers: int = 1, servers: int = 1, staleness: int | None = 0, ahead: bool = False, order: OrderName = "auto",
        batch_size: int | None = None, window: int | None = None, slice_bytes: int = SLICE_BYTES, credit_bytes: int = CREDIT_BYTES, has_barrier: bool = False,
        joined_bytes: int = JOINED_BYTES, piece_bytes: int = PIECE_BYTES, choices: Path | None = None,
    ) -> None:  # fmt: skip
        """
        Args:
            task: what is learned, by `Local.optimizer`, a step a round.
            workers, servers: how many.
            staleness: steps that a worker may be ahead of the slowest; 0: all take each step together; None: nobody waits.
            ahead: a step's parameters are asked for while the step before is computed, whose update is not in them then.
            order: of transfers: `auto` (by `tac` where that pays, else by layers), `tac`, `tic`, `layer`, `tree` or `random`.
            batch_size: examples of a step, of all workers together; None: the task's.
            window: examples within which they are shuffled; None: all.
            slice_bytes, credit_bytes: see `schedule/sending.py`.
            has_barrier: parameters of a step come only when all of the step before are updated.
            joined_bytes: tensors up to this size travel with another.
            piece_bytes: tensors from twice this size on travel in pieces of no less, where the optimizer looks at elements.
            choices: folder in which measured times are kept for the next run of the same program; None: they are not.

        Raises:
            ValueError: a number is not positive, workers cannot share a batch evenly, or the task is one for fleets.
        """
        refuse(task)
        self.roles = Roles(workers=workers, servers=servers)
        self.batch_size = task.local.batch_size if batch_size is None else batch_size
        validate.positive(batch_size=self.batch_size)
        if self.batch_size % workers:
            raise ValueError(f"Expected a batch that {workers} workers share evenly, got batch_size={self.batch_size}.")
        if staleness is not None and staleness < 0:
            raise ValueError(f"Expected a staleness of 0 steps or more, got {staleness}.")
        validate.one_of(ORDER_NAMES, order=order)
        self.staleness, self.order_name, self.window = staleness, order, window
        self.serving = Serving(
            num_workers=workers, staleness=staleness, ahead=ahead, has_barrier=has_barrier, slice_bytes=slice_bytes, credit_bytes=credit_bytes
        )  # fmt: skip
        self._choices = choices
        self.choice: Choice | None = None
        """The first worker's."""
        takes_apart = partial(acts_on_elements, task.local.optimizer)
        self.step = Step(
            task,
            self.batch_size // workers,
            joined_bytes=joined_bytes,
            piece_bytes=piece_bytes,
            takes_apart=takes_apart,
        )
        self.task = self.step.task
        staged = self.step.staged
        if len(staged.graph.transfers) < servers:
            raise ValueError(
                f"Expected at most as many servers as tensors that travel by themselves, got --servers {servers} for {len(staged.graph.transfers)}."
            )
        self.packings = [Packing(names, self.step.travelling) for names in staged.members]
        self.owners = share(staged.graph, servers)

    @property
    def num_members(self) -> int:
        return self.roles.workers

    def settings(self) -> dict[str, Any]:
        """How it trains, as JSON."""
        return {
            "workers": self.roles.workers, "servers": self.roles.servers, "staleness": self.staleness, "ahead": self.serving.ahead, "order": self.order_name,
            "batch_size": self.batch_size, "window": self.window, "slice_bytes": self.serving.slice_bytes, "credit_bytes": self.serving.credit_bytes,
            **({"transfers": self.choice.to_json()} if self.choice else {}),
        }  # fmt: skip

    def lines(self) -> list[str]:
        """What travels, for people."""
        graph = self.step.staged.graph
        size, num = sum(transfer.size_bytes for transfer in graph.transfers), len(graph.transfers)
        amount = f"{size / 1e6:.1f} MB" if size >= 1e5 else f"{size / 1e3:.1f} kB"
        made = [
            f"{len(graph.stages)} stages, {graph.num_forward} of them on the way forward; {amount} each way a step, in {num} transfer{'s' * (num > 1)}"
        ]
        return made + list(self.step.staged.notes)

    def told(self) -> list[str]:
        """What it has to say when it is over, for people: which order transfers took, and what it was worth."""
        return self.choice.lines() if self.choice else []

    def order(self, num_examples: int, *, seed: int) -> Order:
        """Which examples its batches have."""
        whole_batches = self.task.local.drop_remainder or not self.task.heeds_mask
        return Order(
            num_examples=num_examples, batch_size=self.batch_size, seed=seed, window=self.window, drop_remainder=whole_batches
        )  # fmt: skip

    @cached_property
    def updates(self) -> Updates:
        """Raises ValueError where the optimizer looks at more than one tensor at a time."""
        return Updates(self.task.local.optimizer, self.step.travelling, self.step.staged.members)

    def train(
        self, examples: Examples, *, steps: int, commit_every: int, seed: int = 0, held_out: Examples | None = None, folder: Path | None = None,
        checkpoint_every: int | None = None, watch: Watch | None = None,
    ) -> dict[str, Any]:  # fmt: skip
        """Takes steps up to number `steps`, from the newest checkpoint in `folder` or from the beginning. Arguments as for `Trainer.train`.

        Returns:
            ``step``, and ``params`` (name -> tensor) in the process that is the first worker.

        Raises:
            DataError: the examples do not fit the task.
            TransportError: a server or worker is gone.
        """
        validate.positive(steps=steps, commit_every=commit_every, checkpoint_every=checkpoint_every or 1)
        if held_out is not None and self.task.evaluate is None:
            raise DataError(f"Task {self.task.name!r} has no evaluate: leave out held_out, or give the task one.")
        _ = self.updates
        run = _Running(
            self, conform(examples, self.task), None if held_out is None else conform(held_out, self.task), steps, commit_every,
            checkpoint_every or commit_every, seed, Parts((folder or Path("")) / "servers") if folder is not None else None, watch or Watch(),
        )  # fmt: skip
        return run.alone() if jax.process_count() == 1 else run.in_pod()

    def choose(self, worker: int) -> Choice:
        """Which order a worker's transfers take."""
        serving = self.serving
        choice = Choice(
            self.order_name, self.step.staged, seed=worker, is_training=True, has_barrier=serving.has_barrier, ahead=serving.ahead, slice_bytes=serving.slice_bytes,
            folder=None if self._choices is None else self._choices / f"{self.roles.workers}-{self.roles.servers}",  # who share a line
        )  # fmt: skip
        if worker == 0:
            self.choice = choice
        return choice


@dataclass(frozen=True)
class _Running:
    """One training."""

    trainer: ServerTrainer
    examples: Examples
    held_out: Examples | None
    steps: int
    commit_every: int
    checkpoint_every: int
    seed: int
    parts: Parts | None
    watch: Watch

    # Who is who.

    def alone(self) -> dict[str, Any]:
        """Servers and further workers as threads."""
        secret = secrets.token_bytes(32)
        first, params, opt = self._begin()
        roles = self.trainer.roles
        servers = [self._server(number, secret, first, params, opt) for number in range(roles.servers)]
        others: list[threading.Thread] = []
        faults: list[BaseException] = []
        try:
            addresses = [("127.0.0.1", server.port) for server in servers]

            def work(worker: int) -> None:
                try:
                    self._work(worker, addresses, secret, first)
                except BaseException as error:
                    faults.append(error)
                    for server in servers:
                        server.abort(error)

            others = [threading.Thread(target=work, args=(n,), daemon=True) for n in range(1, roles.workers)]
            for thread in others:
                thread.start()
            try:
                made = self._work(0, addresses, secret, first)
            except ShoalError:
                found = [*(server.fault for server in servers if server.fault is not None), *faults]
                if found:
                    raise found[0] from None
                raise
            if made["step"] < self.steps:  # it was stopped
                for number, server in enumerate(servers):
                    server.close()  # so that nothing changes any more
                    self._write(server, number, made["step"])
                return made
            for thread in others:
                thread.join()
            return made
        finally:
            for server in servers:
                server.close()

    def in_pod(self) -> dict[str, Any]:
        """This process's part."""
        rank, roles = jax.process_index(), self.trainer.roles
        if jax.process_count() != roles.workers + roles.servers:
            raise ValueError(f"Expected {roles.workers} workers and {roles.servers} servers, got {jax.process_count()} processes.")  # fmt: skip
        secret = bytes(_gathered(np.frombuffer(secrets.token_bytes(32), np.uint8))[0])
        first, params, opt = self._begin()
        address, is_server = _own_address(self.watch), rank >= roles.workers
        server = self._server(rank - roles.workers, secret, first, params, opt, address) if is_server else None
        said = np.array([*socket.inet_aton(address), 0, 0], np.uint8)
        said[4:] = np.frombuffer((server.port if server else 0).to_bytes(2, "big"), np.uint8)
        found = _gathered(said)[roles.workers :]
        addresses = [(socket.inet_ntoa(bytes(each[:4])), int.from_bytes(bytes(each[4:]), "big")) for each in found]
        if server is None:
            return self._work(rank, addresses, secret, first)
        with server:
            server.until_left()
        return {"step": self.steps}

    def _begin(self) -> tuple[int, Named, list[list[Any]]]:
        """The first step, all parameters, the optimizer's leaves of each transfer."""
        trainer = self.trainer
        latest = None if self.parts is None else self.parts.latest()
        variables = trainer.task.variables(jax.random.key(self.seed))
        params = {name: np.asarray(value) for name, value in named(variables.params, "params").items()}
        learned = trainer.step.apart({name: params[name] for name in trainer.step.learned})
        if self.parts is None or latest is None:
            return 0, learned, trainer.updates.begin(learned)
        kept, leaves = self.parts.read(latest, self._about())
        if {name: value.shape for name, value in kept.items()} != {
            name: value.shape for name, value in learned.items()
        }:
            raise StoreError(
                f"The checkpoint of step {latest} is of another model: train with the task that it was made by, or begin anew in another folder."
            )
        template = trainer.updates.begin(learned)
        wanted = trainer.updates.wanted
        return latest, kept, [[leaves.get(at, value) for at, value in zip(wanted[n], each, strict=True)] for n, each in enumerate(template)]  # fmt: skip

    def _about(self) -> dict[str, Any]:
        return {
            "seed": self.seed, "batch_size": self.trainer.batch_size, "examples": len(self.examples), "window": self.trainer.window,
            "commit_every": self.commit_every, "ahead": self.checkpoint_every if self.trainer.serving.ahead else None,
        }  # fmt: skip

    def _server(
        self, number: int, secret: bytes, first: int, params: Named, opt: Sequence[Sequence[Any]], host: str = "127.0.0.1"
    ) -> Server:  # fmt: skip
        trainer = self.trainer
        mine = [transfer for transfer, owner in enumerate(trainer.owners) if owner == number]
        made: list[Server] = []

        def on_update() -> None:
            self._keep(made[0], number)

        made.append(
            Server(
                trainer.updates, params, {n: opt[n] for n in mine}, {n: trainer.packings[n] for n in mine}, replace(trainer.serving, last_step=self.steps), secret=secret,
                address=(host, 0), first_step=first, on_update=on_update,
            )
        )  # fmt: skip
        return made[0]

    def _keep(self, server: Server, number: int) -> None:
        """Writes the server's part, when all its transfers have come to a step that is to be kept. In the updating thread: nothing changes meanwhile."""
        step, is_just_there = server.reached()
        self.watch.pod.marks.done(step)
        if is_just_there and (step % self.checkpoint_every == 0 or step == self.steps):
            self._write(server, number, step)

    def _write(self, server: Server, number: int, step: int) -> None:
        if self.parts is None:
            return
        params, opt = server.held()
        wanted, owner = self.trainer.updates.wanted, self.trainer.updates.owner
        leaves = {}
        for transfer, values in opt.items():
            for at, value in zip(wanted[transfer], values, strict=True):
                if owner[at] is not None or number == 0:
                    leaves[at] = value
        self.parts.write(step, number, self.trainer.roles.servers, params, leaves, self._about())
        self.watch.pod.marks.saved(step)

    # A worker.

    def _course(self, first: int) -> Course:
        trainer = self.trainer
        return Course(
            step=trainer.step, order=trainer.order(len(self.examples), seed=self.seed), examples=self.examples, held_out=self.held_out, first=first,
            steps=self.steps, commit_every=self.commit_every, checkpoint_every=self.checkpoint_every, seed=self.seed, num_workers=trainer.roles.workers,
            ahead=trainer.serving.ahead, watch=self.watch,
        )  # fmt: skip

    def _work(self, worker: int, addresses: Sequence[tuple[str, int]], secret: bytes, first: int) -> dict[str, Any]:
        trainer, serving = self.trainer, self.trainer.serving
        exchange = Exchange(
            addresses, secret, worker=worker, packings=trainer.packings, owners=trainer.owners, slice_bytes=serving.slice_bytes,
            credit_bytes=serving.credit_bytes, silence_s=serving.silence_s,
        )  # fmt: skip
        try:
            return WorkerTraining(self._course(first), worker, exchange, trainer.choose(worker)).run()
        finally:
            exchange.close()


def _gathered(value: np.ndarray) -> np.ndarray:
    """(processes, …): what each process has."""
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(value))


def _own_address(watch: Watch) -> str:
    """This machine's, as the first process would reach it."""
    assignment = watch.pod.assignment
    if assignment is None:
        return "127.0.0.1"
    host, _, port = assignment.coordinator.rpartition(":")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as made:
        made.connect((host, int(port)))
        return str(made.getsockname()[0])
