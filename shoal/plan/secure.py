"""Secure groups as a plan promises them: the terms that members and server of one go by, and how an update is laid out in it.

All of it follows from the signed manifest, and from the tensors that are trained from: nothing that a server says later changes it.
"""

import hashlib
from dataclasses import replace
from math import prod
from typing import Final

from shoal.plan.manifest import DEVICE_PROGRAMS, Manifest
from shoal.policy import RoundPolicy, Secure
from shoal.privacy.device_noise import DeviceNoise, device_noise
from shoal.privacy.neighbours import Assumptions
from shoal.privacy.secure_terms import Terms
from shoal.privacy.vectors import VectorLayout
from shoal.tensors import canonical_json

LEAST_MINIMUM: Final = 2
"""Honest members in a sum, so that it is nobody's own."""
LEAST_STEPS: Final = 256
"""Units that the largest element of an update of weight 1 is to have: with fewer the rounding is most of what is summed."""


def layout(manifest: Manifest) -> VectorLayout:
    """How an update stands in the vector of a secure group. Raises ValueError: its sums do not fit."""
    members = _secure(manifest).members
    fixed = manifest.fixed_points(members)
    return VectorLayout(manifest.sums, fixed, max_weight=manifest.training.max_weight, max_members=members)


def terms(manifest: Manifest, *, model: str) -> Terms:
    """What a group is made on whose members trained by that manifest, from the tensors with that root."""
    secure = _secure(manifest)
    return Terms(
        purpose=hashlib.sha256(f"shoal group v1\0{manifest.hash}\0{model}".encode()).digest(),
        segments=layout(manifest).segments,
        minimum=manifest.promises.minimum_group,
        assumptions=Assumptions(colluders=secure.colluders, dropouts=secure.dropouts),
        certified=secure.is_certified,
    )


def members_noise(manifest: Manifest) -> DeviceNoise | None:
    """What each member of a secure group adds to its update; None: nothing. Raises ValueError: the sums' grids are not for it."""
    privacy = manifest.promises.privacy
    if not privacy.distributed:
        return None
    fixed = manifest.fixed_points(_secure(manifest).members)
    elements = sum(prod(spec.tensor.shape) for spec in manifest.sums)
    return device_noise(privacy, units={point.unit for point in fixed.values()}, elements=elements)


def update_of(manifest: Manifest, model: str) -> bytes:
    """What an update is known by on its device, 32 bytes: by what makes its numbers, and nothing else.

    These are the tensors that it was trained from (their root is `model`), the programs that devices run, and how these are fed. Plans may
    differ in all the rest, a goal, say: the updates are the same.
    """
    programs = sorted(program.hash for program in manifest.programs if program.name in DEVICE_PROGRAMS)
    made = canonical_json({"model": model, "programs": programs, "training": manifest.training.to_json()})
    return hashlib.sha256(b"shoal update v1\0" + made).digest()


def fits(made: Terms, members: int) -> bool:
    """Whether so many can be a group."""
    try:
        made.graph(members)
    except ValueError:
        return False
    return True


def grouping(manifest: Manifest) -> RoundPolicy:
    """The task's rounds, as those see them who put groups together: their minimum is what can be a group.

    In clear mode that is what the task says. A secure group is larger, so that it can lose members and still have that many honest ones.
    """
    policy, secure = manifest.server.rounds, manifest.promises.privacy.secure
    if secure is None:
        return policy
    made = terms(manifest, model="")
    too_small = [count for count in range(1, secure.members + 1) if not fits(made, count)]
    return replace(policy, minimum_group=max(too_small, default=0) + 1)


def check_secure(manifest: Manifest) -> None:
    """Looks whether secure groups can be made as a task wants them; nothing to do for one that wants none.

    Raises:
        ValueError: they cannot; the message says what to change.
    """
    secure = manifest.promises.privacy.secure
    if secure is None:
        return
    if manifest.promises.minimum_group < LEAST_MINIMUM:
        raise ValueError(
            f"Expected minimum_group >= {LEAST_MINIMUM} with secure groups, got {manifest.promises.minimum_group}: a sum over one member is that "
            "member's."
        )
    members_noise(manifest)
    made = terms(manifest, model="")
    made.graph(secure.members)
    goal = manifest.server.rounds.commit_at
    if goal < secure.members and not fits(made, goal):
        made.graph(goal)  # says how many would do
    grouping(manifest)
    coarse = {
        name: (fixed.unit, fixed.bound)
        for name, fixed in manifest.fixed_points(secure.members).items()
        if fixed.unit * LEAST_STEPS > fixed.bound
    }
    if coarse:
        name, (unit, bound) = next(iter(coarse.items()))
        raise ValueError(
            f"Expected sums of {secure.bits} bits to tell an element's bound from a {LEAST_STEPS}th of it, got a unit of {unit:g} for {name}, "
            f"whose bound is {bound:g}. Bits go to the group's members ({secure.members}) and to the largest weight "
            f"({manifest.training.max_weight}): lower Secure(members=…) or Local(max_examples=…), take Local(weighting='uniform'), or raise "
            "Secure(bits=…)."
        )


def _secure(manifest: Manifest) -> Secure:
    secure = manifest.promises.privacy.secure
    if secure is None:
        raise ValueError(f"Task {manifest.task!r} has no secure groups.")
    return secure
