"""The algorithms as their papers write them, in NumPy and float64, on the problem of `problem.py`.

They share with the programs the order of the examples and nothing else. A model is {"w": (D, E), "b": (E,)}.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence

import jax
import numpy as np

from shoal.codec.chance import uniform
from shoal.data.split import held_out_part
from shoal.data.store import Examples
from shoal.fleet.configuration import round_seed
from shoal.fleet.host import run_seed
from shoal.local import seed_key
from shoal.lora import with_adapters
from shoal.plan.train import member_randomness
from shoal.task import Task
from tests.algorithms.problem import BATCH, EPOCHS, RATE, SEED, population

Model = dict[str, np.ndarray]
Batch = tuple[np.ndarray, np.ndarray]
Cohorts = Sequence[Sequence[str]]
LocalUpdate = Callable[[Model, list[Batch], str, int], Model]
"""(model, batches, member, version) -> the model that the member reached"""


def gradient(model: Model, batch: Batch) -> Model:
    """Of the mean of 1/2 |x w + b - y|^2."""
    x, y = batch
    rest = x @ model["w"] + model["b"] - y
    return {"w": x.T @ rest / len(x), "b": rest.mean(axis=0)}


def plus(one: Model, other: Model, times: float = 1.0) -> Model:
    return {name: one[name] + times * other[name] for name in one}


def minus(one: Model, other: Model) -> Model:
    return plus(one, other, -1.0)


def scaled(model: Model, times: float) -> Model:
    return {name: times * value for name, value in model.items()}


def batches(version: int, member: str, *, holdout: float = 0.0) -> list[Batch]:
    return list(_batches(version, member, holdout))


def _batches(version: int, member: str, holdout: float) -> Iterator[Batch]:
    examples, rng = population()[member], member_randomness(round_seed(run_seed(SEED), version), member).rng
    if holdout:
        examples = Examples(examples.take(held_out_part(len(examples), fraction=holdout, is_held_out=False)))
    for _ in range(EPOCHS):
        order = rng.permutation(len(examples))
        for first in range(0, len(order), BATCH):
            chosen = examples.take(order[first : first + BATCH])
            yield chosen["x"].astype(np.float64), chosen["y"].astype(np.float64)


def sgd(model: Model, given: list[Batch]) -> Model:
    for batch in given:
        model = plus(model, gradient(model, batch), -RATE)
    return model


def averaged(
    model: Model,
    cohorts: Cohorts,
    local: LocalUpdate,
    *,
    uniform: bool = False,
    server: Callable[[Model, Model], Model] = plus,
    holdout: float = 0.0,
) -> Model:
    """McMahan et al. 2017, algorithm 1: the mean of what members reached, by examples or all alike, given to the server."""
    for version, cohort in enumerate(cohorts):
        updates, weights = [], []
        for member in cohort:
            given = batches(version, member, holdout=holdout)
            updates.append(minus(local(model, given, member, version), model))
            weights.append(1 if uniform else sum(len(x) for x, _ in given))
        mean = scaled(model, 0.0)
        for update, weight in zip(updates, weights, strict=True):
            mean = plus(mean, update, weight / sum(weights))
        model = server(model, mean)
    return model


def fedavg(model: Model, cohorts: Cohorts) -> Model:
    return averaged(model, cohorts, lambda received, given, member, version: sgd(received, given))


def fedavg_with_holdout(model: Model, cohorts: Cohorts) -> Model:
    return averaged(model, cohorts, lambda received, given, member, version: sgd(received, given), holdout=0.25)


def personal(model: Model, cohorts: Cohorts, *, lam: float) -> dict[str, Model]:
    """The personal models of Li et al. 2021, algorithm 1, of whoever took part."""
    kept: dict[str, Model] = {}
    for version, cohort in enumerate(cohorts):
        for member in cohort:
            v = kept.get(member, model)
            for batch in batches(version, member):
                v = plus(v, plus(gradient(v, batch), minus(v, model), lam), -RATE)
            kept[member] = v
        model = fedavg_round(model, cohort, version)
    return kept


def fedavg_round(model: Model, cohort: Sequence[str], version: int) -> Model:
    """One round, that of a version."""
    given = {member: batches(version, member) for member in cohort}
    total, after = sum(len(x) for batch in given.values() for x, _ in batch), model
    for batch in given.values():
        after = plus(after, minus(sgd(model, batch), model), sum(len(x) for x, _ in batch) / total)
    return after


def fedopt(model: Model, cohorts: Cohorts, *, kind: str, rate: float) -> Model:
    """Reddi et al. 2021, algorithm 2, with tau = 1e-3."""
    m, v, tau = scaled(model, 0.0), {name: np.full(value.shape, 1e-6) for name, value in model.items()}, 1e-3

    def server(before: Model, mean: Model) -> Model:
        after = {}
        for name, d in mean.items():
            m[name] = 0.9 * m[name] + 0.1 * d
            match kind:
                case "adagrad":
                    v[name] = v[name] + d**2
                case "adam":
                    v[name] = 0.99 * v[name] + 0.01 * d**2
                case "yogi":
                    v[name] = v[name] - 0.01 * d**2 * np.sign(v[name] - d**2)
            after[name] = before[name] + rate * m[name] / (np.sqrt(v[name]) + tau)
        return after

    return averaged(model, cohorts, lambda received, given, member, version: sgd(received, given), server=server)


def norm(update: Model) -> float:
    return float(np.sqrt(sum(np.sum(value**2) for value in update.values())))


def shortened(update: Model, bound: float) -> Model:
    return scaled(update, min(1.0, bound / norm(update)))


def clipped_by_tensor(model: Model, cohorts: Cohorts, *, bounds: dict[str, float]) -> Model:
    """McMahan et al. 2018, per-layer clipping, without noise: each tensor is a layer."""

    def local(received: Model, given: list[Batch], member: str, version: int) -> Model:
        update = minus(sgd(received, given), received)
        parts = [shortened({name: update[name]}, bounds[name]) for name in update]
        return plus(received, {name: value for part in parts for name, value in part.items()})

    return averaged(model, cohorts, local)


def clipped_adaptively(model: Model, cohorts: Cohorts, *, initial: float, quantile: float, rate: float) -> Model:
    """Andrew et al. 2021, algorithm 1, without noise; bits weigh as updates do. And the logarithm of the last bound over the initial one."""
    bound, within, weights = initial, list[bool](), list[int]()

    def local(received: Model, given: list[Batch], member: str, version: int) -> Model:
        update = minus(sgd(received, given), received)
        within.append(norm(update) <= bound)
        weights.append(sum(len(x) for x, _ in given))
        return plus(received, shortened(update, bound))

    def server(before: Model, mean: Model) -> Model:
        nonlocal bound
        bound *= np.exp(-rate * (np.average(within, weights=weights) - quantile))
        within.clear()
        weights.clear()
        return plus(before, mean)

    after = averaged(model, cohorts, local, server=server)
    return {**after, "clip/log_scale": np.log(bound / initial)}


def fednova(model: Model, cohorts: Cohorts) -> Model:
    """Wang et al. 2020, equation 7, with tau_eff the mean number of steps."""
    for version, cohort in enumerate(cohorts):
        given = {member: batches(version, member) for member in cohort}
        sizes = {member: sum(len(x) for x, _ in data) for member, data in given.items()}
        total = sum(sizes.values())
        steps = sum(sizes[member] / total * len(data) for member, data in given.items())
        after = model
        for member, data in given.items():
            after = plus(after, minus(sgd(model, data), model), steps * sizes[member] / total / len(data))
        model = after
    return model


def private_bias(model: Model, cohorts: Cohorts) -> Model:
    """Arivazhagan et al. 2019: b stays on the device, which begins with what it is sent."""
    own: dict[str, np.ndarray] = {}
    first = model["b"]

    def local(received: Model, given: list[Batch], member: str, version: int) -> Model:
        reached = sgd({**received, "b": own.get(member, first)}, given)
        own[member] = reached["b"]
        return {**reached, "b": first}

    return averaged(model, cohorts, local)


def fedprox(model: Model, cohorts: Cohorts, *, mu: float) -> Model:
    """Li et al. 2020, equation 2, by SGD."""

    def local(received: Model, given: list[Batch], member: str, version: int) -> Model:
        reached = received
        for batch in given:
            step = plus(gradient(reached, batch), minus(reached, received), mu)
            reached = plus(reached, step, -RATE)
        return reached

    return averaged(model, cohorts, local)


def scaffold(model: Model, cohorts: Cohorts, *, devices: int) -> Model:
    """Karimireddy et al. 2020, algorithm 1, option II, global step size 1."""
    c = scaled(model, 0.0)
    controls: dict[str, Model] = {}
    for version, cohort in enumerate(cohorts):
        reached, changes = [], []
        for member in cohort:
            own, y, given = controls.get(member, scaled(model, 0.0)), model, batches(version, member)
            for batch in given:
                y = plus(y, plus(minus(gradient(y, batch), own), c), -RATE)
            after = plus(minus(own, c), minus(model, y), 1.0 / (len(given) * RATE))
            changes.append(minus(after, own))
            controls[member] = after
            reached.append(minus(y, model))
        for update, change in zip(reached, changes, strict=True):
            model = plus(model, update, 1.0 / len(cohort))
            c = plus(c, change, 1.0 / devices)
    return {**model, **{f"control/{name}": value for name, value in c.items()}}


def reptile(model: Model, cohorts: Cohorts, *, step: float) -> Model:
    """Nichol et al. 2018, algorithm 2, with a round's devices as the batch of tasks."""
    return averaged(
        model,
        cohorts,
        lambda received, given, member, version: sgd(received, given),
        uniform=True,
        server=lambda before, mean: plus(before, mean, step),
    )


