"""What a plan promises of secure groups: that they can be made, and fine enough, is found out before anybody trains."""

import optax
import pytest

import shoal
from shoal.plan.build import build
from shoal.plan.secure import fits, layout, terms
from tests.plan.plan_tasks import tiny_task


def secure_task(**secure: object) -> shoal.Task:
    return tiny_task().replace(
        rounds=shoal.RoundPolicy(goal=20, minimum_group=8),
        local=shoal.Local(optimizer=optax.sgd(0.1), max_examples=100),
        privacy=shoal.Privacy(clip_norm=1.0, secure=shoal.Secure(**secure)),  # type: ignore[arg-type]
    )


def test_terms_follow_from_the_manifest() -> None:
    manifest = build(secure_task(members=20, colluders=0.1)).plan.manifest
    made = terms(manifest, model="ab")
    assert made.minimum == 8 and made.graph(20).colluders == 2 and not made.certified
    assert made.purpose != terms(manifest, model="cd").purpose
    assert made.segments == layout(manifest).segments
    assert fits(made, 20) and not fits(made, 8)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"members": 8}, "A group of 8 cannot have 8 honest members in every sum"),
        ({"members": 32, "bits": 8}, "Local\\(weighting='uniform'\\), or raise Secure\\(bits=…\\)"),
        ({"members": 200, "authority": "ab" * 32}, "more than a message holds"),
    ],
)
def test_groups_that_cannot_be_made_are_refused(changes: dict[str, object], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        build(secure_task(**changes))


def test_a_sum_that_may_be_one_member_s_own_is_refused() -> None:
    task = secure_task(members=20).replace(rounds=shoal.RoundPolicy(goal=20, minimum_group=1))
    with pytest.raises(ValueError, match="minimum_group >= 2 with secure groups, got 1"):
        build(task)


def test_a_goal_that_is_no_group_is_refused() -> None:
    task = secure_task(members=32).replace(rounds=shoal.RoundPolicy(goal=9, minimum_group=8))
    with pytest.raises(ValueError, match=r"A group of 9 .* members would do"):
        build(task)
