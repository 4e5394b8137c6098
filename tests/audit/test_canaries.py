"""A canary's update is as long as its task's clip norm allows, whatever kind that is and whatever noise there is."""

from typing import Any

import jax
import numpy as np
import pytest

from shoal.audit.canaries import FIELD, OUT, Canaries, with_canaries
from shoal.clip_norm import LOG_SCALE, AdaptiveClip, norm_bound
from shoal.data import Population
from shoal.local import local_rule
from shoal.plan.build import initial_model
from shoal.policy import Correlated, ExamplePrivacy, Privacy, Secure
from shoal.task import Local
from shoal.tensors import Tensors
from shoal.testing import random_examples
from tests.plan.plan_tasks import B, K, tiny_task

NOISE: dict[str, Any] = {"clip_norm": 0.25, "noise_multiplier": 2.0}


def update_of(privacy: Privacy, number: int) -> Tensors:
    """What a device sends whose examples have that number."""
    task = tiny_task(privacy=privacy, local=Local(batch_size=B, steps_per_block=K, weighting="uniform"))
    made = with_canaries(task, seed=1)
    rule = local_rule(made)
    model = initial_model(made, rule, seed=0)
    fields = random_examples(made, num=K * B).fields
    batches = {name: values.reshape(K, B, *values.shape[1:]) for name, values in fields.items()}
    batches[FIELD] = np.full((K, B), number, np.int32)
    key = np.arange(privacy.key_words, dtype=np.uint32)

    @jax.jit
    def train(model: Any, batches: Any) -> Any:
        carry = rule.block(rule.begin(model, {}), batches, np.ones((K, B), bool), key)
        return rule.finish(carry, model).sums["delta"]

    delta = {name: np.asarray(value, np.float64) for name, value in train(model, batches).items()}
    delta.pop(LOG_SCALE, None)
    return delta


@pytest.mark.parametrize(
    "privacy",
    [
        Privacy(clip_norm=0.25),
        Privacy(clip_norm={"params/b": 0.3, "*": 0.4}),
        Privacy(**{**NOISE, "clip_norm": AdaptiveClip(initial=0.5)}),
        Privacy(**NOISE, correlated=Correlated(rounds=4)),
        Privacy(**NOISE, distributed=True, secure=Secure(members=32)),
        Privacy(**NOISE, examples=ExamplePrivacy(clip_norm=0.5, noise_multiplier=2.0)),
    ],
    ids=["a number", "by tensor", "adaptive", "correlated", "distributed", "examples"],
)
def test_a_canary_is_as_long_as_it_may_be(privacy: Privacy) -> None:
    assert privacy.clip_norm is not None
    bound, delta = norm_bound(privacy.clip_norm), update_of(privacy, 3)
    length = np.sqrt(sum(np.sum(value**2) for value in delta.values()))
    assert bound * (1 - 1e-4) < length <= bound


def test_a_canary_that_is_out_takes_part_and_sends_zeros() -> None:
    assert not any(value.any() for value in update_of(Privacy(clip_norm=0.25), OUT).values())
    tossed = Canaries(np.array([True, False]), seed=0)
    users = tossed.among(Population.from_arrays({"u": {"x": np.ones((3, 2), np.float32)}}))
    assert {user: examples.fields[FIELD].tolist() for user, examples in users.items()} == {
        "u": [0, 0, 0], "canary-00001": [1], "canary-00002": [OUT],
    }  # fmt: skip
