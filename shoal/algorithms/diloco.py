"""DiLoCo: whole pods as devices, which send an update only every so many steps (Douillard et al. 2023, "DiLoCo: distributed low-communication
training of language models", algorithm 1), and its streaming form (Douillard et al. 2025, "Streaming DiLoCo with overlapping communication", algorithm 2).

A device takes `inner_steps` steps by the task's own optimizer (the paper: AdamW), whose state it keeps from round to round; the server takes a step of
Nesterov momentum along the mean of what they moved. So a round of 500 steps sends 1/500 of what summing up every gradient sends, and the
round's policy says what becomes of those that are late or lost: `late`, `over_selection`, `buffer`.

    fragments=1    every round: all tensors are sent, averaged, taken over
    fragments=P    round v: those of fragment v mod P; the others go on where they are on each device, for P rounds of inner_steps / P steps

In its streaming form a device keeps its own parameters. What is not of the round's fragment moves by exactly nothing, in updates as in versions, and such
differences take no bytes on the wire: its most at a time falls to 1/P.

Departures: a device that holds more examples than a round takes draws anew each round, rather than going on where it was in its data; fragments are
groups of tensors of about the same size, not of layers; a round waits for its sum, so that what was averaged is taken over whole (the paper mixes, for it overlaps).
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import prod
from typing import Any, Final

import jax
import jax.numpy as jnp
import optax

from shoal import validate
from shoal.algorithms.compose import applied, without_rule
from shoal.codec.linear import VERSION
from shoal.local import LocalRule, Named, Report, sgd_rule
from shoal.policy import ServerRule
from shoal.task import Task
from shoal.tensors import TensorSpec, specs_of

INNER: Final = "inner/"
_ROUNDS: Final = f"{INNER}rounds"
_SEEN: Final = f"{INNER}version"
"""Of the version that a device trained on last, where there are fragments."""
_OPT: Final = "opt/"


def diloco(
    task: Task,
    *,
    inner_steps: int | None = None,
    outer_rate: float = 0.7,
    outer_momentum: float = 0.9,
    fragments: int = 1,
) -> Task:
    """DiLoCo (Douillard et al. 2023), streaming with more than one fragment (Douillard et al. 2025).

    Args:
        task: with plain local training; its `Local.optimizer` is the inner one.
        inner_steps: of a device from one sum of a tensor to the next, as far as its examples last; None: in a round as many as the task's `Local` says.
        outer_rate: of the server's step; the paper's is 0.7.
        outer_momentum: of Nesterov's kind, in [0, 1); the paper's is 0.9.
        fragments: P, parts of the model that are sent by turns, one a round; a round takes inner_steps / P steps.

    Raises:
        ValueError: a number is out of range, the task has another algorithm or server rule, or (with fragments) fewer tensors, or late updates that count.
    """
    validate.positive(outer_rate=outer_rate)
    validate.whole(1, fragments=fragments)
    if not 0 <= outer_momentum < 1:
        raise ValueError(f"Expected 0 <= outer_momentum < 1, got outer_momentum={outer_momentum!r}.")
    without_rule(task, "diloco")
    if task.server != ServerRule():
        raise ValueError(
            f"Expected the plain mean as server rule of task {task.name!r}, got {task.server}: DiLoCo's outer step is one itself."
        )
    local = replace(task.local, weighting="uniform")
    if inner_steps is not None:
        validate.whole(1, inner_steps=inner_steps)
        if inner_steps % fragments:
            raise ValueError(f"Expected inner_steps that {fragments} fragments divide, got inner_steps={inner_steps}.")
        local = replace(local, epochs=1, max_examples=inner_steps // fragments * task.local.batch_size)
    outer = optax.sgd(outer_rate, momentum=outer_momentum or None, nesterov=bool(outer_momentum))
    arguments = {"inner_steps": inner_steps, "outer_rate": outer_rate, "outer_momentum": outer_momentum}
    if fragments == 1:
        return applied(task, "diloco", arguments, local=local, server=outer, rule=diloco_rule)

    def rule(final: Task) -> LocalRule:
        _refuse_late(final)  # what it is by now: settings may have changed since
        return streaming(diloco_rule(final), fragments)

    rule(task)
    arguments["fragments"] = fragments
    return applied(task, "diloco", arguments, local=local, server=outer_by_turns(outer, fragments), rule=rule)


def diloco_rule(task: Task) -> LocalRule:
    """Local training whose optimizer goes on where it was."""
    plain = sgd_rule(task)
    like = _carry(plain)
    kept = {INNER + name: spec for name, spec in like.items() if name.startswith(_OPT)}

    def begin(broadcast: Named, device_state: Named) -> Named:
        carry = dict(plain.begin(broadcast, {n: v for n, v in device_state.items() if not n.startswith(INNER)}))
        is_known = device_state[_ROUNDS] > 0
        for name in kept:
            own = name.removeprefix(INNER)
            carry[own] = jnp.where(is_known, device_state[name], carry[own])
        return _sorted(carry | {_ROUNDS: device_state[_ROUNDS]})

    def block(carry: Named, batches: Named, mask: Any, key: Any) -> Named:
        inner = {name: value for name, value in carry.items() if name != _ROUNDS}
        return _sorted(plain.block(inner, batches, mask, key) | {_ROUNDS: carry[_ROUNDS]})

    def finish(carry: Named, broadcast: Named) -> Report:
        report = plain.finish({name: value for name, value in carry.items() if name != _ROUNDS}, broadcast)
        state = {name: carry[name.removeprefix(INNER)] for name in kept} | {_ROUNDS: carry[_ROUNDS] + 1}
        return report._replace(device_state=_sorted(report.device_state | state))

    state_specs = specs_of(_sorted({**kept, _ROUNDS: jax.ShapeDtypeStruct((), jnp.int32)}))
    return replace(
        plain,
        begin=begin,
        block=block,
        finish=finish,
        device_state=tuple(sorted((*plain.device_state, *state_specs), key=lambda spec: spec.name)),
    )


# Streaming.


def streaming(rule: LocalRule, fragments: int) -> LocalRule:
    """The rule of a device that keeps its own parameters, and takes over and sends one fragment of them a version; statistics are averaged in every one.

    Args:
        rule: `diloco_rule`.
        fragments: how many there are.

    Raises:
        ValueError: there are fewer parameters than fragments.
    """
    names = (
        spec.tensor.name.removeprefix("delta/") for spec in rule.sums if spec.tensor.name.startswith("delta/params/")
    )
    specs = {spec.name: spec for spec in rule.broadcast}
    turns = fragment_of({name: prod(specs[name].shape) for name in names}, fragments)
    like = {spec.name: jax.ShapeDtypeStruct(spec.shape, spec.numpy_dtype) for spec in rule.broadcast}

    def begin(broadcast: Named, device_state: Named) -> Named:
        version = broadcast[VERSION][0].astype(jnp.int32)
        theirs = {name: value for name, value in broadcast.items() if name != VERSION}
        is_known, seen = device_state[_ROUNDS] > 0, device_state[_SEEN]
        for name, turn in turns.items():
            # Of the versions made since the one it trained on last, one in `fragments` has changed this tensor.
            is_new = _changes(version, turn, fragments) > _changes(seen, turn, fragments)
            theirs[name] = jnp.where(is_known & ~is_new, device_state[INNER + name], theirs[name])
        return rule.begin(theirs, {n: v for n, v in device_state.items() if n not in own})

    def finish(carry: Named, broadcast: Named) -> Report:
        version = broadcast[VERSION][0].astype(jnp.int32)
        report = rule.finish(carry, {name: value for name, value in broadcast.items() if name != VERSION})
        delta = dict(report.sums["delta"])
        for name, turn in turns.items():
            delta[name] = jnp.where(version % fragments == turn, delta[name], jnp.zeros_like(delta[name]))
        state = {INNER + name: carry[name] for name in turns} | {_SEEN: version}
        return report._replace(
            sums={**report.sums, "delta": delta}, device_state=_sorted(report.device_state | state)
        )  # fmt: skip

    kept = {INNER + name: like[name] for name in turns} | {_SEEN: jax.ShapeDtypeStruct((), jnp.int32)}
    own = set(kept)
    drawn = TensorSpec(name=VERSION, shape=(1,), dtype="uint32")
    return replace(
        rule,
        begin=begin,
        finish=finish,
        broadcast=tuple(sorted((*rule.broadcast, drawn), key=lambda spec: spec.name)),
        device_state=tuple(sorted((*rule.device_state, *specs_of(_sorted(kept))), key=lambda spec: spec.name)),
    )


def fragment_of(sizes: Mapping[str, int], fragments: int) -> dict[str, int]:
    """Name of each parameter -> its fragment: the largest first, to the one that has least.

    Raises:
        ValueError: there are fewer parameters than fragments.
    """
    if len(sizes) < fragments:
        raise ValueError(
            f"Expected at most as many fragments as parameters that are averaged, {len(sizes)}, got {fragments}."
        )
    loads, made = [0] * fragments, dict[str, int]()
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        made[name] = min(range(fragments), key=lambda each: (loads[each], each))
        loads[made[name]] += sizes[name]
    return dict(sorted(made.items()))


def outer_by_turns(outer: optax.GradientTransformation, fragments: int) -> optax.GradientTransformation:
    """The outer optimizer of each fragment, which takes a step when it is its turn and rests meanwhile. Of parameters by name."""

    def parts(tree: Mapping[str, Any]) -> list[dict[str, Any]]:
        turns = fragment_of({name: value.size for name, value in tree.items()}, fragments)
        return [{name: tree[name] for name in tree if turns[name] == n} for n in range(fragments)]

    def init(params: Any) -> Any:
        return jnp.zeros((), jnp.int32), [outer.init(part) for part in parts(params)]

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        number, states = state
        made, after = dict[str, Any](), list[Any]()
        for fragment, (given, before) in enumerate(zip(parts(updates), states, strict=True)):
            is_on = number % fragments == fragment
            moved, then = outer.update(given, before)
            made |= {name: jnp.where(is_on, value, jnp.zeros_like(value)) for name, value in moved.items()}
            after.append(jax.tree.map(lambda new, old, on=is_on: jnp.where(on, new, old), then, before))
        return {name: made[name] for name in updates}, (number + 1, after)

    return optax.GradientTransformation(init, update)


def _changes(version: Any, turn: int, fragments: int) -> Any:
    """How many of the versions up to this one have changed a fragment: those made from version v, where v mod `fragments` is its turn."""
    return (version - turn + fragments - 1) // fragments


def _refuse_late(task: Task) -> None:
    if task.rounds.max_staleness:
        raise ValueError(
            f"Expected a policy whose late updates are discarded with fragments, got late={task.rounds.late.kind!r} in task {task.name!r}: members of "
            "another version send another fragment."
        )


def _sorted(values: Mapping[str, Any]) -> Named:
    return dict(sorted(values.items()))


def _carry(rule: LocalRule) -> Named:
    """Shapes of what a rule begins with."""

    def like(specs: Sequence[TensorSpec]) -> Named:
        return {spec.name: jax.ShapeDtypeStruct(spec.shape, spec.numpy_dtype) for spec in specs}

    made: Named = jax.eval_shape(rule.begin, like(rule.broadcast), like(rule.device_state))
    return made
