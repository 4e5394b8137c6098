"""The algorithms of the `accuracy` benchmark: a row each, with what its paper claims beside federated averaging.

A row is made of a task by federated averaging. Its settings are those of its grid, among them `rate`, the devices' learning
rate as a multiple of the problem's. To add an algorithm, add a row.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final, Literal

import shoal
from benchmarks.accuracy_problems import Problem
from shoal.policy import Late, RoundPolicy
from shoal.task import Task

Setting = Mapping[str, float]
Measure = Literal["quality", "rounds", "reached", "seconds"]
"""Final quality centrally; rounds to the target; final quality on devices after their local training; virtual seconds to the
target on a fleet."""
Claim = Literal["better", "as good", "nothing"]

FEDAVG: Final = "FedAvg"


@dataclass(frozen=True, kw_only=True)
class Algorithm:
    """One row."""

    name: str
    make: Callable[..., Task] = lambda task, problem: task
    """(task, problem, **setting but for `rate`) -> task."""
    grid: Mapping[str, Sequence[float]] = field(default_factory=dict)
    """Settings beside the rate, each with the values that are tried."""
    rates: Sequence[float] = (0.3, 1.0, 3.0)
    paper: str = ""
    claims: Claim = "better"
    measure: Measure = "quality"
    """What the claim is about, and what settings are chosen by."""
    beside: str = FEDAVG
    """The row that the claim is about."""
    versus: Measure | Literal["sent"] | None = None
    """What of that row is compared with; None: the same measure."""
    where: str = ""
    """The problems that the claim is about: those whose name has this."""
    is_personal: bool = False
    """Whether the server's model is only a part: it has no quality of its own."""
    is_in_fleet: bool = False
    """Whether it is run in a virtual fleet of very different speeds, where virtual time is measured and nothing else."""

    def settings(self) -> list[dict[str, float]]:
        """Those that are tried."""
        axes = {"rate": self.rates, **self.grid}
        return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]

    def task(self, problem: Problem, setting: Setting) -> Task:
        """The problem's task by this algorithm."""
        rest = {name: value for name, value in setting.items() if name != "rate"}
        return self.make(problem.make(problem.rate * setting["rate"]), problem, **rest)


def _fednova(task: Task, problem: Problem) -> Task:
    return task.replace(local=replace(task.local, partial="fednova"))


def _private(task: Task, problem: Problem) -> Task:
    return task.replace(leaves={problem.private: "private"})


def _adaptive(rule: Callable[..., Any]) -> Callable[..., Task]:
    return lambda task, problem, server_rate: task.replace(server=rule(server_rate))


def _fedprox(task: Task, problem: Problem, mu: float) -> Task:
    return shoal.fedprox(task, mu=mu)


def _scaffold(task: Task, problem: Problem) -> Task:
    return shoal.scaffold(task, devices=problem.users)


def _ditto(task: Task, problem: Problem, lam: float) -> Task:
    return shoal.ditto(task, lam=lam)


def _reptile(task: Task, problem: Problem, step: float) -> Task:
    return shoal.reptile(task, step=step)


def _per_fedavg(task: Task, problem: Problem, alpha: float) -> Task:
    """Alpha is a multiple of the problem's rate."""
    return shoal.per_fedavg(task, alpha=alpha * problem.rate)


def _lora(task: Task, problem: Problem, rank: float) -> Task:
    return task.replace(leaves={problem.lora: f"lora({rank:.0f})"})


def _int8(task: Task, problem: Problem) -> Task:
    return shoal.compressed(task, "int8")


def _top_k(task: Task, problem: Problem) -> Task:
    return shoal.compressed(task, "top_k", share=0.1)


def _in_a_fleet(task: Task, problem: Problem) -> Task:
    """Rounds of 60 devices at once; the slowest are not waited for."""
    return task.replace(rounds=RoundPolicy(goal=46, over_selection=1.3, adaptive=False))


def _fedbuff(task: Task, problem: Problem, server_rate: float) -> Task:
    """60 devices at once, a version for every ten updates."""
    late = Late.discount(1.0, max_staleness=20)
    rounds = RoundPolicy(goal=10, buffer=10, concurrency=60, minimum_fraction=1.0, late=late)
    return task.replace(rounds=rounds, server=shoal.server.sgd(server_rate))


SERVER_RATES: Final = {"server_rate": (0.01, 0.03, 0.1)}
FLEET: Final = f"{FEDAVG} in a fleet"
FINE_TUNED: Final = f"{FEDAVG}, fine-tuned"

ALGORITHMS: Final[tuple[Algorithm, ...]] = (
    Algorithm(name=FEDAVG, paper="McMahan et al. 2017"),
    Algorithm(
        name="FedAdagrad", make=_adaptive(shoal.server.adagrad), grid=SERVER_RATES, rates=(0.3, 1.0),
        paper="Reddi et al. 2021", where="MovieLens",
    ),
    Algorithm(
        name="FedAdam", make=_adaptive(shoal.server.adam), grid=SERVER_RATES, rates=(0.3, 1.0), paper="Reddi et al. 2021",
    ),
    Algorithm(
        name="FedYogi", make=_adaptive(shoal.server.yogi), grid=SERVER_RATES, rates=(0.3, 1.0), paper="Reddi et al. 2021",
    ),
    Algorithm(name="FedNova", make=_fednova, paper="Wang et al. 2020", where="Dirichlet"),
    Algorithm(name=FINE_TUNED, measure="reached", versus="sent", paper="Yu et al. 2020, Salvaging federated learning"),
    Algorithm(
        name="private leaves", make=_private, measure="reached", versus="sent", is_personal=True,
        paper="Arivazhagan et al. 2019, FedPer; FedBN (Li et al. 2021) where they are statistics",
    ),
    Algorithm(name="FedProx", make=_fedprox, grid={"mu": (0.01, 0.1)}, paper="Li et al. 2020", where="Dirichlet 0.1"),
    Algorithm(name="SCAFFOLD", make=_scaffold, measure="rounds", paper="Karimireddy et al. 2020", where="Dirichlet"),
    Algorithm(
        name="Ditto", make=_ditto, grid={"lam": (0.1, 1.0)}, rates=(1.0, 3.0), measure="reached", versus="sent",
        paper="Li et al. 2021",
    ),
    Algorithm(
        name="Reptile", make=_reptile, grid={"step": (0.5,)}, rates=(1.0, 3.0), measure="reached", claims="nothing",
        paper="Nichol et al. 2018",
    ),
    Algorithm(
        name="Per-FedAvg", make=_per_fedavg, grid={"alpha": (0.3, 1.0)}, rates=(1.0, 3.0), measure="reached", beside=FINE_TUNED,
        paper="Fallah et al. 2020", where="Dirichlet",
    ),
    Algorithm(name="LoRA", make=_lora, grid={"rank": (4,)}, claims="nothing", paper="Hu et al. 2022, for models that know much"),
    Algorithm(name="int8", make=_int8, claims="as good", paper="Alistarh et al. 2017, QSGD"),
    Algorithm(name="top-k, a tenth", make=_top_k, claims="as good", paper="Karimireddy et al. 2019, error feedback"),
    Algorithm(
        name=FLEET, make=_in_a_fleet, is_in_fleet=True, claims="nothing", measure="seconds", rates=(1.0, 3.0), paper="McMahan et al. 2017",
    ),
    Algorithm(
        name="FedBuff", make=_fedbuff, is_in_fleet=True, measure="seconds", beside=FLEET, rates=(1.0, 3.0), grid={"server_rate": (0.3, 0.6)},
        paper="Nguyen et al. 2022",
    ),
)  # fmt: skip
