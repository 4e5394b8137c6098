"""How a cohort is laid out over this machine, found by a short trial of the cohort itself.

On a CPU the choice is between one device that takes all threads and one device a core, and between members one after the
other (small working sets, plain convolutions) and several at once (larger matrix products). None is best for all models:
the trial trains a part of the first cohort with each and keeps the fastest. It is made only where it pays (`WORTH`), and its
result is kept in the user's cache for this program on this kind of machine, and in the run's config.
"""

import json
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import jax

from shoal.plan.compile_cache import cache_folder
from shoal.plan.manifest import Manifest
from shoal.simulate.fused import Layout
from shoal.tensors import sha256

log = logging.getLogger("shoal.simulate")

WORTH: Final = 20
"""A trial is made where the run is expected to take so many times as long as a trial does."""
COMPILE_S: Final = 3.0
"""What the compilation of one candidate is taken to cost."""
FORMS: Final = 3
"""Goes up when operations are computed otherwise than before (`convolutions.py`, `outer_products.py`): trials are made again then."""
MOST_TOGETHER: Final = 32
"""Members that a CPU trains at once, at most: memory does not grow with the cohort."""
MOST_TOGETHER_ELSEWHERE: Final = 256
"""The same of an accelerator."""


def use_all_cores() -> None:
    """Makes each core of a CPU a JAX device, where JAX has not started yet and nobody has said how many it should have."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    in_flags = "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
    chosen = jax.config.values["jax_num_cpu_devices"]
    if chosen != -1 or in_flags:
        return
    try:
        jax.config.update("jax_num_cpu_devices", cores)
    except RuntimeError:
        if jax.default_backend() == "cpu" and cores > 1:
            log.warning(
                "JAX had started with 1 CPU device, of %d cores: to use all, call jax.config.update('jax_num_cpu_devices', %d) "
                "before anything else of JAX", cores, cores,
            )  # fmt: skip


def default(members: int) -> Layout:
    """What is tried first: on a CPU a device a core, members one after the other; elsewhere all at once, or very many."""
    devices = len(jax.devices()) if jax.process_count() > 1 else min(len(jax.devices()), members)
    return Layout(devices=devices, together=1 if jax.default_backend() == "cpu" else _share(members, devices))


def candidates(members: int) -> Iterator[Layout]:
    """The others, at most five."""
    seen = {default(members)}
    for devices in dict.fromkeys((min(len(jax.devices()), members), 1)):
        share = _share(members, devices)
        for together in (1, 4, share) if jax.default_backend() == "cpu" else (share, -(-share // 4)):
            layout = Layout(devices=devices, together=min(together, share))
            if layout not in seen:
                seen.add(layout)
                yield layout


def _share(members: int, devices: int) -> int:
    """Members of each device, or as many as may go together."""
    most = MOST_TOGETHER if jax.default_backend() == "cpu" else MOST_TOGETHER_ELSEWHERE
    return min(-(-members // devices), most)


@dataclass(frozen=True)
class Trial:
    """What came of it."""

    layout: Layout
    seconds: Mapping[Layout, float]
    """Layout -> seconds for the cohort, of those that were tried; none where a trial cannot pay."""


def choose(
    members: int,
    rounds: int,
    seconds_with: Callable[[Layout], float],
    *,
    clock: Callable[[], float] = time.perf_counter,
) -> Trial:
    """The fastest layout for so many rounds of such a cohort.

    Args:
        members: of the cohort.
        rounds: that are still to be run.
        seconds_with: compiles for a layout, trains the cohort with it, and says how long the training took.
        clock: seconds.
    """
    first, others = default(members), list(candidates(members))
    if rounds <= WORTH * len(others):  # however long a round takes
        return Trial(first, {})
    found = {first: seconds_with(first)}
    if rounds * found[first] < WORTH * len(others) * (COMPILE_S + found[first]):
        return Trial(first, found)
    begun = clock()
    for layout in others:
        found[layout] = seconds_with(layout)
        if clock() - begun > rounds * found[first] / WORTH:
            break
    return Trial(min(found, key=lambda layout: found[layout]), found)


def cached(key: str) -> Layout | None:
    """The layout of an earlier trial; None where there is none that can be used."""
    try:
        layout = Layout.from_json(json.loads(_file(key).read_text()))
    except (OSError, ValueError, TypeError):  # not there, not readable, torn
        return None
    return layout if layout.devices <= len(jax.devices()) else None


def of_run(kept: Mapping[str, Any]) -> Layout:
    """The layout that a run began with, as far as this machine has it: with fewer devices it is said, and last bits may differ."""
    layout, here = Layout.from_json(kept), len(jax.devices())
    if layout.devices <= here:
        return layout
    log.warning("the run began on %s, here are %d: it goes on, and last bits may differ", layout, here)
    return replace(layout, devices=here)


def cache(key: str, layout: Layout) -> None:
    """Keeps it for the next time, where the cache can be written."""
    path = _file(key)
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        path.write_text(json.dumps(layout.to_json()))
    except OSError as error:
        log.debug("the layout could not be kept: %s", error)


def key_of(manifest: Manifest, members: int) -> str:
    """What a trial's result is good for: these programs, a cohort of that size, this machine and JAX."""
    programs = sorted(program.hash for program in manifest.programs if program.name in ("begin", "block", "finish"))
    here = [FORMS, jax.__version__, jax.default_backend(), len(jax.devices()), os.cpu_count()]
    return sha256(json.dumps([programs, members, here]).encode())


def _file(key: str) -> Path:
    return cache_folder() / "layouts" / f"{key[:32]}.json"
