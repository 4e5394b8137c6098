"""Does a task keep its contracts, and what will it cost? A line for each question, pass or fail, with the reason.

    report = shoal.testing.check(task, population)
    assert report.ok, report

What is asked, in this order: functions, data, batches, plan, loads again, memory, bytes, speed, deterministic, padding, masked
step, private leaves, learns, then the task's own predicates. A question that cannot be put is skipped, with the reason.
Cost: one build and one compilation of the task, then a few seconds.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Literal

import jax
import jax.numpy as jnp
import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from shoal.aggregate.linear import Linear
from shoal.api import Model
from shoal.clip_norm import LOG_SCALE
from shoal.codec.linear import VERSION
from shoal.data.batch import num_steps
from shoal.data.store import Examples, Population
from shoal.local import LocalRule, Named, local_rule
from shoal.lora import with_adapters
from shoal.plan.build import Built, build
from shoal.plan.check import check_plan, memory_bytes, readable
from shoal.plan.jax_runner import JaxRunner
from shoal.plan.left_out import EMPTY, HEED_THE_MASK, left_out, named, told
from shoal.plan.manifest import Manifest
from shoal.plan.plan import Plan
from shoal.plan.runner import Limits, Update
from shoal.plan.train import conform, evaluate, no_state, train
from shoal.task import Task
from shoal.tensors import Tensors, is_of_model

Status = Literal["pass", "fail", "skip"]
Predicate = Callable[[Model, Mapping[str, float]], bool]
"""(the model after the trial, its metrics) -> whether it is as it should be."""

USERS_READ: Final = 50
TRIAL_EXAMPLES: Final = 512
TRIAL_ROUNDS: Final = 8
TRIAL_S: Final = 20.0
SPEED_S: Final = 1.0
TOLERANCE: Final = 1e-4
"""Largest difference of a padded batch from an unpadded one, beside 1e-4 of the tensor's largest value."""
_SEED: Final = b"shoal check".ljust(32, b".")
_ROOT: Final = "check"


@dataclass(frozen=True, kw_only=True)
class Line:
    """The answer to one question."""

    name: str
    status: Status
    detail: str
    """What was found."""
    hint: str = ""
    """What to do, where it failed."""
    seconds: float = 0.0

    def __str__(self) -> str:
        return f"{self.status:4}  {self.name:14}  {self.detail}{f' {self.hint}' if self.hint else ''}"


@dataclass(frozen=True)
class Report:
    """What `check` found."""

    task: str
    lines: tuple[Line, ...]

    @property
    def ok(self) -> bool:
        """Whether nothing failed."""
        return all(line.status != "fail" for line in self.lines)

    def __getitem__(self, name: str) -> Line:
        """The line of a question. Raises KeyError for one that was not put."""
        for line in self.lines:
            if line.name == name:
                return line
        raise KeyError(f"No line {name!r} among {' | '.join(line.name for line in self.lines)}.")

    def __str__(self) -> str:
        return "\n".join(map(str, self.lines))


class _Fails(Exception):
    """A question's answer is no."""

    def __init__(self, detail: str, hint: str = "") -> None:
        super().__init__(detail)
        self.hint = hint


class _Skips(Exception):
    """A question cannot be put."""


def check(
    task: Task,
    population: Population | Mapping[str, Mapping[str, np.ndarray]] | None = None,
    *,
    predicates: Mapping[str, Predicate] | None = None,
    on_line: Callable[[Line], None] = lambda line: None,
) -> Report:
    """Checks a task, on users' examples or, without them, on random ones of the task's spec.

    Args:
        task: what is checked.
        population: the users' examples; None: random numbers, on which no task can learn.
        predicates: name -> what should hold of the model after the trial; each gets a line of its own.
        on_line: told of each answer as it comes.

    Returns:
        A line for each question. Nothing is raised for what the task does wrong.
    """
    members = population
    if members is not None and not isinstance(members, Population):
        members = Population.from_arrays(members)
    lines: list[Line] = []
    for name, ask in _Checks(task, members, predicates or {}).questions():
        begun_s = time.perf_counter()
        made = _answer(name, ask)
        lines.append(
            Line(name=name, status=made[0], detail=made[1], hint=made[2], seconds=time.perf_counter() - begun_s)
        )
        on_line(lines[-1])
    return Report(task.name, tuple(lines))


