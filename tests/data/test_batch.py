import doctest

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import shoal.data.batch
from shoal.data import Blocks, Examples, num_blocks, num_steps


def rng(key: int = 0) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=key))


def examples(size: int) -> Examples:
    return Examples({"i": np.arange(size), "x": np.arange(size * 2.0).reshape(size, 2)})


@given(st.integers(1, 20), st.integers(1, 6), st.integers(1, 4), st.integers(1, 3), st.booleans(), st.booleans())
@settings(max_examples=60, deadline=None)
def test_blocks_cover_every_epoch(size, batch_size, k, epochs, shuffle, drop_remainder):
    if drop_remainder and size < batch_size:
        return
    blocks = Blocks(
        examples(size),
        batch_size=batch_size,
        steps_per_block=k,
        epochs=epochs,
        rng=rng(),
        shuffle=shuffle,
        drop_remainder=drop_remainder,
    )
    made = list(blocks)
    assert (
        len(made)
        == len(blocks)
        == num_blocks(size, batch_size, epochs, steps_per_block=k, drop_remainder=drop_remainder)
    )
    assert all(mask.shape == (k, batch_size) and mask.dtype == bool for _, mask in made)
    assert all(b["x"].shape == (k, batch_size, 2) and b["i"].shape == (k, batch_size) for b, _ in made)
    steps = np.concatenate([b["i"] for b, _ in made])
    mask = np.concatenate([mask for _, mask in made])
    # Each epoch visits each example once (all but a remainder), in order if asked.
    used = size - size % batch_size if drop_remainder else size
    visits = steps[mask].reshape(epochs, used)
    for epoch in visits:
        assert len(set(epoch.tolist())) == used
        assert shuffle or epoch.tolist() == list(range(used))
    # What is masked repeats an example of its own batch; steps that are wholly masked come last.
    real = mask.any(1)
    assert real.sum() == num_steps(size, batch_size, epochs, drop_remainder=drop_remainder) == blocks.num_steps
    assert real[: real.sum()].all()
    for row, used_slots in zip(steps[real], mask[real], strict=True):
        assert set(row[~used_slots]) <= set(row[used_slots])
    assert set(steps[~real].ravel()) <= set(steps[real][-1])
    assert blocks.padding == pytest.approx(1 - mask.mean())


def test_orders_are_fresh_and_seeded():
    first, second = (
        [
            b["i"].ravel().tolist()
            for b, _ in Blocks(examples(12), batch_size=12, steps_per_block=1, epochs=2, rng=rng(3))
        ]
        for _ in range(2)
    )
    assert first == second
    assert first[0] != first[1]


def test_a_block_spans_epochs():
    blocks = list(Blocks(examples(2), batch_size=1, steps_per_block=3, epochs=3, shuffle=False))
    assert [b["i"].ravel().tolist() for b, _ in blocks] == [[0, 1, 0], [1, 0, 1]]


def test_nothing_is_shared_with_the_stored_examples():
    held = examples(2)
    batches, mask = next(iter(Blocks(held, batch_size=2, steps_per_block=1, shuffle=False)))
    batches["i"][:] = 9
    mask[:] = False
    assert held.fields["i"].tolist() == [0, 1]


@pytest.mark.parametrize(
    ("size", "settings", "says"),
    [
        (0, {}, "at least one example, got 0"),
        (3, {"drop_remainder": True}, "Nothing remains of 3"),
        (5, {"rng": None}, "Expected rng"),
        (5, {"batch_size": 0}, "batch_size > 0"),
        (5, {"steps_per_block": 0}, "steps_per_block > 0"),
        (5, {"epochs": 0}, "epochs > 0"),
    ],
)
def test_bad_settings_are_refused(size, settings, says):
    with pytest.raises(ValueError, match=says):
        Blocks(examples(size), **{"batch_size": 4, "steps_per_block": 2, "rng": rng()} | settings)


def test_counts():
    assert num_steps(10, 4) == 3
    assert num_steps(10, 4, 2, drop_remainder=True) == 4
    assert num_blocks(10, 4, 2, steps_per_block=4) == 2


def test_the_example_in_the_docstring():
    assert doctest.testmod(shoal.data.batch).failed == 0