def diloco(model: Model, cohorts: Cohorts, *, momentum: float, outer_rate: float, outer_momentum: float) -> Model:
    """Douillard et al. 2023, algorithm 1, with momentum as the inner optimizer."""
    kept: dict[str, Model] = {}
    outer = scaled(model, 0.0)

    def local(received: Model, given: list[Batch], member: str, version: int) -> Model:
        reached, trace = received, kept.get(member, scaled(received, 0.0))
        for batch in given:
            trace = plus(gradient(reached, batch), trace, momentum)
            reached = plus(reached, trace, -RATE)
        kept[member] = trace
        return reached

    def server(before: Model, mean: Model) -> Model:
        nonlocal outer
        outer = plus(scaled(mean, -1.0), outer, outer_momentum)
        return plus(before, plus(scaled(mean, -1.0), outer, outer_momentum), -outer_rate)

    return averaged(model, cohorts, local, uniform=True, server=server)


def streaming_diloco(
    model: Model, cohorts: Cohorts, *, momentum: float, outer_rate: float, outer_momentum: float, fragment_of: Mapping[str, int]
) -> Model:  # fmt: skip
    """Douillard et al. 2025, algorithm 2, without overlap: each round averages one fragment, and every device goes on with its own of the others."""
    num = 1 + max(fragment_of.values())
    kept: dict[str, tuple[Model, Model, int]] = {}
    """Device -> its parameters, its inner momentum, the round after the one that they are of."""
    outer = scaled(model, 0.0)
    for version, cohort in enumerate(cohorts):
        turn, updates = version % num, list[Model]()
        for member in cohort:
            reached, trace, since = kept.get(member, (model, scaled(model, 0.0), 0))
            averaged_since = {v % num for v in range(since - 1 if member in kept else 0, version)}
            reached = {n: model[n] if fragment_of[n] in averaged_since else reached[n] for n in model}
            for batch in batches(version, member):
                trace = plus(gradient(reached, batch), trace, momentum)
                reached = plus(reached, trace, -RATE)
            kept[member] = reached, trace, version + 1
            updates.append(minus(reached, model))
        for name in model:
            if fragment_of[name] == turn:
                slope = -sum(update[name] for update in updates) / len(updates)
                outer[name] = slope + outer_momentum * outer[name]
                model = {**model, name: model[name] - outer_rate * (slope + outer_momentum * outer[name])}
    return model


