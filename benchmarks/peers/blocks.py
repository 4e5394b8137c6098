"""Mt-KaHyPar's blocks, in its own environment: blocks.py GIVEN PRESET MADE THREADS.

GIVEN: an .npz with `indptr`, `ids`, `rows` and `per_block`. Says `ready` when its input is built; MADE gets `block_of`, (rows,) int64, and
`seconds` of the partitioning alone.
"""

import sys
import time
from itertools import pairwise

import mtkahypar
import numpy as np


def main(given: str, preset: str, made: str, threads: str) -> None:
    with np.load(given) as file:
        indptr, ids, rows, per_block = file["indptr"], file["ids"], int(file["rows"]), int(file["per_block"])
    seen = np.flatnonzero(np.bincount(ids, minlength=rows))
    local = np.full(rows, -1, np.int64)
    local[seen] = np.arange(len(seen))
    queries = [np.unique(local[ids[a:b]]).tolist() for a, b in pairwise(indptr)]
    edges = [query for query in queries if len(query) > 1]
    machine = mtkahypar.initialize(int(threads))
    mtkahypar.set_seed(0)
    settings = machine.context_from_preset(getattr(mtkahypar.PresetType, preset))
    settings.set_partitioning_parameters(-(-len(seen) // per_block), 0.0, mtkahypar.Objective.KM1)
    settings.logging = False
    graph = machine.create_hypergraph(settings, len(seen), len(edges), edges)
    print("ready", flush=True)
    begun = time.perf_counter()
    found = graph.partition(settings)
    seconds = time.perf_counter() - begun
    block_of = np.zeros(rows, np.int64)
    block_of[seen] = [found.block_id(vector) for vector in range(len(seen))]
    np.savez(made, block_of=block_of, seconds=seconds)


if __name__ == "__main__":
    main(*sys.argv[1:])
