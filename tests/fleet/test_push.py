"""Pushed shards: crashes between any two steps, servers that lie, takers that do."""

import asyncio
import json
from collections.abc import AsyncGenerator, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from shoal.codec.packed import pack
from shoal.data import Examples, ExampleStore, iid
from shoal.errors import DataError, NetworkError, ProtocolError, StoreError, StoreUnavailable
from shoal.fleet import distribution as distribution_module
from shoal.fleet.distribution import Distribution, Shard, slices, slices_from
from shoal.fleet.grpc_data import DataLink, DataServer
from shoal.fleet.push import NotAllowed, NotYours, Push, PushBook, prepare
from shoal.fleet.take import Taker, Terms
from shoal.fleet.wire import data_pb2 as pb
from tests.fleet import toy

NUM = 50


@pytest.fixture(autouse=True)
def _small_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distribution_module, "SLICE_BYTES", 64)


def data(num: int = NUM) -> Examples:
    numbers = np.arange(num, dtype=np.int32)
    return Examples({"x": np.repeat(numbers[:, None], 3, axis=1).astype(np.float32), "label": numbers})


def book_of(folder: Path, examples: Examples | None = None, shards: int = 2, population: str = "default") -> PushBook:
    book = PushBook(folder)
    if book.fact("manifest") is None:
        examples = examples or data()
        split = iid(len(examples), shards, rng=np.random.default_rng(0))
        prepare(book, "numbers", population, examples, split, asked=b"")
    return book


class Local:
    """A link without a wire: what is sent is read anew."""

    def __init__(self, push: Push, *, address: str = "here") -> None:
        self.push, self.address = push, address

    async def offer(self, request: pb.OfferRequest) -> pb.OfferReply:
        return pb.OfferReply.FromString(self.push.offer(request).SerializeToString())

    async def claim(self, request: pb.ClaimRequest) -> pb.ClaimReply:
        return pb.ClaimReply.FromString(self.push.claim(request, self.address).SerializeToString())

    async def pull(self, request: pb.PullRequest) -> AsyncGenerator[pb.Piece, None]:
        async for piece in self.push.pull(request):
            yield pb.Piece.FromString(piece.SerializeToString())

    async def held(self, request: pb.HeldRequest) -> pb.HeldReply:
        return pb.HeldReply.FromString(self.push.held(request).SerializeToString())


async def no_sleep(seconds: float) -> None:
    assert 0.0 <= seconds <= 60.0
    await asyncio.sleep(0)


def terms(push: Push, **changes: Any) -> Terms:
    return replace(Terms(ticket=push.ticket, key=push.key, patience_s=0.0), **changes)


def taker(store: ExampleStore, push: Push, link: Any = None, **changes: Any) -> Taker:
    return Taker(store, link or Local(push), terms(push, **changes), sleep=no_sleep)


def labels(*stores: ExampleStore) -> list[int]:
    found: list[int] = []
    for store in stores:
        examples = store.examples()
        assert examples.fields["x"][:, 1].tolist() == examples.fields["label"].tolist()
        found += examples.fields["label"].tolist()
    return sorted(found)


@toy.in_loop
async def test_shards_reach_stores_once_and_whole(tmp_path: Path) -> None:
    push = Push(book_of(tmp_path / "run"), patience_s=60.0)
    with ExampleStore(tmp_path / "a.examples") as a, ExampleStore(tmp_path / "b.examples") as b:
        first, second = taker(a, push), taker(b, push)
        await first.run()
        await second.run()
        assert push.dispatch.is_done and labels(a, b) == list(range(NUM)) and len(a) == len(b) == NUM // 2
        moved, again = push.statistics().sent_bytes, taker(a, push)
        await again.run()
        assert push.statistics().sent_bytes == moved and "has shard" in again.progress.why_over
        assert not list((tmp_path / "run" / "shards").iterdir()), "what is held is not kept twice"
        assert {file.suffix for file in tmp_path.glob("*.examples.*")} <= {".lock", ".examples-wal"}


