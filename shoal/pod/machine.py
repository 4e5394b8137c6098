"""What a mesh is made of, in five numbers a device, and how long a step takes by them (a roofline).

Of accelerators the numbers are those that makers publish, which no program reaches whole; of this machine they are measured.

A device is one of `jax.devices()`. A link's rate is what one device sends along one axis of the mesh. TPUs stand in a torus and send both ways round
a ring; GPUs have a switch. The roofline is that of Williams et al. 2009, "Roofline: an insightful visual performance model", with links
beside memory (as in "How to scale your model", Austin et al. 2025).

Sources:
    TPU v3: cloud.google.com/tpu/docs/v3 (a chip: 123 TFLOP/s, 32 GiB, 900 GB/s) and Jouppi et al. 2020, "A domain-specific supercomputer for training
        deep neural networks" (links of 656 Gbit/s, two an axis). JAX's device is one of a chip's two cores, which is half of everything. The network
        between pods is not published; that of v5e is taken.
    TPU v5e: cloud.google.com/tpu/docs/v5e (197 TFLOP/s, 16 GB, 819 GB/s, 400 GB/s over both axes and directions; network of a pod of 256: 6.4 Tbit/s).
    TPU v5p: cloud.google.com/tpu/docs/v5p-training (459 TFLOP/s, 95 GiB, 2765 GB/s, 1200 GB/s over three axes and both directions, network 50 Gbit/s a chip).
    A100: NVIDIA A100 80 GB SXM data sheet (bfloat16 312, TF32 156 TFLOP/s dense, 2039 GB/s, NVLink 600 GB/s both ways; DGX A100: 200 Gbit/s a GPU).
    H100: NVIDIA H100 SXM data sheet (bfloat16 989, TF32 494 TFLOP/s dense, 3.35 TB/s, NVLink 900 GB/s both ways; DGX H100: 400 Gbit/s a GPU).
    Products of float32 are counted at the rate at which JAX does them unless told otherwise: as bfloat16 on TPUs, as TF32 on GPUs.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final

import jax
import jax.numpy as jnp
import psutil
from jax.sharding import PartitionSpec

from shoal import validate
from shoal.pod.mesh import SLOW

_TIMED_SIDE: Final = 768
_TIMED_BYTES: Final = 64 << 20
_TIMED_SUM_BYTES: Final = 2 << 20
"""Of each device."""
_TURNS: Final = 3
Clock = Callable[[], float]


@dataclass(frozen=True)
class Machine:
    """One device and its links."""

    name: str
    flops_per_s: Mapping[str, float]
    """Type -> additions and multiplications a second, in products of matrices of that type."""
    memory_bytes_per_s: float
    memory_bytes: float
    fast_bytes_per_s: float
    """What a device sends along any axis but `slow`."""
    slow_bytes_per_s: float
    """What a device sends along `slow`."""

    def __post_init__(self) -> None:
        validate.positive(
            memory_bytes_per_s=self.memory_bytes_per_s, memory_bytes=self.memory_bytes, fast_bytes_per_s=self.fast_bytes_per_s,
            slow_bytes_per_s=self.slow_bytes_per_s, **{f"flops_per_s[{name!r}]": rate for name, rate in self.flops_per_s.items()},
        )  # fmt: skip

    @classmethod
    def named(cls, name: str) -> "Machine":
        """One of `MACHINES`.

        Raises:
            ValueError: there is none of that name.
        """
        validate.one_of(MACHINES, machine=name)
        return MACHINES[name]

    @classmethod
    def measured(cls, *, slow_bytes_per_s: float | None = None, clock: Clock = time.perf_counter) -> "Machine":
        """This process's devices, all at work at once, in about a second: a product, a copy, a sum over all.

        Virtual devices of a CPU share its cores and its memory, and their links are memory. One device has no link: its memory is taken.

        Args:
            slow_bytes_per_s: of the links to other processes, which are not measured; None: like those inside.
            clock: seconds.
        """
        devices = jax.local_devices()
        num, shared = len(devices), len(devices) if devices[0].platform == "cpu" else 1
        flops = {name: _product_rate(name, devices[0], clock) / shared for name in ("float32", "bfloat16")}
        memory = _copy_rate(devices[0], clock) / shared
        link = _sum_rate(devices, clock) if num > 1 else memory
        return cls(
            f"{num} x {devices[0].device_kind}, measured", flops, memory, memory_bytes(devices[0]) / shared, link,
            link if slow_bytes_per_s is None else slow_bytes_per_s,
        )  # fmt: skip

    def math_s(self, flops: float, dtype: str) -> float:
        """Seconds that one device takes for products of a type; float16 goes like bfloat16, all that is not known like float32.

        Raises:
            ValueError: neither the type's rate is known nor float32's.
        """
        known = [
            name for name in (dtype, {"float16": "bfloat16"}.get(dtype, dtype), "float32") if name in self.flops_per_s
        ]
        if not known:
            raise ValueError(
                f"Expected a machine with a rate for {dtype}, got {self.name} with {sorted(self.flops_per_s)}. Add it to flops_per_s."
            )
        return flops / self.flops_per_s[known[0]]

    def link_s(self, along: str, wire_bytes: float) -> float:
        """Seconds that one device takes to send so much along axes (`data`, `slow+data`); what goes along `slow` among others goes at its rate."""
        return wire_bytes / (self.slow_bytes_per_s if SLOW in along.split("+") else self.fast_bytes_per_s)

    def times(self, *, flops: float, dtype: str, moved_bytes: float, wire_bytes: Mapping[str, float]) -> "Times":
        """Of one step.

        Args:
            flops: of one device.
            dtype: of its products.
            moved_bytes: between one device and its memory.
            wire_bytes: axes -> what one device sends.
        """
        links = {along: self.link_s(along, size) for along, size in wire_bytes.items() if size}
        return Times(self.math_s(flops, dtype), moved_bytes / self.memory_bytes_per_s, links)


@dataclass(frozen=True)
class Times:
    """A step's parts, in seconds, each as if alone."""

    math_s: float
    memory_s: float
    links_s: Mapping[str, float]
    """Axes -> seconds."""

    @property
    def least_s(self) -> float:
        """All at once."""
        return max(self.math_s, self.memory_s, *self.links_s.values())

    @property
    def most_s(self) -> float:
        """One after the other."""
        return self.math_s + self.memory_s + sum(self.links_s.values())

    def to_json(self) -> dict[str, Any]:
        """For machines."""
        return {
            "math_s": self.math_s, "memory_s": self.memory_s, "links_s": dict(self.links_s), "least_s": self.least_s, "most_s": self.most_s,
        }  # fmt: skip


