"""What `shoal data take` does: one connection, one store, and how far it is."""

import logging
import time
from pathlib import Path
from typing import Final

from shoal.cli import words
from shoal.cli.ending import run_until_told
from shoal.cli.failures import Stopped
from shoal.cli.screen import Screen, Stopwatch
from shoal.data.example_store import ExampleStore
from shoal.fleet.grpc_data import DataLink
from shoal.fleet.take import Progress, Taker, Terms

LIVE_S: Final = 0.2
LINE_S: Final = 10.0
"""Between two lines of progress where nobody looks on."""


def run(
    terms: Terms,
    path: Path,
    server: str,
    authority: bytes | None,
    server_name: str | None,
    *,
    screen: Screen,
    watch: Stopwatch,
    parent: int,
) -> None:
    """Takes what there is to take; raises as `Taker.run` does, and Stopped."""
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    with ExampleStore(path) as store:
        shown = _Shown(screen)
        taker: Taker | None = None

        async def take() -> None:
            nonlocal taker
            link = DataLink(server, ca=authority, server_name=server_name)
            try:
                taker = Taker(
                    store, link, terms, on_progress=lambda: shown.show(taker.progress if taker else Progress())
                )
                await taker.run()
            finally:
                await link.close()

        try:
            run_until_told(take(), parent=parent)
        except Stopped as stopped:
            raise Stopped("stopped. Start the same command again to go on where it was.", code=stopped.code) from None
        assert taker is not None
        watch.lap("take")
        _tell(taker.progress, store, screen, watch)


class _Shown:
    """How far it is, now and then."""

    def __init__(self, screen: Screen) -> None:
        self._screen = screen
        self._stage, self._live_s, self._line_s = "", 0.0, time.monotonic()
        self._begun_s = self._begun_bytes = 0.0

    def show(self, progress: Progress) -> None:
        now_s = time.monotonic()
        if progress.stage != self._stage:
            self._stage, self._begun_s, self._begun_bytes = progress.stage, now_s, progress.got_bytes
        elif now_s - self._live_s < LIVE_S:
            return
        self._live_s = now_s
        text = self._text(progress, now_s)
        self._screen.live(text)
        if now_s - self._line_s >= LINE_S:
            self._line_s = now_s
            self._screen.say(text)

    def _text(self, progress: Progress, now_s: float) -> str:
        if progress.stage != "fetching":
            return progress.stage + (
                f" (last: {progress.last_error[:160]})" if progress.stage == "reconnecting" else ""
            )
        got, seconds = progress.got_bytes - self._begun_bytes, now_s - self._begun_s
        text = f"fetching: {words.size(progress.got_bytes)} of {words.size(progress.shard_bytes)}"
        if got and seconds:
            left_s = (progress.shard_bytes - progress.got_bytes) * seconds / got
            text += f", {words.size(got / seconds)}/s, {words.duration(left_s)} left"
        return text


def _tell(progress: Progress, store: ExampleStore, screen: Screen, watch: Stopwatch) -> None:
    held = store.statistics()
    screen.line(
        f"took {words.count(progress.joined, 'shard')}: {words.count(progress.examples, 'example')}, {words.size(progress.joined_bytes)}, "
        f"in {words.size(progress.moved_bytes)} on the wire"
    )
    if progress.left:
        screen.line(f"{words.count(progress.left, 'shard')} left again, as another device was faster")
    if progress.why_over:
        screen.line(f"no more: {progress.why_over}")
    screen.line(f"where the time went: {words.phases(watch.seconds, total=watch.total)}")
    screen.line(f"{store.path}: {words.count(held.examples, 'example')}; learn with shoal device --data {store.path}")
    screen.document(
        {
            "shards": progress.joined, "left": progress.left, "examples": progress.examples, "bytes": progress.joined_bytes,
            "moved_bytes": progress.moved_bytes, "failures": progress.failures, "why_over": progress.why_over,
            "store": str(store.path), "store_examples": held.examples, "total_seconds": watch.total,
        }
    )  # fmt: skip
