"""ATen's recurrent layers, in JAX: LSTM, GRU and plain ones, several layers deep, both ways, with projections.

The inputs of all times are multiplied at once; what is left for each step of the scan is the hidden state's part. Gates are in
torch's order: input, forget, cell, output of an LSTM; reset, update, new of a GRU.

Shape legend: T = times, B = batch, H = hidden.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from shoal.aten.layers import dropout
from shoal.aten.table import Step, Table

WITH_STEP = Table()
Carry = tuple[Any, ...]
Cell = Callable[[Carry, Any, list[Any]], Carry]
"""(state, what the inputs give (B, gates * H), weights) -> state; the first of it is the output."""


def _hidden(h: Any, weights: list[Any]) -> Any:
    made = jnp.matmul(h, weights[1].T)
    return made + weights[3] if len(weights) > 3 else made


def _lstm_cell(carry: Carry, given: Any, weights: list[Any]) -> Carry:
    h, c = carry
    i, f, g, o = jnp.split(given + _hidden(h, weights), 4, axis=-1)
    c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
    h = jax.nn.sigmoid(o) * jnp.tanh(c)
    return (jnp.matmul(h, weights[-1].T) if len(weights) % 2 else h), c


def _gru_cell(carry: Carry, given: Any, weights: list[Any]) -> Carry:
    (h,) = carry
    r, z, n = jnp.split(given, 3, axis=-1)
    hr, hz, hn = jnp.split(_hidden(h, weights), 3, axis=-1)
    update = jax.nn.sigmoid(z + hz)
    new = jnp.tanh(n + jax.nn.sigmoid(r + hr) * hn)
    return ((1 - update) * new + update * h,)


def _tanh_cell(carry: Carry, given: Any, weights: list[Any]) -> Carry:
    return (jnp.tanh(given + _hidden(carry[0], weights)),)


def _relu_cell(carry: Carry, given: Any, weights: list[Any]) -> Carry:
    return (jax.nn.relu(given + _hidden(carry[0], weights)),)


def _one_way(cell: Cell, x: Any, start: Carry, weights: list[Any], biased: bool, backwards: bool) -> tuple[Carry, Any]:
    given = jnp.matmul(x, weights[0].T)
    given = given + weights[2] if biased else given

    def step(carry: Carry, one: Any) -> tuple[Carry, Any]:
        carry = cell(carry, one, weights)
        return carry, carry[0]

    return jax.lax.scan(step, start, given, reverse=backwards)


def _layers(
    step: Step, cell: Cell, x: Any, start: Carry, weights: list[Any], biased: bool, layers: int, p: float, train: bool,
    both_ways: bool, batch_first: bool,
) -> tuple[Any, ...]:  # fmt: skip
    if x.ndim == 2:  # one example alone
        ends = _layers(
            step, cell, x[:, None], tuple(one[:, None] for one in start), weights, biased, layers, p, train, both_ways, False
        )  # fmt: skip
        return tuple(one.squeeze(1) for one in ends)
    x = x.swapaxes(0, 1) if batch_first else x
    ways = 2 if both_ways else 1
    each = len(weights) // (layers * ways)
    finals = []
    for layer in range(layers):
        outputs = []
        for way in range(ways):
            place = layer * ways + way
            own = weights[place * each : (place + 1) * each]
            end, out = _one_way(cell, x, tuple(one[place] for one in start), own, biased, way == 1)
            outputs.append(out)
            finals.append(end)
        x = jnp.concatenate(outputs, axis=-1) if both_ways else outputs[0]
        if train and p and layer < layers - 1:
            x = dropout(step, x, p)
    x = x.swapaxes(0, 1) if batch_first else x
    return (x, *(jnp.stack(parts) for parts in zip(*finals, strict=True)))


@WITH_STEP.operation("lstm.input")
def lstm(step: Step, x: Any, start: Any, weights: Any, *options: Any) -> tuple[Any, ...]:
    return _layers(step, _lstm_cell, x, tuple(start), list(weights), *options)


def _with_one_state(name: str, cell: Cell) -> None:
    def layers(step: Step, x: Any, start: Any, weights: Any, *options: Any) -> tuple[Any, ...]:
        return _layers(step, cell, x, (start,), list(weights), *options)

    WITH_STEP.add(name, layers)


_with_one_state("gru.input", _gru_cell)
_with_one_state("rnn_tanh.input", _tanh_cell)
_with_one_state("rnn_relu.input", _relu_cell)
