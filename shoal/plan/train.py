"""One member's part of a round: examples through begin, block…, finish. The same code on a device and in simulation.

Everything random in it (order of examples, dropout) is made of the round's seed and the member's name, so that a
simulated member and a real one do the same, and order and parallelism change nothing. Where a plan has noise on examples, what its programs
draw from is the device's own: the server knows the round's seed, and could take the noise off.
"""

import hashlib
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import chain, islice
from typing import Any, Final

import numpy as np

from shoal.data.batch import Block, Blocks
from shoal.data.split import held_out_part
from shoal.data.store import Examples
from shoal.errors import DataError, DeviceError, TooFewExamples
from shoal.plan.left_out import HEED_THE_MASK, obstacle
from shoal.plan.manifest import HELD_OUT, Manifest, Training
from shoal.plan.runner import Runner, Update
from shoal.policy import Privacy
from shoal.tensors import Tensors, TensorSpec

NOISE_SEED_BYTES: Final = 32


@dataclass(frozen=True, slots=True)
class MemberRandomness:
    """What one member draws from in one round."""

    key: np.ndarray
    """(2,) uint32: for the programs."""
    rng: np.random.Generator
    """For the order of examples."""


def member_randomness(seed: bytes, member: str) -> MemberRandomness:
    """The randomness of a member in the round with that seed."""
    return Randomness().of(seed, member)


def program_key(privacy: Privacy, public: np.ndarray, *, noise_seed: bytes | None, member: str) -> np.ndarray:
    """What a member's programs draw from in one round.

    Args:
        privacy: what the plan promises.
        public: the key of `member_randomness`, which the server knows.
        noise_seed: what only the member knows; not needed without noise on examples.
        member: its name.

    Returns:
        (privacy.key_words,) uint32.

    Raises:
        ValueError: it is needed and missing, or too short to be a secret.
    """
    if privacy.examples is None:
        return public
    if noise_seed is None or len(noise_seed) < NOISE_SEED_BYTES:
        raise ValueError(
            f"Expected a noise_seed of at least {NOISE_SEED_BYTES} bytes for a plan with noise on examples, got "
            f"{None if noise_seed is None else len(noise_seed)}: on a device os.urandom(32), in a simulation the round's seed."
        )
    digest = hashlib.sha256(b"shoal noise on examples\0" + noise_seed + b"\0" + member.encode()).digest()
    return np.frombuffer(digest[: 4 * privacy.key_words], "<u4").astype(np.uint32)


@dataclass(frozen=True)
class Paused:
    """A training between two blocks."""

    blocks: int
    """How many are done."""
    carry: Tensors
    """What the next one goes on with."""


class Interrupted(DeviceError):
    """A training was interrupted, and may go on later from `paused`; None: from its beginning."""

    def __init__(self, paused: Paused | None) -> None:
        super().__init__("The training was interrupted.", stage="train")
        self.paused = paused


class Randomness:
    """That of one member after the other, from one generator with a new key each: making one takes five times as long."""

    def __init__(self) -> None:
        self._order = np.random.Philox(key=0)
        self._rng = np.random.Generator(self._order)
        self._fresh = self._order.state

    def of(self, seed: bytes, member: str) -> MemberRandomness:
        """As `member_randomness`; its generator is good until the next call."""
        digest = hashlib.sha256(seed + b"\0" + member.encode()).digest()
        self._fresh["state"]["key"] = np.frombuffer(digest[8:24], "<u8")
        self._order.state = self._fresh
        return MemberRandomness(np.frombuffer(digest[:8], "<u4").astype(np.uint32), self._rng)