def per_fedavg(model: Model, cohorts: Cohorts, *, alpha: float, delta: float | None) -> Model:
    """Fallah et al. 2020, algorithm 1; FO without a delta, HF (equation 12) with one."""
    parts = 2 if delta is None else 3

    def part(batch: Batch, number: int) -> Batch:
        return batch[0][number::parts], batch[1][number::parts]

    def slope(at: Model, batch: Batch) -> Model:
        return gradient(at, batch) if len(batch[0]) else scaled(at, 0.0)

    def local(received: Model, given: list[Batch], member: str, version: int) -> Model:
        w = received
        for batch in given:
            adapted = plus(w, slope(w, part(batch, 0)), -alpha)
            v = slope(adapted, part(batch, 1))
            step = v
            if delta is not None:
                turn = minus(slope(plus(w, v, delta), part(batch, 2)), slope(plus(w, v, -delta), part(batch, 2)))
                step = plus(v, turn, -alpha / (2 * delta))
            w = plus(w, step, -RATE)
        return w

    return averaged(model, cohorts, local)


def top_k(model: Model, cohorts: Cohorts, *, share: float) -> Model:
    """Karimireddy et al. 2019, algorithm 2, on each tensor of an update."""
    errors: dict[str, Model] = {}

    def local(received: Model, given: list[Batch], member: str, version: int) -> Model:
        p = plus(minus(sgd(received, given), received), errors.get(member, scaled(received, 0.0)))
        sent = {}
        for name, value in p.items():
            order = np.argsort(-np.abs(value), axis=None)[: max(1, int(np.ceil(share * value.size)))]
            kept = np.zeros(value.size)
            kept[order] = value.reshape(-1)[order]
            sent[name] = kept.reshape(value.shape)
        errors[member] = minus(p, sent)
        return plus(received, sent)

    return averaged(model, cohorts, local)


