"""What devices hold: examples, populations, splits, blocks, files, real data sets by name. No JAX here."""

from shoal.data.batch import Block, Blocks, num_blocks, num_steps
from shoal.data.cache import cache_folder
from shoal.data.disk import open_population, write_population
from shoal.data.example_store import ExampleStore
from shoal.data.federated import Federated, federated_names, leave_out, load_federated
from shoal.data.folders import open_folders
from shoal.data.load import Dataset, load, load_first
from shoal.data.rows import from_dataset, from_hugging_face
from shoal.data.split import Split, by_user, dirichlet, holdout, iid, shards
from shoal.data.store import Examples, Population, Spec

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
