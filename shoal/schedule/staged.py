"""A task's step as stages, each a program of its own that is compiled apart: cut where parameters are first used, and where gradients are ready.

    step(params, …) --trace--> operations --what is upstream, what is downstream--> stages --> Staged

On the way forward operations belong together that wait for the same transfers; from where all of them are needed, those from which the same gradients
follow. Both go one way only (what comes later waits for more, or serves fewer), so stages never wait for one another in a circle. Nested functions,
rematerialization and custom derivatives are as the trace has them. A loop over stacked layers (`jax.lax.scan`) is gone through turn by turn, its parameters taken apart
into those of each layer (*pieces*, `name[3]`, of shape (1, …)), where they may be: what updates them must look at no more than elements. Else it is one
stage, which `notes` says. So is a large tensor, into pieces of some rows (`name[0:512]`), so that servers share it and its last rows go up while the first come down.

Small tensors travel with the one that is used before them: a bias with its kernel.
"""

import heapq
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, Final, final

import jax
import jax.numpy as jnp
import numpy as np

from shoal.flat_trace import KEEP_LAYERS, FlatTrace, Operation, are_layers, select_n, spans, stacks_of
from shoal.flops import of_operation
from shoal.local import Named, Shape, added, model_shape, named, seed_key
from shoal.lora import with_adapters
from shoal.schedule.graph import Graph, Stage, Transfer
from shoal.schedule.oracle import Cost
from shoal.task import LOSS_BOUND, Sum, Task

JOINED_BYTES: Final = 32 << 10
"""Tensors up to this size travel with another."""
PIECE_BYTES: Final = 4 << 20
MOST_PIECES: Final = 16
"""Of a tensor: each takes a program of its own to update."""


@dataclass(frozen=True)
class _Part:
    """A stage's operations."""

    operations: tuple[Operation, ...]
    takes: tuple[int, ...]
    """Numbers of values that come from elsewhere."""
    gives: tuple[int, ...]
    """Numbers of values that others take, or that the step returns."""


@final
class Staged:
    """A step, ready to be run stage by stage."""

    def __init__(
        self, trace: FlatTrace, leaves: Mapping[str, int], gradients: Mapping[str, int], *, joined_bytes: int, turns: Mapping[str, int] | None = None,
        pieces: Mapping[str, str] | None = None,
    ) -> None:  # fmt: skip
        """
        Args:
            trace: of the step.
            leaves: name of a parameter that travels -> its number.
            gradients: name -> number of its gradient; none of a step without a way back.
            joined_bytes: see `JOINED_BYTES`.
            turns: name of a parameter that is a layer's -> which: a layer's travel together.
            pieces: name of a parameter that is some rows of a tensor -> the tensor's: all are needed and made together.
        """
        self._trace = trace
        operations = trace.upstream(trace.outputs)
        self.members = _joined(operations, leaves, trace, joined_bytes, turns or {})
        """Tensors of each transfer."""
        of = {name: number for number, names in enumerate(self.members) for name in names}
        firsts: dict[str, int] = {}
        cut = [firsts.setdefault((pieces or {}).get(names[0], names[0]), at) for at, names in enumerate(self.members)]
        parts = _cut(
            operations, trace, {leaves[n]: cut[of[n]] for n in leaves}, {gradients[n]: cut[of[n]] for n in gradients}
        )
        self._parts = parts
        self._leaves, self._gradients = dict(leaves), dict(gradients)
        self.graph = self._made_graph(of)
        self.costs = tuple(_cost(part, trace) for part in parts)
        self.notes = tuple(_notes(parts, {leaves[n]: n for n in leaves}))
        """What the graph could not see into."""
        self._programs = _programs(parts, trace)
        self._users = Counter(value for part in parts for value in part.takes)
        for value in (*trace.outputs, *trace.inputs):
            self._users[value] += 1  # it stays

    def _made_graph(self, of: Mapping[str, int]) -> Graph:
        transfer_of = {number: of[name] for name, number in self._leaves.items()}
        made_by = {value: number for number, part in enumerate(self._parts) for value in part.gives}
        whole: dict[int, int] = {}
        for name, value in self._gradients.items():  # one that is nothing but a constant is ready when all is
            whole[of[name]] = max(whole.get(of[name], 0), made_by.get(value, len(self._parts) - 1))
        stages = []
        for number, part in enumerate(self._parts):
            after = {made_by[value] for value in part.takes if value in made_by}
            needs = {transfer_of[value] for value in part.takes if value in transfer_of}
            makes = tuple(sorted(transfer for transfer, by in whole.items() if by == number))
            stages.append(
                Stage(name=f"stage{number}", after=tuple(sorted(after)), needs=tuple(sorted(needs)), makes=makes)
            )
        sizes = {name: _size(self._trace.avals[number]) for name, number in self._leaves.items()}
        transfers = (Transfer(name=names[0], size_bytes=sum(sizes[name] for name in names)) for names in self.members)
        return Graph(transfers=tuple(transfers), stages=tuple(stages))

    def begin(self, inputs: Sequence[Any]) -> "Run":
        """A run of the step.

        Args:
            inputs: leaves of the step's arguments, None for parameters that are yet to come.
        """
        known = {number: value for number, value in zip(self._trace.inputs, inputs, strict=True) if value is not None}
        return Run(self, known)

    def gradient_names(self, transfer: int) -> tuple[str, ...]:
        """Tensors of a transfer that have a gradient."""
        return tuple(name for name in self.members[transfer] if name in self._gradients)


