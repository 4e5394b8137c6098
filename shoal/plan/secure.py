"""Secure groups as a plan promises them: the terms that members and server of one go by, and how an update is laid out in it.

All of it follows from the signed manifest, and from the tensors that are trained from: nothing that a server says later changes it.
"""

import hashlib
from typing import Final

from shoal.plan.manifest import Manifest
from shoal.policy import Secure
from shoal.privacy.neighbours import Assumptions
from shoal.privacy.secure_terms import Terms
from shoal.privacy.vectors import VectorLayout

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
        purpose=purpose(manifest.hash, model),
        segments=layout(manifest).segments,
        minimum=manifest.promises.minimum_group,
        assumptions=Assumptions(colluders=secure.colluders, dropouts=secure.dropouts),
        certified=secure.is_certified,
    )


def purpose(plan: str, model: str) -> bytes:
    """What an update is known by on its device, and a group to its members: 32 bytes of the plan and of the tensors trained from."""
    return hashlib.sha256(f"shoal update v1\0{plan}\0{model}".encode()).digest()


def fits(made: Terms, members: int) -> bool:
    """Whether so many can be a group."""
    try:
        made.graph(members)
    except ValueError:
        return False
    return True


def check_secure(manifest: Manifest) -> None:
    """Looks whether secure groups can be made as a task wants them; nothing to do for one that wants none.

    Raises:
        ValueError: they cannot; the message says what to change.
    """
    secure = manifest.promises.privacy.secure
    if secure is None:
        return
    made = terms(manifest, model="")
    made.graph(secure.members)
    goal = manifest.server.rounds.commit_at
    if goal < secure.members and not fits(made, goal):
        made.graph(goal)  # says how many would do
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
