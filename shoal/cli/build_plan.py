"""Builds a task's plan in a process of its own, so that a host never imports JAX and never runs a task's source.

    python -m shoal.cli.build_plan '{"task": "file.py:task", "seed": 0, "policy": {"goal": 4}, "each": {}, "iree": [], "out": "folder"}'

It writes `plan` and `model` into the folder, or one line to standard error and exits with 1. Nothing is signed here.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from shoal.cli.failures import describe
from shoal.errors import PlanError

if TYPE_CHECKING:
    from shoal.plan.plan import Plan
    from shoal.tensors import Tensors

MARK: Final = "shoal build: "
BUILD_S: Final = 1800.0


def build_in_child(
    task: str,
    *,
    seed: int,
    policy: Mapping[str, Any],
    each: Mapping[str, Mapping[str, Any]],
    iree: Sequence[str] = (),
    pods: Mapping[str, Any] | None = None,
) -> "tuple[Plan, Tensors]":
    """The unsigned plan of TASK and its initial model.

    Args:
        task: TASK of the command line.
        seed: of the initial model.
        policy: fields of `RoundPolicy` that are not as the task says.
        each: name of a task -> further ones, of that task only.
        iree: targets that it is compiled for besides; what is being compiled is said on standard error.
        pods: see `train_pods.of_pods`; None: the task is as it is.

    Raises:
        PlanError: the task cannot be loaded or built; the text says why.
    """
    from shoal.plan.plan import Plan
    from shoal.tensors import unpack

    with tempfile.TemporaryDirectory(prefix="shoal-plan-") as out:
        request = {
            "task": task,
            "seed": seed,
            "policy": dict(policy),
            "each": each,
            "iree": list(iree),
            "pods": pods,
            "out": out,
        }
        command = [sys.executable, "-m", "shoal.cli.build_plan", json.dumps(request)]
        # What the task's file prints is not our result.
        done = subprocess.run(
            command, stdout=sys.stderr.fileno() if _has_number(sys.stderr) else subprocess.DEVNULL,
            stderr=subprocess.PIPE, text=True, errors="replace", timeout=BUILD_S, check=False,
        )  # fmt: skip
        if done.returncode:
            raise PlanError(_reason(done.stderr, done.returncode))
        plan = Plan.load(Path(out, "plan"))
        return plan, unpack(Path(out, "model").read_bytes())[0]


def _has_number(stream: Any) -> bool:
    try:
        return bool(stream.fileno() >= 0)
    except (OSError, ValueError, AttributeError):
        return False


def _reason(errors: str, code: int) -> str:
    lines = [line for line in errors.splitlines() if line.strip()]
    said = [line.removeprefix(MARK) for line in lines if line.startswith(MARK)]
    last = lines[-1] if lines else "it said nothing"
    return said[-1] if said else f"The process that builds the plan ended with code {code}: {last}"


def _build(request: Mapping[str, Any]) -> None:
    from dataclasses import replace
    from functools import partial

    from shoal.cli.task_argument import load_task
    from shoal.plan.build import build
    from shoal.policy import Late
    from shoal.tensors import pack

    task = load_task(request["task"])
    policy = {**request["policy"], **request["each"].get(task.name, {})}
    if "late" in policy:
        policy["late"] = Late(**policy["late"])
    task = task.replace(rounds=replace(task.rounds, **policy))
    if request.get("pods"):
        from shoal.cli.train_pods import of_pods

        task = of_pods(task, request["pods"])
    built = build(task, seed=request["seed"], iree=request["iree"], progress=partial(print, flush=True))
    built.plan.save(Path(request["out"], "plan"))
    Path(request["out"], "model").write_bytes(pack(built.model))


if __name__ == "__main__":
    try:
        _build(json.loads(sys.argv[1]))
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as failure:
        print(f"{MARK}{describe(failure)}", file=sys.stderr)
        sys.exit(1)
