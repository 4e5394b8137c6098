"""The nets of the benchmark in PyTorch, for the rivals that train PyTorch modules."""

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from benchmarks.simulation_common import CLASSES, NETS, NO_OP, Weights, sides


class One(nn.Module):
    """One parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.square(self.w - x)


def net(config: str) -> nn.Module:
    """The module; images are batch, channels, height, width."""
    if config == NO_OP:
        return One()
    shape, layers, channels = NETS[config], [], 3
    for number, (kernel, out) in enumerate(shape.convolutions):
        layers += [nn.Conv2d(channels, out, kernel), nn.ReLU()]
        if shape.pool_each or number == len(shape.convolutions) - 1:
            layers.append(nn.MaxPool2d(2))
        channels = out
    if shape.dropout:
        layers.append(nn.Dropout(shape.dropout[0]))
    layers.append(nn.Flatten())
    side, channels = sides(shape)
    wide = side * side * channels
    for out in shape.hidden:
        layers += [nn.Linear(wide, out), nn.ReLU()]
        wide = out
    if shape.dropout:
        layers.append(nn.Dropout(shape.dropout[1]))
    return nn.Sequential(*layers, nn.Linear(wide, CLASSES))


def load(module: nn.Module, config: str, weights: Weights) -> None:
    """Puts the initial weights in, their layout converted."""
    if config == NO_OP:
        module.w.data = torch.from_numpy(weights["w"].copy())
        return
    layers = [layer for layer in module if isinstance(layer, (nn.Conv2d, nn.Linear))]
    names = [f"conv{i}" for i in range(len(NETS[config].convolutions))]
    names += [f"dense{i}" for i in range(len(layers) - len(names))]
    for name, layer in zip(names, layers, strict=True):
        kernel = weights[f"{name}/kernel"]
        if kernel.ndim == 4:
            kernel = kernel.transpose(3, 2, 0, 1)
        else:
            if name == "dense0":  # its inputs are flattened images: from height, width, channels to channels first
                side, channels = sides(NETS[config])
                kernel = kernel.reshape(side, side, channels, -1).transpose(2, 0, 1, 3).reshape(kernel.shape)
            kernel = kernel.T
        layer.weight.data = torch.from_numpy(np.ascontiguousarray(kernel))
        layer.bias.data = torch.from_numpy(weights[f"{name}/bias"].copy())


def tensor(x: np.ndarray, config: str) -> torch.Tensor:
    """Examples as a tensor, images with channels first."""
    return torch.from_numpy(np.array(x if config == NO_OP else np.moveaxis(x, -1, -3), order="C"))


def loss(module: nn.Module, config: str, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """The mean loss of a batch."""
    made = module(x)
    return made.mean() if config == NO_OP else F.cross_entropy(made, y)


@torch.no_grad()
def central_loss(module: nn.Module, config: str, x: torch.Tensor, y: torch.Tensor) -> float:
    """The mean loss without dropout."""
    module.eval()
    return float(loss(module, config, x, y))
