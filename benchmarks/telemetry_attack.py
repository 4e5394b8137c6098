"""Two attackers who are to tell a device's class from numbers about it: logistic regression and a small net, with the same training in JAX."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Final

import jax
import jax.numpy as jnp
import numpy as np
import optax

HIDDEN: Final = 32
STEPS: Final = 300
SPLITS: Final = 4
"""Halvings of the devices: either half is judged by what was learnt from the other."""
STUDENT: Final = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776}
"""Student's t at 97.5 %, by degrees of freedom."""
ATTACKERS: Final = ("logistic regression", "small net")

Params = dict[str, jax.Array]


def attack(features: np.ndarray, label: np.ndarray, attacker: str, *, seed: int) -> float:
    """The area under the curve of an attacker who is judged by devices that it has not seen: the mean over halves.

    Args:
        features: (D, F).
        label: (D,) bool.
        attacker: one of `ATTACKERS`.
        seed: of halvings and initial weights.
    """
    rng = np.random.default_rng([seed, 7])  # another than the devices were drawn with
    areas = []
    for split in range(SPLITS):
        half = rng.permutation(len(label)) % 2 == 0
        for seen in (half, ~half):
            mean, spread = features[seen].mean(0), features[seen].std(0) + 1e-9
            scaled = ((features - mean) / spread).astype(np.float32)
            width = HIDDEN if attacker == "small net" else 0
            key = jax.random.key(2 * split + int(seen[0]) + 100 * seed)
            scores = _scores(scaled[seen], label[seen].astype(np.float32), scaled[~seen], key, width)
            areas.append(area(np.asarray(scores), label[~seen]))
    return float(np.mean(areas))


def area(scores: np.ndarray, label: np.ndarray) -> float:
    """Chance that one of the class has the higher score than one who is not; equal scores count half."""
    _, place, count = np.unique(scores, return_inverse=True, return_counts=True)
    rank = (np.cumsum(count) - (count - 1) / 2.0)[place]
    yes, no = int(label.sum()), int((~label).sum())
    return float((rank[label].sum() - yes * (yes + 1) / 2.0) / (yes * no))


def interval(values: Sequence[float]) -> tuple[float, float, float]:
    """The mean over independent populations, and Student's 95 % interval of it; of a single one: itself."""
    mean, number = float(np.mean(values)), len(values)
    if number == 1:
        return mean, mean, mean
    reach = STUDENT[number - 1] * float(np.std(values, ddof=1)) / number**0.5
    return mean, mean - reach, mean + reach


@partial(jax.jit, static_argnames="width")
def _scores(features: Any, label: Any, judged: Any, key: jax.Array, width: int) -> jax.Array:
    optimizer = optax.adamw(0.01, weight_decay=0.1)
    params = _initial(features.shape[1], width, key)

    def loss(params: Params) -> jax.Array:
        return jnp.mean(optax.sigmoid_binary_cross_entropy(_logit(params, features), label))

    def step(carry: Any, _: None) -> tuple[Any, None]:
        params, state = carry
        updates, state = optimizer.update(jax.grad(loss)(params), state, params)
        return (optax.apply_updates(params, updates), state), None

    (params, _), _ = jax.lax.scan(step, (params, optimizer.init(params)), None, length=STEPS)
    return _logit(params, judged)


def _initial(inputs: int, width: int, key: jax.Array) -> Params:
    draw: Callable[..., jax.Array] = jax.random.normal
    if not width:
        return {"w": jnp.zeros(inputs), "b": jnp.zeros(())}
    one, two = jax.random.split(key)
    return {
        "w1": draw(one, (inputs, width)) / inputs**0.5, "b1": jnp.zeros(width),
        "w": draw(two, (width,)) / width**0.5, "b": jnp.zeros(()),
    }  # fmt: skip


def _logit(params: Params, features: Any) -> jax.Array:
    inner = jax.nn.relu(features @ params["w1"] + params["b1"]) if "w1" in params else features
    return inner @ params["w"] + params["b"]
