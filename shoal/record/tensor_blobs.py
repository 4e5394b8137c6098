"""Named tensors as blobs: one blob a tensor, and the index that names them.

Equal tensors are one blob, so a line whose tables or frozen leaves do not change keeps them once.
"""

from collections.abc import Iterable, Mapping

import numpy as np

from shoal.record.store import Blobs
from shoal.tensors import Entry, Index, Tensors, TensorSpec, specs_of, to_bytes


def put_tensors(blobs: Blobs, tensors: Mapping[str, np.ndarray], specs: Iterable[TensorSpec] | None = None) -> Index:
    """Writes tensors, durably, and returns their index; the index itself goes into the commit.

    Args:
        blobs: Where to.
        tensors: Name -> array.
        specs: Kinds and ranks to keep in the index, in its order; without them the arrays' own shapes and types.
    """
    chosen = specs_of(tensors) if specs is None else tuple(specs)
    hashes = blobs.put_all([to_bytes(tensors[spec.name]) for spec in chosen])
    return Index(tuple(Entry(spec, hash) for spec, hash in zip(chosen, hashes, strict=True)))


def view_tensors(blobs: Blobs, index: Index) -> Tensors:
    """The tensors of an index, memory-mapped where the store is on disk; read-only, hashes not checked again."""
    return {entry.spec.name: blobs.view(entry.hash, entry.spec) for entry in index}
