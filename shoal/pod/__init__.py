"""A task on a mesh of accelerators; see README.md."""

from shoal.pod.loss_scaling import LossScaling
from shoal.pod.mesh import MeshSpec
from shoal.pod.trainer import Progress, Trainer, Version

__all__ = ["LossScaling", "MeshSpec", "Progress", "Trainer", "Version"]
