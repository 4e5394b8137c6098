"""The Task: what is learned, written once, trained anywhere.

A `Task` is pure functions and plain settings. Nothing here trains: `local.py` makes the local rule of it, `plan/`
makes it portable, `simulate/` and `fleet/` run it.

The functions::

    init(key) -> Variables(params, state)
    loss(params, state, batch, key) -> Loss(per_example (B,), state, metrics)
    evaluate(params, state, batch) -> metrics
    predict(params, state, batch) -> array (B, ...)        # optional, for `shoal predict`
    penalty(params) -> scalar                              # optional, added to the mean loss

`batch` is a mapping of the task's fields with a leading dimension B, plus ``batch["mask"]`` (B,), True for real
examples: whoever mixes examples (batch norm) must heed it; the frame masks padding out of losses and metrics.
"""

import fnmatch
import inspect
import re
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple, Self

import jax
import jax.numpy as jnp
import optax

from shoal import validate
from shoal.codec.rounding import Rounding
from shoal.errors import ShoalError
from shoal.policy import About, Privacy, RoundPolicy, ServerRule, check_task_name

if TYPE_CHECKING:
    from shoal.local import LocalRule

Batch = Mapping[str, Any]
"""Field -> array (B, ...); also `mask` (B,)."""

Tree = Any
"""A pytree of arrays."""

LeafRule = str
"""`mean`, `private`, `frozen`, or `lora(rank)`: see `lora.py`."""

LOSS_BOUND: Final = (-1e6, 1e6)
"""Between what the reported loss of one example is clipped, where nobody says otherwise."""

_LEAF_RULES = re.compile(r"mean|private|frozen|lora\([1-9]\d{0,5}\)")


class Variables(NamedTuple):
    """What a model consists of: parameters that are learned and state that is carried (batch statistics)."""

    params: Tree
    state: Tree


@partial(jax.tree_util.register_dataclass, data_fields=["numerator", "denominator"], meta_fields=["bound"])
@dataclass(frozen=True)
class Sum:
    """A metric that can be added exactly: the metric is sum(numerator) / sum(denominator)."""

    numerator: Any
    """(B,), each within `bound`; clipped to it."""
    denominator: Any
    """(B,), each within [0, 1]; clipped to it."""
    bound: tuple[float, float]
    """Smallest and largest numerator of one example."""

    def __post_init__(self) -> None:
        low, high = self.bound
        if not low < high:
            raise ValueError(f"Expected bound=(lo, hi) with lo < hi, got bound={self.bound!r}.")


class Loss(NamedTuple):
    """What a loss function returns."""

    per_example: Any
    """(B,), one loss per example; the frame takes the mean over real ones."""
    state: Tree
    """The model's state after this batch."""
    metrics: dict[str, Sum]
    """Metrics of this batch."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Local:
    """Local training on one device."""

    optimizer: optax.GradientTransformation = field(default_factory=lambda: optax.sgd(0.1))
    """Any optax transformation; its state lives for one round."""
    batch_size: int = 32
    """Examples per step."""
    epochs: int = 1
    """Passes over the device's examples in one round."""
    steps_per_block: int = 4
    """Steps that one call of the compiled program takes."""
    max_examples: int = 1 << 16
    """Most examples (times epochs) that one update uses; a device with more takes a random part of them each round."""
    weighting: Literal["examples", "uniform"] = "examples"
    """An update counts as many times as it saw examples, or once."""
    drop_remainder: bool = False
    """Leave out the partial last batch of an epoch."""
    partial: Literal["drop", "fednova"] = "drop"
    """What becomes of the steps of a device that is interrupted for good: dropped, or reported. With `fednova` every
    device's update is divided by its steps and the mean multiplied by the mean number of steps (Wang et al. 2020)."""

    holdout: float = 0.0
    """Share of a device's examples that training leaves out, for `shoal.evaluation`; in [0, 1)."""
    part: Literal["training", "held_out", "both"] = "training"
    """Which part of the examples is used; the others are set by `shoal.evaluation` and `shoal.measured`."""

    def __post_init__(self) -> None:
        if not isinstance(self.optimizer, optax.GradientTransformation):
            raise TypeError(
                f"Expected optimizer to be an optax transformation, such as optax.sgd(0.1), got optimizer={self.optimizer!r}."
            )
        if not 0.0 <= self.holdout < 1.0:
            raise ValueError(f"Expected 0 <= holdout < 1, got holdout={self.holdout!r}.")
        validate.positive(batch_size=self.batch_size, epochs=self.epochs, steps_per_block=self.steps_per_block)
        if self.max_examples < self.epochs:
            raise ValueError(f"Expected max_examples >= epochs={self.epochs}, got max_examples={self.max_examples}.")
        validate.one_of(("examples", "uniform"), weighting=self.weighting)
        validate.one_of(("drop", "fednova"), partial=self.partial)

    @property
    def max_weight(self) -> int:
        """Most that one update may count for."""
        return self.max_examples if self.weighting == "examples" else 1


