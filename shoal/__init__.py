"""shoal: one system for a model's whole life, wherever its data and machines are.

Write a `Task` once; train it on simulated devices (`simulate`), on a fleet that keeps its data (`shoal host`, `shoal
device`), or on a mesh. Importing shoal starts nothing: names are loaded when first used (PEP 562).
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from shoal import data, errors, record, server, testing
    from shoal.aggregate.statistics import Measure
    from shoal.algorithms.compression import compressed
    from shoal.algorithms.diloco import diloco
    from shoal.algorithms.ditto import ditto
    from shoal.algorithms.fedprox import fedprox
    from shoal.algorithms.measured import measured
    from shoal.algorithms.per_fedavg import per_fedavg
    from shoal.algorithms.reptile import reptile
    from shoal.algorithms.scaffold import scaffold
    from shoal.api import Model, load, read_statistics, simulate
    from shoal.clip_norm import AdaptiveClip
    from shoal.local import LocalRule, Report
    from shoal.policy import (
        About,
        Correlated,
        ExamplePrivacy,
        Late,
        Privacy,
        RoundPolicy,
        Secure,
        Selection,
        ServerRule,
    )
    from shoal.stop_when import StopWhen
    from shoal.task import Local, Loss, Sum, Task, Variables
    from shoal.task_evaluation import evaluation
    from shoal.task_statistics import statistics
    from shoal.weights import from_safetensors, to_safetensors

_HOMES = {
    "About": "shoal.policy",
    "AdaptiveClip": "shoal.clip_norm",
    "ExamplePrivacy": "shoal.policy",
    "Late": "shoal.policy",
    "Local": "shoal.task",
    "LocalRule": "shoal.local",
    "Loss": "shoal.task",
    "Measure": "shoal.aggregate.statistics",
    "Model": "shoal.api",
    "Privacy": "shoal.policy",
    "Report": "shoal.local",
    "RoundPolicy": "shoal.policy",
    "Correlated": "shoal.policy",
    "Secure": "shoal.policy",
    "Selection": "shoal.policy",
    "ServerRule": "shoal.policy",
    "StopWhen": "shoal.stop_when",
    "Sum": "shoal.task",
    "Task": "shoal.task",
    "Variables": "shoal.task",
    "compressed": "shoal.algorithms.compression",
    "diloco": "shoal.algorithms.diloco",
    "ditto": "shoal.algorithms.ditto",
    "evaluation": "shoal.task_evaluation",
    "fedprox": "shoal.algorithms.fedprox",
    "from_safetensors": "shoal.weights",
    "load": "shoal.api",
    "measured": "shoal.algorithms.measured",
    "per_fedavg": "shoal.algorithms.per_fedavg",
    "read_statistics": "shoal.api",
    "reptile": "shoal.algorithms.reptile",
    "scaffold": "shoal.algorithms.scaffold",
    "simulate": "shoal.api",
    "statistics": "shoal.task_statistics",
    "to_safetensors": "shoal.weights",
}
_MODULES = ("data", "errors", "record", "server", "testing")

__all__ = [
    "About",
    "AdaptiveClip",
    "Correlated",
    "ExamplePrivacy",
    "Late",
    "Local",
    "LocalRule",
    "Loss",
    "Measure",
    "Model",
    "Privacy",
    "Report",
    "RoundPolicy",
    "Secure",
    "Selection",
    "ServerRule",
    "StopWhen",
    "Sum",
    "Task",
    "Variables",
    "__version__",
    "compressed",
    "data",
    "diloco",
    "ditto",
    "errors",
    "evaluation",
    "fedprox",
    "from_safetensors",
    "load",
    "measured",
    "per_fedavg",
    "read_statistics",
    "record",
    "reptile",
    "scaffold",
    "server",
    "simulate",
    "statistics",
    "testing",
    "to_safetensors",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    if name in _MODULES:
        return import_module(f"shoal.{name}")
    raise AttributeError(f"module 'shoal' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
