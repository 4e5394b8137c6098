"""What is left of a life that ends unwell: the last state that is known to be right, written by a worker that has it.

    before each call   hold(step, state): it is not given away to the call, whose sums may never be whole
    at the end         write: when a call fails because a member died, or when the supervisor ends the worker (SIGTERM)
    in the next life   agreed, read: where it is newer than the last checkpoint

Where parameters and the optimizer's state are whole on every member (`replicated`), each of those left has all there is: what is lost is a call, not all since the
last checkpoint. Pieces of a state that is cut are gone with their member: there is only the checkpoint. It costs two more copies of the state. The folder is the checkpoints',
which all members see; the first who begins to write is the only one, and what it writes is there whole or not at all.
"""

import os
import zlib
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Final, final

import jax
import numpy as np

from shoal.errors import ProtocolError
from shoal.local import name_of
from shoal.pod.checkpoint import fitted, refuse_other
from shoal.pod.machine import memory_bytes
from shoal.pod.placement import State
from shoal.tensors import frame_parts, unpack

SUFFIX: Final = ".rescue"
PARTIAL: Final = "rescue.partial"
LARGEST_SHARE: Final = 1 / 8
"""Of a device's memory, that a state may have for two more copies of it to be kept."""


def can_hold(state: State) -> bool:
    """Whether all of a state is in this process, and small enough to be held beside the next ones."""
    leaves = jax.tree.leaves(state)
    is_whole = all(leaf.is_fully_addressable or leaf.is_fully_replicated for leaf in leaves)
    device = jax.local_devices()[0]
    held = sum(shard.data.nbytes for leaf in leaves for shard in leaf.addressable_shards if shard.device == device)
    return is_whole and held <= LARGEST_SHARE * memory_bytes(device)


@final
class Rescue:
    """One worker's."""

    def __init__(self, folder: Path) -> None:
        """`folder`: of the checkpoints."""
        self._folder = folder
        self._held: tuple[int, State, Mapping[str, Any]] | None = None

    def hold(self, step: int, state: State, about: Mapping[str, Any]) -> None:
        """A state that has been computed: nothing that fails later can change it. `about`: as for `Checkpoints.save`."""
        self._held = step, state, about

    def write(self) -> None:
        """The state that is held, unless somebody else is about it. From any thread, while the next step is waiting for others. Raises OSError."""
        if self._held is None:
            return
        step, state, about = self._held
        paths = jax.tree_util.tree_flatten_with_path(state)[0]
        tensors = {name_of(path): np.asarray(leaf) for path, leaf in paths}
        with suppress(FileExistsError), open(self._folder / PARTIAL, "xb", opener=_owners) as file:
            check = 0
            for part in frame_parts(tensors, {"about": dict(about)}):
                check = zlib.crc32(part, check)
                file.write(part)
            file.write(check.to_bytes(4, "little"))
            file.flush()
            (self._folder / PARTIAL).rename(self._folder / f"{step}{SUFFIX}")


def agreed(folder: Path, *, beyond: int) -> int | None:
    """The step of the newest rescued state that is newer than a step; the same answer in all processes, which must all ask. Tidies up."""
    step = -1
    if jax.process_index() == 0:
        (folder / PARTIAL).unlink(missing_ok=True)  # whoever wrote it was killed
        step = max(
            (found for found in _steps(folder) if found > beyond and _is_whole(_path(folder, found))), default=-1
        )
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        step = int(multihost_utils.broadcast_one_to_all(np.int32(step)))
    return step if step >= 0 else None


def read(folder: Path, step: int, like: State, shardings: Any) -> tuple[State, dict[str, Any]]:
    """A rescued state as the program at hand keeps it, and what was said of it. Arguments as for `Checkpoints.restore`.

    Raises:
        StoreError: it is of another model or optimizer.
    """
    kept, header = unpack(_path(folder, step).read_bytes()[:-4])
    leaves, structure = jax.tree_util.tree_flatten_with_path(like)
    names = [name_of(path) for path, _ in leaves]
    refuse_other(names, list(kept), what=f"What was rescued of step {step} in {folder}")
    made = [
        jax.make_array_from_callback(
            leaf.shape, place, fitted(kept[name].astype(leaf.dtype, copy=False), leaf.shape).__getitem__
        )
        for name, (_, leaf), place in zip(names, leaves, jax.tree.leaves(shardings), strict=True)
    ]
    state: State = jax.tree.unflatten(structure, made)
    return state, dict(header["about"])


def forget(folder: Path, *, up_to: int) -> None:
    """Removes what is no newer than a checkpoint."""
    if jax.process_index() == 0:
        for step in _steps(folder):
            if step <= up_to:
                _path(folder, step).unlink(missing_ok=True)


def _path(folder: Path, step: int) -> Path:
    return folder / f"{step}{SUFFIX}"


def _steps(folder: Path) -> list[int]:
    return [int(path.stem) for path in folder.glob(f"*{SUFFIX}") if path.stem.isdigit()]


def _is_whole(path: Path) -> bool:
    """A machine that went down may leave a file of the right length without its content."""
    data = memoryview(path.read_bytes())
    if zlib.crc32(data[:-4]) != int.from_bytes(data[-4:], "little"):
        return False
    with suppress(ProtocolError):
        unpack(data[:-4])
        return True
    return False


def _owners(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)