@dataclass(frozen=True, kw_only=True)
class Task:
    """What is learned and how. See the module's text for the functions' signatures."""

    name: str
    """Name of the task; letters, digits, dot, dash, underscore."""
    init: Callable[[jax.Array], Any]
    """Key -> Variables; a bare pytree is taken as params without state."""
    loss: Callable[..., Any]
    """(params, state, batch, key) -> Loss; returning just the per-example losses is enough for a stateless model."""
    batch: Mapping[str, tuple[tuple[int, ...], str]]
    """Field -> (shape of one example, dtype)."""
    evaluate: Callable[..., dict[str, Sum]] | None = None
    """(params, state, batch) -> metrics."""
    predict: Callable[..., Any] | None = None
    """(params, state, batch) -> predictions (B, ...)."""
    penalty: Callable[[Tree], Any] | None = None
    """params -> scalar, added to the mean loss."""
    local: Local = field(default_factory=Local)
    """Local training."""
    server: ServerRule | optax.GradientTransformation = field(default_factory=ServerRule)
    """What the server does with the mean update."""
    rounds: RoundPolicy = field(default_factory=RoundPolicy)
    """How rounds are run on a fleet and in simulation."""
    privacy: Privacy = field(default_factory=Privacy)
    """What the members are promised."""
    leaves: Mapping[str, LeafRule] = field(default_factory=dict)
    """Glob over tensor names (`params/head/*`) -> rule; the first that matches counts, else `mean`."""
    bounds: Mapping[str, float] = field(default_factory=dict)
    """Glob over tensor names -> largest absolute value of an update's element; else `privacy.delta_bound`."""
    tables: Mapping[str, str] = field(default_factory=dict)
    """Name of an embedding table -> name of its tensor."""
    keys: Callable[[Batch], Mapping[str, Any]] | None = None
    """batch -> table -> ids (B, ...): the rows that a batch needs."""
    about: About = field(default_factory=About)
    """What people are told of it."""
    heeds_mask: bool = True
    """False: the model mixes examples without looking at the mask, so a partial batch is refused."""
    down: Rounding = "float32"
    """What versions are rounded to before they are sent: see `shoal.compressed`."""
    aggregator: Literal["weighted_mean", "evaluation", "statistics"] = "weighted_mean"
    """What the server makes of the sums; the others are set by `shoal.evaluation` and `shoal.statistics`."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Of the aggregator, as JSON."""
    rule: "Callable[[Task], LocalRule] | None" = None
    """Makes another local rule than `local.sgd_rule` of this task."""
    algorithms: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """What has been made of it by `shoal.fedprox` and its siblings, in order: name -> its arguments, for people to read."""

    def __post_init__(self) -> None:
        check_task_name(self.name)
        _check_parts(self)
        if not self.batch or "mask" in self.batch:
            raise ValueError(
                f"Expected batch to name the fields of an example ('mask' is ours), got {sorted(self.batch)}."
            )
        if wide := {name: dtype for name, (_, dtype) in self.batch.items() if dtype in ("int64", "uint64", "float64")}:
            raise ValueError(
                f"Expected fields of at most 32 bits, got {wide}: programs compute in 32 bits. Name the 32-bit type; data "
                "of 64 bits is converted where it fits."
            )
        if self.rounds.selection.kind == "by_size" and self.local.weighting != "uniform":
            raise ValueError(
                "Expected Local(weighting='uniform') with selection by size: who holds more is drawn more often, and would "
                "count for its examples once more."
            )
        if self.rounds.selection.kind == "by_size" and "scaffold" in self.algorithms:
            raise ValueError(
                "Expected another selection than by size with SCAFFOLD: a device that is drawn twice would change the mean of "
                "the control variates twice, and its own once. Take uniform selection."
            )
        _check_noise(self)
        _check_adaptive_clip(self)
        _check_examples(self)
        for pattern, rule in self.leaves.items():
            if not _LEAF_RULES.fullmatch(rule):
                raise ValueError(
                    f"Expected leaves[{pattern!r}] to be one of frozen | lora(rank) | mean | private, got {rule!r}."
                )

    def leaf_rule(self, name: str) -> LeafRule:
        """The rule of the tensor of that name."""
        for pattern, rule in self.leaves.items():
            if fnmatch.fnmatchcase(name, pattern):
                return rule
        return "mean"

    def bound(self, name: str) -> float:
        """The largest absolute value of an element of that tensor's update."""
        for pattern, bound in self.bounds.items():
            if fnmatch.fnmatchcase(name, pattern):
                return bound
        return self.privacy.delta_bound

    def variables(self, key: jax.Array) -> Variables:
        """`init`, with a bare pytree wrapped."""
        made = self.init(key)
        return made if isinstance(made, Variables) else Variables(made, {})

    def batch_spec(self, size: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes of a batch of `size` examples with its mask."""
        spec = {
            name: jax.ShapeDtypeStruct((size, *shape), jnp.dtype(dtype)) for name, (shape, dtype) in self.batch.items()
        }
        return spec | {"mask": jax.ShapeDtypeStruct((size,), jnp.bool_)}

    def losses(self, params: Tree, state: Tree, batch: Batch, key: jax.Array) -> Loss:
        """`loss`, with its simple forms wrapped and its result checked.

        Raises:
            ValueError: the per-example losses do not have shape (B,).
        """
        made = called(f"loss of task {self.name!r}", self.loss, (params, state, batch, key), batch)
        result = made if isinstance(made, Loss) else Loss(made, state, {})
        size = batch["mask"].shape[0]
        shape = jnp.shape(result.per_example)
        if shape != (size,):
            what = "a scalar" if shape == () else f"shape {shape}"
            raise ValueError(
                f"Expected the loss of task {self.name!r} to return one loss per example, shape ({size},), got {what}. "
                "Do not take the mean: shoal masks padding and takes it."
            )
        if not jnp.issubdtype(dtype := jnp.result_type(result.per_example), jnp.floating):
            raise ValueError(
                f"Expected losses of a floating type from task {self.name!r}, got {dtype}: none has a gradient."
            )
        check_metrics(result.metrics, size, what=f"loss of task {self.name!r}")
        return result

    def replace(self, **changes: Any) -> "Task":
        """A copy with some fields changed."""
        return replace(self, **changes)

    @classmethod
    def from_flax(
        cls, module: Any, *, loss: str | Callable[..., Any], batch: Mapping[str, Any], **settings: Any
    ) -> Self:
        """A task from a Flax module in one line; see `shoal.task_flax.from_flax`."""
        from shoal.task_flax import from_flax

        made: Self = from_flax(cls, module, loss=loss, batch=batch, **settings)
        return made

    @classmethod
    def from_equinox(
        cls, module: Any, *, loss: str | Callable[..., Any], batch: Mapping[str, Any], **settings: Any
    ) -> Self:
        """A task from an Equinox module in one line; see `shoal.task_equinox.from_equinox`."""
        from shoal.task_equinox import from_equinox

        made: Self = from_equinox(cls, module, loss=loss, batch=batch, **settings)
        return made

    @classmethod
    def from_torch(
        cls, module: Any, *, loss: str | Callable[..., Any], batch: Mapping[str, Any], **settings: Any
    ) -> Self:
        """A task from a PyTorch module in one line; see `shoal.task_torch.from_torch`."""
        from shoal.task_torch import from_torch

        made: Self = from_torch(cls, module, loss=loss, batch=batch, **settings)
        return made


def check_metrics(metrics: Mapping[str, Any], size: int, *, what: str) -> None:
    """Raises ValueError unless every metric is a `Sum` of vectors of `size`."""
    for name, metric in metrics.items():
        if not isinstance(metric, Sum):
            raise ValueError(f"Expected metric {name!r} of the {what} to be a shoal.Sum, got {type(metric).__name__}.")
        for part in ("numerator", "denominator"):
            if (shape := jnp.shape(getattr(metric, part))) != (size,):
                raise ValueError(
                    f"Expected {part} of metric {name!r} of the {what} to have shape ({size},), got {shape}."
                )


def _check_noise(task: Task) -> None:
    """Raises ValueError for what noise cannot protect."""
    if not task.privacy.noise_multiplier:
        return
    if task.local.weighting != "uniform":
        raise ValueError(
            "Expected Local(weighting='uniform') with noise, got 'examples': how much one device can change has to be the same for all."
        )
    if task.local.partial != "drop":
        raise ValueError(f"Expected Local(partial='drop') with noise, got {task.local.partial!r}: steps have no noise.")
    if task.rounds.late.kind != "discard" or task.rounds.buffer:
        raise ValueError(
            "Expected late=Late() and buffer=0 with noise: a device would be in a version more than once, or in one that was made before."
        )
    if task.rounds.group_size:
        raise ValueError(
            f"Expected group_size=0 with noise, got {task.rounds.group_size}: sums would be in the record before they have their noise."
        )
    if task.rounds.selection.kind == "by_size":
        raise ValueError("Expected another selection than by size with noise: who is drawn twice counts twice.")
    if task.aggregator != "weighted_mean":
        raise ValueError(f"Expected a task that trains with noise, got aggregation by {task.aggregator!r}.")


def _check_adaptive_clip(task: Task) -> None:
    """Raises ValueError for rounds in which an update may be over another version's clip norm than the one it is multiplied by."""
    if task.privacy.adaptive_clip is None:
        return
    if task.rounds.late.kind != "discard" or task.rounds.buffer:
        raise ValueError(
            "Expected late=Late() and buffer=0 with an adaptive clip norm: an update is divided by the norm of the version that it was made "
            "from, and a later version has another."
        )
    if task.aggregator != "weighted_mean":
        raise ValueError(
            f"Expected a task that trains with an adaptive clip norm, got aggregation by {task.aggregator!r}."
        )


def _check_examples(task: Task) -> None:
    """Raises ValueError for what noise on examples cannot protect."""
    if task.privacy.examples is None:
        return
    if task.local.weighting != "uniform":
        raise ValueError(
            "Expected Local(weighting='uniform') with noise on examples, got 'examples': how many a device has would be told, without noise."
        )
    if task.local.partial != "drop":
        raise ValueError(
            f"Expected Local(partial='drop') with noise on examples, got {task.local.partial!r}: steps have no noise."
        )
    if not task.heeds_mask:
        raise ValueError(
            "Expected a model that takes each example alone with noise on examples, got heeds_mask=False: one that mixes the examples of a batch "
            "has no gradient of a single one."
        )
    if task.keys is not None:
        raise ValueError(
            "Expected keys=None with noise on examples, got a function: which rows of a table a device takes tells what it holds."
        )
    if task.aggregator != "weighted_mean":
        raise ValueError(f"Expected a task that trains with noise on examples, got aggregation by {task.aggregator!r}.")


def _check_parts(task: Task) -> None:
    """Raises TypeError or ValueError for a part of the wrong kind, which would else fail far from here."""
    for name in ("init", "loss", "evaluate", "predict", "penalty"):
        part = getattr(task, name)
        if not callable(part) and not (part is None and name not in ("init", "loss")):
            raise TypeError(f"Expected {name} of task {task.name!r} to be a function, got {type(part).__name__}.")
    if not isinstance(task.server, ServerRule | optax.GradientTransformation):
        raise TypeError(
            f"Expected server of task {task.name!r} to be a rule such as shoal.server.adam(1e-2), or an optax transformation, got "
            f"{task.server!r}."
        )
    for name, spec in task.batch.items():
        if not (isinstance(spec, tuple | list) and len(spec) == 2 and isinstance(spec[0], tuple | list)):
            raise ValueError(
                f"Expected batch[{name!r}] to be (shape of one example, dtype), such as ((5,), 'float32'), got {spec!r}."
            )


def called(what: str, function: Callable[..., Any], arguments: tuple[Any, ...], batch: Batch) -> Any:
    """What a function of the user's returns. What goes wrong in it is told with the batch that it got, and where in it.

    Raises:
        ValueError: it raised an error that says nothing of the task.
    """
    try:
        return function(*arguments)
    except (ShoalError, NotImplementedError):
        raise
    except Exception as error:
        fields = ", ".join(
            f"{name} {jnp.result_type(value)}{list(jnp.shape(value))}"
            for name, value in batch.items()
            if name != "mask"
        )
        frames = traceback.extract_tb(error.__traceback__)[1:]
        own = [frame for frame in frames if "site-packages" not in frame.filename] or frames
        where = f", line {own[-1].lineno} of {own[-1].filename}" if own else ""
        said = f"{type(error).__name__}: {error}".strip().splitlines()[0]
        raise ValueError(f"The {what} failed on a batch of {fields}{where}: {said}") from error


def takes_argument(function: Callable[..., Any], name: str) -> bool:
    """Whether a function names an argument so; `**kwargs` does not count: nobody knows what becomes of those."""
    return name in inspect.signature(function).parameters
