"""The folder of a push, and the calls of takers: what `shoal data push` is without its wire.

In the folder: the key that signs (`host.key`), the shards' bytes until they are held, and the book (`push.sqlite`: the signed manifest, the
ticket, who claimed and who holds which shard). Every entry is on the disk before a taker is told. After a crash at any point the same folder
goes on: shards are written first, the manifest makes them a push; a shard's bytes are deleted after the book says who holds it.
"""

import asyncio
import hashlib
import hmac
import os
import shutil
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final, final

import numpy as np

from shoal.codec.packed import pack
from shoal.data.store import Examples
from shoal.errors import NetworkError, ProtocolError, StoreError, StoreUnavailable
from shoal.fleet.dispatch import PAST_KEPT, Dispatch
from shoal.fleet.distribution import Distribution, Shard, slices_from
from shoal.fleet.keys import HostKeys
from shoal.fleet.wire import data_pb2 as pb
from shoal.record.private_file import PrivateFile
from shoal.tensors import DTYPES, to_bytes

FILE_NAME: Final = "push.sqlite"
SHARDS: Final = "shards"
TICKET_BYTES: Final = 16
TAKER_BYTES: Final = 16
WAIT_S: Final = 1.0
"""After which one for whom there is no shard yet is to ask again."""
_SCHEMA: Final = """
CREATE TABLE fact (name TEXT PRIMARY KEY, value BLOB NOT NULL) WITHOUT ROWID;
CREATE TABLE held (shard INTEGER PRIMARY KEY, taker BLOB NOT NULL);
CREATE TABLE past (number INTEGER PRIMARY KEY, shard INTEGER NOT NULL, taker BLOB NOT NULL);
"""
_CHUNK_BYTES: Final = 8 << 20


class NotYours(ProtocolError):
    """The shard is not claimed by this taker any more: it may claim another."""


class NotAllowed(ProtocolError):
    """The ticket is not that of this push."""


