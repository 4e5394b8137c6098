"""A supervisor in a process of its own: python pod_supervisor.py WORKERS COMMAND…, or follow=PORT COMMAND…"""

import asyncio
import sys

from shoal.pod.follower import Follower
from shoal.pod.link import read_secret
from shoal.pod.place import WorkerCommand
from shoal.pod.supervisor import Supervisor

if __name__ == "__main__":
    how = WorkerCommand(command=sys.argv[2:], grace_s=0.5, has_spare=False)
    kind, _, port = sys.argv[1].partition("=")
    if port:
        asyncio.run(Follower(how, first=("127.0.0.1", int(port)), secret=read_secret(), name="other").run())
        sys.exit()
    supervisor = Supervisor(how, local_workers=int(kind))
    try:
        print(asyncio.run(supervisor.run()))
    except KeyboardInterrupt:
        print("stopped", supervisor.snapshot().step)
