"""One replica group of torchft in `pod_elastic`: the same perceptron, fault-tolerant data parallel over gloo.

Run by the environment of `setup.sh torchft`: python pod_elastic_torchft.py FOLDER MEMBER MASTER_PORT, with TORCHFT_LIGHTHOUSE set. A replica that
comes back takes the model from one that lives; a step is committed with those that are there. Gradients are averaged by `Manager.allreduce`, all in one:
torchft's `DistributedDataParallel` dies of an assertion (0.2.0, ddp.py, `assert fut._fut`) where the other is killed in the middle of a sum.
"""

import os
import sys
from datetime import timedelta
from itertools import pairwise
from pathlib import Path

import torch
from torch import nn
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors
from torchft import Manager, Optimizer, ProcessGroupGloo

sys.path.insert(0, str(Path(__file__).parent.parent))
from pod_elastic_common import BATCH, POOL, RATE, WIDTHS, batches, weights


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(*pair) for pair in pairwise(WIDTHS))
        for number, layer in enumerate(self.layers):
            layer.weight.data = torch.from_numpy(weights()[f"kernel{number}"].T.copy())
            layer.bias.data = torch.from_numpy(weights()[f"bias{number}"])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers[:-1]:
            x = torch.relu(layer(x))
        return self.layers[-1](x)


def main(folder: Path, member: int, port: str) -> None:
    os.sched_setaffinity(0, {member % (os.cpu_count() or 1)})
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "RANK": "0", "WORLD_SIZE": "1"}
    (folder / f"pid-{member}").write_text(str(os.getpid()))
    net = Net()
    inner = torch.optim.Adam(net.parameters(), lr=RATE)
    _store = torch.distributed.TCPStore("127.0.0.1", int(port), is_master=True, wait_for_workers=False)
    manager = Manager(
        pg=ProcessGroupGloo(timeout=timedelta(seconds=5)),
        load_state_dict=lambda kept: (net.load_state_dict(kept["net"]), inner.load_state_dict(kept["inner"])),
        state_dict=lambda: {"net": net.state_dict(), "inner": inner.state_dict()},
        min_replica_size=1,
        # The defaults are a minute each: so long a survivor may wait for one that is dead.
        timeout=timedelta(seconds=5),
        quorum_timeout=timedelta(seconds=10),
        connect_timeout=timedelta(seconds=5),
        replica_id=f"member_{member}",
    )
    optimizer = Optimizer(manager, inner)
    pool = [{n: torch.from_numpy(v) for n, v in batch.items()} for batch in batches(member)]
    reached = os.open(folder / f"reached-{member}", os.O_RDWR | os.O_CREAT)
    number = 0
    while True:
        batch = pool[number % POOL]
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(batch["x"]), batch["y"].long()).backward()
        gradients = [tensor.grad for tensor in net.parameters()]
        flat = _flatten_dense_tensors(gradients)
        manager.allreduce(flat).wait()
        for gradient, mean in zip(gradients, _unflatten_dense_tensors(flat, gradients), strict=True):
            gradient.copy_(mean)
        optimizer.step()
        number += 1
        os.pwrite(reached, b"%10d %20d\n" % (0, manager.batches_committed() * BATCH), 0)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
