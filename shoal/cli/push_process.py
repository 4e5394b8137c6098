"""What a push process does: cuts the data into shards, or takes the push of its folder up, and serves until every shard is held."""

import asyncio
import json
import logging
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from shoal.cli import data_argument, words
from shoal.cli.ending import run_until_told
from shoal.cli.failures import Stopped, command_line
from shoal.cli.host_process import write_ready
from shoal.cli.screen import Screen, Stopwatch
from shoal.data.store import Examples
from shoal.fleet import tls as tls_files
from shoal.fleet.address import joined
from shoal.fleet.grpc_data import DataServer
from shoal.fleet.grpc_server import Tls
from shoal.fleet.process import be_a_server
from shoal.fleet.push import Push, PushBook, PushStatistics, prepare
from shoal.record.lock import only_writer

STATUS_S: Final = 0.5
LINE_S: Final = 10.0
"""Between two lines of progress where nobody looks on."""
LINGER_S: Final = 3.0
"""For takers that wait, to hear that it is over."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is pushed, and how it is served."""

    data: str
    shards: int
    folder: Path
    population: str
    split: str
    seed: int
    user_column: str
    address: str
    port: int
    patience_s: float
    make_tls: bool
    tls_cert: Path | None
    tls_key: Path | None
    ready_file: Path | None

    @property
    def asked(self) -> bytes:
        """What makes it this push and no other."""
        names = ("data", "shards", "population", "split", "seed", "user_column")
        return json.dumps({name: getattr(self, name) for name in names}).encode()


def run(settings: Settings, *, screen: Screen, watch: Stopwatch, parent: int) -> None:
    """Serves the push to its end.

    Raises:
        ValueError: the folder holds another push, or the data cannot be cut so.
        Stopped: by Ctrl-C, SIGTERM, or the end of the parent.
        NetworkError: the port is taken.
        StoreError: another process serves this push, or the disk is full.
    """
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    be_a_server()
    settings.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    with only_writer(settings.folder):
        book = PushBook(settings.folder)
        try:
            _prepare(settings, book, screen)
            watch.lap("shards")
            push = Push(book, patience_s=settings.patience_s)
            _serve_until_told(settings, push, screen, parent=parent)
            watch.lap("push")
            _tell(settings, push, screen, watch)
        finally:
            book.close()


def _prepare(settings: Settings, book: PushBook, screen: Screen) -> None:
    asked = book.fact("asked")
    if asked is not None:
        if asked != settings.asked:
            raise ValueError(
                f"{settings.folder} holds another push: {asked.decode()}. Take another --run folder, or the same words again."
            )
        return screen.say(f"goes on with the push of {settings.folder}")
    examples = _joined(settings)
    split = data_argument.deal(examples, settings.split, settings.shards, seed=settings.seed)
    total = sum(array.nbytes for array in examples.fields.values())
    screen.say(
        f"cutting {words.count(len(examples), 'example')}, {words.size(total)}, into {words.count(len(split), 'shard')}"
    )
    prepare(
        book, settings.data[-100:], settings.population, examples, split, asked=settings.asked,
        on_progress=lambda number: screen.live(f"shard {number} of {len(split)}"),
    )  # fmt: skip


def _joined(settings: Settings) -> Examples:
    """All examples, whoever's they are."""
    population = data_argument.open_data(settings.data, user_column=settings.user_column)
    whole = population.whole()
    if whole is not None:
        return whole[0]
    return Examples.concatenate([examples for _, examples in population.items()])


def _serve_until_told(settings: Settings, push: Push, screen: Screen, *, parent: int) -> None:
    try:
        run_until_told(_serve(settings, push, screen), parent=parent)
    except Stopped as stopped:
        raise Stopped(
            f"stopped; {_progress(push.statistics())}. Start the same command again to go on.", code=stopped.code
        ) from None


async def _serve(settings: Settings, push: Push, screen: Screen) -> None:
    tls, ca = _tls(settings)
    server = DataServer(push, address=joined(settings.address, settings.port), tls=tls)
    await server.start()
    try:
        _announce(settings, push, server.port, ca, screen)
        await _until_held(push, screen)
        await asyncio.sleep(LINGER_S)
    finally:
        await server.close(grace_s=0.5)


async def _until_held(push: Push, screen: Screen) -> None:
    begun_s = line_s = time.monotonic()
    told = ""
    before = push.statistics().held_bytes
    while not push.dispatch.is_done:
        with suppress(TimeoutError):
            async with asyncio.timeout(STATUS_S):
                await push.changed.wait()
        push.changed.clear()
        now, now_s = push.statistics(), time.monotonic()
        text = _progress(now) + _left(now.held_bytes - before, now.size_bytes - now.held_bytes, now_s - begun_s)
        screen.live(text)
        if now_s - line_s >= LINE_S and text != told:
            line_s, told = now_s, text
            screen.say(text)


def _progress(now: PushStatistics) -> str:
    return f"{now.held} of {now.shards} shards held, {now.claimed} on their way, sent {words.size(now.sent_bytes)}"


def _left(done: int, left: int, seconds: float) -> str:
    """Time left, by what was done since this process began."""
    return f", about {words.duration(left * seconds / done)} left" if done else ""


def _tls(settings: Settings) -> tuple[Tls | None, Path | None]:
    if settings.tls_cert is not None and settings.tls_key is not None:
        return tls_files.read_tls(settings.tls_key, settings.tls_cert), None
    return tls_files.load_or_make_tls(settings.folder, address=settings.address) if settings.make_tls else (None, None)


def _announce(settings: Settings, push: Push, port: int, ca: Path | None, screen: Screen) -> None:
    where = joined(settings.address, port)
    line = f"listening on {where}"
    screen.say(line) if screen.json else print(line, flush=True)
    reached = where if settings.address not in ("0.0.0.0", "::") else f"THIS-MACHINE:{port}"
    said: list[Any] = [
        "shoal",
        "data",
        "take",
        "--server",
        reached,
        "--ticket",
        push.ticket.hex(),
        "--key",
        push.key.hex(),
    ]
    said += [*(["--ca", ca] if ca else []), *(["--population", settings.population] if settings.population != "default" else [])]  # fmt: skip
    screen.say(f"devices: {command_line([*said, '--store', 'NAME.examples'])}")
    if settings.ready_file is not None:
        write_ready(settings.ready_file, where)


def _tell(settings: Settings, push: Push, screen: Screen, watch: Stopwatch) -> None:
    now = push.statistics()
    seconds = watch.seconds["push"]
    screen.line(f"all {words.count(now.shards, 'shard')} are held, {words.size(now.size_bytes)} of examples")
    if now.duplicates:
        screen.line(f"{words.count(now.duplicates, 'shard')} arrived twice: the later device was told to leave it")
    screen.line(f"sent {words.size(now.sent_bytes)} in {words.duration(seconds)}")
    screen.line(f"where the time went: {words.phases(watch.seconds, total=watch.total)}")
    screen.line(f"push: {settings.folder}")
    screen.document(
        {
            "shards": now.shards, "held": now.held, "size_bytes": now.size_bytes, "sent_bytes": now.sent_bytes,
            "duplicates": now.duplicates, "seconds": dict(watch.seconds), "total_seconds": watch.total, "folder": str(settings.folder),
        }
    )  # fmt: skip
