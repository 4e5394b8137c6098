"""A device that takes shards of central data into its example store.

    offer -> verified -> claim -> slices into NAME.examples.part -> hash -> joins the store -> held -> (confirmed | leaves again)

What was reached is in the store's file and the part file, so that a taker that is killed anywhere goes on there:

    part file without its last bytes      the transfer goes on after the last whole slice
    part file complete, not in the store  the hash is checked again, the shard joins
    in the store, not confirmed           the server is told; where another device holds it by then, it leaves the store
    confirmed                             it is not asked for again

Nothing of a shard is in the store before its hash is right. The server's word is believed only as far as its signature goes: of what it sends
no more than the manifest's bytes are kept, a slice is unpacked to the size that the manifest says and no further, and the device's own limits
(`most_bytes`, those of the store) are looked at before anything is asked for.
"""

import asyncio
import errno
import hashlib
import logging
import os
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import isfinite, prod
from pathlib import Path
from typing import Any, BinaryIO, Final, Protocol, final, runtime_checkable

import numpy as np

from shoal.codec.packed import unpack
from shoal.data.example_store import CHUNK_BYTES, ExampleStore, bytes_each
from shoal.data.store import Spec, difference
from shoal.errors import DataError, NetworkError, ProtocolError, StoreError, StoreUnavailable
from shoal.fleet.distribution import Distribution, slices, slices_from
from shoal.fleet.push import TAKER_BYTES, NotYours
from shoal.fleet.wire import data_pb2 as pb
from shoal.record.lock import lock_file
from shoal.tensors import DTYPES

log = logging.getLogger("shoal.take")

BACK_OFF_S: Final = (0.2, 5.0)
LONGEST_WAIT_S: Final = 60.0
"""Whatever a server says."""


@runtime_checkable
class Link(Protocol):
    """A way to a push; see `grpc_data.DataLink`."""

    async def offer(self, request: pb.OfferRequest) -> pb.OfferReply: ...
    async def claim(self, request: pb.ClaimRequest) -> pb.ClaimReply: ...
    def pull(self, request: pb.PullRequest) -> AsyncGenerator[pb.Piece, None]: ...
    async def held(self, request: pb.HeldRequest) -> pb.HeldReply: ...


@dataclass
class Progress:
    """What a taker has done; for the command line."""

    stage: str = "connecting"
    shard_bytes: int = 0
    """Of the shard that is on its way."""
    got_bytes: int = 0
    """Of them, what is here."""
    moved_bytes: int = 0
    """Messages with pieces."""
    joined: int = 0
    joined_bytes: int = 0
    examples: int = 0
    left: int = 0
    """Shards that another device held before."""
    failures: int = 0
    last_error: str = ""
    why_over: str = ""


@dataclass(frozen=True, kw_only=True)
class Terms:
    """What a device takes, and of whom."""

    ticket: bytes
    population: str = "default"
    key: bytes | None = None
    """Whose data are taken; None: whose this store took before, else of the first that is seen."""
    most_bytes: int = 2 * 10**9
    """Of one push."""
    stays: bool = False
    """Takes another shard as long as there are any."""
    patience_s: float = 300.0
    """Without anything that works, before it gives up."""


