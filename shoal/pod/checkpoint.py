"""The whole state of a run on disk, by Orbax: written while training goes on, and read onto whatever mesh there is.

A checkpoint holds a State (parameters, model state, the optimizer's state, step) leaf by leaf, each process its own part. What a leaf's shape is
depends on the mesh: a flat piece has padding at its end, and another number of members needs another padding; where an update is of whole
tensors, the same leaf has its own shape. All of these are the same numbers in the same order, so a leaf is read as it lies and then cut or
padded to what the program at hand wants.
"""

from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any, Final, final

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import NamedSharding, PartitionSpec

from shoal.errors import StoreError
from shoal.local import name_of
from shoal.pod.placement import State

KEPT: Final = 2


@final
class Checkpoints:
    """Those of one run, by step."""

    def __init__(self, folder: Path, *, keep: int = KEPT) -> None:
        """`folder`: made if it is not there; `keep`: the newest so many stay."""
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True, enable_async_checkpointing=True)
        self.folder, self._manager = folder, ocp.CheckpointManager(folder.resolve(), options=options)

    def latest(self) -> int | None:
        """The step of the newest whole one."""
        found: int | None = self._manager.latest_step()
        return found

    def save(self, step: int, state: State, about: Mapping[str, Any]) -> None:
        """Begins to write a checkpoint; returns when the state may be changed.

        Args:
            step: of the state.
            state: all of it.
            about: what else is needed to go on, as JSON.
        """
        leaves, _ = jax.tree_util.tree_flatten_with_path(state)
        names = [name_of(path) for path, _ in leaves]
        numbered = {f"{number:05d}": leaf for number, (_, leaf) in enumerate(leaves)}
        shapes = {name: list(leaf.shape) for name, (_, leaf) in zip(names, leaves, strict=True)}
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(numbered), about=ocp.args.JsonSave({**about, "shapes": shapes})
            ),
        )

    def about(self, step: int) -> dict[str, Any]:
        """What was said of a checkpoint."""
        found: dict[str, Any] = self._manager.restore(step, args=ocp.args.Composite(about=ocp.args.JsonRestore()))[
            "about"
        ]
        return found

    def restore(self, step: int, like: State, shardings: Any) -> State:
        """A checkpoint's state, as the program at hand keeps it.

        Args:
            step: one that is there.
            like: shapes and types of a State.
            shardings: of the same structure.

        Raises:
            StoreError: it is of another model or optimizer.
        """
        kept = self.about(step)["shapes"]
        leaves, structure = jax.tree_util.tree_flatten_with_path(like)
        names = [name_of(path) for path, _ in leaves]
        refuse_other(names, list(kept), what=f"Checkpoint {step} in {self.folder}")
        wanted = [leaf for _, leaf in leaves]
        places = jax.tree.leaves(shardings)
        stored = {
            f"{number:05d}": jax.ShapeDtypeStruct(
                tuple(kept[name]), leaf.dtype, sharding=_as_stored(tuple(kept[name]), place)
            )
            for number, (name, leaf, place) in enumerate(zip(names, wanted, places, strict=True))
        }
        found = self._manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore(stored)))["state"]
        values = [found[number] for number in sorted(found)]
        fit = jax.jit(
            lambda values: [fitted(value, leaf.shape) for value, leaf in zip(values, wanted, strict=True)],
            out_shardings=places,
        )
        made: State = jax.tree.unflatten(structure, fit(values))
        return made

    def wait(self) -> None:
        """Until what was begun is on disk."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits, and lets go."""
        self._manager.close()


def _as_stored(shape: tuple[int, ...], place: NamedSharding) -> NamedSharding:
    """Where a leaf of that shape is read to: split like the one that becomes of it, if that can be."""
    try:
        place.shard_shape(shape)
    except (ValueError, IndexError):
        return NamedSharding(place.mesh, PartitionSpec())
    return place


def refuse_other(names: Sequence[str], kept: Sequence[str], *, what: str) -> None:
    """Raises StoreError unless a state's leaves are those that were kept."""
    if list(names) != list(kept):
        new, gone = sorted(set(names) - set(kept)), sorted(set(kept) - set(names))
        raise StoreError(
            f"{what} is of another model or optimizer: it has {gone[:3] or 'nothing'} that this one has not, and lacks {new[:3] or 'nothing'}. Train with the "
            "task that it was made by, or begin anew."
        )


def fitted(value: Any, shape: tuple[int, ...]) -> Any:
    """An array as a leaf of that shape: the same numbers in the same order, cut or padded."""
    if value.shape == shape:
        return value
    size = min(value.size, prod(shape))
    pad = jnp.pad if isinstance(value, jax.Array) else np.pad
    return pad(value.reshape(-1)[:size], (0, prod(shape) - size)).reshape(shape)