@toy.in_loop
async def test_one_that_stays_takes_all_that_have_room(tmp_path: Path) -> None:
    push = Push(book_of(tmp_path / "run", shards=5), patience_s=60.0)
    with ExampleStore(tmp_path / "a.examples") as a, ExampleStore(tmp_path / "b.examples") as b:
        some = taker(a, push, stays=True, most_bytes=2 * push.distribution.size(0))
        await some.run()
        assert len(a) == 20 and "none has room" in some.progress.why_over
        rest = taker(b, push, stays=True)
        await rest.run()
        assert labels(a, b) == list(range(NUM)) and rest.progress.why_over == "every shard is held"


@toy.in_loop
async def test_one_that_waits_is_not_sent_the_manifest_again_and_hears_that_it_is_over(tmp_path: Path) -> None:
    push = Push(book_of(tmp_path / "run", shards=1), patience_s=60.0)
    offers, waits = list[int](), list[float]()
    with ExampleStore(tmp_path / "a.examples") as a, ExampleStore(tmp_path / "b.examples") as b:
        push.claim(
            pb.ClaimRequest(ticket=push.ticket, taker=bytes(16), root=push.distribution.root, room_bytes=1 << 30), "x"
        )
        link = Local(push)
        offer = link.offer

        async def counted(request: pb.OfferRequest) -> pb.OfferReply:
            offers.append(1)
            return await offer(request)

        async def wait(seconds: float) -> None:
            waits.append(seconds)
            if len(waits) == 5:
                push.dispatch.hold(0, bytes(16))
            await no_sleep(seconds)

        link.offer = counted  # type: ignore[method-assign]
        waiting = Taker(a, link, terms(push), sleep=wait)
        await waiting.run()
        assert len(offers) == 1 and waits == [1.0] * 5 and waiting.progress.why_over == "every shard is held"
        assert len(a) == len(b) == 0


# Crashes.


class Crash(BaseException):
    """A process is killed."""


class Points:
    """Kills at one point, of those before and after each step that leaves something behind."""

    def __init__(self, at: int) -> None:
        self.at, self.seen = at, 0

    def point(self) -> None:
        self.seen += 1
        if self.seen == self.at:
            raise Crash

    def wrap(self, thing: Any, *names: str) -> None:
        for name in names:
            setattr(thing, name, self._wrapped(getattr(thing, name)))

    def _wrapped(self, inner: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **named: Any) -> Any:
            self.point()
            made = inner(*args, **named)
            self.point()
            return made

        return call


async def one_life(folder: Path, points: Points) -> bool:
    """Server and two takers, until all is held or one of them is killed, and the others with it."""
    book = book_of(folder / "run")
    points.wrap(book, "claimed", "holds")
    stores = [ExampleStore(folder / f"{name}.examples") for name in "ab"]
    try:
        push = Push(book, patience_s=60.0)
        points.wrap(push, "offer", "claim", "pull", "held")
        for store in stores:
            points.wrap(store, "join", "confirm", "leave", "keep_fact")
            running = taker(store, push)
            running._on_progress = points.point
            await running.run()
        assert push.dispatch.is_done
        return True
    except Crash:
        return False
    finally:
        book.close()
        for store in stores:
            store._file.close()


@pytest.mark.parametrize("step", [pytest.param(1, marks=pytest.mark.slow), 29])
def test_a_crash_between_any_two_steps_loses_nothing_and_doubles_nothing(tmp_path: Path, step: int) -> None:
    at = 1
    while True:
        folder = tmp_path / str(at)
        book_of(folder / "run").close()
        if asyncio.run(one_life(folder, Points(at))):
            break
        assert asyncio.run(one_life(folder, Points(-1)))
        with ExampleStore(folder / "a.examples") as a, ExampleStore(folder / "b.examples") as b:
            assert labels(a, b) == list(range(NUM)), f"after a crash at point {at}"
            assert list(a.shards().values()) == list(b.shards().values()) == [True]
        at += step
    assert at > 40


