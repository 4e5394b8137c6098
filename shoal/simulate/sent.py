"""A version as members of a simulation start from it: rounded as a fleet's devices are sent it."""

import numpy as np

from shoal.codec.rounding import rounded
from shoal.plan.manifest import Manifest
from shoal.record.store import Blobs
from shoal.record.tensor_blobs import view_tensors
from shoal.tensors import Index, Tensors


def model_as_sent(blobs: Blobs, model: Index, manifest: Manifest) -> tuple[str, Tensors]:
    """What it is known by to who trains, and its tensors."""
    tensors, names = view_tensors(blobs, model), manifest.rounded
    if not names:
        return model.root, tensors
    down = manifest.server.down
    made = {name: rounded(np.asarray(value), down) if name in names else value for name, value in tensors.items()}
    return f"{model.root} as {down}", made
