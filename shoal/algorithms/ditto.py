"""Ditto: a personal model on each device, drawn to the global one (Li et al. 2021, "Ditto: fair and robust federated learning
through personalization", algorithm 1).

Devices train the global model as ever (federated averaging: the global model has its bits), and beside it one of their own,
v, that never leaves them. It takes the same steps on the same batches, along the gradient of

    F(v) + lam/2 |v - w|^2          w: the global model that came with the round

A device that takes part for the first time begins with the global model. With lam = 0 the personal model is that of local
training alone; the larger lam is, the more it is the global one.

Training reports the personal model's metrics beside the global one's (`train/personal/…`); `shoal.measured(shoal.ditto(task))`
measures it on what devices hold out. Cost: every step twice; a device keeps a model.
"""

from dataclasses import replace
from typing import Any, Final

import optax

from shoal import validate
from shoal.algorithms.compose import applied, without_rule
from shoal.algorithms.fedprox import proximal
from shoal.local import LocalRule, Named, Report, sgd_rule
from shoal.task import Task

OWN: Final = "personal/"


def ditto(task: Task, *, lam: float = 0.1) -> Task:
    """Ditto (Li et al. 2021).

    Args:
        task: with plain local training.
        lam: how strongly the personal model is drawn to the global one, at least 0; the paper tries 0.1, 1 and 2.

    Raises:
        ValueError: lam is below 0, or the task has another algorithm that this one does not go with.
    """
    validate.not_negative(lam=lam)
    without_rule(task, "ditto")
    return applied(task, "ditto", {"lam": lam}, rule=lambda made: ditto_rule(made, lam))


def ditto_rule(task: Task, lam: float) -> LocalRule:
    """Two local trainings side by side: the global model's, and that of a model whose every leaf is private."""
    shared = sgd_rule(task)
    leaves: Any = {
        spec.name: "frozen" if task.leaf_rule(spec.name) == "frozen" else "private" for spec in shared.broadcast
    }
    optimizer = optax.chain(proximal(lam), task.local.optimizer)
    own = sgd_rule(task.replace(leaves=leaves, local=replace(task.local, optimizer=optimizer, partial="drop")))

    def begin(broadcast: Named, device_state: Named) -> Named:
        kept, theirs = _parted(device_state)
        carry = dict(own.begin(broadcast, kept))
        for name, value in broadcast.items():
            if (anchor := f"opt/0/anchor/{name.removeprefix('params/')}") in carry:
                carry[anchor] = value
        return _joined(carry, shared.begin(broadcast, theirs))

    def block(carry: Named, batches: Named, mask: Any, key: Any) -> Named:
        mine, theirs = _parted(carry)
        return _joined(own.block(mine, batches, mask, key), shared.block(theirs, batches, mask, key))

    def finish(carry: Named, broadcast: Named) -> Report:
        mine, theirs = _parted(carry)
        personal, report = own.finish(mine, broadcast), shared.finish(theirs, broadcast)
        return report._replace(
            metrics=_joined(personal.metrics, report.metrics),
            device_state=_joined(personal.device_state, report.device_state),
        )

    kept = (*(replace(spec, name=OWN + spec.name) for spec in own.device_state), *shared.device_state)
    metrics = (
        replace(spec, tensor=replace(spec.tensor, name=spec.tensor.name.replace("metric/", f"metric/{OWN}", 1)))
        for spec in own.sums
    )
    return LocalRule(
        begin=begin,
        block=block,
        finish=finish,
        broadcast=shared.broadcast,
        device_state=tuple(sorted(kept, key=lambda spec: spec.name)),
        sums=(*shared.sums, *metrics),
        reached=lambda carry: _parted(carry)[0],
    )


def _parted(values: Named) -> tuple[Named, Named]:
    """The personal ones under their own names, and the others."""
    mine = {name.removeprefix(OWN): value for name, value in values.items() if name.startswith(OWN)}
    return mine, {name: value for name, value in values.items() if not name.startswith(OWN)}


def _joined(mine: Named, theirs: Named) -> Named:
    return dict(sorted({**{OWN + name: value for name, value in mine.items()}, **theirs}.items()))