def test_a_preparation_that_is_cut_off_is_begun_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(PushBook, "keep", lambda self, facts: (_ for _ in ()).throw(Crash()))
        with pytest.raises(Crash):
            book_of(tmp_path / "run")
    push = Push(book_of(tmp_path / "run", shards=3), patience_s=60.0)
    assert len(push.distribution.shards) == 3 and len(list((tmp_path / "run" / "shards").iterdir())) == 3


class Breaking(Local):
    """Breaks off after some pieces."""

    def __init__(self, push: Push, *, after: int, error: Exception) -> None:
        super().__init__(push)
        self.left, self.error, self.offsets = after, error, list[int]()

    async def pull(self, request: pb.PullRequest) -> AsyncGenerator[pb.Piece, None]:
        self.offsets.append(request.offset)
        async for piece in super().pull(request):
            if self.left == 0:
                self.left -= 1
                raise self.error
            self.left -= 1
            yield piece


@toy.in_loop
async def test_a_broken_transfer_goes_on_where_it_broke_also_over_a_restart(tmp_path: Path) -> None:
    push = Push(book_of(tmp_path / "run"), patience_s=60.0)
    with ExampleStore(tmp_path / "a.examples") as store:
        broken = Breaking(push, after=3, error=NetworkError("broke"))
        with pytest.raises(NetworkError, match="broke"):
            await taker(store, push, broken, patience_s=-1.0).run()
        with (tmp_path / "a.examples.part").open("ab") as part:
            part.write(b"half a sl")
        again = Breaking(push, after=-1, error=NetworkError("broke"))
        await taker(store, push, again).run()
        assert again.offsets == [3 * 64] and len(store) == NUM // 2
        sent = push.statistics().sent_bytes
        assert sent < 1.3 * push.distribution.size(0)


@toy.in_loop
async def test_zeros_that_a_power_cut_left_are_fetched_anew(tmp_path: Path) -> None:
    push = Push(book_of(tmp_path / "run"), patience_s=60.0)
    with ExampleStore(tmp_path / "a.examples") as store:
        store.keep_fact("part", push.distribution.id(0).encode())
        (tmp_path / "a.examples.part").write_bytes(bytes(128))
        running = taker(store, push, patience_s=60.0)
        await running.run()
        assert len(store) == NUM // 2 and "fetched anew" in running.progress.last_error


@toy.in_loop
async def test_a_full_disk_is_waited_for_and_what_was_fetched_is_kept(tmp_path: Path) -> None:
    push = Push(book_of(tmp_path / "run"), patience_s=60.0)
    with ExampleStore(tmp_path / "a.examples") as store:
        join, tries = store.join, list[int]()

        def full(*args: Any) -> None:
            tries.append(1)
            if len(tries) < 3:
                raise StoreUnavailable("No space left.")
            join(*args)

        store.join = full  # type: ignore[method-assign]
        running = taker(store, push, patience_s=60.0)
        await running.run()
        assert len(store) == NUM // 2 and running.progress.failures == 2
        assert running.progress.moved_bytes == push.statistics().sent_bytes < 1.3 * push.distribution.size(0)


@toy.in_loop
async def test_a_server_whose_disk_is_full_does_not_say_that_a_shard_is_held(tmp_path: Path) -> None:
    book = book_of(tmp_path / "run", shards=1)
    push = Push(book, patience_s=60.0)
    holds, tries = book.holds, list[bool]()

    def full(shard: int, who: bytes) -> None:
        tries.append(push.dispatch.is_done)
        if len(tries) < 3:
            raise NetworkError("unavailable: No space left.")  # as a StoreError arrives
        holds(shard, who)

    book.holds = full  # type: ignore[method-assign]
    with ExampleStore(tmp_path / "a.examples") as store:
        await taker(store, push, patience_s=60.0).run()
        assert tries == [False] * 3 and book.held() == {0: store.fact("taker")} and len(store) == NUM