@final
class PushBook:
    """What is known of a push, on the disk."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._file = PrivateFile(
            folder / FILE_NAME, kind="push book", application_id=0x53685075, version=1, schema=_SCHEMA
        )

    def close(self) -> None:
        """Nothing can be asked of it afterwards."""
        self._file.close()

    def fact(self, name: str) -> bytes | None:
        """What was kept under a name."""
        with self._file.reading() as db:
            row = db.execute("SELECT value FROM fact WHERE name = ?", (name,)).fetchone()
        return None if row is None else bytes(row[0])

    def keep(self, facts: Mapping[str, bytes]) -> None:
        """Keeps values under their names, all or none."""
        with self._file.writing() as db:
            db.executemany("INSERT OR REPLACE INTO fact VALUES (?, ?)", facts.items())

    def held(self) -> dict[int, bytes]:
        """Shard -> who holds it."""
        with self._file.reading() as db:
            return {int(shard): bytes(taker) for shard, taker in db.execute("SELECT shard, taker FROM held")}

    def past(self) -> list[tuple[int, bytes]]:
        """Claims in their order, also those that lapsed."""
        with self._file.reading() as db:
            return [(int(shard), bytes(taker)) for shard, taker in db.execute("SELECT shard, taker FROM past ORDER BY number")]  # fmt: skip

    def claimed(self, shard: int, taker: bytes, *, kept: int) -> None:
        """A taker has claimed a shard; of the claims to it the newest are kept."""
        with self._file.writing() as db:
            db.execute("DELETE FROM past WHERE shard = ? AND taker = ?", (shard, taker))
            db.execute("INSERT INTO past (shard, taker) VALUES (?, ?)", (shard, taker))
            db.execute(
                "DELETE FROM past WHERE shard = ? AND number NOT IN (SELECT number FROM past WHERE shard = ? ORDER BY number DESC LIMIT ?)",
                (shard, shard, kept),
            )

    def holds(self, shard: int, taker: bytes) -> None:
        """A taker holds a shard."""
        with self._file.writing() as db:
            db.execute("INSERT OR IGNORE INTO held VALUES (?, ?)", (shard, taker))


def prepare(
    book: PushBook,
    name: str,
    population: str,
    examples: Examples,
    split: Mapping[str, np.ndarray],
    *,
    asked: bytes,
    on_progress: Callable[[int], None] = lambda shards: None,
) -> None:
    """Cuts data into shards, in the book's folder; the book has a push when it returns, and none before.

    Args:
        name: what the data are called.
        population: of the devices that are to have them.
        examples: the data.
        split: any name -> indices of a shard's examples.
        asked: what the push was asked for, kept as the fact "asked".

    Raises:
        ValueError: the data cannot be given out.
        StoreUnavailable: the disk is full.
    """
    spec = examples.spec()
    if strange := [dtype for _, dtype in spec.values() if dtype not in DTYPES]:
        raise ValueError(f"Expected numbers of {' | '.join(DTYPES)}, got {strange[0]}.")
    folder = book.folder / SHARDS
    with _told_of_the_disk(folder):
        shutil.rmtree(folder, ignore_errors=True)  # of a preparation that was cut off
        folder.mkdir(parents=True, mode=0o700)
        made = []
        for number, indices in enumerate(split.values()):
            made.append(_write_shard(folder / str(number), examples, np.sort(indices)))
            on_progress(number + 1)
        _sync_folder(folder)
    distribution = Distribution(name, population, spec, tuple(made))
    signature = distribution.sign(HostKeys.load_or_make(book.folder).signing)
    facts = {
        "manifest": distribution.data,
        "signature": signature,
        "ticket": os.urandom(TICKET_BYTES),
        "asked": asked,
    }
    book.keep(facts)


def _write_shard(path: Path, examples: Examples, indices: np.ndarray) -> Shard:
    digest = hashlib.sha256()
    with path.open("wb") as file:
        for array in examples.fields.values():
            step = max(1, _CHUNK_BYTES // max(1, array[:1].nbytes))
            for start in range(0, len(indices), step):
                data = to_bytes(array[indices[start : start + step]])
                digest.update(data)
                file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return Shard(digest.hexdigest(), len(indices))


def _sync_folder(folder: Path) -> None:
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextmanager
def _told_of_the_disk(where: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StoreUnavailable(
            f"Cannot write shards to {where}: {error.strerror}. They take as much room as the data; choose another --run folder."
        ) from error


@dataclass(frozen=True, kw_only=True, slots=True)
class PushStatistics:
    """How far a push is."""

    shards: int
    held: int
    claimed: int
    """On their way."""
    size_bytes: int
    """Of all shards."""
    held_bytes: int
    """Of those that are held."""
    sent_bytes: int
    """Messages with pieces, in this process."""
    duplicates: int
    """Shards that a taker was told to leave, as another held them."""


@final
class Push:
    """Answers takers. All methods belong to one event loop; files are read in threads."""

    def __init__(self, book: PushBook, *, patience_s: float, now_s: Callable[[], float] = time.monotonic) -> None:
        """
        Args:
            book: of a push that `prepare` made.
            patience_s: how long a claim lasts without a word of its taker.
            now_s: a clock that only rises.

        Raises:
            StoreError: the book has no push.
        """
        manifest, signature, ticket = (book.fact(name) for name in ("manifest", "signature", "ticket"))
        if manifest is None or signature is None or ticket is None:
            raise StoreError(f"There is no push in {book.folder}.")
        self.ticket, self.key = ticket, HostKeys.load_or_make(book.folder).public
        self.distribution = Distribution.verified(manifest, signature, self.key)
        self._book, self._signature, self._now_s = book, signature, now_s
        sizes = [self.distribution.size(number) for number in range(len(self.distribution.shards))]
        self.dispatch = Dispatch(sizes, patience_s=patience_s, now_s=now_s(), held=book.held(), past=book.past())
        self._sent_bytes = self._duplicates = 0
        self.changed = asyncio.Event()
        """Set when a shard is held."""
        for shard in book.held():
            self._path(shard).unlink(missing_ok=True)

    def statistics(self) -> PushStatistics:
        """How far it is."""
        held = [shard for shard, (state, _) in self.dispatch.snapshot().items() if state == "held"]
        return PushStatistics(
            shards=len(self.distribution.shards), held=len(held), claimed=self.dispatch.num_claimed,
            size_bytes=self.distribution.size_bytes, held_bytes=sum(map(self.distribution.size, held)),
            sent_bytes=self._sent_bytes, duplicates=self._duplicates,
        )  # fmt: skip

    def offer(self, request: pb.OfferRequest) -> pb.OfferReply:
        """The manifest. Raises NotAllowed or ProtocolError."""
        self._check_ticket(request.ticket)
        if request.population != self.distribution.population:
            raise ProtocolError(
                f"This push is for population {self.distribution.population!r}, not {request.population[:80]!r} (--population)."
            )
        return pb.OfferReply(manifest=self.distribution.data, signature=self._signature, key=self.key)

    def claim(self, request: pb.ClaimRequest, address: str) -> pb.ClaimReply:
        """A shard. Raises NotAllowed or ProtocolError."""
        self._check(request)
        if self.dispatch.is_done:
            return pb.ClaimReply(done=True, held=self.dispatch.num_held)
        found = self.dispatch.claim(request.taker, address, room_bytes=request.room_bytes, now_s=self._now_s())
        if found == "wait":
            return pb.ClaimReply(wait_s=WAIT_S, held=self.dispatch.num_held)
        if found == "too large":
            return pb.ClaimReply(too_large=True, held=self.dispatch.num_held)
        self._book.claimed(found, request.taker, kept=PAST_KEPT)
        return pb.ClaimReply(shard=found, held=self.dispatch.num_held)

    async def pull(self, request: pb.PullRequest) -> AsyncGenerator[pb.Piece, None]:
        """The rest of a claimed shard. Raises NotYours, NotAllowed or ProtocolError."""
        shard = self._check_shard(request)
        spec, examples = self.distribution.spec, self.distribution.shards[shard].examples
        for dtype, offset, size in slices_from(spec, examples, request.offset):
            if not self.dispatch.touch(shard, request.taker, now_s=self._now_s()):
                raise NotYours(f"Shard {shard} is not claimed by this device any more.")
            data = await asyncio.to_thread(self._packed, shard, dtype, offset, size)
            piece = pb.Piece(offset=offset, data=data)
            self._sent_bytes += piece.ByteSize()
            yield piece

    def held(self, request: pb.HeldRequest) -> pb.HeldReply:
        """A taker has a shard in its store. Raises NotYours, NotAllowed or ProtocolError."""
        shard = self._check_shard(request)
        outcome = self.dispatch.may_hold(shard, request.taker)
        if outcome == "stranger":
            raise NotYours(f"Shard {shard} was never claimed by this device.")
        if outcome == "held":
            self._book.holds(shard, request.taker)
            self.dispatch.hold(shard, request.taker)
            self._path(shard).unlink(missing_ok=True)
            self.changed.set()
        else:
            self._duplicates += 1
        return pb.HeldReply(other=outcome == "other", held=self.dispatch.num_held)

    def _path(self, shard: int) -> Path:
        return self._book.folder / SHARDS / str(shard)

    def _packed(self, shard: int, dtype: str, offset: int, size: int) -> bytes:
        try:
            with self._path(shard).open("rb") as file:
                file.seek(offset)
                data = file.read(size)
        except OSError as error:
            raise NetworkError(f"Shard {shard} cannot be read here: {error.strerror}.") from error
        if len(data) != size:
            raise NetworkError(f"Shard {shard} is cut off on the server's disk: begin the push anew in another folder.")
        return pack(data, dtype)

    def _check_ticket(self, ticket: bytes) -> None:
        if not hmac.compare_digest(ticket, self.ticket):
            raise NotAllowed("The ticket is not that of this push: take --ticket as `shoal data push` prints it.")

    def _check(self, request: pb.ClaimRequest | pb.PullRequest | pb.HeldRequest) -> None:
        self._check_ticket(request.ticket)
        if len(request.taker) != TAKER_BYTES:
            raise ProtocolError(f"Expected a taker of {TAKER_BYTES} bytes, got {len(request.taker)}.")
        if request.root != self.distribution.root:
            raise ProtocolError("This server pushes something else by now: ask for its offer again.")

    def _check_shard(self, request: pb.PullRequest | pb.HeldRequest) -> int:
        self._check(request)
        if request.shard >= len(self.distribution.shards):
            raise ProtocolError(f"Expected a shard from 0 to {len(self.distribution.shards) - 1}, got {request.shard}.")
        return request.shard
