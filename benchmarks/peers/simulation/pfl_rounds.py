"""Rounds of pfl. Workers: run once for each rank with PFL_WORKER_ADDRESSES and PFL_WORKER_RANK; rank 0 tells."""

import os
import random
import types

import numpy as np
import torch
import torch_nets
from pfl.aggregate.simulate import SimulatedBackend
from pfl.aggregate.weighting import WeightByUser
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.callback.base import TrainingProcessCallback
from pfl.data import FederatedDataset, get_user_sampler
from pfl.hyperparam import NNEvalHyperParams, NNTrainHyperParams
from pfl.metrics import Metrics, Weighted
from pfl.model.pytorch import PyTorchModel

from benchmarks import simulation_common as common


class Rounds(TrainingProcessCallback):
    """Ends each round at the pace; with two workers both are told to stop by the number of rounds."""

    def __init__(self, pace: common.Pace, loss, leads: bool) -> None:
        self.pace, self.loss, self.leads = pace, loss, leads

    def after_central_iteration(self, aggregate_metrics, model, *, central_iteration):
        if self.leads:
            self.pace.round(self.loss)
        return False, Metrics()


def main() -> None:
    given = common.parse()
    rank, workers = int(os.environ.get("PFL_WORKER_RANK", "0")), os.environ.get("PFL_WORKER_ADDRESSES", "")
    torch.set_num_threads(1 if workers else 2)
    random.seed(given.seed), np.random.seed(given.seed), torch.manual_seed(given.seed + 1000 * rank)
    config, data = given.config, common.load_data(given.data, given.config)
    users = [(torch_nets.tensor(data.x[u], config), torch.from_numpy(data.y[u]).long()) for u in range(common.USERS)]
    central = torch_nets.tensor(data.central_x, config), torch.from_numpy(data.central_y).long()
    net = torch_nets.net(config)
    torch_nets.load(net, config, data.weights)

    def loss(self, x, y, eval=False):
        self.eval() if eval else self.train()
        return torch_nets.loss(self, config, x, y)

    def metrics(self, x, y, eval=True):
        return {"examples": Weighted(0.0, len(x))}

    net.loss, net.metrics = types.MethodType(loss, net), types.MethodType(metrics, net)
    dataset = FederatedDataset.from_slices(users, get_user_sampler("random", range(common.USERS)))
    pace = common.Pace(given)
    rounds = Rounds(pace, lambda: torch_nets.central_loss(net, config, *central), leads=rank == 0)
    model = PyTorchModel(net, torch.optim.SGD, torch.optim.SGD(net.parameters(), common.SERVER_RATE))
    pace.begin(rounds.loss)
    FederatedAveraging().run(
        NNAlgorithmParams(
            central_num_iterations=given.rounds,
            evaluation_frequency=10**9,
            train_cohort_size=common.COHORT,
            val_cohort_size=None,
        ),
        SimulatedBackend(dataset, dataset, postprocessors=[WeightByUser()]),
        model,
        NNTrainHyperParams(
            local_num_epochs=1, local_learning_rate=common.local_rate(config), local_batch_size=common.BATCH
        ),
        NNEvalHyperParams(local_batch_size=10_000),
        callbacks=[rounds],
    )
    if rank == 0:
        pace.finish()


if __name__ == "__main__":
    main()
