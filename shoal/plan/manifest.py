"""The manifest of a plan: everything that is known of a task without running it. Data, not code; no JAX here.

Format: canonical JSON (`tensors.canonical_json`) of `Manifest.to_json`, signed whole. Its SHA-256 is the plan's hash.
Programs are named by hash and travel apart, so that a device takes only the variants that it can run.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from math import floor
from typing import Any, Final, Literal, Self

from shoal import validate
from shoal.codec.rounding import ROUNDINGS, Rounding
from shoal.errors import PlanError
from shoal.fixed import STEPS, FixedPoint, SumSpec, fixed_points
from shoal.policy import About, Privacy, RoundPolicy, ServerRule, check_task_name
from shoal.tensors import (
    PARSE_ERRORS,
    TensorSpec,
    canonical_json,
    check_hash,
    is_of_model,
    parse_json,
    sha256,
    total_bytes,
)

FORMAT: Final = "shoal-plan/1"
SERVER_FORMAT: Final = "shoal-server-half/1"
AGGREGATORS: Final[Mapping[str, str]] = {"weighted_mean": "train", "evaluation": "evaluate", "statistics": "statistics"}
"""Aggregation rule -> what the metrics of its cohorts are called by."""
DEVICE_PROGRAMS: Final = ("begin", "block", "finish")
"""What a member must be able to run."""
OPTIONAL_PROGRAMS: Final = ("evaluate", "predict", "keys")
"""What a member runs if it can: metrics, predictions, the rows of tables that its batches need."""
SERVER_PROGRAMS: Final = ("server_begin", "server_step")
PROGRAMS: Final = DEVICE_PROGRAMS + OPTIONAL_PROGRAMS + SERVER_PROGRAMS
HELD_OUT: Final = "held_out"
"""Field of a batch, where programs are fed both parts of a device's examples: true for those that are held out."""
IREE: Final = "iree-"
"""What the kinds of runtimes begin with that run programs compiled ahead of time, for one family of processors each."""
MAX_MANIFEST_BYTES: Final = 16 << 20
MAX_PROGRAM_BYTES: Final = 64 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class Runtime:
    """What runs programs, as a device names it at check-in and a program names what it needs."""

    kind: str
    """`stablehlo` (JAX), or `iree-<family>` (native code for such processors, `iree_targets.py`)."""
    version: tuple[int, int, int]
    """For stablehlo: the newest StableHLO version that is read (device) or the one that is needed (program). For iree: of IREE."""
    calling_convention: int = 9
    """The newest that is understood (device) or the one that is needed (program). For stablehlo: that of jax.export."""
    platforms: tuple[str, ...] = ("cpu",)
    """For stablehlo: where it runs, of cpu | cuda | rocm | tpu. For iree: levels of the processor, from the least to the most."""

    def __post_init__(self) -> None:
        validate.types(self)

    def runs(self, needed: "Runtime") -> bool:
        """Whether a program that needs `needed` runs here."""
        # IREE promises nothing between its minor versions, either way.
        is_read = self.version >= needed.version and (not self.is_native or self.version[:2] == needed.version[:2])
        return (
            self.kind == needed.kind
            and is_read
            and self.calling_convention >= needed.calling_convention
            and bool(set(self.platforms) & set(needed.platforms))
        )

    @property
    def is_native(self) -> bool:
        """Whether its programs are native code, whose operations nobody can check."""
        return self.kind.startswith(IREE)

    def level(self, needed: "Runtime") -> int:
        """How far up its own platforms the best is that a program names; of two programs the higher one is the faster."""
        return max((at for at, name in enumerate(self.platforms) if name in needed.platforms), default=-1)

    def __str__(self) -> str:
        version = ".".join(map(str, self.version))
        return f"{self.kind} {version} (calling convention {self.calling_convention}, {'/'.join(self.platforms)})"

    def to_json(self) -> dict[str, Any]:
        return {
            "kind": self.kind, "version": list(self.version), "calling_convention": self.calling_convention,
            "platforms": list(self.platforms),
        }  # fmt: skip

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        return cls(**{**data, "version": tuple(data["version"]), "platforms": tuple(data["platforms"])})


