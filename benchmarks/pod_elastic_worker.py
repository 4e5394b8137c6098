"""One of our workers in `pod_elastic`: python -m benchmarks.pod_elastic_worker FOLDER."""

import os
import sys
from pathlib import Path

from shoal.pod import worker


def main(folder: Path) -> None:
    with worker.attached(prepare=imports) as pod:
        from benchmarks.pod_elastic_training import train

        assert pod.assignment is not None
        os.sched_setaffinity(0, {pod.assignment.process_id % (os.cpu_count() or 1)})
        (folder / f"pid-{pod.assignment.process_id}").write_text(str(os.getpid()))
        pod.initialize()
        train(pod, folder)


def imports() -> None:
    import benchmarks.pod_elastic_training  # noqa: F401


if __name__ == "__main__":
    main(Path(sys.argv[1]))