def train(
    runner: Runner,
    manifest: Manifest,
    root: str,
    examples: Examples,
    device_state: Tensors | None,
    *,
    seed: bytes,
    member: str,
    noise_seed: bytes | None = None,
    should_stop: Callable[[], bool] = lambda: False,
    is_interrupted: Callable[[], bool] = lambda: False,
    paused: Paused | None = None,
) -> Update:
    """One member's local training.

    Args:
        runner: holds the model `root`.
        manifest: of the runner's plan.
        root: the model's index.
        examples: the member's data; fields as the manifest's batch says.
        device_state: what the member kept from its last counted round, None at first.
        seed: the round's, 32 bytes.
        member: the member's name.
        noise_seed: what only the member knows, for plans with noise on examples; another for each training.
        should_stop: asked between two blocks: the result is not needed any more.
        is_interrupted: asked between two blocks: the device can go no further. What it did by then is its update, at the
            weight of the whole training, where the plan takes partial work and a block is done.
        paused: where a training of the same model, seed, member and examples stood when it was interrupted.

    Raises:
        DataError: the examples do not fit the task.
        Interrupted: it was, and nothing is to be reported of it yet.
        DeviceError: `should_stop` said so.
        ProgramError: a program failed.
        ValueError: a noise_seed is needed.
    """
    randomness = member_randomness(seed, member)
    key = program_key(manifest.promises.privacy, randomness.key, noise_seed=noise_seed, member=member)
    training = manifest.training
    conformed = conform(examples, manifest)
    where = chosen_examples(len(conformed), manifest, randomness.rng, member=member)
    blocks = Blocks(
        conformed if where is None else Examples(conformed.take(where)),
        batch_size=training.batch_size,
        steps_per_block=training.steps_per_block,
        epochs=training.epochs,
        rng=randomness.rng,
        drop_remainder=training.drop_remainder,
    )
    measured = _measured_blocks(conformed, training)
    done = paused.blocks if paused is not None else 0
    if paused is not None:
        runner.resume(root, paused.carry)
    else:
        runner.begin(root, device_state if device_state is not None else no_state(manifest))
    data_s = 0.0
    begun = time.perf_counter()
    is_whole = True
    for number, (batches, mask) in islice(enumerate(chain(blocks, measured)), done, None):
        data_s += time.perf_counter() - begun
        if should_stop():
            raise DeviceError("The training was stopped: its result is not needed any more.", stage="train")
        if is_interrupted():
            if not number or not manifest.takes_partial:
                raise Interrupted(Paused(number, runner.carry()) if number else None)
            is_whole = False
            break
        runner.block(batches, mask, key)
        begun = time.perf_counter()
    update = runner.finish()
    # FedNova: a device's weight is that of its data, however many steps it took.
    weight = update.weight if is_whole else min(blocks.num_examples, training.max_weight)
    return replace(update, weight=weight, seconds={**update.seconds, "data": data_s})


def chosen_examples(count: int, manifest: Manifest, rng: np.random.Generator, *, member: str) -> np.ndarray | None:
    """Which of a member's examples it trains on: the task's part of them, and no more than one update may use. None: all.

    Raises:
        DataError: the member cannot take part.
    """
    training = manifest.training
    if why := obstacle(training, count):
        hint = f" {HEED_THE_MASK}" if training.whole_batches and count else ""
        raise TooFewExamples(f"{member!r} cannot take part in task {manifest.task!r}: it has {why}.{hint}")
    most = training.max_examples // training.epochs
    if training.whole_batches:
        most = most // training.batch_size * training.batch_size
    part = None
    if training.holdout:
        part = held_out_part(count, fraction=training.holdout, is_held_out=training.part == "held_out")
        count = len(part)
    if count <= most:
        return part
    drawn = np.sort(rng.permutation(count)[:most])
    return drawn if part is None else part[drawn]


def measured_examples(count: int, training: Training) -> np.ndarray | None:
    """Which ones a member is fed after all epochs, where programs are fed both parts: what it holds out, as far as an update
    may use it. None where that is nothing."""
    if training.part != "both":
        return None
    where = held_out_part(count, fraction=training.holdout, is_held_out=True)[
        : training.max_examples // training.epochs
    ]
    return where if len(where) else None


def _measured_blocks(examples: Examples, training: Training) -> Iterable[Block]:
    where = measured_examples(len(examples), training)
    if where is None:
        return ()
    marked = Examples({**examples.take(where), HELD_OUT: np.ones(len(where), bool)})
    return Blocks(marked, batch_size=training.batch_size, steps_per_block=training.steps_per_block, shuffle=False)


def no_state(manifest: Manifest) -> Tensors:
    """The state of a device that has none."""
    return {spec.name: np.zeros(spec.shape, spec.numpy_dtype) for spec in manifest.device_state}


def conform(examples: Examples, manifest: Manifest) -> Examples:
    """The fields that the task reads, in its types; see `fields_of`."""
    if manifest.training.part == "both" and HELD_OUT not in examples.fields:
        examples = Examples({**examples.fields, HELD_OUT: np.zeros(len(examples), bool)})
    return fields_of(examples, manifest.task, manifest.batch)


