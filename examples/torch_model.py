"""A PyTorch module, trained on devices that have no PyTorch, and back in PyTorch at the end.

    python examples/torch_model.py
    shoal simulate examples/torch_model.py --data name:digits --users 20 --rounds 20
    shoal host examples/torch_model.py --rounds 20 --port 7070 --run runs/torch

Needs the extra torch (pip install 'shoal[torch]') here, where the task is made, and on no device: what is sent to devices are programs. The
net is the CNN by which simulators of federated learning are compared, for pictures of 8x8 with fewer channels: convolutions, pooling, dropout,
and batch norm, whose statistics heed the padding of a device's last batch. At the end the trained weights are loaded into
the module by their names, and PyTorch itself says how many of the pictures held out it tells right; guessing is right for one in ten.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import optax
import torch
from torch import nn

import shoal


class Net(nn.Module):
    """Picture (B, 8, 8, 1) between 0 and 1 in, a score for each digit out."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
            nn.Conv2d(16, 32, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Dropout(0.25),
        )  # fmt: skip
        self.classifier = nn.Sequential(nn.Linear(32 * 3 * 3, 64), nn.ReLU(), nn.Dropout(0.5), nn.Linear(64, 10))

    def forward(self, image: Any) -> Any:
        return self.classifier(self.features(image.permute(0, 3, 1, 2)).flatten(1))


def task_for(module: nn.Module) -> shoal.Task:
    """The task whose first weights are the module's."""
    return shoal.Task.from_torch(
        module,
        name="torch-digits",
        loss=nn.CrossEntropyLoss(),
        batch={"image": ((8, 8, 1), "uint8"), "label": ((), "int32")},
        local=shoal.Local(optimizer=optax.sgd(0.05, momentum=0.9), batch_size=16),
        rounds=shoal.RoundPolicy(goal=8),
        about=shoal.About(
            purpose="Tell handwritten digits.",
            data="Digits of 8x8 (scikit-learn), dealt out to 20 made users unequally.",
            licence="Apache-2.0, like shoal; the data: BSD.",
            limits="Made users: nobody's handwriting.",
        ),
    )


torch.manual_seed(0)
task = task_for(Net())


def run(*, rounds: int = 20) -> tuple[float, float]:
    """What share of the pictures held out PyTorch tells right, before and after."""
    digits = shoal.data.load("digits")
    rng = np.random.default_rng(0)
    split = shoal.data.dirichlet(digits.train.fields["label"], 20, alpha=1.0, rng=rng)
    net = Net()
    before = right(net, digits.test)
    with tempfile.TemporaryDirectory() as folder:
        run_folder, weights = Path(folder) / "run", Path(folder) / "model.safetensors"
        devices = shoal.data.Population.from_split(digits.train, split)
        shoal.simulate(task_for(net), devices, rounds=rounds, folder=run_folder)
        shoal.load(run_folder).save(weights, bare=True)
        load_into(net, weights)
    return before, right(net, digits.test)


def load_into(net: nn.Module, weights: Path) -> None:
    """Weights by their names, every one of them."""
    from safetensors.torch import load_file

    net.load_state_dict(load_file(weights))


def right(net: nn.Module, examples: shoal.data.Examples) -> float:
    """The share of examples that the module tells right, by PyTorch."""
    with torch.no_grad():
        scores = net.eval()(torch.tensor(examples.fields["image"]).float() / 255)
    return float((scores.argmax(1).numpy() == examples.fields["label"]).mean())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--rounds", type=int, default=20)
    before, after = run(rounds=parser.parse_args().rounds)
    print(f"told right by PyTorch: {before:.3f} before, {after:.3f} after training on devices without PyTorch")
