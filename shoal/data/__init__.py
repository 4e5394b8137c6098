"""What devices hold: examples, populations, splits, blocks, files, real data sets by name. No JAX here.

What one of them needs is loaded when it is first used (PEP 562): a device that reads its own files loads no catalogue.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from shoal.data.batch import Block, Blocks, num_blocks, num_steps
    from shoal.data.cache import cache_folder
    from shoal.data.disk import open_population, write_population
    from shoal.data.example_store import ExampleStore
    from shoal.data.federated import Federated, federated_names, leave_out, load_federated
    from shoal.data.folders import open_folders
    from shoal.data.loading import Dataset, load, load_first
    from shoal.data.rows import from_dataset, from_hugging_face
    from shoal.data.split import Split, by_user, dirichlet, holdout, iid, shards
    from shoal.data.store import Examples, Population, Spec

_HOMES: Final = {
    "Block": "shoal.data.batch",
    "Blocks": "shoal.data.batch",
    "Dataset": "shoal.data.loading",
    "ExampleStore": "shoal.data.example_store",
    "Examples": "shoal.data.store",
    "Federated": "shoal.data.federated",
    "Population": "shoal.data.store",
    "Spec": "shoal.data.store",
    "Split": "shoal.data.split",
    "by_user": "shoal.data.split",
    "cache_folder": "shoal.data.cache",
    "dirichlet": "shoal.data.split",
    "federated_names": "shoal.data.federated",
    "from_dataset": "shoal.data.rows",
    "from_hugging_face": "shoal.data.rows",
    "holdout": "shoal.data.split",
    "iid": "shoal.data.split",
    "leave_out": "shoal.data.federated",
    "load": "shoal.data.loading",
    "load_federated": "shoal.data.federated",
    "load_first": "shoal.data.loading",
    "num_blocks": "shoal.data.batch",
    "num_steps": "shoal.data.batch",
    "open_folders": "shoal.data.folders",
    "open_population": "shoal.data.disk",
    "shards": "shoal.data.split",
    "write_population": "shoal.data.disk",
}

__all__ = [
    "Block",
    "Blocks",
    "Dataset",
    "ExampleStore",
    "Examples",
    "Federated",
    "Population",
    "Spec",
    "Split",
    "by_user",
    "cache_folder",
    "dirichlet",
    "federated_names",
    "from_dataset",
    "from_hugging_face",
    "holdout",
    "iid",
    "leave_out",
    "load",
    "load_federated",
    "load_first",
    "num_blocks",
    "num_steps",
    "open_folders",
    "open_population",
    "shards",
    "write_population",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'shoal.data' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
