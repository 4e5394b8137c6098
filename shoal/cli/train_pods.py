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
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, final

from shoal.cli import words
from shoal.cli.failures import Stopped, command_line
from shoal.cli.late_argument import parse_late
from shoal.cli.screen import Screen, Stopwatch
from shoal.cli.train_asked import Asked

if TYPE_CHECKING:
    from shoal.data import Examples

FOLDER: Final = "pods"
MOST_LIVES: Final = 4
"""Of a pod that dies without a version in between; then it is left where it is."""
LOOK_S: Final = 0.2
END_S: Final = 5.0


def train_pods(asked: Asked) -> None:
    """Trains with pods as devices, to the last version."""
    from shoal.cli import data_argument, host_process, run_folder

    screen, watch = Screen(json=asked.as_json), Stopwatch()
    examples = data_argument.open_joined(asked.data, user_column=asked.user_column)
    if len(examples) < asked.pods:
        raise ValueError(f"Expected an example for each of --pods {asked.pods} at least, got {len(examples)}.")
    watch.lap("data")
    if asked.resume:
        found = run_folder.existing_run(asked.run, kind="host")
        folder, run_id = found.path, found.run.id
    else:
        folder, run_id = _begin(asked, len(examples), screen)
    again = command_line(asked.command(folder))
    ready = folder / FOLDER / "ready"
    settings = host_process.Settings(
        folder=folder, run_ids=(run_id,), rounds=None, address="127.0.0.1", port=0, held_out=_held_out(asked), ready_file=ready, make_tls=False,
        tls_cert=None, tls_key=None, resumed=asked.resume,
    )  # fmt: skip
    try:
        with _Pods(asked, folder, examples, screen):
            host_process.run(settings, screen=screen, watch=watch, parent=0)
    except Stopped as stopped:
        raise Stopped(f"stopped. Go on with: {again}", code=stopped.code) from None


def _held_out(asked: Asked) -> str:
    """What versions are evaluated on: without --held-out the test part of the data, where it has one."""
    return asked.held_out or (asked.data if asked.data.startswith("name:") else "")


def _begin(asked: Asked, num_examples: int, screen: Screen) -> tuple[Path, str]:
    """A run of the task with pods as devices."""
    from shoal.cli import run_folder
    from shoal.cli.build_plan import build_in_child
    from shoal.fleet.keys import HostKeys
    from shoal.plan.run_plan import begin_run
    from shoal.record.sqlite import open_store

    folder = run_folder.new_folder(asked.run, Path(asked.task.partition(":")[0]).stem)
    goal = asked.goal or asked.pods
    policy = {
        "goal": goal, "minimum_group": goal, "over_selection": asked.pods / goal, "late": parse_late(asked.late).to_json(), "adaptive": False,
        "selection_window_s": 3600.0, "reporting_window_s": 86_400.0,
    }  # fmt: skip
    screen.say(f"building the plan of {asked.task}")
    pods = {
        "pods": asked.pods, "batch_size": int(asked.batch) if asked.batch else None, "examples": num_examples // asked.pods,
        "inner_steps": asked.inner_steps, "fragments": asked.fragments,
    }  # fmt: skip
    plan, model = build_in_child(asked.task, seed=asked.seed, policy=policy, each={}, pods=pods)
    training = plan.manifest.training
    assert training is not None
    steps_a_round = asked.inner_steps // asked.fragments
    steps = asked.steps
    if steps is None:
        steps = max(1, round((asked.epochs or 0) * num_examples / (training.batch_size * asked.pods)))
    rounds = -(-steps // steps_a_round)
    sent = f"a {asked.fragments}th of the model" if asked.fragments > 1 else "the model"
    screen.say(
        f"{words.count(asked.pods, 'pod')}, each with {num_examples // asked.pods:,} examples and a batch of {training.batch_size}; {rounds} rounds of "
        f"{words.count(steps_a_round, 'step')}, after each {sent} is averaged"
    )
    folder.mkdir(parents=True, exist_ok=True)
    store = open_store(folder)
    try:
        config = {"task": asked.task, "data": asked.data, "pods": asked.pods}
        signed = plan.sign(HostKeys.load_or_make(folder).signing)
        run_id = begin_run(store, signed, model, kind="host", rounds=rounds, seed=asked.seed, config=config)
    finally:
        store.close()
    return folder, run_id


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
        self._given_up: set[int] = set()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "_Pods":
        import numpy as np

        self._folder.mkdir(parents=True, exist_ok=True)
        (self._folder / "ready").unlink(missing_ok=True)
        order = np.random.Generator(np.random.Philox(key=self._asked.seed)).permutation(len(self._examples))
        for pod, rows in enumerate(np.array_split(order, self._asked.pods)):
            np.savez(self._data(pod), **self._examples.take(np.sort(rows)))  # type: ignore[arg-type]
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
        for pod in self._lives:
            self._data(pod).unlink(missing_ok=True)

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
        with self._log(pod).open("ab") as log:
            self._processes[pod] = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)

    def _ended(self, pod: int, code: int, server: str) -> None:
        del self._processes[pod]
        if self._lives[pod] < MOST_LIVES:
            self._screen.say(f"pod {pod} ended ({_name(code)}) and is begun again")
            return self._start(pod, server)
        self._given_up.add(pod)
        self._screen.say(
            f"pod {pod} ended {self._lives[pod]} times, and is left alone. It said last: {_last_line(self._log(pod))}"
        )
        if len(self._lives) - len(self._given_up) < (self._asked.goal or self._asked.pods):
            self._screen.say("fewer pods are left than a round needs")
            os.kill(os.getpid(), signal.SIGTERM)
        return None


def _name(code: int) -> str:
    with suppress(ValueError):
        return signal.Signals(-code).name
    return f"code {code}"


def _last_line(path: Path) -> str:
    lines: Sequence[str] = path.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1] if lines else "nothing"
