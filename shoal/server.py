"""Server rules to choose from: `Task(..., server=shoal.server.adam(1e-2))`.

Each is data (a `ServerRule`); the same rule gives the same bits on every machine. Any optax transformation may be
passed in its place, which then travels as a program of the plan.
"""

from shoal.policy import ServerRule


def sgd(learning_rate: float = 1.0, *, momentum: float = 0.0) -> ServerRule:
    """FedAvg (McMahan et al. 2017, algorithm 1) at learning rate 1; FedAvgM with momentum (Hsu et al. 2019)."""
    return ServerRule(kind="sgd", learning_rate=learning_rate, momentum=momentum)


def adagrad(learning_rate: float, *, b1: float = 0.9, eps: float = 1e-3) -> ServerRule:
    """FedAdagrad (Reddi et al. 2021, algorithm 2)."""
    return ServerRule(kind="adagrad", learning_rate=learning_rate, b1=b1, eps=eps)


def adam(learning_rate: float, *, b1: float = 0.9, b2: float = 0.99, eps: float = 1e-3) -> ServerRule:
    """FedAdam (Reddi et al. 2021, algorithm 2); no bias correction, as in the paper."""
    return ServerRule(kind="adam", learning_rate=learning_rate, b1=b1, b2=b2, eps=eps)


def yogi(learning_rate: float, *, b1: float = 0.9, b2: float = 0.99, eps: float = 1e-3) -> ServerRule:
    """FedYogi (Reddi et al. 2021, algorithm 2)."""
    return ServerRule(kind="yogi", learning_rate=learning_rate, b1=b1, b2=b2, eps=eps)
