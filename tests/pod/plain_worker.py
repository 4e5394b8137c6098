"""A worker without JAX, which is there in a moment: python plain_worker.py FOLDER KIND LAST.

It counts steps in a file, from which it goes on; KIND is `work`, or what goes wrong with it.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from shoal.pod import worker

STEP_S = 0.02


def main(folder: Path, kind: str, last: int) -> None:
    with (folder / "imports").open("a") as file:
        file.write(f"{os.getpid()}\n")
    with worker.attached() as pod:
        assert pod.assignment is not None
        process = pod.assignment.process_id
        write(folder / f"pid-{process}", f"{os.getpid()} {pod.life}")
        go_wrong(kind, folder, process)
        pod.marks.doing("training")
        kept = folder / f"step-{process}"
        for step in range(int(kept.read_text()) + 1 if kept.exists() else 0, last + 1):
            pod.marks.begin(step)
            time.sleep(STEP_S)
            write(kept, str(step))
            pod.marks.done(step)
            pod.marks.saved(step)
            if pod.was_asked:
                pod.pause()


def go_wrong(kind: str, folder: Path, process: int) -> None:
    if kind == "fail":
        raise ValueError("there is no such data")
    if kind == "deaf":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if kind == "nonsense":
        os.write(int(os.environ[worker.MARKS_FD]), b"[1]\n")
    if kind == "child":
        child = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(600)"])
        write(folder / f"child-{process}", str(child.pid))


def write(path: Path, text: str) -> None:
    """All of it or nothing: it may be killed at any moment."""
    path.with_suffix(".new").write_text(text)
    path.with_suffix(".new").rename(path)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
