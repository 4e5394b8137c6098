"""The mesh: which accelerators there are, in axes with names, and which of these split the batch.

``data=4,model=2`` is eight devices. The axes `data` and `slow` are the *members*: each has a part of the batch, and gradients are
summed over them. `slow` is the outer one, for the links between pods or hosts; what goes over it is as little as can be
(`collectives.py`). All other axes split tensors, by the rules of `rules.py`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Final, Self

import jax
import numpy as np

DATA: Final = "data"
SLOW: Final = "slow"
MEMBER_AXES: Final = (SLOW, DATA)
"""In the order in which they count members."""


@dataclass(frozen=True)
class MeshSpec:
    """Axes and their sizes, those of the members first."""

    sizes: Mapping[str, int]

    @classmethod
    def parse(cls, text: str) -> Self:
        """Reads ``data=4,model=2``; an axis of size 1 may be named.

        Raises:
            ValueError: it is not written so, or an axis is named twice.
        """
        sizes: dict[str, int] = {}
        for part in text.split(","):
            name, equals, number = (word.strip() for word in part.partition("="))
            if not (equals and name.isidentifier() and number.isascii() and number.isdigit() and int(number) > 0):
                raise ValueError(
                    f"Expected --mesh NAME=SIZE,…, such as data=4,model=2, got {text!r}: {part.strip()!r}."
                )
            if name in sizes:
                raise ValueError(f"Expected each axis of --mesh once, got {name!r} twice in {text!r}.")
            sizes[name] = int(number)
        members = [name for name in MEMBER_AXES if name in sizes]
        return cls({name: sizes[name] for name in (*members, *(n for n in sizes if n not in MEMBER_AXES))})

    def __str__(self) -> str:
        return ",".join(f"{name}={size}" for name, size in self.sizes.items())

    @property
    def member_axes(self) -> tuple[str, ...]:
        """Those that split the batch, the outer one first."""
        return tuple(name for name in MEMBER_AXES if name in self.sizes)

    @property
    def num_members(self) -> int:
        """Parts of the batch."""
        return prod(self.sizes[name] for name in self.member_axes)

    @property
    def num_devices(self) -> int:
        """Of all axes."""
        return prod(self.sizes.values())

    def fitted(self, num_devices: int, num_processes: int) -> "MeshSpec":
        """The same with as many members as there are devices for: a pod whose processes come and go. `slow` is one for each process.

        Raises:
            ValueError: its other axes do not divide the devices.
        """
        slow = num_processes if SLOW in self.sizes else 1
        others = prod(size for name, size in self.sizes.items() if name not in MEMBER_AXES)
        if num_devices % (slow * others):
            raise ValueError(
                f"Expected devices that the axes of {self} divide, got {num_devices} in {num_processes} processes."
            )
        members = {SLOW: slow} if SLOW in self.sizes else {}
        sizes = members | {DATA: num_devices // (slow * others)}
        return MeshSpec(sizes | {name: size for name, size in self.sizes.items() if name not in MEMBER_AXES})

    def size(self, *names: str) -> int:
        """Devices along these axes together."""
        return prod(self.sizes[name] for name in names)

    def build(self, devices: Sequence[jax.Device] | None = None) -> jax.sharding.Mesh:
        """The mesh, on these devices or all there are. Neighbours along the last axes are neighbours in `devices`.

        Raises:
            ValueError: there are not just so many.
        """
        devices = jax.devices() if devices is None else devices
        if len(devices) != self.num_devices:
            raise ValueError(
                f"Expected a mesh of {len(devices)} devices, which is what there is ({devices[0].platform}), got {self}, which has "
                f"{self.num_devices}. (On a CPU JAX_NUM_CPU_DEVICES={self.num_devices} makes so many.)"
            )
        grid = np.asarray(devices, dtype=object).reshape(tuple(self.sizes.values()))
        types = (jax.sharding.AxisType.Auto,) * grid.ndim
        return jax.sharding.Mesh(grid, tuple(self.sizes), axis_types=types)