@toy.in_loop
async def test_one_that_comes_back_too_late_leaves_what_another_holds(tmp_path: Path) -> None:
    now_s = [0.0]
    push = Push(book_of(tmp_path / "run", shards=1), patience_s=60.0, now_s=lambda: now_s[0])
    with ExampleStore(tmp_path / "a.examples") as a, ExampleStore(tmp_path / "b.examples") as b:
        deaf = Local(push)

        async def gone(request: pb.HeldRequest) -> pb.HeldReply:
            raise NetworkError("broke")

        deaf.held = gone  # type: ignore[method-assign]
        with pytest.raises(NetworkError):
            await taker(a, push, deaf, patience_s=-1.0).run()
        assert len(a) == NUM
        now_s[0] = 61.0
        await taker(b, push).run()
        late = taker(a, push)
        await late.run()
        assert labels(b) == list(range(NUM)) and len(a) == 0 and a.shards() == {}
        assert late.progress.left == 1 and push.statistics().duplicates == 1


# Servers that lie.


class Lying(Local):
    """Changes answers."""

    def __init__(self, push: Push, **changes: Callable[[Any], Any]) -> None:
        super().__init__(push)
        self.changes = changes

    async def offer(self, request: pb.OfferRequest) -> pb.OfferReply:
        return self.changes.get("offer", lambda x: x)(await super().offer(request))  # type: ignore[no-any-return]

    async def claim(self, request: pb.ClaimRequest) -> pb.ClaimReply:
        return self.changes.get("claim", lambda x: x)(await super().claim(request))  # type: ignore[no-any-return]

    async def pull(self, request: pb.PullRequest) -> AsyncGenerator[pb.Piece, None]:
        change = self.changes.get("piece", lambda x: x)
        pieces = [change(piece) async for piece in super().pull(request)]
        for piece in self.changes.get("pieces", lambda x: x)(pieces):
            yield piece


def signed(made: Distribution, key: Ed25519PrivateKey | None = None) -> Callable[[pb.OfferReply], pb.OfferReply]:
    """An offer of another manifest."""
    key = key or toy.KEYS.signing

    def change(reply: pb.OfferReply) -> pb.OfferReply:
        public = key.public_key().public_bytes_raw()
        return pb.OfferReply(manifest=made.data, signature=made.sign(key), key=public)

    return change


def zeros(piece: pb.Piece) -> pb.Piece:
    """As long as what is there: 25 examples are 300 bytes of one field, then 100 of the other."""
    size = min(64, (300 if piece.offset < 300 else 400) - piece.offset)
    return pb.Piece(offset=piece.offset, data=pack(bytes(size), "float32"))


def bomb(piece: pb.Piece) -> pb.Piece:
    return pb.Piece(offset=piece.offset, data=pack(bytes(1 << 20), "float32"))


def moved(piece: pb.Piece) -> pb.Piece:
    return pb.Piece(offset=piece.offset + 4, data=piece.data)


LIES: list[tuple[str, dict[str, Callable[[Any], Any]]]] = [
    ("not the one it signed", {"piece": zeros}),
    ("Expected", {"piece": bomb}),
    ("does not have there", {"piece": moved}),
    ("does not have there", {"pieces": lambda pieces: [*pieces, *pieces]}),
    ("ended early", {"pieces": lambda pieces: pieces[:-1]}),
    ("not signed by the key", {"offer": lambda reply: pb.OfferReply(manifest=reply.manifest + b" ", signature=reply.signature, key=reply.key)}),
    ("at most", {"offer": lambda reply: pb.OfferReply(manifest=bytes(1 << 21), signature=reply.signature, key=reply.key)}),
    ("takes data of", {"offer": lambda reply: signed(Distribution.verified(reply.manifest, reply.signature, reply.key))(reply)}),
    ("which was not asked for", {"claim": lambda reply: pb.ClaimReply(shard=7)}),
    ("nothing that is known", {"claim": lambda reply: pb.ClaimReply()}),
]  # fmt: skip


