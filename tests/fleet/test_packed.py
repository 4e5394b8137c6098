"""Slices on the wire in fewer bytes: for those who ask, to the bit, and against those who lie about them."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from shoal.codec.packed import pack, unpack
from shoal.codec.rounding import BLOCK, Rounding, rounded
from shoal.errors import ProtocolError, StoreError
from shoal.fleet import updates
from shoal.fleet.group_sums import _machine
from shoal.fleet.link import LocalLink
from shoal.fleet.offer import Offer
from shoal.fleet.packed_slices import SLICE_BYTES, PackedSlices, Readable
from shoal.fleet.sent import SentBlobs
from shoal.fleet.wire import fleet_pb2 as pb
from shoal.record.memory import MemoryStore
from shoal.record.tensor_blobs import put_tensors
from shoal.tensors import Index, sha256
from tests.fleet import toy
from tests.fleet.test_fleet import BIG, honest_two, stream_of


class TellingLink(LocalLink):
    """Notes what is pulled; an Edge of before knows nothing of packed slices."""

    def __init__(self, fleet: toy.Fleet, *, is_old: bool = False) -> None:
        super().__init__(fleet.host.edge)
        self.is_old, self.pulled = is_old, list[tuple[pb.PullRequest, list[pb.Slice]]]()

    async def pull(self, request: pb.PullRequest) -> AsyncIterator[pb.Slice]:  # type: ignore[override]
        if self.is_old:
            request.packed, request.base = False, ""
        slices: list[pb.Slice] = []
        self.pulled.append((request, slices))
        async for piece in super().pull(request):
            slices.append(piece)
            yield piece


@toy.in_loop
async def test_a_second_version_comes_as_the_difference_to_the_first() -> None:
    async with toy.fleet(toy.plan(toy.exact("a"), BIG), rounds=3) as fleet:
        link = TellingLink(fleet)
        fleet.start(toy.device("a", link, runner=toy.RandomRunner))
        await asyncio.gather(*fleet.tasks)
    based = [slices for request, slices in link.pulled if request.base]
    assert based and any(piece.is_delta for slices in based for piece in slices)
    assert all(piece.unpacked for _, slices in link.pulled for piece in slices if piece.data)


@toy.in_loop
async def test_who_does_not_ask_for_packed_slices_gets_them_as_they_are() -> None:
    async with toy.fleet(toy.plan(toy.exact("a", "b"), BIG), rounds=2) as fleet:
        old = TellingLink(fleet, is_old=True)
        fleet.start(toy.device("a", old, value=1.0), toy.device("b", fleet.link, value=2.0))
        await asyncio.gather(*fleet.tasks)
        assert not any(piece.unpacked for _, slices in old.pulled for piece in slices)
        np.testing.assert_array_equal(fleet.model["params/big"], np.full(700_000, 3.0, np.float32))


@pytest.mark.parametrize(
    ("data", "unpacked", "line"),
    [
        (b"\x08\x04nonsense", 4000, "ends within a stream"),
        (pack(bytes(4000), "float32"), 8000, "stream of"),
        (pack(bytes(4000), "float32"), 3999, "whole elements"),
        (pack(bytes(4000), "float32"), 1 << 40, "slices of at most 1048576 bytes"),
        (pack(np.full(1000, np.nan, np.float32).tobytes(), "float32"), 4000, "NaN"),
        (pack(np.ones(1000, np.float32).tobytes(), "float32", bytes(4000)), 4000, "stands for itself"),
    ],
)
@toy.in_loop
async def test_a_bad_packed_slice_is_refused_at_once(data: bytes, unpacked: int, line: str) -> None:
    made = toy.plan(toy.RoundPolicy(goal=2, minimum_group=2, over_selection=1.5), BIG)
    async with toy.fleet(made) as fleet, toy.peer(fleet.link) as peer:
        honest_two(fleet)
        token = (await peer.assigned()).token
        part = pb.PushSlice(token=token, tensor="delta/params/big", data=data, unpacked=unpacked)
        with pytest.raises(ProtocolError, match=line):
            await fleet.link.push(stream_of(part))
        kind, refused = await peer.hear()
        assert kind == "refused" and line in refused.detail
        await asyncio.wait_for(fleet.tasks[0], timeout=15)


class CountingBlobs:
    """Bytes by hash, some of which go away."""

    def __init__(self, *pieces: bytes) -> None:
        self.held = {sha256(piece): piece for piece in pieces}
        self.reads = 0

    def get(self, hash: str) -> bytes:
        return self.held[hash]

    def read(self, hash: str, offset: int, size: int) -> bytes:
        self.reads += 1
        if hash not in self.held:
            raise StoreError("it is gone")
        return self.held[hash][offset : offset + size]

    def size(self, hash: str) -> int:
        return len(self.held[hash])


@toy.in_loop
async def test_many_who_ask_at_once_cost_one_packing() -> None:
    values = np.random.default_rng(0).normal(size=SLICE_BYTES // 4).astype(np.float32)
    blobs = CountingBlobs(values.tobytes())
    slices, hash = PackedSlices(blobs), sha256(values.tobytes())
    made = await asyncio.gather(*(slices.get(hash, "float32", 0, SLICE_BYTES) for _ in range(50)))
    assert blobs.reads == 1 and len({data for data, _ in made}) == 1
    assert unpack(made[0][0], "float32", SLICE_BYTES) == values.tobytes()


@toy.in_loop
async def test_what_is_kept_of_packed_slices_is_bounded() -> None:
    pieces = [np.random.default_rng(seed).bytes(50_000) for seed in range(20)]
    slices = PackedSlices(CountingBlobs(*pieces), kept_bytes=120_000)
    for piece in pieces:
        await slices.get(sha256(piece), "uint8", 0, len(piece))
    assert sum(map(len, slices._made.values())) <= 120_000


@toy.in_loop
async def test_a_base_that_is_gone_is_no_base() -> None:
    now, before = (np.random.default_rng(seed).normal(size=1000).astype(np.float32).tobytes() for seed in (1, 2))
    slices = PackedSlices(CountingBlobs(now))
    data, is_delta = await slices.get(sha256(now), "float32", 0, len(now), base=sha256(before))
    assert not is_delta and unpack(data, "float32", len(now)) == now


def offer_of(tensors: dict[str, np.ndarray], blobs: Readable, *, bases: dict[str, str] | None = None) -> Offer:
    plan = toy.plan(toy.exact("a"), BIG)
    return Offer(plan, Index.of(tensors), blobs, PackedSlices(blobs), bases=bases or {})


async def pulled(offer: Offer, hash: str, **settings: Any) -> list[pb.Slice]:
    return [piece async for piece in offer.pull(pb.PullRequest(hash=hash, packed=True, **settings))]


@toy.in_loop
async def test_bytes_of_several_types_come_as_they_are() -> None:
    zeros = {"params/a": np.zeros(64, np.float32), "params/b": np.zeros(128, np.float16)}
    offer = offer_of(zeros, CountingBlobs(bytes(256)))
    (piece,) = await pulled(offer, sha256(bytes(256)))
    assert not piece.unpacked and piece.data == bytes(256)


@toy.in_loop
async def test_only_the_same_tensor_of_another_version_is_a_base() -> None:
    now, before = (np.random.default_rng(1).normal(size=5000).astype(np.float32) + x for x in (0.0, 1e-6))
    blobs = CountingBlobs(now.tobytes(), before.tobytes())
    for name, is_delta in (("params/w", True), ("params/other", False)):
        offer = offer_of({"params/w": now}, blobs, bases={sha256(before.tobytes()): name})
        (piece,) = await pulled(offer, sha256(now.tobytes()), base=sha256(before.tobytes()))
        assert piece.is_delta is is_delta


@toy.in_loop
async def test_what_is_here_already_is_not_unpacked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    unpacked: list[int] = []
    monkeypatch.setattr(updates, "unpack", lambda data, dtype, size: unpacked.append(size) or unpack(data, dtype, size))
    async with toy.fleet(toy.plan(toy.exact("a"), BIG)) as fleet, toy.peer(fleet.link, "a") as peer:
        token = (await peer.assigned()).token
        data = pack(np.ones(1000, np.float32).tobytes(), "float32")
        part = pb.PushSlice(token=token, tensor="delta/params/big", data=data, unpacked=4000)
        for _ in range(20):
            reply = await fleet.link.push(stream_of(part))
        assert reply.received["delta/params/big"] == 4000 and unpacked == [4000]


def test_a_group_of_drawn_elements_does_not_move_on() -> None:
    made = toy.plan(toy.exact("a"), BIG).manifest
    drawn = replace(made, sums=tuple(replace(spec, one_of=4) for spec in made.sums))
    moves = [_machine(manifest)._moves_on for manifest in (made, drawn)]  # type: ignore[attr-defined]
    assert moves == [True, False]


@pytest.mark.parametrize("down", ["bfloat16", "int8"])
def test_rounded_tensors_are_read_in_any_piece(down: Rounding) -> None:
    made = toy.plan(toy.exact("a"), BIG)
    half = replace(made.manifest.server, down=down)
    manifest = replace(made.manifest, half=half, server_hash=sha256(half.data))
    store = MemoryStore()
    rng = np.random.default_rng(0)
    tensors = {s.name: rng.normal(size=s.shape).astype(s.numpy_dtype) for s in manifest.broadcast}
    model = put_tensors(store.blobs, tensors, manifest.broadcast)
    sent = SentBlobs(store.blobs, manifest)
    index = sent.index(model)
    assert index == Index.of({n: rounded(v, down) for n, v in tensors.items()}, manifest.broadcast) != model
    entry = next(entry for entry in index if entry.spec.name == "params/big")
    whole = rounded(tensors["params/big"], down).tobytes()
    assert sent.get(entry.hash) == whole and sent.size(entry.hash) == len(whole)
    for offset, size in ((0, 10), (4 * BLOCK - 3, 9), (12345, 4 * BLOCK + 1), (len(whole) - 5, 100), (len(whole), 4)):
        assert sent.read(entry.hash, offset, size) == whole[offset : offset + size]
