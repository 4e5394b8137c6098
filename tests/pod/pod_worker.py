"""A worker that trains nothing: in each step it adds up one number over all members, and it keeps its step in a file.

python pod_worker.py FOLDER LAST [SECONDS]: until step LAST, each at least SECONDS long.
"""

import os
import sys
import time
from collections import Counter
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.experimental import multihost_utils

from shoal.pod import worker

EVERY = 5
"""Steps from one checkpoint to the next."""


REQUESTS, HITS = "/jax/compilation_cache/compile_requests_use_cache", "/jax/compilation_cache/cache_hits"


def main(folder: Path, last: int, seconds: float) -> None:
    events: Counter[str] = Counter()
    jax.monitoring.register_event_listener(lambda event, **_: events.update([event]))
    with worker.attached() as pod:
        pod.initialize()
        (folder / f"pid-{jax.process_index()}").write_text(str(os.getpid()))
        kept = folder / "step"
        first = int(kept.read_text()) + 1 if kept.exists() else 0
        pod.marks.doing("training")
        for step in range(first, last + 1):
            pod.marks.begin(step)
            total = multihost_utils.process_allgather(jnp.ones(())).sum() if jax.process_count() > 1 else 1
            assert total == jax.process_count()
            time.sleep(seconds)
            pod.marks.done(step)
            if step % EVERY == 0 or step == last:
                save(kept, step)
                pod.marks.saved(step)
                if step < last and pod.agree_to_pause():
                    pod.pause()
        (folder / f"compiled-{pod.life}-{jax.process_index()}").write_text(f"{events[REQUESTS]} {events[HITS]}")
        print(f"life {pod.life}: {jax.process_count()} reached {last}", flush=True)


def save(kept: Path, step: int) -> None:
    if jax.process_index() == 0:
        kept.with_suffix(".new").write_text(str(step))
        kept.with_suffix(".new").rename(kept)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]) if len(sys.argv) > 3 else 0.01)
