"""What a step on a mesh of 8 devices sends and holds, read off lowered programs: nothing here depends on how fast the machine is.

Three nets (`pod_nets.py`) on three meshes, each update, gradients summed in float32 and in bfloat16. Bytes are those that one device sends in a ring
(`shoal/pod/traffic.py`). *Moved* are gradients and parameters, *the rest* are metrics, the count of examples, batch statistics and the norms of LARS
and LAMB. What the compiler makes of it stands beside (full run): on a CPU bfloat16 becomes float32, and what axes of rules need is there only.

Y1a  moved by a sharded update / moved by a replicated one on the same mesh, padding taken off both: at most 1. A replicated one all-reduces; a
     sharded one sends each gradient half the way (reduce-scatter) and each parameter the other half (all-gather).
Y1b  the same of all that is sent, padding and norms included: at most 1 % more.
Y1c  optimizer bytes on a device, sharded / what is allowed, which is the sum over its tensors of ceil(elements / members): at most 1.
Y2   bytes in which gradients are summed, bfloat16 / float32, for sharded and fully sharded updates: at most one half. (A replicated update gathers
     the sum in float32; its share, three quarters, is in the table and not judged.)
Y3   all that a device sends over the slow axis of slow=2,data=4 / all that it sends in a flat ring of 8, whose links between the halves carry as much
     as all others: at most 1 / size of the fast axis. Beside it what leaves a half as a whole: four devices send there instead of one.

The goals are of lowered programs. Of compiled ones the same ratio as Y1b is printed and kept (`compiled_share`), and not judged: with rules (data=4,
model=2) a sharded update is compiled to 1.6 to 2.8 times the bytes of a replicated one, since the compiler makes split tensors whole where members cut
them; without rules it is that of the lowered programs.

No tensor here is kept whole (last column): one that a rule splits, and of which members divide no other dimension, would be all-reduced in float32 and
updated by all, whatever the update.

Each value is the worst of all nets, meshes and updates that its line names.
"""

import jax

jax.config.update("jax_num_cpu_devices", 8)

from collections import Counter  # noqa: E402 (devices are counted when JAX starts)
from collections.abc import Iterable, Sequence  # noqa: E402
from dataclasses import dataclass  # noqa: E402
from math import prod  # noqa: E402
from typing import Any, Final  # noqa: E402

import numpy as np  # noqa: E402

from benchmarks.frame import Goal, run, table  # noqa: E402
from benchmarks.pod_nets import NETS, Net  # noqa: E402
from shoal.local import model_shape, named  # noqa: E402
from shoal.pod.collectives import Members, SumType  # noqa: E402
from shoal.pod.describe import lower, state_bytes  # noqa: E402
from shoal.pod.mesh import SLOW, MeshSpec  # noqa: E402
from shoal.pod.placement import Update  # noqa: E402
from shoal.pod.rules import specs  # noqa: E402
from shoal.pod.step import Program  # noqa: E402
from shoal.pod.traffic import Collective, Traffic  # noqa: E402
from shoal.pod.traffic_compiled import compiled_traffic  # noqa: E402
from shoal.pod.traffic_lowered import lowered_traffic  # noqa: E402

FLAT, TWO_LEVEL, SPLIT = "data=8", "slow=2,data=4", "data=4,model=2"
UPDATES: Final[tuple[Update, ...]] = ("replicated", "sharded", "fully_sharded")
QUICK: Final = (("replicated", "float32"), ("sharded", "float32"), ("sharded", "bfloat16"))
SUM_TYPES: Final[tuple[SumType, ...]] = ("float32", "bfloat16")


@dataclass(frozen=True)
class Row:
    """One program. Bytes are those that one device sends in a step."""

    net: str
    mesh: str
    update: Update
    sum_type: SumType
    moved: float
    """Of gradients and parameters, padding included."""
    padding: float
    """Of that."""
    summed: float
    """Of `moved` what gradients are summed with."""
    rest: float
    by_axis: dict[str, float]
    compiled: dict[str, float] | None
    """By axis; None: it was not compiled."""
    optimizer: int
    """Bytes that one device holds."""
    allowed: int
    """Bytes of its share of an optimizer, each tensor rounded up to a whole element a member."""

    kept_whole: int
    """Bytes of learned tensors that members cannot cut, since a rule splits them and no other dimension is divided evenly: neither sharded nor rounded."""

    @property
    def total(self) -> float:
        return self.moved + self.rest

    @property
    def slow(self) -> float:
        """What goes over the slow axis, alone or among others."""
        return sum(size for axes, size in self.by_axis.items() if SLOW in axes.split("+"))

    def cells(self) -> list[str]:
        return [
            self.net, self.mesh, self.update, self.sum_type, f"{self.moved:,.0f}", f"{self.padding:,.0f}", f"{self.summed:,.0f}", f"{self.rest:,.0f}",
            _axes(self.by_axis), "-" if self.compiled is None else _axes(self.compiled), f"{self.optimizer:,}", f"{self.allowed:,}", f"{self.kept_whole:,}",
        ]  # fmt: skip


