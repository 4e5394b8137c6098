"""What goes over a link next."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.schedule.sending import SendQueue, Slice


def drained(queue: SendQueue) -> list[Slice]:
    """All that is in it, each slice acknowledged at once."""
    found = []
    while (part := queue.take()) is not None:
        found.append(part)
        queue.acknowledged(part.size)
    return found


@given(
    st.lists(st.tuples(st.integers(1, 50), st.integers(0, 5)), min_size=1, max_size=8),
    st.integers(1, 20),
    st.integers(1, 40),
    st.data(),
)
@settings(max_examples=150, deadline=None)
def test_every_byte_goes_once_in_order_and_under_the_credit(
    puts: Any, slice_bytes: int, credit: int, data: Any
) -> None:
    queue = SendQueue(slice_bytes=slice_bytes, credit_bytes=credit)
    sent = [0] * len(puts)
    flying: list[int] = []
    left = list(enumerate(puts))
    while left or flying or any(done < size for done, (size, _) in zip(sent, puts, strict=True)):
        if left and data.draw(st.booleans()):
            number, (size, rank) = left.pop(0)
            queue.put(number, size, rank)
        part = queue.take()
        if part is not None:
            assert part.offset == sent[part.transfer]
            assert 0 < part.size <= slice_bytes
            sent[part.transfer] += part.size
            flying.append(part.size)
            assert sum(flying) <= max(credit, flying[-1]) or len(flying) == 1
        elif flying:
            queue.acknowledged(flying.pop(0))
        elif left:
            number, (size, rank) = left.pop(0)
            queue.put(number, size, rank)
    assert sent == [size for size, _ in puts]
    assert queue.statistics() == {"ready": 0, "in_flight_bytes": 0}


def test_the_urgent_one_overtakes_at_the_next_slice() -> None:
    queue = SendQueue(slice_bytes=10, credit_bytes=10)
    queue.put(0, 30, rank=5)
    assert queue.take() == Slice(0, 0, 10)
    queue.put(1, 10, rank=1)
    assert queue.take() is None  # no credit
    queue.acknowledged(10)
    assert [part.transfer for part in drained(queue)] == [1, 0, 0]


def test_of_equal_ranks_the_first_goes_first() -> None:
    queue = SendQueue(slice_bytes=10, credit_bytes=100)
    for number in (2, 0, 1):
        queue.put(number, 20, rank=0)
    assert [part.transfer for part in drained(queue)] == [2, 2, 0, 0, 1, 1]


def test_what_was_never_sent_cannot_be_acknowledged() -> None:
    queue = SendQueue()
    with pytest.raises(ValueError, match="at most 0 bytes"):
        queue.acknowledged(1)
