"""The task of `shoal demo`, to run by hand: Fashion-MNIST on devices that keep their pictures.

    shoal check examples/fashion.py --data name:fashion-mnist
    shoal simulate examples/fashion.py --data name:fashion-mnist --split dirichlet:0.3 --rounds 10
    python examples/fashion.py

The net and its settings are in `shoal/cli/demo_task.py`, because the demo runs where there is no folder of examples.
"""

import numpy as np

import shoal
from shoal.cli.demo_task import Net, task

__all__ = ["Net", "task"]


if __name__ == "__main__":
    found = shoal.data.load("fashion-mnist")
    split = shoal.data.dirichlet(found.train.fields["label"], 100, alpha=0.3, rng=np.random.default_rng(0))
    shoal.simulate(
        task,
        shoal.data.Population.from_split(found.train, split),
        rounds=10,
        held_out=found.test,
        on_round=lambda result: print(f"version {result.version}: accuracy {result.metrics['accuracy']:.3f}"),
    )
