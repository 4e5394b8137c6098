"""What JAX finds on this machine, asked in a process of its own: starting it here would take memory and devices."""

import json
import subprocess
import sys
from dataclasses import dataclass
from typing import Final

PROBE_S: Final = 180.0

_SOURCE: Final = """
import json, time
begun = time.perf_counter()
import jax, jax.numpy as jnp
devices = jax.devices()
started = time.perf_counter()
jax.jit(lambda x: jnp.tanh(x @ x).sum()).lower(jnp.ones((8, 8))).compile()
kinds = [d.platform if d.platform == "cpu" else f"{d.platform}: {d.device_kind}" for d in devices]
print(json.dumps({"kinds": kinds, "start_s": started - begun, "compile_s": time.perf_counter() - started}))
"""


@dataclass(frozen=True)
class JaxSaid:
    """The answer."""

    kinds: tuple[str, ...]
    """Each device; `cpu` for the processor."""
    start_s: float
    compile_s: float


def ask_jax() -> JaxSaid:
    """Raises OSError where JAX does not start."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", _SOURCE], capture_output=True, text=True, timeout=PROBE_S, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise TimeoutError(f"no answer in {PROBE_S:.0f} s") from error
    lines = (done.stdout if done.returncode == 0 else done.stderr).strip().splitlines()
    if done.returncode or not lines:
        raise OSError(lines[-1] if lines else f"it ended with code {done.returncode}")
    said = json.loads(lines[-1])
    return JaxSaid(tuple(said["kinds"]), said["start_s"], said["compile_s"])
