"""`shoal train --workers N`: processes that train together, watched by one that does not; with other machines under one secret.

shoal train … --workers 2                                      the supervisor: imports no JAX, starts workers, begins anew with those left
    └─ python -m shoal.cli.train_pod ASKED FOLDER HOSTS        a worker, and a spare that has imported all and waits
"""

import asyncio
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Final

from shoal.cli import words
from shoal.cli.ending import run_until_told
from shoal.cli.failures import Stopped, command_line
from shoal.cli.screen import Screen
from shoal.cli.train_asked import Asked

if TYPE_CHECKING:
    from shoal.pod.membership_events import Command
    from shoal.pod.place import WorkerCommand
    from shoal.pod.supervisor import Outcome

MODULE: Final = "shoal.cli.train_pod"


def supervise(asked: Asked, *, workers: int, hosts: int | None, listen: str, join: str, secret: Path | None) -> None:
    """Starts and watches workers until the training is over."""
    from shoal.cli import run_folder
    from shoal.fleet import address
    from shoal.pod.link import read_secret
    from shoal.pod.membership import PodPolicy
    from shoal.pod.supervisor import Listen, Supervisor

    if join and (listen or hosts is not None):
        raise ValueError("--join is for the other machines: --listen and --hosts go with the first one.")
    if asked.resume or join:
        if asked.run is None:
            raise ValueError(
                f"Expected --run DIR with {'--join' if join else '--resume'}: the folder that all machines see."
            )
        folder = asked.run
    else:
        name = Path(asked.task.partition(":")[0]).stem
        folder = run_folder.new_folder(asked.run, name)
        folder.mkdir(parents=True, exist_ok=True)
    folder = folder.resolve()
    screen, number = Screen(json=asked.as_json), (hosts or max(1, workers)) + asked.servers
    how = _command(asked, folder, number)
    if join:
        return _follow(how, join, secret, workers, screen)
    policy = PodPolicy(hosts=number)
    where = None
    if listen:
        host, port = address.split(listen, what="--listen")
        where = Listen(host=host, port=port, secret=read_secret(secret))
    ending: list[bool] = []

    def said(name: str, line: str) -> None:
        if not ending:  # a worker whose others end before it complains
            screen.say(f"[{name}] {line}")

    supervisor = Supervisor(
        how, local_workers=workers + asked.servers, policy=policy, listen=where, watch=lambda command: _tell(command, screen), output=said,
    )  # fmt: skip

    async def supervised() -> "Outcome":
        running = asyncio.ensure_future(supervisor.run())
        try:
            return await asyncio.shield(running)
        except asyncio.CancelledError:
            ending.append(True)
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)
            raise

    again = command_line([*asked.command(folder), "--workers", str(workers)])
    try:
        outcome = run_until_told(supervised())
    except Stopped as stopped:
        raise Stopped(f"stopped. Go on from the last checkpoint with: {again}", code=stopped.code) from None
    if outcome.num_lives > 1:
        screen.say(f"{outcome.num_lives} lives in all")
    _summary(folder, screen)


def _follow(how: "WorkerCommand", join: str, secret: Path | None, workers: int, screen: Screen) -> None:
    from shoal.fleet import address
    from shoal.pod.follower import Follower
    from shoal.pod.link import read_secret

    follower = Follower(
        how, first=address.split(join, what="--join"), secret=read_secret(secret), workers=max(1, workers),
        output=lambda name, line: screen.say(f"[{name}] {line}"),
    )  # fmt: skip
    is_finished = run_until_told(follower.run())
    screen.line("the pod has finished" if is_finished else "the pod was stopped")


def _command(asked: Asked, folder: Path, hosts: int) -> "WorkerCommand":
    from shoal.pod.place import WorkerCommand

    return WorkerCommand(command=[sys.executable, "-m", MODULE, asked.to_json(), str(folder), str(hosts)])


def _tell(command: "Command", screen: Screen) -> None:
    from shoal.pod.membership_events import LifeEnded, StartWorker

    if isinstance(command, StartWorker) and command.process_id == 0:
        screen.say(f"life {command.life} begins with {words.count(command.num_processes, 'worker')}")
    if isinstance(command, LifeEnded):
        whom = f" by {', '.join(command.hosts)}" if command.hosts else ""
        screen.say(f"life {command.life} was ended{whom} at step {max(command.step, 0)}: {command.why}")


def _summary(folder: Path, screen: Screen) -> None:
    from shoal.cli.run_summary import summarize
    from shoal.record.run import open_run

    with open_run(folder) as run:
        summary = summarize(run.store, run.id)
    screen.line(f"{summary.task} version {summary.version}: {words.values(summary.metrics) or 'no metrics'}")
    screen.line(f"run: {folder}")
    screen.document(summary.to_json() | {"folder": str(folder)})


def worker(arguments: list[str]) -> None:
    """What a worker's process does: ASKED FOLDER HOSTS. A spare imports all, and waits for its assignment."""
    from shoal.pod.worker import attached

    asked, folder, hosts = Asked.from_json(arguments[0]), Path(arguments[1]), int(arguments[2])
    with attached(prepare=_imports) as pod:
        from shoal.cli.train_run import train_in_pod

        pod.initialize()
        pod.marks.doing("compiling")
        train_in_pod(asked, pod, folder, hosts)


def _imports() -> None:
    import shoal.cli.train_run
    import shoal.pod.run
    import shoal.pod.trainer  # noqa: F401


if __name__ == "__main__":
    worker(sys.argv[1:])