@dataclass(frozen=True, kw_only=True, slots=True)
class Program:
    """One variant of one program. Inputs and outputs are flat lists of named tensors, in this order."""

    name: str
    """One of `PROGRAMS`."""
    needs: Runtime
    """What it takes to run it."""
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    hash: str
    """SHA-256 of its bytes."""
    size_bytes: int

    def __post_init__(self) -> None:
        validate.types(self)
        check_hash(self.hash)
        validate.one_of(PROGRAMS, name=self.name)
        validate.between(1, MAX_PROGRAM_BYTES, size_bytes=self.size_bytes)

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name, "needs": self.needs.to_json(), "hash": self.hash, "size_bytes": self.size_bytes,
            "inputs": [spec.to_json() for spec in self.inputs], "outputs": [spec.to_json() for spec in self.outputs],
        }  # fmt: skip

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        return cls(
            **{
                **data,
                "needs": Runtime.from_json(data["needs"]),
                "inputs": _specs(data["inputs"]),
                "outputs": _specs(data["outputs"]),
            }
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Training:
    """How a device feeds its examples to the programs."""

    batch_size: int
    """B: examples per step."""
    steps_per_block: int
    """k: steps per call of `block`."""
    epochs: int
    """Passes over the examples."""
    max_examples: int
    """Most examples (times epochs) that are used for one update."""
    max_weight: int
    """Most that one update may count for: `max_examples`, or 1 where updates count alike."""
    whole_batches: bool
    """The model does not heed the mask: a partial batch is refused."""
    drop_remainder: bool
    """A partial last batch is left out."""
    evaluate_batch_size: int
    """Batch of the `evaluate` and `predict` programs."""
    holdout: float = 0.0
    """Share of a device's examples that is kept for evaluation (`data.split.held_out_part` says which)."""
    part: Literal["training", "held_out", "both"] = "training"
    """Which part the programs are fed: what is not held out, what is, or both: the held-out part once, after all epochs."""

    def __post_init__(self) -> None:
        validate.types(self)
        validate.one_of(("training", "held_out", "both"), part=self.part)
        if not 0.0 <= self.holdout < 1.0 or (self.part != "training" and not self.holdout):
            raise ValueError(f"Expected 0 <= holdout < 1, above 0 for the part held out, got holdout={self.holdout!r}.")
        validate.positive(batch_size=self.batch_size, steps_per_block=self.steps_per_block, epochs=self.epochs)
        validate.positive(max_weight=self.max_weight, evaluate_batch_size=self.evaluate_batch_size)
        if self.max_examples < self.epochs:
            raise ValueError(f"Expected max_examples >= epochs={self.epochs}, got max_examples={self.max_examples}.")

    def to_json(self) -> dict[str, Any]:
        made = {f.name: getattr(self, f.name) for f in fields(self)}
        # Plans that hold nothing out stay as they were; a device that does not know of it refuses those that do.
        return made if self.holdout else {name: made[name] for name in made if name not in ("holdout", "part")}

    def num_used(self, num_examples: int) -> int:
        """How many of a device's examples the programs are fed in an epoch, at most; of both parts those of training."""
        held_out = floor(num_examples * self.holdout)
        return held_out if self.part == "held_out" else num_examples - held_out


NOISED_BITS: Final = 32
"""Width of sums with noise: a grid on which noise of the clip norm's size is drawn."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Promises:
    """What binds the server towards the members; signed, and held to by the device."""

    group: Literal["clear", "secure"] = "clear"
    """Whether an Edge sees single updates on their way into the sum."""
    minimum_group: int
    """Fewest updates in a sum that anybody sees."""
    sum_bits: int = 64
    """Width of the sums' integers."""
    privacy: Privacy
    """Bounds, clipping, noise."""

    def __post_init__(self) -> None:
        validate.types(self)
        validate.positive(minimum_group=self.minimum_group)
        validate.one_of((8, 16, 32, 64), sum_bits=self.sum_bits)
        secure = self.privacy.secure
        if self.privacy.noise_multiplier and self.sum_bits > NOISED_BITS:
            raise ValueError(f"Expected sums of at most {NOISED_BITS} bits where there is noise, got {self.sum_bits}.")
        if (self.group == "secure") != (secure is not None) or (secure is not None and self.sum_bits != secure.bits):
            raise ValueError(
                f"Expected a secure group and its bits where privacy names them, got {self.group!r} and {self.sum_bits}."
            )

    @classmethod
    def of(cls, privacy: Privacy, *, minimum_group: int) -> Self:
        """What a task with that privacy promises."""
        if privacy.secure is None:
            bits = NOISED_BITS if privacy.noise_multiplier else 64
            return cls(minimum_group=minimum_group, privacy=privacy, sum_bits=bits)
        return cls(group="secure", minimum_group=minimum_group, sum_bits=privacy.secure.bits, privacy=privacy)

    def to_json(self) -> dict[str, Any]:
        return {
            "group": self.group, "minimum_group": self.minimum_group, "sum_bits": self.sum_bits,
            "privacy": self.privacy.to_json(),
        }  # fmt: skip

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        return cls(**{**data, "privacy": Privacy.from_json(data["privacy"])})


@dataclass(frozen=True, kw_only=True, slots=True)
class ServerHalf:
    """What the Coordinator needs, so that it starts again without the task's source. No device ever sees it.

    It is a blob of its own, that the manifest names by hash: what is added to it breaks no device.
    """

    rounds: RoundPolicy
    rule: ServerRule
    about: About
    needs: Literal["sum", "group_sums", "updates"] = "sum"
    """What the aggregation looks at: one sum, the groups' sums, or single updates."""
    aggregator: str = "weighted_mean"
    """The aggregation rule, one of `AGGREGATORS`."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Of the aggregation rule, as JSON."""
    down: Rounding = "float32"
    """What the model's numbers are rounded to before devices are sent them; the line itself is not rounded."""
    algorithms: Mapping[str, Any] = field(default_factory=dict)
    """What the task has been made by: name -> arguments, for people to read."""

    def __post_init__(self) -> None:
        validate.types(self)

    def to_json(self) -> dict[str, Any]:
        made: dict[str, Any] = {
            "format": SERVER_FORMAT, "rounds": self.rounds.to_json(), "rule": self.rule.to_json(),
            "about": self.about.to_json(), "needs": self.needs, "aggregator": self.aggregator,
        }  # fmt: skip
        made |= {"options": dict(self.options)} if self.options else {}
        made |= {"down": self.down} if self.down != "float32" else {}
        return made | ({"algorithms": dict(self.algorithms)} if self.algorithms else {})

    @property
    def metrics_prefix(self) -> str:
        """What the cohorts' metrics are called by."""
        return AGGREGATORS[self.aggregator]

    @property
    def data(self) -> bytes:
        """The blob that the manifest names."""
        return canonical_json(self.to_json())

    @classmethod
    def parse(cls, data: bytes) -> Self:
        """Reads what `data` wrote. Raises PlanError for anything else, and for rules that this version has not."""
        try:
            value = parse_json(data)
            if value.pop("format") != SERVER_FORMAT:
                raise ValueError(f"this version reads {SERVER_FORMAT!r}")
            validate.one_of(("sum",), needs=value["needs"])
            validate.one_of(tuple(AGGREGATORS), aggregator=value["aggregator"])
            validate.one_of(ROUNDINGS, down=value.get("down", "float32"))
            parts = {
                "rounds": RoundPolicy.from_json(value["rounds"]),
                "rule": ServerRule.from_json(value["rule"]),
                "about": About.from_json(value["about"]),
            }
            return cls(**{**value, **parts})
        except PARSE_ERRORS as error:
            raise PlanError(f"Expected the server half of a plan, got {data[:40]!r}…: {error}.") from error


@dataclass(frozen=True)
class Manifest:
    """Everything that is known of a task without running it."""

    task: str
    programs: tuple[Program, ...]
    broadcast: tuple[TensorSpec, ...]
    """The model's tensors, as the server sends them."""
    device_state: tuple[TensorSpec, ...]
    """What a device keeps between rounds."""
    sums: tuple[SumSpec, ...]
    """What an update holds."""
    metrics: tuple[SumSpec, ...]
    """What `evaluate` gives, for summing over members."""
    batch: tuple[TensorSpec, ...]
    """Fields of one example, without the leading dimension."""
    training: Training
    promises: Promises
    server_hash: str
    """SHA-256 of the server half."""
    half: ServerHalf | None = field(default=None, compare=False, repr=False)
    """The server half, where it is at hand: on the server."""

    def __post_init__(self) -> None:
        validate.types(self)
        check_task_name(self.task)
        check_hash(self.server_hash)
        for what, names in (
            ("broadcast", [spec.name for spec in self.broadcast]),
            ("device_state", [spec.name for spec in self.device_state]),
            ("sums", [spec.tensor.name for spec in self.sums]),
            ("metrics", [spec.tensor.name for spec in self.metrics]),
            ("batch", [spec.name for spec in self.batch]),
        ):
            if len(set(names)) != len(names):
                raise ValueError(f"Expected each name of {what} once, got {names[:20]}.")

    def fixed_points(self, max_members: int) -> Mapping[str, FixedPoint]:
        """Name of a sum -> how it is written as integers, for a round of at most so many.

        In secure mode that many are added up outside of the group, in 64 bits: its own sum is made for its own members.
        """
        from shoal.privacy.device_noise import noise_room  # for servers: a device that waits is small

        secure = self.promises.privacy.secure
        members = max_members if secure is None else secure.members
        bits, max_weight = self.promises.sum_bits, self.training.max_weight
        room = noise_room(self.promises.privacy, self.promises.minimum_group)
        sums = [replace(spec, bound=spec.bound + room) for spec in self.sums] if room else self.sums
        return fixed_points(sums, bits=bits, max_weight=max_weight, max_members=members)

    @property
    def server(self) -> ServerHalf:
        """The server half. Raises PlanError on a device, which has none."""
        if self.half is None:
            raise PlanError(
                f"The server half of task {self.task!r} is not at hand: this is a device's side of the plan."
            )
        return self.half

    def to_json(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "task": self.task,
            "programs": [program.to_json() for program in self.programs],
            "broadcast": [spec.to_json() for spec in self.broadcast],
            "device_state": [spec.to_json() for spec in self.device_state],
            "sums": [spec.to_json() for spec in self.sums],
            "metrics": [spec.to_json() for spec in self.metrics],
            "batch": [spec.to_json() for spec in self.batch],
            "training": self.training.to_json(),
            "promises": self.promises.to_json(),
            "server": self.server_hash,
        }

    @cached_property
    def data(self) -> bytes:
        """The bytes that are signed."""
        return canonical_json(self.to_json())

    @cached_property
    def hash(self) -> str:
        """Hash of the plan."""
        return sha256(self.data)

    @classmethod
    def parse(cls, data: bytes, *, server: bytes | None = None) -> Self:
        """Reads what `data` wrote, with the server half where it is at hand. Raises PlanError for anything else."""
        if len(data) > MAX_MANIFEST_BYTES:
            raise PlanError(f"Expected a manifest of at most {MAX_MANIFEST_BYTES} bytes, got {len(data)}.")
        try:
            value = parse_json(data)
            if value["format"] != FORMAT:
                raise ValueError(f"format is {value['format']!r}, this version reads {FORMAT!r}")
            manifest = cls(
                task=value["task"],
                programs=tuple(Program.from_json(item) for item in value["programs"]),
                broadcast=_specs(value["broadcast"]),
                device_state=_specs(value["device_state"]),
                sums=tuple(SumSpec.from_json(item) for item in value["sums"]),
                metrics=tuple(SumSpec.from_json(item) for item in value["metrics"]),
                batch=_specs(value["batch"]),
                training=Training(**value["training"]),
                promises=Promises.from_json(value["promises"]),
                server_hash=value["server"],
                half=ServerHalf.parse(server) if server is not None else None,
            )
            if server is not None and sha256(server) != manifest.server_hash:
                raise ValueError("its server half has not the hash that it names")
            if manifest.data != data:
                raise ValueError("it is not in canonical form")
        except PARSE_ERRORS as error:
            raise PlanError(f"Expected the manifest of a plan, got {data[:40]!r}…: {error}.") from error
        return manifest

    @property
    def rounded(self) -> tuple[str, ...]:
        """The tensors that are rounded before they are sent: those of the model that rounds change, if they are float32. On a server."""
        if self.server.down == "float32":
            return ()
        changed = {spec.tensor.name.removeprefix("delta/") for spec in self.sums}
        return tuple(
            s.name for s in self.broadcast if s.name in changed and is_of_model(s.name) and s.dtype == "float32"
        )

    @property
    def update(self) -> tuple[TensorSpec, ...]:
        """The tensors of an update, in their order."""
        return tuple(spec.tensor for spec in self.sums)

    @property
    def takes_partial(self) -> bool:
        """Whether a device that is interrupted may report the steps it took: updates are divided by their steps."""
        return any(spec.tensor.name == STEPS for spec in self.sums)

    @property
    def model_bytes(self) -> int:
        return total_bytes(self.broadcast)

    @property
    def constant_bytes(self) -> int:
        """Of the model, what no round changes: frozen and private leaves, which a device fetches once."""
        changed = {spec.tensor.name.removeprefix("delta/") for spec in self.sums}
        return total_bytes([spec for spec in self.broadcast if spec.name not in changed])

    @property
    def update_bytes(self) -> int:
        return total_bytes(self.update)

    def variants(self, name: str) -> tuple[Program, ...]:
        """The variants of one program; empty where the task has none."""
        return tuple(program for program in self.programs if program.name == name)

    def pick(self, runtime: Runtime, *, needed: Sequence[str] = DEVICE_PROGRAMS) -> dict[str, Program]:
        """For each program the variant that this runtime can run; those that are not needed may be missing.

        Raises:
            PlanError: there is none for one that is needed; the text says what it would take.
        """
        chosen = {}
        for name in dict.fromkeys((*needed, *(program.name for program in self.programs))):
            fitting = [program for program in self.variants(name) if runtime.runs(program.needs)]
            if not fitting and name not in needed:
                continue
            if not fitting:
                wanted = " or ".join(str(program.needs) for program in self.variants(name)) or "to be in the plan"
                raise PlanError(f"Program {name!r} of task {self.task!r} needs {wanted}; this runtime is {runtime}.")
            chosen[name] = max(fitting, key=lambda program: (program.needs.version, runtime.level(program.needs)))
        return chosen


def _specs(items: Any) -> tuple[TensorSpec, ...]:
    return tuple(TensorSpec.from_json(item) for item in items)