@final
class Run:
    """One run of a step: parameters come, stages run, gradients leave."""

    def __init__(self, staged: Staged, known: dict[int, Any]) -> None:
        self._staged, self._known = staged, known
        self._arrived: set[int] = set()
        self._left = list(range(len(staged.graph.stages)))
        self._done: set[int] = set()
        self._users = staged._users.copy()

    def give(self, transfer: int, tensors: Mapping[str, Any]) -> None:
        """Parameters that have arrived: all of one transfer."""
        for name in self._staged.members[transfer]:
            self._known[self._staged._leaves[name]] = tensors[name]
        self._arrived.add(transfer)

    @property
    def is_done(self) -> bool:
        return not self._left

    def ready(self) -> int | None:
        """The first stage that can begin now; None where all wait."""
        stages = self._staged.graph.stages
        for number in self._left:
            stage = stages[number]
            if self._arrived.issuperset(stage.needs) and self._done.issuperset(stage.after):
                return number
        return None

    def run(self, stage: int) -> None:
        """Begins a stage that is ready; its results need not be there when this returns."""
        staged = self._staged
        part = staged._parts[stage]
        made = staged._programs[stage](*(self._known[value] for value in part.takes))
        self._known |= zip(part.gives, made, strict=True)
        self._left.remove(stage)
        self._done.add(stage)
        self._users.subtract(part.takes)
        for value in part.takes:
            if not self._users[value]:
                del self._known[value]

    def gradients(self, transfer: int) -> Named:
        """Those of a transfer, when the stage that makes them has begun."""
        staged = self._staged
        return {name: self._value(staged._gradients[name]) for name in staged.gradient_names(transfer)}

    def wait(self, stage: int) -> None:
        """Until a stage that has begun is done."""
        jax.block_until_ready(
            [self._known[value] for value in self._staged._parts[stage].gives if value in self._known]
        )

    def outputs(self) -> list[Any]:
        """Leaves of what the step returns, when all stages have begun."""
        return [self._value(number) for number in self._staged._trace.outputs]

    def _value(self, number: int) -> Any:
        return self._known[number] if number in self._known else self._staged._trace.constants[number]


