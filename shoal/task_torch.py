"""Tasks from PyTorch modules in one line. Needs the extra `torch` to make the task, and nothing of it on devices.

    Task.from_torch(Net(), loss="softmax_cross_entropy", batch=…)

The module's parameters are the first weights and keep their names and layouts: `params/conv1.weight`. Its persistent buffers are
state: those of floating type that training changes are averaged, others stay as they are, `num_batches_tracked` among
them. Parameters that want no gradient are frozen.

`torch.export` takes the module apart for each shape of batch, and `shoal.aten` does its operations in JAX; an operation that
the table lacks is named when the task is made. Noise (dropout) is drawn from the step's key, not from torch's generator. Batch norm
takes its statistics of the real examples alone where the batch is the first dimension of what it normalises; where it
is not, padding could not be told apart, so such a module is trained on whole batches.

Whole numbers are given to the module as int64, as torch wants labels and indices, and computed in int32.
"""

import copy
import inspect
from collections.abc import Callable, Mapping
from typing import Any, Final

import jax
import jax.numpy as jnp

from shoal.aten.exported import Exported, Weights, export, loss_module, module_weights
from shoal.aten.run import KNOWN, MIXING, run, unknown_operations
from shoal.task import Batch, LeafRule, Variables
from shoal.task_supervised import Module, Read, supervised

PROBE: Final = 61
"""Examples in the batch by which is found out where a module keeps the batch: a size that nothing else is likely to have."""


def from_torch(
    make: Callable[..., Any],
    module: Any,
    *,
    loss: Any,
    batch: Mapping[str, tuple[tuple[int, ...], str]],
    **settings: Any,
) -> Any:
    """A task from a PyTorch module.

    Args:
        make: the class to make, `Task`.
        module: a `torch.nn.Module`. It is copied: what becomes of it later does not matter to the task.
        loss: see `shoal.task_supervised.supervised`; or one of torch's, `nn.CrossEntropyLoss()` or `F.cross_entropy`, whose
            reduction is ignored.
        batch: field -> (shape of one example, dtype).
        **settings: `inputs`, `outputs`, `labels`, `loss_bound` (see there), any other field of `Task`.

    Raises:
        MissingExtra: torch is not installed.
        ValueError: an unknown loss or field, no module, or one that cannot be taken apart; the text says why.
    """
    return supervised(make, lambda read: _module(module, read, batch), loss=_loss(loss), batch=batch, **settings)


def _module(given: Any, read: Read, batch: Mapping[str, tuple[tuple[int, ...], str]]) -> Module:
    weights = module_weights(given)
    takes_mask = "mask" in inspect.signature(given.forward).parameters
    graphs = _Graphs(given, weights)

    def exported(args: Any, mask: Any, training: bool) -> Exported:
        return graphs.get(args, {"mask": mask} if takes_mask else {}, training)

    spec = {name: jax.ShapeDtypeStruct((PROBE, *shape), jnp.dtype(dtype)) for name, (shape, dtype) in batch.items()}
    spec["mask"] = jax.ShapeDtypeStruct((PROBE,), jnp.bool_)
    probe = exported(jax.eval_shape(read, spec), spec["mask"], True)
    mixing = [node for node in probe.nodes if str(node.target) in MIXING]
    heeds_mask = takes_mask or all(node.args[0].meta["val"].shape[0] == PROBE for node in mixing)

    def init(key: jax.Array) -> Variables:
        return Variables(
            {name: jnp.asarray(value) for name, value in weights.params.items()},
            {name: jnp.asarray(value) for name, value in weights.buffers.items()},
        )

    def apply(params: Any, state: Any, batch: Batch, key: jax.Array | None) -> tuple[Any, Any]:
        args, mask = read(batch), batch["mask"]
        graph = exported(args, mask, key is not None)
        inputs = [*args, mask] if takes_mask else list(args)
        outputs, changed = run(graph, params, state, inputs, key, mask if heeds_mask else None)
        return outputs, {**state, **changed} if key is not None else state

    return Module(init=init, apply=apply, heeds_mask=heeds_mask, leaves=_rules(weights, probe))


def _loss(loss: Any) -> Any:
    """A loss of torch's as a function of JAX arrays; any other as it is."""
    module = None if isinstance(loss, str) else loss_module(loss)
    if module is None:
        return loss
    weights = module_weights(module)
    graphs = _Graphs(module, weights)

    def losses(outputs: Any, labels: Any) -> Any:
        graph = graphs.get((outputs, labels), {}, False)
        return run(graph, weights.params, weights.buffers, [outputs, labels], None, None)[0]

    return losses


class _Graphs:
    """The graphs of a module, one for each shape of its inputs, in training and out of it."""

    def __init__(self, module: Any, weights: Weights) -> None:
        self._module, self._weights = copy.deepcopy(module), weights
        self._found: dict[Any, Exported] = {}

    def get(self, args: Any, kwargs: Mapping[str, Any], training: bool) -> Exported:
        specs = tuple((tuple(one.shape), str(one.dtype)) for one in args)
        named = {name: (tuple(one.shape), str(one.dtype)) for name, one in kwargs.items()}
        if (specs, training) not in self._found:
            self._found[specs, training] = self._export(specs, named, training)
        return self._found[specs, training]

    def _export(self, specs: Any, named: Any, training: bool) -> Exported:
        made = export(self._module, specs, named, training=training, known=KNOWN, shared=self._weights.shared)
        if unknown := unknown_operations(made):
            raise ValueError(
                f"Expected {type(self._module).__name__} to be made of operations that shoal has in JAX ({len(KNOWN)} of them), it "
                f"uses {', '.join(unknown)}. Write that part otherwise, or the whole model in JAX (docs/models.md)."
            )
        return made


def _rules(weights: Weights, training: Exported) -> dict[str, LeafRule]:
    """Frozen is what does not learn: it is sent to devices, and never back."""
    still = [f"params/{name}" for name in weights.params if name not in weights.learned]
    kept = [n for n, value in weights.buffers.items() if n not in training.changed or value.dtype.kind in "iub"]
    return dict.fromkeys([*still, *(f"state/{name}" for name in kept)], "frozen")