def measure(quick: bool) -> tuple[Sequence[Goal], dict[str, Any]]:
    rows = []
    for made in NETS:
        net = made()
        for mesh in (FLAT, TWO_LEVEL) if quick else (FLAT, TWO_LEVEL, SPLIT):
            for update in UPDATES:
                for sum_type in SUM_TYPES:
                    if quick and (update, sum_type) not in QUICK:
                        continue
                    rows.append(_row(net, mesh, update, sum_type, compiles=not quick))
            print(f"{net.name} on {mesh}", flush=True)
    header = ["net", "mesh", "update", "sums", "moved", "padding", "summed", "rest", "lowered, kB by axis", "compiled, kB by axis", "optimizer", "allowed", "kept whole"]  # fmt: skip
    table(header, [row.cells() for row in rows])
    boundary = _boundary(rows)
    table(["net", "update", "slow / flat ring, a device", "a half"], [[*key, *shares] for key, shares in boundary.items()])  # fmt: skip
    compiled = _compiled_shares(rows)
    table(["net", "mesh", "update", "compiled / replicated"], [[*key, share] for key, share in compiled.items()])
    fast = MeshSpec.parse(TWO_LEVEL).sizes["data"]
    why = "the full run has fully sharded updates and the axis of rules, too" if quick else ""
    goals = [
        Goal("Y1a", "sharded / replicated, gradients and parameters moved, padding apart", _share(rows, lambda r: r.moved - r.padding), "<= 1.0", why),
        Goal("Y1b", "sharded / replicated, all that is sent, padding and norms included", _share(rows, lambda r: r.total), "<= 1.01", why),
        Goal("Y1c", "optimizer bytes on a device, sharded / one share with its padding", max(r.optimizer / r.allowed for r in rows if r.update != "replicated"), "<= 1.0", why),
        Goal("Y2", "bfloat16 / float32, bytes that gradients are summed with, sharded and fully sharded", max(_halves(rows, "sharded", "fully_sharded")), "<= 0.5", why),
        Goal("Y3", f"over the slow axis of {TWO_LEVEL} / in a flat ring, all that a device sends", max(share for share, _ in boundary.values()), f"<= {1 / fast}", why),
    ]  # fmt: skip
    return goals, {
        "replicated_bfloat16_share": max(_halves(rows, "replicated"), default=None),
        "compiled_share": {" ".join(key): share for key, share in compiled.items()},
        "slow_share_of_a_half": max(half for _, half in boundary.values()),
        "rows": [vars(row) for row in rows],
    }


def _share(rows: Sequence[Row], size: Any) -> float:
    """Sharded / replicated, the worst of nets and meshes, in float32."""
    pairs = _pairs(rows, lambda r: r.update, "sharded", "replicated", lambda r: (r.net, r.mesh, r.sum_type))
    return float(max(size(one) / size(other) for one, other in pairs if one.sum_type == "float32"))


def _halves(rows: Sequence[Row], *updates: Update) -> list[float]:
    """bfloat16 / float32, of what gradients are summed with."""
    pairs = _pairs(rows, lambda r: r.sum_type, "bfloat16", "float32", lambda r: (r.net, r.mesh, r.update))
    return [one.summed / other.summed for one, other in pairs if one.update in updates]


def _boundary(rows: Sequence[Row]) -> dict[tuple[str, str], tuple[float, float]]:
    """(net, update) -> what goes over the slow axis of what a flat ring sends: of a device, and of half of them, of which in a flat ring one sends."""
    pairs = _pairs(rows, lambda r: r.mesh, TWO_LEVEL, FLAT, lambda r: (r.net, r.update, r.sum_type))
    fast = MeshSpec.parse(TWO_LEVEL).sizes["data"]
    return {
        (one.net, one.update): (one.slow / other.total, fast * one.slow / other.total)
        for one, other in pairs
        if one.sum_type == "float32"
    }


