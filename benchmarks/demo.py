"""The demo as a stranger runs it: `shoal demo`, a server and four device processes on Fashion-MNIST.

D1 is the time from the start of the command to the first commit with 80 % test accuracy, data and compilation included; D2 the
distance to central training of the same net with as many passes over the pooled data.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from typing import Any

from benchmarks.frame import Goal, run, table


def measure(quick: bool) -> tuple[Sequence[Goal], dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "shoal", "demo", "--json", "--run", f"{folder}/run"]
        done = subprocess.run(
            [*command, *(["--quick"] if quick else [])], stdout=subprocess.PIPE, check=True, timeout=1000
        )
    found = json.loads(done.stdout.splitlines()[-1])
    table(["figure", "value"], [[name, value] for name, value in found.items() if isinstance(value, int | float)])
    why = "a quick demo has fewer devices and rounds" if quick else ""
    behind = 100 * (found["central_accuracy"] - found["accuracy"])
    goals = [
        Goal("D1", "time to 80 % test accuracy, s", found["seconds_to_80"], "<= 240", why=why),
        Goal("D2", "points behind central training", behind, "<= 6", why=why),
    ]
    return goals, {"demo": found}


if __name__ == "__main__":
    run("demo", measure, __doc__ or "")
