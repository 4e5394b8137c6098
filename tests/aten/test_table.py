"""What the table promises beyond torch: padding that changes nothing, noise by key. Needs no torch."""

import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import shoal
from shoal.aten import layers, recurrent
from shoal.aten.run import FUNCTIONS, KNOWN, WITH_STEP
from shoal.aten.table import Step
from shoal.errors import MissingExtra


def step(mask: Any = None, seed: int = 0) -> Step:
    return Step(iter(jax.random.split(jax.random.key(seed), 9)), mask)


def test_names_are_those_of_torch_s_operations() -> None:
    assert all(name.startswith("aten.") and name.count(".") == 2 for name in KNOWN)
    assert not set(FUNCTIONS) & set(WITH_STEP)


def test_padding_changes_no_statistic_of_batch_norm() -> None:
    x = jnp.asarray(np.random.default_rng(0).normal(size=(6, 3, 5)), jnp.float32)
    own = (jnp.full(3, 2.0), jnp.ones(3), jnp.zeros(3), jnp.ones(3), True, 0.1, 1e-5)
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        padded = layers.batch_norm(step(jnp.arange(6) < 4), x, *own)
        whole = layers.batch_norm(step(), x[:4], *own)
    np.testing.assert_allclose(padded[0][:4], whole[0], rtol=1e-5)
    for one, two in zip(padded[3:], whole[3:], strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-5)


def test_dropout_by_its_rate() -> None:
    x = jnp.ones(10_000)
    for p in (0.0, 0.25, 1.0):
        kept = layers.dropout(step(), x, p)
        assert float((kept == 0).mean()) == pytest.approx(p, abs=0.02)
        assert p == 1 or float(kept.max()) == pytest.approx(1 / (1 - p))
    np.testing.assert_array_equal(layers.dropout(step(), x, 0.5, False), x)


def test_the_way_back_reads_from_the_end() -> None:
    """A plain recurrent layer with weights of one is a sum of what was read so far."""
    one = jnp.ones((1, 1))
    x = jnp.asarray([[[1.0]], [[2.0]], [[4.0]]])
    start, weights = jnp.zeros((2, 1, 1)), [one, one, one, one]
    out, ends = recurrent.WITH_STEP.functions["aten.rnn_relu.input"](
        step(), x, start, weights, False, 1, 0.0, False, True, False
    )
    np.testing.assert_array_equal(out[:, 0], [[1, 7], [3, 6], [7, 4]])
    np.testing.assert_array_equal(ends[:, 0, 0], [7, 7])


def test_without_torch_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(MissingExtra, match=r"Task\.from_torch needs torch, which is not installed.*shoal\[torch\]"):
        shoal.Task.from_torch(object(), loss="squared_error", batch={"x": ((), "float32"), "label": ((), "float32")})
