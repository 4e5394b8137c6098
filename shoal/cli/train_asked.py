"""What `shoal train` was asked for, and how to ask for it again."""

import json
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Final, Self

from shoal.cli.late_argument import parse_late
from shoal.schedule import ORDER_NAMES
from shoal.validate import one_of

_OPTIONS: Final = {"split_input": "input"}
"""Fields whose option has another name."""
_OF_A_MESH: Final = (
    "mesh", "rule", "split_input", "update", "sums", "accumulate", "steps_per_call", "remat", "loss_scaling", "batch_norm_group", "machine",
)  # fmt: skip
_OF_PODS: Final = ("inner_steps", "fragments", "goal", "late")
_NOT_AGAIN: Final = ("task", "as_json", "run", "resume")


@dataclass(frozen=True, kw_only=True)
class Asked:
    """The options of one training; see `train.py`."""

    task: str
    data: str
    epochs: float | None = None
    steps: int | None = None
    mesh: str = ""
    rule: tuple[str, ...] = ()
    split_input: tuple[str, ...] = ()
    update: str = ""
    sums: str = "float32"
    batch: str = ""
    accumulate: int = 1
    steps_per_call: int | None = None
    window: int | None = None
    remat: tuple[str, ...] = ()
    loss_scaling: bool = False
    batch_norm_group: int = 1
    commit_every: int | None = None
    checkpoint_every: int | None = None
    held_out: str = ""
    user_column: str = ""
    seed: int = 0
    machine: str = ""
    servers: int = 0
    staleness: str = "0"
    ahead: bool = False
    order: str = "auto"
    pods: int = 0
    inner_steps: int = 100
    fragments: int = 1
    goal: int | None = None
    late: str = "discard"
    run: Path | None = None
    resume: bool = False
    as_json: bool = False

    def check(self) -> None:
        """Raises ValueError for what is wrong whatever the task and the data are."""
        if (self.epochs is None) == (self.steps is None):
            raise ValueError("Expected one of --epochs and --steps: how long is to be trained?")
        one_of(("float32", "bfloat16"), sums=self.sums)
        one_of(("", "replicated", "sharded", "fully_sharded"), update=self.update)
        is_number = self.batch.isascii() and self.batch.isdigit() and int(self.batch) > 0
        if not (self.batch in ("", "auto") or is_number):
            raise ValueError(f"Expected --batch NUMBER or auto, got {self.batch!r}.")
        _ = self.rules, self.inputs, self.steps_ahead
        one_of(ORDER_NAMES, order=self.order)
        if not self.servers and (self.staleness, self.ahead, self.order) != ("0", False, "auto"):
            raise ValueError("--staleness, --ahead and --order are of training with --servers.")
        if self.servers and self.pods:
            raise ValueError("Expected --servers or --pods, got both: pods are a fleet's devices, which ask a host.")
        if self.servers:
            self._refuse((*_OF_A_MESH, *_OF_PODS), "--servers")
        elif self.pods:
            self._check_pods()
        else:
            self._refuse(_OF_PODS, "a mesh")

    def _check_pods(self) -> None:
        self._refuse((*_OF_A_MESH, "window", "commit_every", "checkpoint_every"), "--pods")
        if self.inner_steps % self.fragments:
            raise ValueError(
                f"Expected --inner-steps that --fragments {self.fragments} divide, got {self.inner_steps}."
            )
        if not 1 <= (self.goal or self.pods) <= self.pods:
            raise ValueError(f"Expected a --goal of at most --pods {self.pods}, got {self.goal}.")
        if parse_late(self.late).kind != "discard" and self.fragments > 1:
            raise ValueError(
                f"Expected --late discard with --fragments, got {self.late}: another version averages another fragment."
            )

    def _refuse(self, names: tuple[str, ...], what: str) -> None:
        """Raises ValueError for options that have nothing to say with that."""
        meant = [name for name in names if getattr(self, name) != type(self).__dataclass_fields__[name].default]
        if meant or (self.batch == "auto" and what != "a mesh"):
            options = [f"--{_OPTIONS.get(name, name).replace('_', '-')}" for name in meant] or ["--batch auto"]
            raise ValueError(f"{', '.join(options)} would be ignored with {what}. Leave it out.")

    @property
    def steps_ahead(self) -> int | None:
        """Of the slowest worker; None: any."""
        if self.staleness == "any":
            return None
        if not (self.staleness.isascii() and self.staleness.isdigit()):
            raise ValueError(f"Expected --staleness STEPS or any, got {self.staleness!r}.")
        return int(self.staleness)

    @property
    def rules(self) -> dict[str, str]:
        """Glob over tensors -> words."""
        return _pairs(self.rule, "--rule")

    @property
    def inputs(self) -> dict[str, str]:
        """Field -> words."""
        return _pairs(self.split_input, "--input")

    def settled(self, *, steps: int, commit_every: int, batch_size: int) -> Self:
        """The same with what was worked out for it, so that it comes to the same again."""
        return replace(self, epochs=None, steps=steps, commit_every=commit_every, batch=str(batch_size))

    def to_json(self) -> str:
        """For a worker's process."""
        return json.dumps({**asdict(self), "run": None, "resume": False})

    @classmethod
    def from_json(cls, text: str) -> Self:
        """What `to_json` made."""
        made: dict[str, Any] = json.loads(text)
        for name, value in made.items():
            made[name] = tuple(value) if isinstance(value, list) else value
        return cls(**made)

    def command(self, folder: Path) -> list[Any]:
        """The words of the command that goes on with the run in a folder."""
        return ["shoal", "train", self.task, *self.arguments(), "--run", folder, "--resume"]

    def arguments(self) -> list[str]:
        """The options that are not as if left out, without those that say where the run is."""
        made: list[str] = []
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name in _NOT_AGAIN or value == field.default:
                continue
            option = "--" + _OPTIONS.get(field.name, field.name).replace("_", "-")
            for each in value if isinstance(value, tuple) else (value,):
                made += [option] if each is True else [option, str(each)]
        return made


def _pairs(given: tuple[str, ...], option: str) -> dict[str, str]:
    """`GLOB=WORDS` each."""
    made = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not (name and equals and value):
            raise ValueError(f"Expected {option} NAME=WORDS, such as 'params/*/kernel=-,model', got {text!r}.")
        made[name.strip()] = value.strip()
    return made
