"""What a machine's speed is told by: the same little work twice a second, until it is ended.

    python -m benchmarks.soak_clock FILE

The work is of the kinds that a round is made of: Python, a hash, some arithmetic, and commits of a database to disk; about ten
milliseconds. To FILE goes a line each time: the end, by `time.perf_counter`, which processes of a machine share, and milliseconds.
"""

import hashlib
import json
import sqlite3
import sys
import tempfile
import time
from pathlib import Path

import numpy as np


def work(database: sqlite3.Connection) -> None:
    """The same each time, and the database keeps its size."""
    rng = np.random.default_rng(0)
    for number in range(10):
        text = json.dumps({str(key): value for key, value in enumerate(rng.normal(size=300).tolist())})
        digest = hashlib.sha256(text.encode()).digest()
        with database:
            database.execute("replace into kept values (?, ?)", (number, digest))


def main(path: Path) -> None:
    with tempfile.TemporaryDirectory(dir=path.parent) as folder, path.open("w") as took:
        database = sqlite3.connect(Path(folder) / "database")
        database.execute("pragma journal_mode = wal")
        database.execute("pragma synchronous = full")
        database.execute("create table kept (number integer primary key, digest blob)")
        while True:
            start_s = time.perf_counter()
            work(database)
            end_s = time.perf_counter()
            print(end_s, 1000.0 * (end_s - start_s), file=took, flush=True)
            time.sleep(0.5)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