def fields_of(examples: Examples, task: str, batch: Iterable[TensorSpec]) -> Examples:
    """The fields that a task reads, in its types.

    Args:
        examples: with these fields, and maybe others.
        task: its name.
        batch: what one example has of each field.

    Raises:
        DataError: a field is missing, or has another shape or a type that cannot be converted without loss of kind.
    """
    spec = examples.spec()
    fields = {}
    for wanted in batch:
        if wanted.name not in spec:
            raise DataError(f"Task {task!r} reads field {wanted.name!r}; the examples have {' | '.join(spec)}.")
        shape, dtype = spec[wanted.name]
        if tuple(shape) != wanted.shape or not np.can_cast(np.dtype(dtype), wanted.numpy_dtype, "same_kind"):
            raise DataError(
                f"Task {task!r} reads {wanted.name!r} as {wanted.dtype}{list(wanted.shape)}, the examples have {dtype}{list(shape)}."
            )
        fields[wanted.name] = _cast(examples.fields[wanted.name], wanted.numpy_dtype, wanted.name)
    return Examples(fields)


def _cast(values: np.ndarray, dtype: "np.dtype[Any]", name: str) -> np.ndarray:
    if values.dtype == dtype:
        return values
    made = values.astype(dtype)
    if dtype.kind in "iu" and not np.array_equal(made, values):
        raise DataError(f"Expected {name} to fit {dtype}, got values from {values.min()} to {values.max()}.")
    return made


def evaluate(runner: Runner, manifest: Manifest, root: str, examples: Examples) -> Mapping[str, float]:
    """The task's metrics over all the examples, by the plan's `evaluate` program."""
    return ratios(evaluated_sums(runner, manifest, root, examples))


def evaluated_sums(runner: Runner, manifest: Manifest, root: str, examples: Examples) -> dict[str, float]:
    """The sums of which the metrics are made: `NAME/numerator` and `NAME/denominator`."""
    totals: dict[str, float] = {}
    size = manifest.training.evaluate_batch_size
    for batches, mask in Blocks(conform(examples, manifest), batch_size=size, steps_per_block=1, shuffle=False):
        batch = {name: values[0] for name, values in batches.items()}
        for name, value in runner.evaluate(root, batch, mask[0]).items():
            totals[name] = totals.get(name, 0.0) + float(value)
    return totals


def ratios(sums: Mapping[str, float]) -> dict[str, float]:
    """Metrics of their sums; one whose denominator is zero is left out."""
    names = sorted({name.rsplit("/", 1)[0] for name in sums})
    return {n: sums[f"{n}/numerator"] / sums[f"{n}/denominator"] for n in names if sums[f"{n}/denominator"]}


def only_field(manifest: Manifest, array: np.ndarray) -> str:
    """The field of the task that an array (N, …) can be. Raises DataError: none, or several."""
    fitting = [spec.name for spec in manifest.batch if spec.shape == array.shape[1:]]
    if len(fitting) != 1:
        raise DataError(
            f"Expected an array that fits one field of task {manifest.task!r}, got shape {array.shape}, which fits {fitting or 'none'}. "
            f"Pass a mapping: {{'{manifest.batch[0].name}': array}}, or an .npz of fields."
        )
    return fitting[0]


def predict(runner: Runner, manifest: Manifest, root: str, fields: Mapping[str, np.ndarray]) -> np.ndarray:
    """Predictions (N, …) for examples (N, …); fields that a prediction does not need may be missing."""
    known = [spec.name for spec in manifest.batch]
    if not set(fields) & set(known):
        raise DataError(
            f"Expected fields of task {manifest.task!r} ({', '.join(known)}), got {', '.join(fields) or 'none'}."
        )
    size = manifest.training.evaluate_batch_size
    num = len(next(iter(fields.values())))
    missing = {s.name: np.zeros((num, *s.shape), s.numpy_dtype) for s in manifest.batch if s.name not in fields}
    made = []
    blocks = Blocks(
        conform(Examples({**fields, **missing}), manifest), batch_size=size, steps_per_block=1, shuffle=False
    )
    for batches, mask in blocks:
        predictions = runner.predict(root, {name: values[0] for name, values in batches.items()}, mask[0])
        made.append(predictions[mask[0]])
    return np.concatenate(made)
