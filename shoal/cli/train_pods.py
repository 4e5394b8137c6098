"""`shoal train --pods N`: DiLoCo on one machine, a host and N devices that each have their part of the examples.

    examples --dealt out--> FOLDER/pods/pod-0.npz …          task --diloco, build--> plan --> a run in FOLDER
                                    |                                                           |
                 shoal device, one for each pod, begun again when it dies  <--rounds-->  host, in this process

A round is `--inner-steps` steps of each pod (with --fragments P, a P-th of them), and the fleet's policy closes it: with all, or with the first `--goal` of them,
late ones as --late says. On several machines the same is `shoal host` and a `shoal device --accelerators` on each (examples/pod/machines.py).
"""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, final

from shoal.cli import words
from shoal.cli.failures import Stopped, command_line
from shoal.cli.late_argument import parse_late
from shoal.cli.screen import Screen, Stopwatch
from shoal.cli.train_asked import Asked
from shoal.errors import DeviceError

if TYPE_CHECKING:
    from shoal.data import Examples
    from shoal.plan.plan import Plan

FOLDER: Final = "pods"
MOST_LIVES: Final = 4
"""In a row of a pod that dies within `SOUND_S` each time; then it is left where it is."""
SOUND_S: Final = 60.0
LOOK_S: Final = 0.2
END_S: Final = 5.0


def train_pods(asked: Asked) -> None:
    """Trains with pods as devices, to the last version.

    Raises:
        ValueError: options that do not go together, or are not those that a run began with.
        DataError: the examples do not fit the task.
        DeviceError: fewer pods are left than a round needs.
    """
    from shoal.cli import data_argument, host_process

    screen, watch = Screen(json=asked.as_json), Stopwatch()
    examples = data_argument.open_joined(asked.data, user_column=asked.user_column)
    if len(examples) < asked.pods:
        raise ValueError(f"Expected an example for each of --pods {asked.pods} at least, got {len(examples)}.")
    watch.lap("data")
    begun = _resumed(asked, len(examples)) if asked.resume else _begin(asked, examples, screen)
    folder = begun.folder
    settings = host_process.Settings(
        folder=folder, run_ids=(begun.run_id,), rounds=begun.rounds, address="127.0.0.1", port=0, held_out=begun.held_out,
        ready_file=folder / FOLDER / "ready", make_tls=False, tls_cert=None, tls_key=None, resumed=asked.resume, has_devices=True,
    )  # fmt: skip
    pods = _Pods(asked, folder, examples, screen)
    try:
        with pods:
            host_process.run(settings, screen=screen, watch=watch, parent=0)
    except Stopped as stopped:
        again = command_line(asked.command(folder))
        if pods.fault:
            raise DeviceError(f"{pods.fault} What was committed is kept. Go on with: {again}", stage="train") from None
        raise Stopped(f"stopped. Go on with: {again}", code=stopped.code) from None


@dataclass(frozen=True)
class _Begun:
    """A run that can be served."""

    folder: Path
    run_id: str
    rounds: int
    held_out: str
    """What versions are evaluated on; empty: they are not."""


def _resumed(asked: Asked, num_examples: int) -> _Begun:
    """The run of --run, perhaps with more rounds than it had. Raises ValueError where it was begun with other options."""
    from shoal.cli import run_folder
    from shoal.plan.run_plan import load_plan
    from shoal.record.run import open_run

    found = run_folder.existing_run(asked.run, kind="host")
    kept = found.run.config.get("pods")
    if not isinstance(kept, dict):
        raise ValueError(f"The run in {found.path} was made by `shoal host`; resume it with that.")
    for name, value in _options(asked).items():
        if kept.get(name) != value:
            raise ValueError(
                f"The run began with {name}={kept.get(name)!r}, and would go on with {value!r}: its rounds would be others. Go on with what it began "
                "with, or begin anew in another folder."
            )
    with open_run(found.path) as run:
        plan = load_plan(run.store, run.id).plan
    return _Begun(found.path, found.run.id, _rounds(asked, plan, num_examples), _held_out(asked, plan))


def _options(asked: Asked) -> dict[str, Any]:
    """What a run that goes on must have in common, beside its task and its data."""
    return {
        "pods": asked.pods, "inner_steps": asked.inner_steps, "fragments": asked.fragments, "batch": asked.batch, "goal": asked.goal, "late": asked.late,
        "seed": asked.seed, "data": asked.data,
    }  # fmt: skip


