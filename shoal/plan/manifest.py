"""The manifest of a plan: everything that is known of a task without running it. Data, not code; no JAX here.

Format: canonical JSON (`tensors.canonical_json`) of `Manifest.to_json`, signed whole. Its SHA-256 is the plan's hash.
Programs are named by hash and travel apart, so that a device takes only the variants that it can run.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any, Final, Literal, Self

from shoal import validate
from shoal.errors import PlanError
from shoal.fixed import SumSpec
from shoal.policy import About, Privacy, RoundPolicy, ServerRule
from shoal.tensors import TensorSpec, canonical_json, sha256, total_bytes

FORMAT: Final = "shoal-plan/1"
PROGRAMS: Final = ("begin", "block", "finish", "evaluate", "predict", "server_begin", "server_step")
MAX_MANIFEST_BYTES: Final = 16 << 20
MAX_PROGRAM_BYTES: Final = 64 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class Runtime:
    """What runs programs, as a device names it at check-in and a program names what it needs."""

    kind: str
    """`stablehlo` (JAX), later `iree-<target>` and others."""
    version: tuple[int, int, int]
    """For stablehlo: the newest StableHLO version that is read (device) or the one that is needed (program)."""
    calling_convention: int = 9
    """For stablehlo: the newest calling convention of jax.export that is understood, or the one that is needed."""
    platforms: tuple[str, ...] = ("cpu",)
    """For stablehlo: where it runs, of cpu | cuda | rocm | tpu."""

    def runs(self, needed: "Runtime") -> bool:
        """Whether a program that needs `needed` runs here."""
        return (
            self.kind == needed.kind
            and self.version >= needed.version
            and self.calling_convention >= needed.calling_convention
            and bool(set(self.platforms) & set(needed.platforms))
        )

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
        major, minor, patch = (int(part) for part in data["version"])
        return cls(**{**data, "version": (major, minor, patch), "platforms": tuple(data["platforms"])})


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
    max_weight: int
    """Most examples (times epochs) that are used."""
    whole_batches: bool
    """The model does not heed the mask: a partial batch is refused."""
    drop_remainder: bool
    """A partial last batch is left out."""
    evaluate_batch_size: int
    """Batch of the `evaluate` and `predict` programs."""

    def __post_init__(self) -> None:
        for f in fields(self):
            if not isinstance(getattr(self, f.name), bool):
                validate.positive(**{f.name: getattr(self, f.name)})

    def to_json(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in fields(self)}


@dataclass(frozen=True, kw_only=True, slots=True)
class ServerHalf:
    """What the Coordinator needs, so that it starts again without the task's source."""

    rounds: RoundPolicy
    rule: ServerRule
    privacy: Privacy
    about: About
    sum_bits: int = 64
    """Width of the sums' integers."""
    needs: Literal["sum", "group_sums", "updates"] = "sum"
    """What the aggregation looks at: one sum, the groups' sums, or single updates."""
    aggregator: str = "weighted_mean"
    """The aggregation rule."""

    def to_json(self) -> dict[str, Any]:
        return {
            "rounds": self.rounds.to_json(), "rule": self.rule.to_json(), "privacy": self.privacy.to_json(),
            "about": self.about.to_json(), "sum_bits": self.sum_bits, "needs": self.needs, "aggregator": self.aggregator,
        }  # fmt: skip

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        validate.one_of(("sum",), needs=data["needs"])
        validate.one_of(("weighted_mean",), aggregator=data["aggregator"])
        return cls(
            **{
                **data,
                "rounds": RoundPolicy.from_json(data["rounds"]),
                "rule": ServerRule.from_json(data["rule"]),
                "privacy": Privacy.from_json(data["privacy"]),
                "about": About.from_json(data["about"]),
            }
        )


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
    batch: tuple[TensorSpec, ...]
    """Fields of one example, without the leading dimension."""
    training: Training
    server: ServerHalf

    def to_json(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "task": self.task,
            "programs": [program.to_json() for program in self.programs],
            "broadcast": [spec.to_json() for spec in self.broadcast],
            "device_state": [spec.to_json() for spec in self.device_state],
            "sums": [spec.to_json() for spec in self.sums],
            "batch": [spec.to_json() for spec in self.batch],
            "training": self.training.to_json(),
            "server": self.server.to_json(),
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
    def parse(cls, data: bytes) -> Self:
        """Reads what `data` wrote. Raises PlanError for anything else, in one line."""
        if len(data) > MAX_MANIFEST_BYTES:
            raise PlanError(f"Expected a manifest of at most {MAX_MANIFEST_BYTES} bytes, got {len(data)}.")
        try:
            value = json.loads(data)
            if value["format"] != FORMAT:
                raise ValueError(f"format is {value['format']!r}, this version reads {FORMAT!r}")
            manifest = cls(
                task=str(value["task"]),
                programs=tuple(Program.from_json(item) for item in value["programs"]),
                broadcast=_specs(value["broadcast"]),
                device_state=_specs(value["device_state"]),
                sums=tuple(SumSpec.from_json(item) for item in value["sums"]),
                batch=_specs(value["batch"]),
                training=Training(**value["training"]),
                server=ServerHalf.from_json(value["server"]),
            )
            if manifest.data != data:
                raise ValueError("it is not in canonical form")
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise PlanError(f"Expected the manifest of a plan, got {data[:40]!r}…: {error}.") from error
        return manifest

    @property
    def update(self) -> tuple[TensorSpec, ...]:
        """The tensors of an update, in their order."""
        return tuple(spec.tensor for spec in self.sums)

    @property
    def model_bytes(self) -> int:
        return total_bytes(self.broadcast)

    @property
    def update_bytes(self) -> int:
        return total_bytes(self.update)

    def variants(self, name: str) -> tuple[Program, ...]:
        """The variants of one program; empty where the task has none."""
        return tuple(program for program in self.programs if program.name == name)

    def pick(self, runtime: Runtime) -> dict[str, Program]:
        """For each program the variant that this runtime can run.

        Raises:
            PlanError: there is none for one of them; the text says what is needed.
        """
        chosen = {}
        for name in dict.fromkeys(program.name for program in self.programs):
            fitting = [program for program in self.variants(name) if runtime.runs(program.needs)]
            if not fitting:
                needed = " or ".join(str(program.needs) for program in self.variants(name))
                raise PlanError(f"Program {name!r} of task {self.task!r} needs {needed}; this runtime is {runtime}.")
            chosen[name] = max(fitting, key=lambda program: program.needs.version)
        return chosen


def _specs(items: Any) -> tuple[TensorSpec, ...]:
    return tuple(TensorSpec.from_json(item) for item in items)
