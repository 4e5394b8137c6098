"""A task on a mesh of accelerators; see README.md.

Loaded when first used (PEP 562): a supervisor of workers imports no JAX.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from shoal.pod.loss_scaling import LossScaling
    from shoal.pod.mesh import MeshSpec
    from shoal.pod.servers.trainer import ServerTrainer
    from shoal.pod.trainer import Trainer
    from shoal.pod.training import Progress, Version, Watch

_HOMES: Final = {
    "LossScaling": "shoal.pod.loss_scaling",
    "MeshSpec": "shoal.pod.mesh",
    "Progress": "shoal.pod.training",
    "ServerTrainer": "shoal.pod.servers.trainer",
    "Trainer": "shoal.pod.trainer",
    "Version": "shoal.pod.training",
    "Watch": "shoal.pod.training",
}

__all__ = ["LossScaling", "MeshSpec", "Progress", "ServerTrainer", "Trainer", "Version", "Watch"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'shoal.pod' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
