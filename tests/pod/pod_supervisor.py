"""A supervisor in a process of its own: python pod_supervisor.py WORKERS COMMAND…"""

import asyncio
import sys

from shoal.pod.place import WorkerCommand
from shoal.pod.supervisor import Supervisor

if __name__ == "__main__":
    supervisor = Supervisor(WorkerCommand(command=sys.argv[2:], grace_s=1.0), local_workers=int(sys.argv[1]))
    try:
        print(asyncio.run(supervisor.run()))
    except KeyboardInterrupt:
        print("stopped", supervisor.snapshot().step)
