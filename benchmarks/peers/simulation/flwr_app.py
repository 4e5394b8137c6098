"""What a client of Flower does. Importable by name, or Ray would send its globals with every message."""

import functools
import os
from pathlib import Path

import torch
import torch_nets
from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from benchmarks import simulation_common as common

client = ClientApp()


@functools.cache
def data(config: str) -> common.Data:
    """Mapped once in each worker; where from is in the environment, which Ray hands on."""
    torch.set_num_threads(1)
    return common.load_data(Path(os.environ["SIMULATION_DATA"]), config)


@client.train()
def train(message, context):
    config = os.environ["SIMULATION_CONFIG"]
    held, user = data(config), int(context.node_config["partition-id"])
    net = torch_nets.net(config)
    net.load_state_dict(message.content["arrays"].to_torch_state_dict())
    net.train()
    optimizer = torch.optim.SGD(net.parameters(), common.local_rate(config))
    x, y = torch_nets.tensor(held.x[user], config), torch.from_numpy(held.y[user]).long()
    for first in range(0, common.EACH, common.BATCH):
        optimizer.zero_grad()
        torch_nets.loss(net, config, x[first : first + common.BATCH], y[first : first + common.BATCH]).backward()
        optimizer.step()
    reply = {"arrays": ArrayRecord(net.state_dict()), "metrics": MetricRecord({"num-examples": common.EACH})}
    return Message(content=RecordDict(reply), reply_to=message)