def _compiled_shares(rows: Sequence[Row]) -> dict[tuple[str, str, str], float]:
    """(net, mesh, update) -> all that its compiled program sends / what that of the replicated update does, in float32; empty where nothing is compiled."""
    made = {}
    for update in ("sharded", "fully_sharded"):
        for one, other in _pairs(rows, lambda r: r.update, update, "replicated", lambda r: (r.net, r.mesh, r.sum_type)):
            if one.sum_type == "float32" and one.compiled is not None and other.compiled is not None:
                made[one.net, one.mesh, update] = sum(one.compiled.values()) / sum(other.compiled.values())
    return made


def _pairs(rows: Iterable[Row], of: Any, first: str, second: str, key: Any) -> list[tuple[Row, Row]]:
    """Rows that differ in one thing."""
    by = {(key(row), of(row)): row for row in rows}
    return [(row, by[known, second]) for (known, which), row in by.items() if which == first and (known, second) in by]


def _row(net: Net, text: str, update: Update, sum_type: SumType, *, compiles: bool) -> Row:
    spec, members = MeshSpec.parse(text), Members(MeshSpec.parse(text), sum_type)
    shapes = {name: tuple(leaf.shape) for name, leaf in named(model_shape(net.task).params, "params").items()}
    split = specs(net.rules if text == SPLIT else {}, shapes, spec, what="rules")
    program = Program(net.task, spec.build(), members, update, split, {})
    fields = {name: jax.ShapeDtypeStruct((1, net.task.local.batch_size, *shape), dtype) for name, (shape, dtype) in net.task.batch.items()}  # fmt: skip
    lowered = lower(program, fields)
    traffic = lowered_traffic(lowered, spec.sizes)
    compiled = compiled_traffic(lowered.compile().as_text(), spec.sizes).by_axis() if compiles else None
    moved = _moved(traffic, program)
    return Row(
        net.name, text, update, sum_type, sum(each.total_bytes for each in moved), _padding(program),
        sum(each.total_bytes for each in moved if _adds_up(each, update)), traffic.total_bytes() - sum(each.total_bytes for each in moved),
        traffic.by_axis(), compiled, state_bytes(program)["optimizer"], _allowed(program), sum(prod(cut.shape) * cut.dtype.itemsize for cut in program.layout.cuts.values() if cut.is_whole),
    )  # fmt: skip


def _moved(traffic: Traffic, program: Program) -> list[Collective]:
    """Those of gradients and parameters: all but sums, and of the sums one for each tensor that is summed whole, told by its shape.

    Metrics are scalars, too: which of several sums of one shape is taken makes no difference in bytes.
    """
    cuts = program.layout.cuts
    wanted = Counter(cut.shape for cut in cuts.values() if _sums_whole(program) or cut.is_whole)
    made = []
    for each in traffic.collectives:
        shape = each.operands[0].shape
        if each.kind != "all_reduce":
            made.append(each)
        elif each.operands[0].dtype != "int32" and wanted[shape]:
            wanted[shape] -= 1
            made.append(each)
    assert not wanted.total(), f"each learned tensor is summed: {wanted}"
    return made


def _adds_up(each: Collective, update: Update) -> bool:
    """Whether it is part of a sum of gradients: gathering is, where it is of the sum and not of parameters."""
    return each.kind != "all_gather" or update == "replicated"


def _padding(program: Program) -> float:
    """Bytes that one device sends only so that pieces are equal: once for the sum, and once for each gathering."""
    if _sums_whole(program):
        return 0.0
    num = program.members.num
    flat = [cut for cut in program.layout.cuts.values() if cut.dim is None and not cut.is_whole]
    padding = sum((num * cut.columns(num) - prod(cut.shape)) * cut.dtype.itemsize for cut in flat)
    summed = 0.5 if program.members.sum_type == "bfloat16" else 1.0
    return (summed + (2 if program.update == "fully_sharded" else 1)) * (num - 1) / num * padding


def _sums_whole(program: Program) -> bool:
    """Whether gradients are all-reduced, tensor by tensor."""
    members = program.members
    return program.update == "replicated" and len(members.axes) == 1 and members.sum_type == "float32"


def _allowed(program: Program) -> int:
    """One member's share of an optimizer, each of its tensors rounded up to a whole element a member."""
    whole, _ = program.optimized_shapes
    leaves = jax.tree.leaves(jax.eval_shape(program.task.local.optimizer.init, whole))
    num = 1 if program.update == "replicated" else program.members.num
    return int(sum(-(-prod(leaf.shape) // num) * np.dtype(leaf.dtype).itemsize for leaf in leaves))


def _axes(by_axis: dict[str, float]) -> str:
    return " ".join(f"{axes} {size / 1e3:.1f}" for axes, size in sorted(by_axis.items()))


if __name__ == "__main__":
    run("pod_bytes", measure, "What a step on a mesh sends and holds, read off its programs.")