@final
class Step:
    """A task's step, staged: what goes in and comes out, by name."""

    def __init__(
        self, task: Task, batch_size: int, *, is_training: bool = True, joined_bytes: int = JOINED_BYTES, piece_bytes: int = PIECE_BYTES,
        takes_apart: Callable[[Named, Named], bool] = lambda whole, piece: False,
    ) -> None:  # fmt: skip
        """
        Args:
            task: with its leaf rules; frozen parameters stay where they are.
            batch_size: examples of a step.
            is_training: the gradient of the mean loss; else the sums of `task.evaluate`.
            joined_bytes: tensors up to this size travel with another.
            piece_bytes: tensors from twice this size on travel in pieces of no less.
            takes_apart: whether a tensor, by name with its shape, may be updated by pieces like the one given, by name.
        """
        self.task = task = with_adapters(task)
        like = model_shape(task)
        self._params, self._state = named(like.params, "params"), named(like.state, "state")
        self._shapes = Shape(like.params, "params"), Shape(like.state, "state")
        self.learned = tuple(name for name in self._params if task.leaf_rule(name) != "frozen")
        frozen = {name: self._params[name] for name in self._params if name not in self.learned}
        learned = {name: self._params[name] for name in self.learned}
        batch = task.batch_spec(batch_size)
        scalars = jax.ShapeDtypeStruct((), jnp.float32), jax.ShapeDtypeStruct((2,), jnp.uint32)
        function = self._gradient if is_training else self._evaluate
        trace, shape = FlatTrace.of(function, learned, frozen, self._state, batch, *scalars)
        names = sorted(learned)
        layers = _stacks(trace, names, joined_bytes)
        rows = {name: (1,) * layers[name] if name in layers else _rows(learned[name], piece_bytes) for name in names}
        self.rows = {
            name: each for name, each in rows.items()
            if len(each) > 1 and takes_apart({name: learned[name]}, {_pieces(name, each)[0]: _piece(learned[name], each[0])})
        }  # fmt: skip
        """Name of a tensor that is taken apart -> rows of each piece."""
        if self.rows:
            trace = trace.with_apart({names.index(name): each for name, each in self.rows.items()})
        leaves = self._each(names, lambda at: trace.pieces[at], trace.inputs)
        gradients = (
            self._each(names, lambda at: trace.pieces_of(trace.outputs[at], self.rows[names[at]]), trace.outputs)
            if is_training
            else {}
        )
        if is_training:
            trace.outputs = [gradients[name] for name in sorted(gradients)] + trace.outputs[len(names) :]
            shape = (dict.fromkeys(gradients, 0), *shape[1:])
        self._returns = jax.tree.structure(shape)
        turns, pieces = dict[str, int](), dict[str, str]()
        for name, rows_of_it in self.rows.items():
            for at, piece in enumerate(_pieces(name, rows_of_it)):
                if are_layers(rows_of_it):
                    turns[piece] = at
                else:
                    pieces[piece] = name
        self.staged = Staged(trace, leaves, gradients, joined_bytes=joined_bytes, turns=turns, pieces=pieces)

    def _each(self, names: Sequence[str], pieces: Callable[[int], list[int]], numbers: Sequence[int]) -> dict[str, int]:
        """Numbers by name, of pieces where a tensor is taken apart."""
        made: dict[str, int] = {}
        for at, name in enumerate(names):
            made |= (
                dict(zip(_pieces(name, self.rows[name]), pieces(at), strict=True))
                if name in self.rows
                else {name: numbers[at]}
            )
        return made

    def apart(self, tensors: Mapping[str, Any]) -> Named:
        """Tensors by name, in their pieces: what travels."""
        made: Named = {}
        for name, value in tensors.items():
            if name in self.rows:
                rows = self.rows[name]
                made |= {piece: value[begin:end] for piece, (begin, end) in zip(_pieces(name, rows), spans(rows), strict=True)}  # fmt: skip
            else:
                made[name] = value
        return made

    def whole(self, tensors: Mapping[str, Any]) -> Named:
        """What `apart` was given."""
        left = dict(tensors)
        joined = {
            name: np.concatenate([left.pop(piece) for piece in _pieces(name, rows)]) for name, rows in self.rows.items()
        }
        return left | joined

    @cached_property
    def travelling(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes of the learned parameters as they travel."""
        shapes: dict[str, jax.ShapeDtypeStruct] = jax.eval_shape(
            self.apart, {name: self._params[name] for name in self.learned}
        )
        return shapes

    def _model(self, learned: Named, frozen: Named, state: Named) -> tuple[Any, Any]:
        """Parameters and state as the task has them."""
        params_shape, state_shape = self._shapes
        return params_shape.tree(frozen | learned), state_shape.tree(state)

    def _gradient(
        self, learned: Named, frozen: Named, state: Named, batch: Named, count: Any, key: Any
    ) -> tuple[Named, Named, Named]:
        """Gradient, state and metric sums, of a share of a batch of `count` examples."""
        mask = batch["mask"]

        def objective(learned: Named) -> Any:
            params, model_state = self._model(learned, frozen, state)
            result = self.task.losses(params, model_state, batch, seed_key(key))
            total = jnp.sum(jnp.where(mask, result.per_example, jnp.zeros_like(result.per_example)))
            mean = total / count.astype(total.dtype)
            if self.task.penalty is not None:
                mean = mean + self.task.penalty(params) * (jnp.sum(mask) / count).astype(total.dtype)
            metrics = {"loss": Sum(result.per_example, jnp.ones_like(result.per_example), LOSS_BOUND)} | result.metrics
            return mean, (named(result.state, "state"), added(metrics, mask))

        gradients, (after, metrics) = jax.grad(objective, has_aux=True)(learned)
        return gradients, after, metrics

    def _evaluate(self, learned: Named, frozen: Named, state: Named, batch: Named, count: Any, key: Any) -> Named:
        """Metric sums."""
        assert self.task.evaluate is not None
        params, model_state = self._model(learned, frozen, state)
        return added(self.task.evaluate(params, model_state, batch), batch["mask"])

    def begin(self, frozen: Named, state: Named, batch: Named, count: Any, key: Any) -> Run:
        """A run, whose learned parameters are yet to come.

        Args:
            frozen: parameters that are not learned.
            state: the model's, by name.
            batch: field -> (B, …), and `mask` (B,).
            count: float32, examples of the whole batch.
            key: (2,) uint32.
        """
        return self.staged.begin([None] * len(self.learned) + jax.tree.leaves((frozen, state, batch, count, key)))

    def returned(self, run: Run) -> Any:
        """What the step returns: gradients, state, metric sums; or metric sums."""
        return jax.tree.unflatten(self._returns, run.outputs())


def _piece(whole: Any, rows: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((rows, *whole.shape[1:]), whole.dtype)


def _pieces(name: str, rows: Sequence[int]) -> list[str]:
    """Their names."""
    is_of_layers = are_layers(rows)
    return [f"{name}[{begin}]" if is_of_layers else f"{name}[{begin}:{end}]" for begin, end in spans(rows)]


def _rows(whole: Any, piece_bytes: int) -> tuple[int, ...]:
    """Rows of each piece of a tensor: more than one piece where it is twice as large as one should be."""
    num = int(whole.shape[0]) if whole.shape else 1
    most = num_pieces(_size(whole), num, piece_bytes)
    least, more = divmod(num, most)
    return (least + 1,) * more + (least,) * (most - more)


def num_pieces(size_bytes: int, num_rows: int, piece_bytes: int = PIECE_BYTES) -> int:
    """In how many pieces a tensor travels: each has two rows or more."""
    return max(1, min(MOST_PIECES, size_bytes // piece_bytes, num_rows // 2))


def _stacks(trace: FlatTrace, names: Sequence[str], least_bytes: int) -> dict[str, int]:
    """Names of the inputs that are stacks of layers for a loop -> how many; not of loops whose turns need less than so many bytes."""
    at = {number: name for number, name in zip(trace.inputs, names, strict=False)}
    found: dict[str, int] = {}
    for operation in trace.operations:
        if operation.name in KEEP_LAYERS and operation.inputs[0] in at:
            at[operation.outputs[0]] = at[operation.inputs[0]]
        if operation.name == "scan" and operation.eqn is not None:
            length = int(operation.eqn.params["length"])
            mine = [number for number in stacks_of(operation.eqn, operation.inputs) if number in at]
            if length > 1 and sum(_size(trace.avals[number]) for number in mine) > length * least_bytes:
                found |= {at[number]: length for number in mine}
    return found


def _size(aval: Any) -> int:
    return int(aval.size * aval.dtype.itemsize)


def _joined(
    operations: Sequence[Operation], leaves: Mapping[str, int], trace: FlatTrace, joined_bytes: int, turns: Mapping[str, int]
) -> tuple[tuple[str, ...], ...]:  # fmt: skip
    """Names of tensors that travel together, in the order in which they are first used."""
    first: dict[int, int] = {}
    stands_for: dict[int, tuple[int, ...]] = {}
    for at, operation in enumerate(operations):
        used = tuple(one for value in operation.inputs for one in stands_for.get(value, (value,)))
        if _is_of_layers(operation):
            stands_for |= dict.fromkeys(operation.outputs, used)
            continue
        for value in used:
            first.setdefault(value, at)
    in_order = sorted(leaves, key=lambda name: (first.get(leaves[name], len(operations)), name))
    groups: list[list[str]] = []
    waiting: list[str] = []
    last: int | None = None
    """The turn of the last group."""
    for name in in_order:
        if last is not None and turns.get(name) == last:
            groups[-1].append(name)
        elif _size(trace.avals[leaves[name]]) > joined_bytes:
            groups.append([name, *waiting])
            waiting, last = [], turns.get(name)
        elif groups:
            groups[-1].append(name)
        else:
            waiting.append(name)
    if waiting:
        groups.append(waiting)
    return tuple(tuple(group) for group in groups)


def _cut(
    operations: Sequence[Operation], trace: FlatTrace, needs: Mapping[int, int], makes: Mapping[int, int]
) -> list[_Part]:
    """Stages, each after those that it waits for.

    Args:
        operations: in an order in which they can be done.
        trace: theirs.
        needs: number of a parameter -> its transfer, of a tensor in pieces the first.
        makes: number of a gradient -> the same.
    """
    upstream = {value: 1 << transfer for value, transfer in needs.items()}
    downstream = dict[int, int]()
    for value, transfer in makes.items():
        downstream[value] = downstream.get(value, 0) | 1 << transfer
    waits_for = []
    for operation in operations:
        mask = 0
        for value in operation.inputs:
            mask |= upstream.get(value, 0)
        upstream |= dict.fromkeys(operation.outputs, mask)
        waits_for.append(mask)
    everything = 0
    for mask in waits_for:
        everything |= mask
    serves = [0] * len(operations)
    for at in reversed(range(len(operations))):
        for value in operations[at].outputs:
            serves[at] |= downstream.get(value, 0)
        for value in operations[at].inputs:
            downstream[value] = downstream.get(value, 0) | serves[at]

    def key(at: int) -> tuple[bool, int]:
        is_back = bool(makes) and waits_for[at] == everything
        return (True, serves[at]) if is_back else (False, waits_for[at])

    keys = [key(at) for at in range(len(operations))]
    _sink(operations, keys, set(needs), trace)
    return _parts(operations, keys, trace)


def _sink(operations: Sequence[Operation], keys: list[tuple[bool, int]], given: set[int], trace: FlatTrace) -> None:
    """What only turns parameters and constants over (a transposed kernel, a bias spread out) goes to the first stage that takes it, where it costs
    nothing: it would be a stage of its own."""
    made_by = {value: at for at, operation in enumerate(operations) for value in operation.outputs}
    takers: dict[int, list[int]] = {}
    for at, operation in enumerate(operations):
        for value in operation.inputs:
            takers.setdefault(value, []).append(at)
    light = set[int]()
    for at, operation in enumerate(operations):
        is_light = _is_of_layers(operation) or (operation.eqn is not None and of_operation(operation.eqn) == 0)
        known = (v in given or v in trace.constants or made_by.get(v) in light for v in operation.inputs)
        if is_light and operation.inputs and all(known):
            light.add(at)
    for at in sorted(light, reverse=True):
        users = [user for value in operations[at].outputs for user in takers.get(value, ())]
        if users:
            keys[at] = keys[min(users, key=lambda user: _place(keys[user]))]


def _is_of_layers(operation: Operation) -> bool:
    """It takes a layer out of a stack, casts one, or makes a stack of them."""
    return operation.eqn is None and operation.own is not select_n


def _place(key: tuple[bool, int]) -> tuple[bool, int]:
    """Earlier stages come first: forward those that wait for less, back those that serve more."""
    is_back, mask = key
    return is_back, -mask.bit_count() if is_back else mask.bit_count()


def _parts(operations: Sequence[Operation], keys: Sequence[tuple[bool, int]], trace: FlatTrace) -> list[_Part]:
    """In the order in which the trace has them, as far as none waits for a later one."""
    groups: dict[tuple[bool, int], list[int]] = {}
    for at, key in enumerate(keys):
        groups.setdefault(key, []).append(at)
    home = {value: keys[at] for at, operation in enumerate(operations) for value in operation.outputs}
    before = {
        key: {home[v] for at in group for v in operations[at].inputs if v in home} - {key} for key, group in groups.items()
    }  # fmt: skip
    ready = [(group[-1], key) for key, group in groups.items() if not before[key]]
    heapq.heapify(ready)
    ordered = []
    while ready:
        _, done = heapq.heappop(ready)
        ordered.append(done)
        for key, waits in before.items():
            if done in waits:
                waits.remove(done)
                if not waits:
                    heapq.heappush(ready, (groups[key][-1], key))
    assert len(ordered) == len(groups), "stages wait for one another"
    everywhere = Counter(v for key in ordered for v in {v for at in groups[key] for v in operations[at].inputs})
    everywhere.update(trace.outputs)
    parts = []
    for key in ordered:
        group = [operations[at] for at in groups[key]]
        made = {value for operation in group for value in operation.outputs}
        used = {value for operation in group for value in operation.inputs}
        takes = {v for v in used if v not in made and v not in trace.constants}
        gives = {value for value in made if everywhere[value] > (value in used)}
        parts.append(_Part(tuple(group), tuple(sorted(takes)), tuple(sorted(gives))))
    return parts


def _programs(parts: Sequence[_Part], trace: FlatTrace) -> list[Any]:
    """Of each stage one; turns of a loop that do the same share theirs, so that it is compiled once."""
    made: dict[Hashable, Any] = {}
    return [
        made.setdefault(_key(part, trace), jax.jit(_program(part, trace.constants), inline=False)) for part in parts
    ]


def _key(part: _Part, trace: FlatTrace) -> Hashable:
    """What a stage does, with numbers of its own for values."""
    own: dict[int, int] = {}
    given = tuple((trace.avals[value].shape, trace.avals[value].dtype, own.setdefault(value, len(own))) for value in part.takes)  # fmt: skip

    def inside(value: int) -> Hashable:
        known = value in trace.constants and value not in own
        return ("constant", id(trace.constants[value])) if known else own.setdefault(value, len(own))

    does = tuple(
        (_what(operation), tuple(map(inside, operation.inputs)), tuple(map(inside, operation.outputs)))
        for operation in part.operations
    )
    return given, does, tuple(own[value] for value in part.gives)


def _what(operation: Operation) -> Hashable:
    if operation.eqn is not None:
        return id(operation.eqn)
    if isinstance(operation.own, partial):
        return operation.own.func, tuple(each if isinstance(each, int) else id(each) for each in operation.own.args)
    return operation.own


def _program(part: _Part, constants: Mapping[int, Any]) -> Callable[..., list[Any]]:
    def run(*values: Any) -> list[Any]:
        known = dict(zip(part.takes, values, strict=True))
        for operation in part.operations:
            inputs = [known[value] if value in known else constants[value] for value in operation.inputs]
            known |= zip(operation.outputs, operation.done(inputs), strict=True)
        return [known[value] for value in part.gives]

    return run


def _cost(part: _Part, trace: FlatTrace) -> Cost:
    flops = sum(of_operation(operation.eqn) for operation in part.operations if operation.eqn is not None)
    avals = [trace.avals[value] for value in (*part.takes, *part.gives) if value in trace.avals]
    return Cost(flops, float(sum(_size(aval) for aval in avals if hasattr(aval.dtype, "itemsize"))))


def _notes(parts: Sequence[_Part], names: Mapping[int, str]) -> Iterator[str]:
    for number, part in enumerate(parts):
        for operation in part.operations:
            if operation.name == "scan" and operation.eqn is not None:
                stacked = sorted(names[value] for value in operation.inputs if value in names)
                if stacked:
                    turns = operation.eqn.params["length"]
                    yield f"stage{number} has a loop of {turns} turns that needs all of {', '.join(stacked)} before it begins"