def _answer(name: str, ask: Callable[[], str]) -> tuple[Status, str, str]:
    try:
        return "pass", ask(), ""
    except _Skips as skips:
        return "skip", str(skips), ""
    except _Fails as fails:
        return "fail", str(fails), fails.hint
    except Exception as error:  # a stranger's task may raise anything; that is the answer
        text = " ".join(str(error).split())[:400]
        known = isinstance(error, ValueError) or type(error).__module__.startswith("shoal.")
        return "fail", text if known and text else f"{type(error).__name__}: {text}", ""


@dataclass
class _Checks:
    """The questions, and what earlier ones leave for later ones."""

    task: Task
    population: Population | None
    predicates: Mapping[str, Predicate]
    rule: LocalRule | None = None
    built: Built | None = None
    runner: JaxRunner | None = None
    examples: Examples | None = None
    first: Update | None = None
    trained: Model | None = None
    metrics: dict[str, float] = field(default_factory=dict)

    def questions(self) -> Iterator[tuple[str, Callable[[], str]]]:
        yield "functions", self.functions
        yield "data", self.data
        yield "batches", self.batches
        yield "plan", self.plan
        yield "loads again", self.loads_again
        yield "memory", self.memory
        yield "bytes", self.bytes
        yield "speed", self.speed
        yield "deterministic", self.deterministic
        yield "padding", self.padding
        yield "masked step", self.masked_step
        yield "private leaves", self.private_leaves
        yield "learns", self.learns
        for name, predicate in self.predicates.items():
            yield name, lambda predicate=predicate: self.holds(predicate)  # type: ignore[misc]

    def functions(self) -> str:
        rule = local_rule(self.task)
        params = sum(int(np.prod(s.shape)) for s in rule.broadcast if s.name.startswith("params/"))
        self.rule = rule
        return f"{len(rule.broadcast)} tensors, {params:,} parameters; reads {', '.join(sorted(self.task.batch))}"

    def data(self) -> str:
        self.need_rule()
        if self.population is None:
            self.examples = random_examples(self.task)
            raise _Skips("no data were given; random examples take their place")
        manifest = self.manifest_of_batch()
        sizes = self.population.sizes()
        with_examples = sorted((n, user) for user, n in sizes.items() if n)
        if not with_examples:
            raise _Fails("no user has an example.", "Give users with data.")
        step = max(1, len(with_examples) // USERS_READ)
        for _, user in with_examples[::step][:USERS_READ]:
            self.refuse_odd(user, conform(self.population[user], manifest))
        counts = [n for n, _ in with_examples]
        self.examples = conform(self.population[with_examples[len(with_examples) // 2][1]], manifest)
        empty = [user for user, n in sizes.items() if not n]
        return (
            f"{sum(counts):,} examples of {len(counts):,} users: {counts[0]} / {counts[len(counts) // 2]} / {counts[-1]} "
            f"(least, median, most){f'; beware: {told(empty, EMPTY)}' if empty else ''}"
        )

    def batches(self) -> str:
        self.need_examples()
        if self.population is None:
            raise _Skips("no data were given")
        training = self.manifest_of_batch().training
        found = left_out(training, {user: n for user, n in self.population.sizes().items() if n})
        for why, users in found.items():
            hint = HEED_THE_MASK if training.whole_batches else "Take a smaller batch, or leave them out."
            raise _Fails(f"{len(users):,} of {len(self.population):,} users have {why}: {named(users)}.", hint)
        return f"every user with examples has something to train on in batches of {training.batch_size}"

    def refuse_odd(self, user: str, examples: Examples) -> None:
        for name, values in examples.fields.items():
            if values.dtype.kind == "f" and not np.isfinite(values).all():
                raise _Fails(f"field {name!r} of user {user!r} has NaN or infinity.", "Fill or drop those examples.")

    def manifest_of_batch(self) -> Manifest:
        # Only `task` and `batch` of it are read; the plan itself is the next question.
        self.built = self.built or build(self.task)
        return self.built.plan.manifest

    def plan(self) -> str:
        self.need_rule()
        self.built = self.built or build(self.task)
        programs = self.built.plan.manifest.programs
        size = sum(program.size_bytes for program in programs)
        named = ", ".join(f"{program.name} {readable(program.size_bytes)}" for program in programs)
        return f"{readable(size)} in {len(programs)} programs: {named}"

    def loads_again(self) -> str:
        built = self.need_built()
        key = Ed25519PrivateKey.generate()
        plan = Plan.parse(built.plan.sign(key).to_bytes())
        plan.verify(key.public_key().public_bytes_raw())
        check_plan(plan.manifest, Limits(memory_bytes=1 << 50))
        runner = JaxRunner(plan)
        seconds = runner.compile()
        runner.set_model(_ROOT, built.model)
        self.runner = runner
        return f"signed, verified, compiled in {seconds:.1f} s"

    def memory(self) -> str:
        needed, most = memory_bytes(self.need_built().plan.manifest), Limits().memory_bytes
        if needed > most:
            raise _Fails(
                f"a device needs about {readable(needed)}, by default it allows {readable(most)}.",
                "Take a smaller model or batch, or start devices with --memory.",
            )
        return f"a device needs about {readable(needed)} for tensors (it allows {readable(most)} by default)"

    def bytes(self) -> str:
        manifest = self.need_built().plan.manifest
        return f"{readable(manifest.model_bytes)} down and {readable(manifest.update_bytes)} up for a device in a round"

    def speed(self) -> str:
        examples, took_s, steps = self.need_examples(), 0.0, 0
        self.first = self.update(examples)  # what is done once is not timed
        training = self.need_built().plan.manifest.training
        while took_s < SPEED_S:
            begun_s = time.perf_counter()
            self.update(examples)
            took_s += time.perf_counter() - begun_s
            steps += num_steps(
                len(examples), training.batch_size, training.epochs, drop_remainder=training.drop_remainder
            )
        padding = f"; {self.first.padding:.0%} of the work is padding" if self.first.padding >= 0.005 else ""
        return f"{steps / took_s:,.0f} steps/s of {training.batch_size} examples on this machine{padding}"

    def deterministic(self) -> str:
        first, second = self.first or self.update(self.need_examples()), self.update(self.need_examples())
        for name, value in first.sums.items():
            if value.tobytes() != second.sums[name].tobytes():
                raise _Fails(
                    f"the same update twice differs in {name}.",
                    "Draw randomness from the key that loss is given, only.",
                )
        return "the same update twice has the same bits"

    def padding(self) -> str:
        rule, size = self.need_rule(), self.task.local.batch_size
        if not self.task.heeds_mask:
            raise _Skips("the model mixes examples and does not take the mask, so partial batches are refused")
        if self.task.privacy.examples is not None:
            raise _Skips("each example's gradient is taken alone, and noise is as large in any batch")
        if size == 1:
            raise _Skips("batches of one example are never padded")
        num = min(len(self.need_examples()), max(1, size * 2 // 3))
        batch = self.need_examples().take(np.arange(num))
        mask = np.arange(size) < num
        exact = _step(rule, self.need_built().model, batch, np.ones(num, bool))
        for filler in (0, num - 1):
            padded = {
                name: np.concatenate([v, np.repeat(v[filler : filler + 1], size - num, 0)]) for name, v in batch.items()
            }
            made = _step(rule, self.need_built().model, padded, mask)
            if far := _far(made, exact):
                raise _Fails(
                    f"{num} examples padded to {size} give another {far} than unpadded.",
                    "Whatever looks at other examples of the batch (batch norm, a mean) must heed batch['mask'].",
                )
        return f"{num} examples padded to {size} give what they give unpadded"

    def masked_step(self) -> str:
        rule, size = self.need_rule(), self.task.local.batch_size
        batch = self.need_examples().take(np.arange(size) % len(self.need_examples()))
        before, after = _carry(rule, self.need_built().model, batch, np.zeros(size, bool))
        for name, value in before.items():
            if np.asarray(value).tobytes() != np.asarray(after[name]).tobytes():
                raise _Fails(
                    f"a wholly masked step changes {name}.",
                    "The local rule must keep its carry where no example is real.",
                )
        return "a wholly masked step changes nothing"

    def private_leaves(self) -> str:
        rule = self.need_rule()
        private = [s.name for s in rule.broadcast if with_adapters(self.task).leaf_rule(s.name) == "private"]
        sent = {spec.tensor.name for spec in rule.sums}
        if leaked := [name for name in private if any(s == name or s.endswith(f"/{name}") for s in sent)]:
            raise _Fails(f"the update has private leaf {leaked[0]}.", "Leave it out of the local rule's sums.")
        return f"{', '.join(private)}: never in an update" if private else "the task has none"

    def learns(self) -> str:
        if self.population is None:
            self.need_runner()
            raise _Skips("no data were given")
        examples = self.trial_examples()
        runner, manifest = self.need_runner(), self.need_built().plan.manifest
        if "loss" not in _metric_names(manifest):
            raise _Skips(
                "devices tell no loss, as where there is noise: train it with shoal simulate, and held-out examples"
            )
        model, losses = dict(self.need_built().model), list[float]()
        state, begun_s = no_state(manifest), time.perf_counter()
        while len(losses) < TRIAL_ROUNDS and (len(losses) < 2 or time.perf_counter() - begun_s < TRIAL_S):
            root = f"trial {len(losses)}"
            runner.set_model(root, model)
            update = train(runner, manifest, root, examples, state, seed=_SEED, member=root, noise_seed=_SEED)
            losses.append(_mean(update.sums, "loss"))
            state, model = update.device_state, _stepped(model, update.sums, manifest)
        self.trained = self.as_model(model)
        self.metrics = {n: _mean(update.sums, n) for n in _metric_names(manifest)} | self.evaluated(examples)
        text = f"loss {losses[0]:.4g} -> {losses[-1]:.4g} over {len(losses)} passes of local training"
        if not np.isfinite(losses[-1]) or losses[-1] >= losses[0]:
            raise _Fails(f"{text}.", "Try a smaller learning rate; is the loss per example, and are the labels right?")
        return text

    def holds(self, predicate: Predicate) -> str:
        if self.trained is None:
            raise _Skips("there is no trained model: give data, and mend what failed above")
        if not predicate(self.trained, self.metrics):
            told = ", ".join(f"{name} {value:.4g}" for name, value in sorted(self.metrics.items()))
            raise _Fails(f"is not so after the trial ({told}).")
        return "holds after the trial"

    # What questions need of earlier ones.

    def need_rule(self) -> LocalRule:
        if self.rule is None:
            raise _Skips("the functions failed")
        return self.rule

    def need_built(self) -> Built:
        if self.built is None:
            raise _Skips("there is no plan")
        return self.built

    def need_runner(self) -> JaxRunner:
        if self.runner is None:
            raise _Skips("the plan was not loaded")
        return self.runner

    def need_examples(self) -> Examples:
        self.need_built()
        if self.examples is None:
            raise _Skips("the data do not fit")
        return self.usable(self.examples)

    def usable(self, examples: Examples) -> Examples:
        """Whole batches only, where the task takes no others."""
        size = self.task.local.batch_size
        if self.task.heeds_mask and not self.task.local.drop_remainder:
            return examples
        num = len(examples) - len(examples) % size
        return Examples(examples.take(np.arange(num or size) % len(examples)))

    def trial_examples(self) -> Examples:
        """Examples of several users, taken in turn."""
        assert self.population is not None
        self.need_examples()
        manifest, sizes, parts, num = self.need_built().plan.manifest, self.population.sizes(), list[Examples](), 0
        for user in (user for user, n in sizes.items() if n):
            parts.append(conform(self.population[user], manifest))
            num += len(parts[-1])
            if num >= TRIAL_EXAMPLES:
                break
        joined = Examples.concatenate(parts)
        return self.usable(Examples(joined.take(np.arange(min(num, TRIAL_EXAMPLES)))))

    def update(self, examples: Examples) -> Update:
        manifest = self.need_built().plan.manifest
        return train(self.need_runner(), manifest, _ROOT, examples, None, seed=_SEED, member="check", noise_seed=_SEED)

    def as_model(self, tensors: Tensors) -> Model:
        runner = self.need_runner()
        runner.set_model("trained", tensors)
        own = {name: value for name, value in tensors.items() if is_of_model(name)}
        return Model(self.task.name, 0, own, self.need_built().plan, runner, "trained")

    def evaluated(self, examples: Examples) -> dict[str, float]:
        manifest = self.need_built().plan.manifest
        if not manifest.variants("evaluate"):
            return {}
        return dict(evaluate(self.need_runner(), manifest, "trained", examples))


def random_examples(task: Task, *, num: int = 0) -> Examples:
    """Random examples of a task's spec: integers 0 and 1 (any label or id), bytes 0 to 255, numbers around zero.

    Args:
        task: whose fields they have.
        num: how many; 0: two batches and a half.
    """
    rng = np.random.default_rng(0)
    num = num or task.local.batch_size * 5 // 2 or 1

    def values(shape: Sequence[int], dtype: "np.dtype[np.generic]") -> np.ndarray:
        if dtype.kind in "iub":
            return rng.integers(0, 256 if dtype == np.uint8 else 2, (num, *shape)).astype(dtype)
        return rng.normal(size=(num, *shape)).astype(dtype)

    return Examples({name: values(shape, jnp.dtype(dtype)) for name, (shape, dtype) in sorted(task.batch.items())})


def _carry(rule: LocalRule, model: Tensors, batch: Mapping[str, np.ndarray], mask: np.ndarray) -> tuple[Named, Named]:
    """The carry before and after one step."""
    kept = {spec.name: jnp.zeros(spec.shape, spec.numpy_dtype) for spec in rule.device_state}
    broadcast = {name: jnp.asarray(value) for name, value in model.items()}
    before = jax.jit(rule.begin)(broadcast, kept)
    fields = {name: jnp.asarray(value)[None] for name, value in sorted(batch.items())}
    key = jnp.arange(6 if rule.hides_examples else 2, dtype=jnp.uint32)
    return before, jax.jit(rule.block)(before, fields, jnp.asarray(mask)[None], key)


def _step(rule: LocalRule, model: Tensors, batch: Mapping[str, np.ndarray], mask: np.ndarray) -> Named:
    return _carry(rule, model, batch, mask)[1]


def _far(made: Named, expected: Named) -> str:
    """The first tensor that differs by more than rounding; "" where none does."""
    for name, value in expected.items():
        wanted, got = np.asarray(value), np.asarray(made[name])
        if wanted.dtype.kind not in "fV":
            if not np.array_equal(wanted, got):
                return name
            continue
        a, b = wanted.astype(np.float64), got.astype(np.float64)
        largest = float(np.max(np.abs(a), initial=0.0))
        if not np.allclose(a, b, rtol=TOLERANCE, atol=TOLERANCE * max(largest, 1e-3), equal_nan=True):
            return name
    return ""


def _stepped(model: Tensors, sums: Tensors, manifest: Manifest) -> Tensors:
    """The model after one member's update."""
    scale = np.exp(model.get(LOG_SCALE, np.zeros((), np.float32)))  # what the update was divided by

    specs = {spec.tensor.name: spec for spec in manifest.sums}
    version = int(model[VERSION][0]) if VERSION in model else 0

    def after(name: str, value: np.ndarray) -> np.ndarray:
        key = f"delta/{name}"
        if key not in sums:
            return value + np.uint32(1) if name == VERSION else value
        delta = Linear(specs[key], value.size, version=version).undone_whole(sums[key]).reshape(value.shape)
        step = delta if name == LOG_SCALE else delta * scale
        return np.asarray(value + step.astype(value.dtype), value.dtype)

    return {name: after(name, value) for name, value in model.items()}


def _mean(sums: Tensors, name: str) -> float:
    denominator = float(sums[f"metric/{name}/denominator"])
    return float(sums[f"metric/{name}/numerator"]) / denominator if denominator else float("nan")


def _metric_names(manifest: Manifest) -> list[str]:
    names = (spec.tensor.name for spec in manifest.sums)
    return [n.removeprefix("metric/").removesuffix("/numerator") for n in names if n.endswith("/numerator")]
