"""Frames over pipes: whole, exact, bounded."""

import os
import threading
from collections.abc import Iterator
from io import FileIO

import ml_dtypes
import numpy as np
import pytest

from shoal.errors import ProtocolError
from shoal.plan.channel import Channel
from shoal.tensors import frame_parts, pack, read_frame, unpack

TENSORS = {
    "matrix": np.arange(6.0).reshape(2, 3).T,  # not in C order
    "scalar": np.array(3, np.int32),
    "empty": np.zeros((0, 3)),
    "half": np.arange(3).astype(ml_dtypes.bfloat16),
    "foreign": np.arange(3, dtype=">f4"),
    "flag": np.array([True, False]),
}


@pytest.fixture
def ends() -> Iterator[tuple[Channel, Channel]]:
    to_child, to_parent = os.pipe(), os.pipe()
    parent = Channel(FileIO(to_parent[0], "r"), FileIO(to_child[1], "w"))
    child = Channel(FileIO(to_child[0], "r"), FileIO(to_parent[1], "w"))
    yield parent, child
    parent.close()
    child.close()


def test_a_message_arrives_as_it_was(ends: tuple[Channel, Channel]) -> None:
    parent, child = ends
    parent.send({"call": "x", "number": 1.5}, TENSORS)
    tensors, header = child.receive(most_bytes=1000)
    assert header == {"call": "x", "number": 1.5} and list(tensors) == list(TENSORS)
    for name, value in TENSORS.items():
        assert tensors[name].shape == value.shape and np.array_equal(tensors[name], value)


def test_a_message_larger_than_the_pipe(ends: tuple[Channel, Channel]) -> None:
    parent, child = ends
    large = {"large": np.random.default_rng(0).normal(size=1 << 20)}
    thread = threading.Thread(target=parent.send, args=({}, large))
    thread.start()
    tensors, _ = child.receive(most_bytes=1 << 23)
    thread.join()
    assert np.array_equal(tensors["large"], large["large"])


def test_a_message_that_is_too_large_is_refused_before_it_is_read(ends: tuple[Channel, Channel]) -> None:
    parent, child = ends
    parent.send({}, {"x": np.zeros(11, np.uint8)})
    with pytest.raises(ProtocolError, match="at most 10 bytes, got 11"):
        child.receive(most_bytes=10)


def test_the_end_of_the_stream(ends: tuple[Channel, Channel]) -> None:
    parent, child = ends
    parent.close()
    with pytest.raises(EOFError):
        child.receive(most_bytes=0)
    with pytest.raises((OSError, ValueError)):
        parent.send({})


@pytest.mark.parametrize("data", [b"\xff" * 8, b"\2" + bytes(7) + b"{}", b"\4" + bytes(7) + b"null"])
def test_what_is_no_frame_is_refused(data: bytes) -> None:
    position = 0

    def fill(view: memoryview) -> None:
        nonlocal position
        if position + len(view) > len(data):
            raise EOFError
        view[:] = data[position : position + len(view)]
        position += len(view)

    with pytest.raises(ProtocolError):
        read_frame(fill, most_bytes=1 << 20)


def test_the_pieces_are_the_frame_and_nothing_is_copied() -> None:
    assert b"".join(frame_parts(TENSORS, {"a": 1})) == pack(TENSORS, {"a": 1})
    assert list(unpack(pack(TENSORS))[0]) == list(TENSORS)
    array = np.zeros(1000)
    *_, last = frame_parts({"x": array})
    assert np.shares_memory(np.frombuffer(last, np.float64), array)