def _held_out(asked: Asked, plan: "Plan") -> str:
    """What versions are evaluated on: without --held-out the test part of the data, where it has one and the task an `evaluate`."""
    if asked.held_out:
        return asked.held_out
    return asked.data if asked.data.startswith("name:") and plan.manifest.variants("evaluate") else ""


def _rounds(asked: Asked, plan: "Plan", num_examples: int) -> int:
    """Rounds of so many steps, in which each fragment has its turn as often as any other."""
    steps = asked.steps
    if steps is None:
        steps = max(1, round((asked.epochs or 0) * num_examples / (plan.manifest.training.batch_size * asked.pods)))
    return asked.fragments * -(-steps // asked.inner_steps)


def _policy(asked: Asked) -> dict[str, Any]:
    """Fields of the `RoundPolicy`. Where late updates count nobody waits for anybody: a version is made of the next --goal updates."""
    goal, late = asked.goal or asked.pods, parse_late(asked.late)
    made = {"goal": goal, "minimum_group": goal, "late": late.to_json(), "selection_window_s": 3600.0, "reporting_window_s": 86_400.0}  # fmt: skip
    if goal < asked.pods and late.kind != "discard":
        return made | {"buffer": goal, "concurrency": asked.pods}
    return made | {"over_selection": asked.pods / goal, "adaptive": False}


def _begin(asked: Asked, examples: "Examples", screen: Screen) -> _Begun:
    """A run of the task with pods as devices."""
    from shoal.cli import run_folder
    from shoal.cli.build_plan import build_in_child
    from shoal.fleet.keys import HostKeys
    from shoal.plan.run_plan import begin_run
    from shoal.plan.train import conform
    from shoal.record.sqlite import open_store

    folder = run_folder.new_folder(asked.run, Path(asked.task.partition(":")[0]).stem)
    each = len(examples) // asked.pods
    screen.say(f"building the plan of {asked.task}")
    pods = {
        "pods": asked.pods, "batch_size": int(asked.batch) if asked.batch else None, "examples": each, "inner_steps": asked.inner_steps,
        "fragments": asked.fragments,
    }  # fmt: skip
    plan, model = build_in_child(asked.task, seed=asked.seed, policy=_policy(asked), each={}, pods=pods)
    conform(type(examples)(examples.take(slice(0, 1))), plan.manifest)
    held_out, rounds = _held_out(asked, plan), _rounds(asked, plan, len(examples))
    if held_out and not plan.manifest.variants("evaluate"):
        raise ValueError(f"Task {plan.manifest.task!r} has no `evaluate`, so --held-out has no use: leave it out.")
    steps = asked.inner_steps // asked.fragments
    sent = f"1/{asked.fragments} of the model" if asked.fragments > 1 else "the model"
    screen.say(
        f"{words.count(asked.pods, 'pod')}, each with {each:,} examples and a batch of {plan.manifest.training.batch_size}; {words.count(rounds, 'round')} of "
        f"{words.count(steps, 'step')}, after each {sent} is averaged: {rounds * steps:,} steps in all"
    )
    folder.mkdir(parents=True, exist_ok=True)
    store = open_store(folder)
    try:
        config = {"task": asked.task, "data": asked.data, "pods": _options(asked)}
        signed = plan.sign(HostKeys.load_or_make(folder).signing)
        run_id = begin_run(store, signed, model, kind="host", rounds=rounds, seed=asked.seed, config=config)
    finally:
        store.close()
    return _Begun(folder, run_id, rounds, held_out)


def of_pods(task: Any, asked: dict[str, Any]) -> Any:
    """The task as pods train it, in the process that builds its plan.

    Args:
        task: the `Task`.
        asked: `pods`, `batch_size` (of all pods, or None), `examples` (of each), `inner_steps`, `fragments`.
    """
    from dataclasses import replace

    import shoal

    whole = task.local.batch_size if asked["batch_size"] is None else asked["batch_size"]
    if whole % asked["pods"]:
        raise ValueError(f"Expected a batch that {asked['pods']} pods share evenly, got {whole}.")
    size = whole // asked["pods"]
    local = replace(task.local, batch_size=size)
    made = shoal.diloco(task.replace(local=local), inner_steps=asked["inner_steps"], fragments=asked["fragments"])
    epochs = -(-made.local.max_examples // max(1, asked["examples"]))
    return made.replace(local=replace(made.local, epochs=epochs))


@final
class _Pods:
    """The devices' processes. A context manager: none outlives the block."""

    def __init__(self, asked: Asked, folder: Path, examples: "Examples", screen: Screen) -> None:
        self._asked, self._screen = asked, screen
        self._folder = (folder / FOLDER).resolve()
        self._examples = examples
        self._over = threading.Event()
        self._processes: dict[int, subprocess.Popen[bytes]] = {}
        self._lives: dict[int, int] = dict.fromkeys(range(asked.pods), 0)
        self._begun_s: dict[int, float] = {}
        self._given_up: set[int] = set()
        self.fault = ""
        """Why the training cannot go on; empty: nothing of that kind."""
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "_Pods":
        import numpy as np

        self._folder.mkdir(parents=True, exist_ok=True)
        (self._folder / "ready").unlink(missing_ok=True)
        self._clear()  # of one that was killed
        order = np.random.Generator(np.random.Philox(key=self._asked.seed)).permutation(len(self._examples))
        for pod, rows in enumerate(np.array_split(order, self._asked.pods)):
            with open(self._data(pod), "wb", opener=_private) as file:
                np.savez(file, **self._examples.take(np.sort(rows)))  # type: ignore[arg-type]
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        for process in self._processes.values():
            process.terminate()
        for process in self._processes.values():
            try:
                process.wait(END_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._clear()

    def _clear(self) -> None:
        """The examples are elsewhere."""
        for path in self._folder.glob("pod-*.npz"):
            path.unlink()

    def _data(self, pod: int) -> Path:
        return self._folder / f"pod-{pod}.npz"

    def _log(self, pod: int) -> Path:
        return self._folder / f"pod-{pod}.log"

    def _watch(self) -> None:
        """Starts the pods when the host listens, and those that die again."""
        ready = self._folder / "ready"
        while not ready.exists():
            if self._over.wait(LOOK_S):
                return
        server = ready.read_text()
        for pod in self._lives:
            self._start(pod, server)
        while not self._over.wait(LOOK_S):
            for pod, process in list(self._processes.items()):
                if process.poll():  # 0: the run is over
                    self._ended(pod, process.returncode, server)

    def _start(self, pod: int, server: str) -> None:
        threads = max(1, (os.cpu_count() or 1) // self._asked.pods)
        command: list[str | Path] = [
            sys.executable, "-m", "shoal", "device", "--server", server, "--data", self._data(pod), "--id", f"pod-{pod}", "--threads", str(threads),
            "--state", self._folder / f"pod-{pod}", "--priority", "normal", "--with-parent",
        ]  # fmt: skip
        self._lives[pod] += 1
        self._begun_s[pod] = time.monotonic()
        with self._log(pod).open("ab") as log:
            self._processes[pod] = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)

    def _ended(self, pod: int, code: int, server: str) -> None:
        del self._processes[pod]
        if time.monotonic() - self._begun_s[pod] > SOUND_S:
            self._lives[pod] = 0
        if self._lives[pod] < MOST_LIVES:
            self._screen.say(f"pod {pod} ended ({_name(code)}) and is begun again")
            return self._start(pod, server)
        self._given_up.add(pod)
        why = f"pod {pod} ended {self._lives[pod]} times, and is left alone. It said last: {_last_line(self._log(pod))}"
        self._screen.say(why)
        if len(self._lives) - len(self._given_up) < (self._asked.goal or self._asked.pods) and not self._over.is_set():
            self.fault = f"Fewer pods are left than a round needs: {why}"
            os.kill(os.getpid(), signal.SIGTERM)
        return None


def _private(path: str, flags: int) -> int:
    """Opens a file that nobody else can read."""
    return os.open(path, flags, 0o600)


def _name(code: int) -> str:
    with suppress(ValueError):
        return signal.Signals(-code).name
    return f"code {code}"


def _last_line(path: Path) -> str:
    lines: Sequence[str] = path.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1] if lines else "nothing"
