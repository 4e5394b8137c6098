"""A member of `pod_step` that runs PyTorch: DDP and FSDP2 over gloo, in one process. Turns as in `benchmarks/pod_step_jax.py`."""

import argparse
import json
import sys
import time

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from benchmarks import pod_step_common as common


def linear(weight, bias=None):
    made = nn.Linear(*weight.shape, bias=bias is not None)
    with torch.no_grad():
        made.weight.copy_(torch.from_numpy(weight.T))
        if bias is not None:
            made.bias.copy_(torch.from_numpy(bias))
    return made


class Mlp(nn.Module):
    def __init__(self, weights):
        super().__init__()
        count = len(common.WIDTHS) - 1
        self.parts = nn.ModuleList(linear(weights[f"kernel{n}"], weights[f"bias{n}"]) for n in range(count))

    def forward(self, x, y):
        for layer in self.parts[:-1]:
            x = F.relu(layer(x))
        return F.cross_entropy(self.parts[-1](x), y)


class Norm(nn.Module):
    def __init__(self, scale):
        super().__init__()
        self.scale = nn.Parameter(torch.from_numpy(scale))

    def forward(self, x):
        return F.rms_norm(x, (x.shape[-1],), self.scale, 1e-6)


class Layer(nn.Module):
    def __init__(self, weights):
        super().__init__()
        self.norm1, self.norm2 = Norm(weights["norm1"]), Norm(weights["norm2"])
        self.qkv, self.out = linear(weights["qkv"]), linear(weights["out"])
        self.up, self.down = linear(weights["up"]), linear(weights["down"])

    def forward(self, hidden):
        size, row, dim = hidden.shape
        query, key, value = self.qkv(self.norm1(hidden)).view(size, row, 3, common.HEADS, -1).permute(2, 0, 3, 1, 4)
        seen = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        hidden = hidden + self.out(seen.transpose(1, 2).reshape(size, row, dim))
        return hidden + self.down(F.gelu(self.up(self.norm2(hidden)), approximate="tanh"))


class Decoder(nn.Module):
    def __init__(self, weights):
        super().__init__()
        self.embed = nn.Parameter(torch.from_numpy(weights["embed"]))
        self.place = nn.Parameter(torch.from_numpy(weights["place"]))
        self.norm = Norm(weights["norm"])
        names = ("norm1", "norm2", "qkv", "out", "up", "down")
        self.parts = nn.ModuleList(
            Layer({name: weights[f"layer{n}/{name}"] for name in names}) for n in range(common.LAYERS)
        )

    def forward(self, x, y):
        hidden = F.embedding(x, self.embed) + self.place
        for layer in self.parts:
            hidden = layer(hidden)
        return F.cross_entropy(F.linear(self.norm(hidden), self.embed).flatten(0, 1), y.flatten())


def stepper(model, way, optimizer, rank):
    """Number of a batch -> the member's loss."""
    net = {"mlp": Mlp, "decoder": Decoder}[model](common.weights(model))
    if way == "fsdp2":
        mesh = init_device_mesh("cpu", (common.MEMBERS,))
        for layer in net.parts:
            fully_shard(layer, mesh=mesh)
        fully_shard(net, mesh=mesh)
    else:
        net = DistributedDataParallel(net, gradient_as_bucket_view=True, static_graph=True)
    rate, fused = common.RATE[optimizer], {"fused": True}
    if optimizer == "adam":
        rule = torch.optim.Adam(net.parameters(), rate, **fused)
    else:
        rule = torch.optim.AdamW(net.parameters(), rate, weight_decay=common.DECAY, **fused)
    parts = [common.part(batch, rank) for batch in common.batches(model)]
    pool = [{"x": torch.from_numpy(p["x"]), "y": torch.from_numpy(p["y"]).long()} for p in parts]

    def step(number):
        rule.zero_grad(set_to_none=True)
        loss = net(**pool[number])
        loss.backward()
        rule.step()
        return loss.detach()

    return step


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=("mlp", "decoder"), required=True)
    parser.add_argument("--rank", type=int, required=True)
    parser.add_argument("--port", type=int, required=True)
    given = parser.parse_args()
    torch.set_num_threads(1)
    address = f"tcp://localhost:{given.port}"
    dist.init_process_group("gloo", init_method=address, rank=given.rank, world_size=common.MEMBERS)
    steps = {}
    print(json.dumps({"how": "gloo"}), flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        which = asked["way"], asked["optimizer"]
        begun, worked = time.perf_counter(), time.process_time()
        if which not in steps:
            steps[which] = stepper(given.model, *which, given.rank)
        for number in range(asked["steps"]):
            loss = steps[which](number % common.POOL)
        seconds, worked = time.perf_counter() - begun, time.process_time() - worked
        dist.all_reduce(loss)  # of all members, as the others say it
        mean = float(loss) / common.MEMBERS
        print(json.dumps({"seconds": seconds, "worked": worked, "loss": mean}), flush=True)


if __name__ == "__main__":
    main()
