"""The model used where it is: the newest version that a device was sent of each task, answered without a host.

One file a task and host (the key that signs its plans) in the device's `--state`, `models/….model`: the signed plan with its `predict`, and the tensors as they were sent. A newer version takes
its place in one rename, so who reads meanwhile reads either, whole. Nobody but the owner may read it. A device with private leaves (a head of its own, say) answers with these.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from shoal.errors import DataError, PlanError, ProtocolError
from shoal.plan.plan import Plan
from shoal.plan.runner import Runner
from shoal.plan.train import predict
from shoal.tensors import Tensors, check, pack, read_head, sha256, unpack

SUFFIX: Final = ".model"
MOST_TASKS: Final = 16
"""Whose models are kept; of more those that changed last."""
_PLAN: Final = "plan"
_PRIVATE: Final = "private/"


@dataclass(frozen=True)
class KeptModel:
    """A version on a device."""

    plan: Plan
    tensors: Tensors
    run: str
    version: int

    @property
    def name(self) -> str:
        """Of its task."""
        return self.plan.manifest.task

    @property
    def is_native(self) -> bool:
        """Whether its `predict` is native code, compiled for devices without JAX."""
        at_hand = [each for each in self.plan.manifest.variants("predict") if each.hash in self.plan.programs]
        return bool(at_hand) and all(each.needs.is_native for each in at_hand)

    def predict(self, runner: Runner, fields: Mapping[str, np.ndarray], *, own: Tensors | None = None) -> np.ndarray:
        """Predictions (N, …) for examples (N, …).

        Args:
            runner: of the plan.
            fields: of the examples.
            own: the device's state, whose private leaves stand in for the model's; None: it has none.

        Raises:
            DataError: the fields are not those that the task reads.
        """
        tensors = dict(self.tensors)
        if own is not None and int(own.get("rounds", np.zeros((), np.int32))) > 0:
            tensors |= {name.removeprefix(_PRIVATE): own[name] for name in own if name.startswith(_PRIVATE)}
        root = f"{self.run} {self.version}"
        runner.set_model(root, {name: np.asarray(value) for name, value in tensors.items()})
        return predict(runner, self.plan.manifest, root, fields)


def keep(folder: Path, plan: Plan, tensors: Tensors, *, run: str, version: int) -> None:
    """Writes a version, unless one that is as new of the same run is there. Raises OSError: it could not be written.

    Args:
        folder: the device's state folder.
        plan: signed, with the program `predict`.
        tensors: as the plan's manifest says.
        run, version: which they are.
    """
    task, key = plan.manifest.task, plan.public_key.hex()
    path = folder / "models" / f"{sha256(f'{key} {task}'.encode())[:32]}{SUFFIX}"
    header = {"run": run, "version": version, "task": task, "key": key}
    if path.exists():
        kept = _header(path)
        if kept.get("run") == run and kept.get("version", 0) >= version:
            return
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    partial = path.with_suffix(".partial")
    plan_bytes = np.frombuffer(plan.to_bytes(), np.uint8)
    partial.unlink(missing_ok=True)  # one that was left has the rights that it was made with
    try:
        with open(partial, "wb", opener=_owners) as file:
            file.write(pack({_PLAN: plan_bytes, **tensors}, header))
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError:
        partial.unlink(missing_ok=True)  # a full disk needs the room
        raise
    for old in sorted(path.parent.glob(f"*{SUFFIX}"), key=lambda each: each.stat().st_mtime)[:-MOST_TASKS]:
        old.unlink()


def _owners(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def _header(path: Path) -> Mapping[str, Any]:
    """What a kept model says of itself; nothing, where it is broken."""

    def fill(view: memoryview) -> None:
        if file.readinto(view) != len(view):
            raise ProtocolError("it ends within its head")

    with path.open("rb") as file:
        try:
            return read_head(fill)[1]
        except ProtocolError:
            return {}


def read(path: Path) -> KeptModel:
    """Reads what `keep` wrote. Raises PlanError for anything else, and for a plan that is not signed by the key it names."""
    try:
        tensors, header = unpack(path.read_bytes())
        plan = Plan.parse(tensors.pop(_PLAN).tobytes())
        plan.verify(plan.public_key)
        check(tensors, plan.manifest.broadcast, what="the model")
        return KeptModel(plan, tensors, str(header["run"]), int(header["version"]))
    except (ProtocolError, KeyError, TypeError, ValueError) as error:
        raise PlanError(f"Expected a model that a device has kept in {path}: {error}") from error


def find(folder: Path, task: str = "", key: bytes | None = None) -> KeptModel:
    """The model of a task that a device has kept.

    Args:
        folder: its state folder.
        task: by name; empty: the only one.
        key: that signed its plan; None: any, if there is one model alone.

    Raises:
        DataError: there is none, or there are several.
    """
    heads = {path: _header(path) for path in sorted(folder.glob(f"models/*{SUFFIX}"))}
    fit = [
        path
        for path, head in heads.items()
        if task in ("", head.get("task")) and (key is None or head.get("key") == key.hex())
    ]
    fit = [path for path in fit if heads[path]] or fit  # a broken one is not asked about where others are
    if not fit:
        what = f"a model of task {task!r}" if task else "a model"
        others = sorted({str(head["key"]) for head in heads.values() if "key" in head})
        whose = "" if key is None else f" from the holder of key {key.hex()[:8]}…"
        whose += f" (there are some from --key {', '.join(others)})" if key is not None and others else ""
        raise DataError(
            f"Expected {what}{whose} in {folder}: there is none yet. A device keeps one once it has been sent a version (shoal device … --state {folder}) "
            "of a task that has `predict`."
        )
    if len(fit) > 1:
        names = ", ".join(sorted(f"{heads[path].get('task')} (--key {heads[path].get('key')})" for path in fit))
        raise DataError(f"Expected one model in {folder}, there are several: name one with --task or --key: {names}.")
    return read(fit[0])
