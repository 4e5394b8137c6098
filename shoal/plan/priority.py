"""How much a process steps back for the others of its machine."""

import os
import sys
from contextlib import suppress
from typing import Final, Literal

Priority = Literal["normal", "low", "lowest"]

_NICE: Final = {"normal": 0, "low": 5, "lowest": 19}


def step_back(priority: Priority) -> None:
    """Lowers the priority of this process and those that it starts from now on; it cannot be raised again.

    `lowest`: it runs when nobody else wants the core (Linux), and its disk accesses wait for those of others.
    """
    if sys.platform == "win32":
        import psutil

        classes = {"low": psutil.BELOW_NORMAL_PRIORITY_CLASS, "lowest": psutil.IDLE_PRIORITY_CLASS}
        psutil.Process().nice(classes.get(priority, psutil.NORMAL_PRIORITY_CLASS))
        return
    os.nice(_NICE[priority])
    if sys.platform == "linux" and priority == "lowest":
        with suppress(OSError):  # a sandbox forbids it
            os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
        with suppress(ImportError, OSError):  # the interpreter of an older JAX need not have psutil
            import psutil

            with suppress(psutil.Error):
                psutil.Process().ionice(psutil.IOPRIO_CLASS_IDLE)
