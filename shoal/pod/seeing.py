"""A process of a pod looks at itself, and hears from the others what they saw (`seen.py`)."""

import time
from typing import Final, final

import jax
import jax.numpy as jnp
import numpy as np
import psutil

from shoal.pod.seen import NUM_BINS, MemberSeen, bin_of

STALL: Final = 4.0
"""Times the median of the steps since the last version, from which a step is one that stood still."""
JOB_SIZE, JOB_TIMES, JOB_EVERY_S = 512, 5, 10.0


@final
class Seeing:
    """Of this process."""

    def __init__(self, life: int) -> None:
        """`life`: its number."""
        self._life = life
        self._job_s, self._job_at_s = 0.0, float("-inf")
        self._clear()

    def _clear(self) -> None:
        self._steps: list[float] = []
        self._step_counts, self._wait_counts = np.zeros(NUM_BINS, np.int64), np.zeros(NUM_BINS, np.int64)
        self._waited_s = self._worked_s = 0.0

    def saw(self, num_steps: int, *, waited_s: float, worked_s: float) -> None:
        """A call of so many steps: seconds until its examples were there, and seconds that it took then."""
        each_s = (waited_s + worked_s) / num_steps
        self._steps.append(each_s)
        self._step_counts[bin_of(each_s)] += num_steps
        self._wait_counts[bin_of(waited_s)] += 1
        self._waited_s += waited_s
        self._worked_s += worked_s

    def gathered(self) -> tuple[MemberSeen, ...]:
        """What all have seen since this was last called, which all do at once."""
        stalls = sum(step > STALL * float(np.median(self._steps)) for step in self._steps)
        share = self._waited_s / max(self._waited_s + self._worked_s, 1e-9)
        rest = [self._life, stalls, psutil.Process().memory_info().rss >> 10, 1e6 * self._job(), 1e6 * share]
        row = np.concatenate([np.array(rest), self._step_counts, self._wait_counts]).astype(np.int32)
        self._clear()
        return tuple(_read(process, each) for process, each in enumerate(_from_all(row)))

    def _job(self) -> float:
        """Seconds of the small job, by now; nobody to compare with, none."""
        now_s = time.perf_counter()
        if jax.process_count() > 1 and now_s - self._job_at_s >= JOB_EVERY_S:
            matrix = jax.device_put(np.ones((JOB_SIZE, JOB_SIZE), np.float32), jax.local_devices()[0])
            _product(matrix).block_until_ready()
            taken = []
            for _ in range(JOB_TIMES):
                begun_s = time.perf_counter()
                _product(matrix).block_until_ready()
                taken.append(time.perf_counter() - begun_s)
            self._job_s, self._job_at_s = float(np.median(taken)), time.perf_counter()
        return self._job_s


def _read(process: int, row: np.ndarray) -> MemberSeen:
    life, stalls, memory, job, share = (int(value) for value in row[:5])
    steps, waits = row[5 : 5 + NUM_BINS], row[5 + NUM_BINS :]
    return MemberSeen(
        process=process, life=life, step_s=tuple(steps.tolist()), wait_s=tuple(waits.tolist()), waited=share * 1e-6, stalls=stalls,
        memory_bytes=memory << 10, job_s=job * 1e-6,
    )  # fmt: skip


def _from_all(row: np.ndarray) -> np.ndarray:
    """(processes, n)."""
    if jax.process_count() == 1:
        return row[None]
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(row))


@jax.jit
def _product(matrix: jax.Array) -> jax.Array:
    return matrix @ jnp.transpose(matrix)
