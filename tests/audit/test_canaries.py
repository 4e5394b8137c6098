"""A canary's update is as long as its task's clip norm allows, whatever kind that is."""

from typing import Any

import numpy as np
import pytest

from shoal.audit.canaries import FIELD, with_canaries
from shoal.clip_norm import LOG_SCALE, AdaptiveClip, norm_bound
from shoal.local import local_rule
from shoal.plan.build import build
from shoal.policy import Privacy
from shoal.testing import random_examples
from tests.plan.plan_tasks import B, K, tiny_task


@pytest.mark.parametrize(
    "clip_norm",
    [0.25, {"params/b": 0.3, "*": 0.4}, AdaptiveClip(initial=0.5)],
    ids=["a number", "by tensor", "adaptive"],
)
def test_a_canary_is_as_long_as_it_may_be(clip_norm: Any) -> None:
    task = with_canaries(tiny_task(privacy=Privacy(clip_norm=clip_norm)), seed=1)
    rule, model = local_rule(task), build(task, seed=0).model
    fields = random_examples(task, num=K * B).fields
    batches = {name: values.reshape(K, B, *values.shape[1:]) for name, values in fields.items()}
    batches[FIELD] = np.full((K, B), 3, np.int32)
    carry = rule.block(rule.begin(model, {}), batches, np.ones((K, B), bool), np.uint32([1, 2]))
    delta = {name: np.asarray(value, np.float64) for name, value in rule.finish(carry, model).sums["delta"].items()}
    delta.pop(LOG_SCALE, None)
    length = np.sqrt(sum(np.sum(value**2) for value in delta.values()))
    assert norm_bound(clip_norm) * (1 - 1e-4) < length <= norm_bound(clip_norm)
