"""Which example when: every one once a pass, from the seed and the step alone; on devices, each row once."""

from contextlib import closing

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

from shoal.data.store import Examples
from shoal.pod.feed import Feed, lengths
from shoal.pod.mesh import MeshSpec
from shoal.pod.order import Order, mixing, spread


@settings(max_examples=60)
@given(st.integers(1, 300), st.integers(1, 8), st.integers(1, 4), st.none() | st.integers(1, 50), st.integers(0, 3))
def test_every_example_once_a_pass(count: int, size: int, parts: int, window: int | None, epoch: int) -> None:
    count = max(count, parts)
    order = Order(num_examples=count, batch_size=size * parts, seed=7, window=window, parts=parts)
    indices, mask = order.epoch(epoch)
    assert indices.shape == mask.shape == (order.steps_per_epoch, size * parts)
    assert sorted(indices[mask]) == list(range(count))
    assert mask.any(axis=1).all(), "no step without an example"
    again, _ = order.epoch(epoch)
    np.testing.assert_array_equal(indices, again)


@settings(max_examples=30)
@given(st.integers(0, 40))
def test_it_goes_on_in_the_middle_of_an_epoch(first: int) -> None:
    order = Order(num_examples=33, batch_size=8, seed=1, window=10)
    from_start, from_there = order.steps(0), order.steps(first)
    for _ in range(first):
        next(from_start)
    for _ in range(7):
        for one, other in zip(next(from_start), next(from_there), strict=True):
            np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(("count", "window"), [(10_000, 100), (5_003, 1000)])
def test_a_window_is_a_bound_on_what_a_reader_holds(count: int, window: int) -> None:
    indices, mask = Order(num_examples=count, batch_size=32, seed=0, window=window).epoch(0)
    run, held, most = window // 32, set[int](), 0
    seen = set[int]()
    for n in map(int, indices[mask]):
        if n not in held:  # it reads a whole run when it first needs an example of it
            held |= set(range(n // run * run, min(count, (n // run + 1) * run))) - seen
        most = max(most, len(held))
        held.discard(n)
        seen.add(n)
    assert most <= 2 * window


def test_mixing_tells_a_shuffle_from_none() -> None:
    def made(window: int | None) -> float:
        return mixing(Order(num_examples=20_000, batch_size=64, seed=0, window=window))

    assert made(None) == pytest.approx(1.0, abs=0.05)
    assert 0.8 < made(1024) < 1.05
    stored = np.arange(6400).reshape(100, 64)
    assert spread(stored, np.ones_like(stored, bool), 6400) == pytest.approx(64 / 6400, rel=0.05)


def test_each_host_has_its_own_part() -> None:
    indices, mask = Order(num_examples=100, batch_size=8, seed=0, parts=2).epoch(1)
    assert (indices[:, :4][mask[:, :4]] < 50).all() and (indices[:, 4:][mask[:, 4:]] >= 50).all()


def test_calls_end_where_they_have_to() -> None:
    assert list(lengths(0, 13, 4, 5)) == [4, 1, 4, 1, 3]
    assert list(lengths(7, 13, 4, 5)) == [3, 3]
    assert list(lengths(0, 9, 4)) == [4, 4, 1]


def made_feed(last: int = 6) -> tuple[Feed, Order, Examples]:
    mesh = MeshSpec.parse("data=4,model=2").build()
    examples = Examples({"x": np.arange(60, dtype="f").reshape(20, 3), "n": np.arange(20)})
    order = Order(num_examples=20, batch_size=6, seed=2)
    sharding = NamedSharding(mesh, PartitionSpec(None, "data"))
    return (
        Feed(
            examples, order, {n: sharding for n in ("x", "n", "mask")}, first=2, last=last, steps_per_call=3, multiple=4
        ),
        order,
        examples,
    )


def test_devices_get_the_rows_of_the_order_filled_up() -> None:
    feed, order, examples = made_feed()
    steps = order.steps(2)
    with closing(feed):
        calls = list(feed)
    assert [(call.first, call.num_steps) for call in calls] == [(2, 3), (5, 1)]
    for call in calls:
        for k in range(call.num_steps):
            indices, mask = next(steps)
            assert call.mask.shape[1] == 8 and not np.asarray(call.mask)[k, 6:].any()
            np.testing.assert_array_equal(np.asarray(call.batches["x"])[k, :6], examples.fields["x"][indices])
            np.testing.assert_array_equal(np.asarray(call.mask)[k, :6], mask)


def test_a_feed_that_is_closed_early_ends_its_thread() -> None:
    feed, _, _ = made_feed(last=10_000)
    next(iter(feed))
    feed.close()
    assert not feed._thread.is_alive()


def test_what_goes_wrong_in_the_thread_is_raised() -> None:
    feed, _, _ = made_feed()
    feed.close()
    broken = Examples({"x": np.zeros((2, 3), "f")})
    order = Order(num_examples=20, batch_size=6, seed=2)
    sharding = NamedSharding(MeshSpec.parse("data=1").build(jax.devices()[:1]), PartitionSpec())
    feed = Feed(broken, order, {"x": sharding, "mask": sharding}, first=0, last=4, steps_per_call=2, multiple=1)
    with closing(feed), pytest.raises(IndexError):
        list(feed)