@final
class Taker:
    """See the module's text."""

    def __init__(
        self,
        store: ExampleStore,
        link: Link,
        terms: Terms,
        *,
        on_progress: Callable[[], None] = lambda: None,
        now_s: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[Any]] = asyncio.sleep,
    ) -> None:
        self._store, self._link, self._terms = store, link, terms
        self._on_progress, self._now_s, self._sleep = on_progress, now_s, sleep
        self._part = store.path.with_name(f"{store.path.name}.part")
        self._offered: Distribution | None = None
        """What the server gives out, as long as nothing goes wrong."""
        self.progress = Progress()

    async def run(self) -> None:
        """Takes a shard, or with `stays` as many as there are and have room.

        Raises:
            ProtocolError: the server is not what it says, or sends what is not in its manifest.
            DataError: the data do not fit the store, or no shard has room.
            NetworkError, StoreUnavailable: nothing worked for as long as patience lasts.
        """
        with _only_one(self._part):
            worked_s, failures = self._now_s(), 0
            while True:
                moved = self.progress.moved_bytes
                try:
                    if await self._take():
                        return self._say("finished")
                    worked_s, failures = self._now_s(), 0
                except (NetworkError, NotYours, StoreUnavailable) as error:
                    if self.progress.moved_bytes > moved:
                        worked_s, failures = self._now_s(), 0
                    self._offered = None
                    failures += 1
                    self.progress.failures += 1
                    self.progress.last_error = str(error)
                    if self._now_s() - worked_s > self._terms.patience_s:
                        raise
                    self._say("disk full" if isinstance(error, StoreUnavailable) else "reconnecting")
                    first, longest = BACK_OFF_S
                    await self._sleep(min(longest, first * 2.0 ** min(failures - 1, 10)))

    async def _take(self) -> bool:
        """One shard, or a wait for one; whether it is over."""
        offered = self._offered
        if offered is None:
            asked = pb.OfferRequest(ticket=self._terms.ticket, population=self._terms.population)
            offered = self._offered = self._verified(await self._link.offer(asked))
        await self._settle(offered)
        mine = self._mine(offered)
        if mine and not self._terms.stays:
            return self._over(f"the store has shard {min(mine)} of this push" if not self.progress.joined else "")
        room = self._room(offered, mine)
        answer = await self._link.claim(
            pb.ClaimRequest(ticket=self._terms.ticket, taker=self._taker(), root=offered.root, room_bytes=max(0, room))
        )
        match answer.WhichOneof("kind"):
            case "shard":
                if not answer.shard < len(offered.shards) or offered.size(answer.shard) > room:
                    raise ProtocolError(f"The server gives shard {answer.shard}, which was not asked for.")
                await self._fetch(offered, answer.shard)
                await self._join(offered, answer.shard)
                await self._settle(offered)
                return False
            case "wait_s":
                self._say("waiting")
                wait_s = answer.wait_s if isfinite(answer.wait_s) else LONGEST_WAIT_S
                await self._sleep(min(LONGEST_WAIT_S, max(0.05, wait_s)))
                return False
            case "too_large" if not mine:
                raise DataError(
                    f"No shard has room: the smallest of {len(offered.shards)} has {min(map(offered.size, range(len(offered.shards)))):,} bytes, "
                    f"this store takes {max(0, room):,} more (--most, and the store's own limits)."
                )
            case "too_large":
                return self._over("of the shards that are left none has room here")
            case "done":
                return self._over("every shard is held")
        raise ProtocolError("The server answers nothing that is known here: is it of a newer shoal?")

    def _over(self, why: str) -> bool:
        self.progress.why_over = why
        return True

    def _verified(self, reply: pb.OfferReply) -> Distribution:
        """The manifest, if it is signed by whom this device believes, and fits the store."""
        offered = Distribution.verified(reply.manifest, reply.signature, reply.key)
        name = f"key {self._terms.population}"
        trusted = self._terms.key or self._store.fact(name)
        if trusted is not None and trusted != reply.key:
            raise ProtocolError(
                f"The push is signed by {reply.key.hex()}, this device takes data of {trusted.hex()} alone. If that is right, give --key."
            )
        if offered.population != self._terms.population:
            raise ProtocolError(
                f"The push is for population {offered.population!r}, not {self._terms.population!r} (--population)."
            )
        held = self._store.spec()
        if held and (problem := difference(offered.spec, held)):
            raise DataError(
                f"The pushed examples do not fit those in {self._store.path}: {problem}. Take them into another store."
            )
        if self._store.fact(name) != reply.key:
            if trusted is None:
                log.warning("first use: from now on this store takes data of key %s alone", reply.key.hex())
            self._store.keep_fact(name, reply.key)
        return offered

    def _mine(self, offered: Distribution) -> dict[int, bool]:
        """Shards of this push that the store has, and whether the server has heard of it."""
        held = self._store.shards()
        return {n: held[id] for n in range(len(offered.shards)) if (id := offered.id(n)) in held}

    def _room(self, offered: Distribution, mine: Iterable[int]) -> int:
        """Bytes of this push that the device takes beside the shards that it has."""
        now = self._store.statistics()
        free = max(0.0, now.limits.most_examples(offered.spec) - now.examples)
        return int(min(self._terms.most_bytes - sum(map(offered.size, mine)), free * bytes_each(offered.spec)))

    def _taker(self) -> bytes:
        """This store's name towards servers, made once."""
        held = self._store.fact("taker")
        if held is None:
            held = os.urandom(TAKER_BYTES)
            self._store.keep_fact("taker", held)
        return held

    async def _settle(self, offered: Distribution) -> None:
        """Tells the server of shards that joined; takes out those that another device holds."""
        for number, is_confirmed in self._mine(offered).items():
            if is_confirmed:
                continue
            self._say("confirming")
            request = pb.HeldRequest(ticket=self._terms.ticket, taker=self._taker(), root=offered.root, shard=number)
            if (await self._link.held(request)).other:
                log.warning("shard %d is held by another device, which was faster: it leaves this store", number)
                self._store.leave(offered.id(number))
                self.progress.left += 1
                continue
            self._store.confirm(offered.id(number))
            self.progress.joined += 1
            self.progress.joined_bytes += offered.size(number)
            self.progress.examples += offered.shards[number].examples
        if (self._store.fact("part") or b"").decode() in self._store.shards():
            self._part.unlink(missing_ok=True)

    async def _fetch(self, offered: Distribution, number: int) -> None:
        """The shard's bytes, whole and right, into the part file."""
        shard, id = offered.shards[number], offered.id(number)
        is_new = self._store.fact("part") != id.encode()
        if is_new:
            self._part.unlink(missing_ok=True)
            self._store.keep_fact("part", id.encode())
        self.progress.shard_bytes = offered.size(number)
        with _explained(self._part), _opened(self._part) as file:
            begun = _last_whole_slice(offered.spec, shard.examples, file.seek(0, os.SEEK_END))
            file.truncate(begun)
            file.seek(begun)
            self.progress.got_bytes = begun
            self._say("fetching")
            if begun < offered.size(number):
                await self._pull(offered, number, begun, file)
            file.flush()
            os.fsync(file.fileno())
        self._say("checking")
        if await asyncio.to_thread(_hash_of, self._part) != shard.hash:
            self._part.unlink()
            if begun:  # a power cut may have left zeros in what was there before
                raise NetworkError(f"Shard {number} is not what its manifest says; it is fetched anew.")
            raise ProtocolError(f"The server sent a shard {number} that is not the one it signed.")

    async def _pull(self, offered: Distribution, number: int, begun: int, file: BinaryIO) -> None:
        expected = slices_from(offered.spec, offered.shards[number].examples, begun)
        request = pb.PullRequest(
            ticket=self._terms.ticket, taker=self._taker(), root=offered.root, shard=number, offset=begun
        )
        async for piece in self._link.pull(request):
            part = next(expected, None)
            if part is None or piece.offset != part.offset:
                raise ProtocolError(
                    f"The server sent a piece at {piece.offset} that shard {number} does not have there."
                )
            file.write(unpack(piece.data, part.dtype, part.size))
            self.progress.moved_bytes += piece.ByteSize()
            self.progress.got_bytes += part.size
            self._on_progress()
        if next(expected, None) is not None:
            raise NetworkError(f"The transfer of shard {number} ended early.")

    async def _join(self, offered: Distribution, number: int) -> None:
        self._say("joining")
        examples = offered.shards[number].examples
        blocks = _blocks(self._part, offered.spec, examples)
        await asyncio.to_thread(self._store.join, offered.id(number), examples, blocks)

    def _say(self, stage: str) -> None:
        self.progress.stage = stage
        self._on_progress()