def int8(model: Model, cohorts: Cohorts) -> Model:
    """Alistarh et al. 2017, section 3.1, with 127 levels and the largest element for the norm, levels in steps of 8 significant bits."""

    def local(received: Model, given: list[Batch], member: str, version: int) -> Model:
        key = seed_key(member_randomness(round_seed(run_seed(SEED), version), member).key)
        sent = {}
        for number, (name, value) in enumerate(sorted(minus(sgd(received, given), received).items())):
            words = np.asarray(jax.random.key_data(jax.random.fold_in(key, number)))
            u = uniform(value.size, words, np).reshape(value.shape)
            mantissa, exponent = np.frexp(np.abs(value).max() / 127)
            unit = np.ldexp(np.ceil(mantissa * 256) / 256, exponent)
            sent[name] = np.floor(value / unit + u) * unit
        return plus(received, sent)

    return averaged(model, cohorts, local)


def lora(task: Task, cohorts: Cohorts) -> Model:
    """Hu et al. 2022: plain steps of A and B, the frozen W and b as they were."""
    params = with_adapters(task).variables(jax.random.key(SEED)).params
    given = {name: np.asarray(value, np.float64) for name, value in params.items()}

    def local(received: Model, data: list[Batch], member: str, version: int) -> Model:
        a, b = received["w/lora_a"], received["w/lora_b"]
        for batch in data:
            slope = gradient({"w": given["w"] + a @ b, "b": given["b"]}, batch)["w"]
            a, b = a - RATE * slope @ b.T, b - RATE * a.T @ slope
        return {"w/lora_a": a, "w/lora_b": b}

    adapters = {name: value for name, value in given.items() if "lora" in name}
    return {**given, **averaged(adapters, cohorts, local)}
