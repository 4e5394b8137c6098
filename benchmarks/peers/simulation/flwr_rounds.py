"""Rounds of Flower's simulation: two workers of one thread each."""

import os
import random

import flwr_app
import torch
import torch_nets
from flwr.app import ArrayRecord, MetricRecord
from flwr.serverapp import ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation

from benchmarks import simulation_common as common


def main() -> None:
    given = common.parse()
    config, data = given.config, common.load_data(given.data, given.config)
    os.environ |= {"SIMULATION_DATA": str(given.data.resolve()), "SIMULATION_CONFIG": config}
    random.seed(given.seed), torch.manual_seed(given.seed)
    central = torch_nets.tensor(data.central_x, config), torch.from_numpy(data.central_y).long()
    net = torch_nets.net(config)
    torch_nets.load(net, config, data.weights)
    pace, server = common.Pace(given), ServerApp()

    def loss(arrays: ArrayRecord) -> float:
        net.load_state_dict(arrays.to_torch_state_dict())
        return torch_nets.central_loss(net, config, *central)

    def ended(number: int, arrays: ArrayRecord) -> MetricRecord | None:
        if number:
            pace.round(lambda: loss(arrays))
        else:
            pace.begin(lambda: loss(arrays))

    @server.main()
    def serve(grid, context):
        strategy = FedAvg(
            fraction_train=common.COHORT / common.USERS,
            fraction_evaluate=0.0,
            min_train_nodes=common.COHORT,
            min_available_nodes=common.USERS,
        )
        strategy.start(
            grid=grid, initial_arrays=ArrayRecord(net.state_dict()), num_rounds=given.rounds, evaluate_fn=ended
        )

    resources = {"init_args": {"num_cpus": 2}, "client_resources": {"num_cpus": 1, "num_gpus": 0.0}}
    run_simulation(server, flwr_app.client, num_supernodes=common.USERS, backend_config=resources)
    pace.finish()


if __name__ == "__main__":
    main()