def _accelerator(
    name: str, bfloat16: float, float32: float, memory: float, size: float, fast: float, slow: float
) -> Machine:
    return Machine(name, {"bfloat16": bfloat16, "float32": float32}, memory, size, fast, slow)


MACHINES: Final[Mapping[str, Machine]] = MappingProxyType(
    {
        machine.name: machine
        for machine in (
            _accelerator("tpu-v3", 61.5e12, 61.5e12, 450e9, 16 * 2**30, 82e9, 1.5625e9),
            _accelerator("tpu-v5e", 197e12, 197e12, 819e9, 16e9, 100e9, 3.125e9),
            _accelerator("tpu-v5p", 459e12, 459e12, 2765e9, 95 * 2**30, 200e9, 6.25e9),
            _accelerator("a100", 312e12, 156e12, 2039e9, 80e9, 300e9, 25e9),
            _accelerator("h100", 989e12, 494e12, 3350e9, 80e9, 450e9, 50e9),
        )
    }
)


def _product_rate(dtype: str, device: jax.Device, clock: Clock) -> float:
    square = jax.device_put(jnp.ones((_TIMED_SIDE, _TIMED_SIDE), dtype), device)
    product = jax.jit(jnp.matmul)
    return 2 * _TIMED_SIDE**3 / _seconds(lambda: product(square, square), clock)


def _copy_rate(device: jax.Device, clock: Clock) -> float:
    held = [jax.device_put(jnp.zeros(_TIMED_BYTES // 4, jnp.float32), device)]
    add = jax.jit(lambda values: values + jnp.float32(1), donate_argnums=0)

    def turn() -> Any:  # in place: fresh memory would be timed with what the system takes to give it
        held[0] = add(held[0])
        return held[0]

    return 2 * _TIMED_BYTES / _seconds(turn, clock)


def _sum_rate(devices: Sequence[jax.Device], clock: Clock) -> float:
    num = len(devices)
    mesh = jax.make_mesh((num,), ("all",), devices=devices)
    spec = PartitionSpec("all")
    values = jax.device_put(jnp.zeros(num * _TIMED_SUM_BYTES // 4, jnp.float32), jax.NamedSharding(mesh, spec))
    total = jax.jit(
        jax.shard_map(lambda v: jax.lax.psum(v, "all"), mesh=mesh, in_specs=spec, out_specs=PartitionSpec())
    )
    return 2 * (num - 1) / num * _TIMED_SUM_BYTES / _seconds(lambda: total(values), clock)


def _seconds(turn: Callable[[], Any], clock: Clock) -> float:
    """The shortest of some, after a first."""
    jax.block_until_ready(turn())
    taken = []
    for _ in range(_TURNS):
        begun = clock()
        jax.block_until_ready(turn())
        taken.append(clock() - begun)
    return max(min(taken), 1e-9)


def memory_bytes(device: jax.Device) -> float:
    """Of a device; of a CPU the machine's."""
    stats = device.memory_stats()
    if stats and "bytes_limit" in stats:
        return float(stats["bytes_limit"])
    return float(psutil.virtual_memory().total)