def _last_whole_slice(spec: Spec, examples: int, have: int) -> int:
    """Where a transfer goes on."""
    ends = (part.offset + part.size for part in slices(spec, examples))
    return max((end for end in ends if end <= have), default=0)


def _blocks(path: Path, spec: Spec, examples: int) -> Iterator[dict[str, np.ndarray]]:
    """A shard's examples, some at a time; raises ProtocolError where a truth value is none."""
    arrays, at = {}, 0
    for name, (shape, dtype) in spec.items():
        held = DTYPES[dtype].newbyteorder("<")
        size = examples * prod(shape) * held.itemsize
        arrays[name] = (
            np.memmap(path, held, "r", offset=at, shape=(examples, *shape))
            if size
            else np.empty((examples, *shape), held)
        )
        at += size
    step = max(1, 4 * CHUNK_BYTES // max(1, bytes_each(spec)))
    for start in range(0, examples, step):
        block = {name: np.asarray(array[start : start + step]) for name, array in arrays.items()}
        for name, array in block.items():
            if array.dtype == bool and array.view(np.uint8).max(initial=0) > 1:
                raise ProtocolError(f"Expected bytes 0 and 1 in field {name!r}, which is bool.")
        yield block


def _hash_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _opened(path: Path) -> BinaryIO:
    return os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o600), "r+b")


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        kind = StoreUnavailable if error.errno in (errno.ENOSPC, errno.EDQUOT) else StoreError
        raise kind(f"Cannot write {path}: {error.strerror}. What was fetched before is kept.") from error


@contextmanager
def _only_one(part: Path) -> Iterator[None]:
    """One taker at a time for a store."""
    path = part.with_name(f"{part.name}.lock")
    with _opened(path) as file:
        try:
            lock_file(file.fileno())
        except OSError as error:
            raise StoreError(f"Another process takes data into {part.with_suffix('')}. End it, or take another --store.") from error  # fmt: skip
        yield