@pytest.mark.parametrize(("line", "changes"), LIES, ids=range(len(LIES)))
@toy.in_loop
async def test_a_server_that_lies_puts_nothing_into_the_store(
    tmp_path: Path, line: str, changes: dict[str, Callable[[Any], Any]]
) -> None:
    push = Push(book_of(tmp_path / "run"), patience_s=60.0)
    with ExampleStore(tmp_path / "a.examples") as store:
        store.add({name: array[:1] for name, array in data().fields.items()})
        with pytest.raises((ProtocolError, NetworkError), match=line):
            await taker(store, push, Lying(push, **changes), patience_s=-1.0).run()
        assert len(store) == 1 and store.shards() == {} and not push.dispatch.num_held
        part = tmp_path / "a.examples.part"
        assert not part.exists() or part.stat().st_size <= push.distribution.size(0)


@toy.in_loop
async def test_a_key_is_believed_at_first_use_and_no_other_afterwards(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    push, other = (Push(book_of(tmp_path / name), patience_s=60.0) for name in ("run", "other"))
    with ExampleStore(tmp_path / "a.examples") as store:
        await taker(store, push, key=None).run()
        assert "first use" in caplog.text and push.key.hex() in caplog.text
        with pytest.raises(ProtocolError, match=r"takes data of .* alone"):
            await taker(store, other, key=None, stays=True).run()


@toy.in_loop
async def test_data_that_do_not_fit_are_not_fetched(tmp_path: Path) -> None:
    push = Push(book_of(tmp_path / "run"), patience_s=60.0)
    cases: list[tuple[str, dict[str, Any], dict[str, Any], Any]] = [
        ("field 'x'", {}, {}, {"x": np.zeros((1, 4), np.float32), "label": np.zeros(1, np.int32)}),
        ("No shard has room", {"most_bytes": 100}, {}, None),
        ("No shard has room", {}, {"max_examples": NUM // 2 - 1}, None),
        ("No shard has room", {}, {"max_bytes": 100}, None),
        ("is for population", {"population": "other"}, {}, None),
    ]
    for number, (line, changes, limits, held) in enumerate(cases):
        with ExampleStore(tmp_path / f"{number}.examples", **limits) as store:
            if held:
                store.add(held)
            with pytest.raises((DataError, ProtocolError), match=line):
                await taker(store, push, **changes).run()
            assert store.shards() == {}
    assert push.statistics().sent_bytes == 0


@pytest.mark.parametrize(
    "change",
    [
        {"format": "shoal-data/2"}, {"shards": []}, {"shards": [["x", 3]]}, {"shards": [["0" * 64, 0]]}, {"shards": [["0" * 64, 1 << 50]]},
        {"spec": []}, {"spec": [["x", [-1], "float32"]]}, {"spec": [["x", [3], "object"]]}, {"spec": [["x", [1 << 40, 1 << 40], "int8"]]},
        {"spec": [["x", [3], "float32"], ["x", [4], "float32"]]},
        {"spec": [["x", [0], "float32"]]}, {"name": "x" * 300}, {"population": 3}, {"more": 1},
    ],
    ids=str,
)  # fmt: skip
def test_a_manifest_that_is_none_is_refused(change: dict[str, Any]) -> None:
    good = Distribution("n", "p", {"x": ((3,), "float32")}, (Shard("0" * 64, 3),))
    key = toy.KEYS.signing
    bad = json.dumps(json.loads(good.data) | change, sort_keys=True, separators=(",", ":")).encode()
    with pytest.raises(ProtocolError, match="The manifest"):
        Distribution.verified(bad, key.sign(b"shoal data v1\0" + bad), key.public_key().public_bytes_raw())


def test_slices_cover_a_shard_and_offsets_within_one_are_refused() -> None:
    spec = {"a": ((5,), "float64"), "b": ((), "uint8"), "none": ((0,), "int32"), "c": ((3,), "bool")}
    cut = list(slices(spec, 7))
    assert [part.offset for part in cut] == [0, *np.cumsum([part.size for part in cut])[:-1]]
    assert sum(part.size for part in cut) == 7 * 44
    for part in cut:
        assert next(slices_from(spec, 7, part.offset)) == part
        with pytest.raises(ProtocolError, match="a slice begins"):
            list(slices_from(spec, 7, part.offset + 1 if part.size > 1 else 10**9))
    assert list(slices_from(spec, 7, 7 * 44)) == []


# Takers that lie.


@toy.in_loop
async def test_takers_that_lie_get_a_clear_no(tmp_path: Path) -> None:
    push = Push(book_of(tmp_path / "run"), patience_s=60.0)
    good = {"ticket": push.ticket, "taker": bytes(16), "root": push.distribution.root}
    with pytest.raises(NotAllowed, match="ticket"):
        push.offer(pb.OfferRequest(ticket=bytes(16), population="default"))
    with pytest.raises(NotAllowed, match="ticket"):
        push.claim(pb.ClaimRequest(ticket=b"", taker=bytes(16), root=push.distribution.root), "here")
    with pytest.raises(ProtocolError, match="is for population 'default', not 'cars'"):
        push.offer(pb.OfferRequest(ticket=push.ticket, population="cars"))
    with pytest.raises(ProtocolError, match="16 bytes"):
        push.claim(pb.ClaimRequest(**{**good, "taker": b"x"}), "here")
    with pytest.raises(ProtocolError, match="something else by now"):
        push.claim(pb.ClaimRequest(**{**good, "root": bytes(32)}), "here")
    with pytest.raises(NotYours, match="not claimed"):
        [piece async for piece in push.pull(pb.PullRequest(**good, shard=1))]
    with pytest.raises(ProtocolError, match="from 0 to 1"):
        [piece async for piece in push.pull(pb.PullRequest(**good, shard=2))]
    with pytest.raises(NotYours, match="never claimed"):
        push.held(pb.HeldRequest(**good, shard=0))
    push.claim(pb.ClaimRequest(**good, room_bytes=10**9), "here")
    with pytest.raises(ProtocolError, match="a slice begins"):
        [piece async for piece in push.pull(pb.PullRequest(**good, shard=0, offset=3))]


def test_a_store_has_one_taker_at_a_time(tmp_path: Path) -> None:
    from shoal.fleet.take import _only_one

    with (
        _only_one(tmp_path / "a.part"),
        pytest.raises(StoreError, match="Another process"),
        _only_one(tmp_path / "a.part"),
    ):
        pass


# The wire.


@pytest.mark.integration
@toy.in_loop
async def test_over_the_wire_errors_keep_their_kinds_and_a_server_that_restarts_is_found_again(tmp_path: Path) -> None:
    book = book_of(tmp_path / "run", data(1500))
    push = Push(book, patience_s=60.0)
    server = DataServer(push, address="127.0.0.1:0")
    await server.start()
    address = f"127.0.0.1:{server.port}"
    link = DataLink(address)
    try:
        with pytest.raises(NotAllowed):
            await link.offer(pb.OfferRequest(ticket=bytes(16), population="default"))
        with pytest.raises(ProtocolError, match="is for population"):
            await link.offer(pb.OfferRequest(ticket=push.ticket, population="cars"))
        good = {"ticket": push.ticket, "taker": bytes(16), "root": push.distribution.root}
        with pytest.raises(NotYours):
            [piece async for piece in link.pull(pb.PullRequest(**good, shard=0))]
        with pytest.raises(NetworkError):  # larger than anything a taker has to say
            await link.claim(pb.ClaimRequest(**good | {"taker": bytes(1 << 16)}))
        with ExampleStore(tmp_path / "a.examples") as a, ExampleStore(tmp_path / "b.examples") as b:
            first, second = (Taker(store, link, terms(push, patience_s=20.0)) for store in (a, b))
            running = asyncio.gather(first.run(), second.run())
            while not first.progress.got_bytes:
                await asyncio.sleep(0)
            await server.close(grace_s=0.0)
            push = Push(book, patience_s=60.0)
            server = DataServer(push, address=address)
            await server.start()
            await running
            assert first.progress.failures and push.dispatch.is_done and labels(a, b) == list(range(1500))
    finally:
        await link.close()
        await server.close(grace_s=0.0)
