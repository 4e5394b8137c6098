"""Ends the workers of a supervisor that died: a process that does nothing else, and so outlives it.

Run as a script, in a session of its own, by `worker_process.py`. The supervisor says on its standard input which process groups there are: `+7` a new
one, `-7` one that has ended. When the input ends, however that came about, those that are left are killed. It imports nothing of shoal: it is there in
a few milliseconds, and takes a few megabytes.
"""

import os
import signal
import sys


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the supervisor's to heed
    groups: set[int] = set()
    for line in sys.stdin.buffer:
        sign, group = line[:1], int(line[1:])
        if sign == b"+":
            groups.add(group)
        else:
            groups.discard(group)
    for group in groups:
        try:
            os.killpg(group, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            pass


if __name__ == "__main__":
    main()
