"""The members of one system, a process and a core each, which take steps when they are told to."""

import json
import os
import queue
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from benchmarks.frame import PEERS
from benchmarks.pod_step_common import MEMBERS
from shoal.errors import ShoalError

ROOT: Final = Path(__file__).parent.parent
ONE_THREAD: Final = {
    "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo",
    "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false", "JAX_PLATFORMS": "cpu",
}  # fmt: skip


class CrewFailed(ShoalError):
    """A system is not there, or did not answer; the message is the last it said."""


@dataclass(frozen=True)
class System:
    """How members are started."""

    name: str
    command: tuple[str, ...]
    needs: str = ""
    """Environment of `peers/setup.sh`; empty: ours."""
    devices: int = 1
    """JAX's, of each member."""


JAX: Final = System("jax", (sys.executable, "-m", "benchmarks.pod_step_jax"))
TORCH: Final = System(
    "torch", (str(PEERS / "torch/bin/python"), str(ROOT / "benchmarks/peers/pod_step_torch.py")), "torch"
)


@dataclass(frozen=True)
class Turn:
    """Of one step, the slowest member's."""

    seconds: float
    worked: float
    """Seconds of a processor, all threads."""
    loss: float
    """After the last step."""


@dataclass
class Crew:
    """Use as a context: whatever is left of it is ended."""

    system: System
    model: str
    limit_s: float
    """Longest that a turn may take, compilation included."""
    _members: list[subprocess.Popen[str]] = field(default_factory=list)
    _readers: list[threading.Thread] = field(default_factory=list)
    _lines: list["queue.Queue[str]"] = field(default_factory=list)

    def __enter__(self) -> "Crew":
        if not Path(self.system.command[0]).exists():
            raise CrewFailed(f"{self.system.name} is not installed: run benchmarks/peers/setup.sh {self.system.needs}")
        self._errors = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")
        port, cores = _free_port(), sorted(os.sched_getaffinity(0))
        for rank in range(MEMBERS):
            core = ("taskset", "--cpu-list", str(cores[rank % len(cores)]))
            words = ("--model", self.model, "--rank", str(rank), "--port", str(port))
            member = subprocess.Popen(
                [*core, *self.system.command, *words], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors,
                text=True, cwd=ROOT,
                env={**os.environ, **ONE_THREAD, "JAX_NUM_CPU_DEVICES": str(self.system.devices), "PYTHONPATH": str(ROOT)},
            )  # fmt: skip
            lines: queue.Queue[str] = queue.Queue()
            reader = threading.Thread(target=_read, args=(member, lines), daemon=True)
            reader.start()
            self._members.append(member)
            self._readers.append(reader)
            self._lines.append(lines)
        return self

    def __exit__(self, *_: object) -> None:
        for member in self._members:
            member.kill()
        for member, reader in zip(self._members, self._readers, strict=True):
            member.wait()
            reader.join()
            for pipe in (member.stdin, member.stdout):
                assert pipe is not None
                with suppress(BrokenPipeError):
                    pipe.close()
        self._errors.close()

    def wait(self) -> str:
        """Until all have found one another; how they add up."""
        return str(self._answers()[0]["how"])

    def turn(self, way: str, optimizer: str, steps: int) -> Turn:
        """Some steps by all members."""
        answers = self.ask({"way": way, "optimizer": optimizer, "steps": steps})
        seconds, worked = (max(answer[name] for answer in answers) / steps for name in ("seconds", "worked"))
        return Turn(seconds, worked, answers[0]["loss"])

    def ask(self, what: Mapping[str, Any]) -> Sequence[Any]:
        """The answers of all members, by rank."""
        for member in self._members:
            assert member.stdin is not None
            member.stdin.write(json.dumps(what) + "\n")
            member.stdin.flush()
        return self._answers()

    def _answers(self) -> Sequence[Any]:
        return [self._answer(lines) for lines in self._lines]

    def _answer(self, lines: "queue.Queue[str]") -> Any:
        while True:
            try:
                line = lines.get(timeout=self.limit_s)
            except queue.Empty:
                raise CrewFailed(f"{self.system.name} did not answer for {self.limit_s:g} s") from None
            if not line:
                raise CrewFailed(f"{self.system.name} ended; it last said: {self._last_said()}")
            if line.startswith("{"):
                return json.loads(line)

    def _last_said(self) -> str:
        self._errors.seek(0)
        said = [line.strip() for line in self._errors.read().splitlines() if line.strip()]
        return said[-1][:300] if said else "nothing"


def _read(member: subprocess.Popen[str], lines: "queue.Queue[str]") -> None:
    assert member.stdout is not None
    for line in member.stdout:
        lines.put(line)
    lines.put("")


def _free_port() -> int:
    with socket.socket() as made:
        made.bind(("localhost", 0))
        return int(made.getsockname()[1])
