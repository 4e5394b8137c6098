"""What is left of a life that ends unwell: the last state that is known to be right, written by a worker that has it.

    before each call   hold(step, state): it is not given away to the call, whose sums may never be whole
    at the end         write: when a call fails because a member died, or when the supervisor ends the worker (SIGTERM)
    in the next life   agreed, read: where it is newer than the last checkpoint

Where all of the state is in every process (`replicated`, and no rule splits tensors between processes), each of those left has all there is: what is lost is a call, not
all since the last checkpoint. Pieces of a state that is cut are gone with their member: there is only the checkpoint. It costs two more copies of the state. The folder is the
checkpoints', which all members see; the first who begins to write is the only one, and what it writes is there whole or not at all.
"""

import json
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
from shoal.tensors import DTYPES, dtype_name, frame_parts, unpack

SUFFIX: Final = ".rescue"
PARTIAL: Final = "rescue.partial"
LARGEST_BYTES: Final = 1 << 30
"""Of a state that is rescued: it has to be on disk within a supervisor's grace, five seconds."""
LARGEST_SHARE: Final = 1 / 8
"""Of a device's memory, that a state may have for two more copies of it to be kept."""


def can_hold(state: State) -> bool:
    """Whether in every process all of a state is there, and small enough to be held beside the next ones. All processes must ask."""
    fits = _can_hold(jax.tree.leaves(state))
    if jax.process_count() == 1:
        return fits
    from jax.experimental import multihost_utils

    return bool(np.all(multihost_utils.process_allgather(np.int32(fits))))


def _can_hold(leaves: list[jax.Array]) -> bool:
    if not all(leaf.is_fully_addressable or leaf.is_fully_replicated for leaf in leaves):
        return False
    if not all(dtype_name(np.dtype(leaf.dtype)) in DTYPES for leaf in leaves):
        return False
    device = leaves[0].addressable_shards[0].device
    sharing = jax.device_count() if device.platform == "cpu" else 1  # at most: they may be on several machines
    held = sum(shard.data.nbytes for leaf in leaves for shard in leaf.addressable_shards if shard.device == device)
    whole = sum(leaf.nbytes for leaf in leaves)
    return whole <= LARGEST_BYTES and held <= LARGEST_SHARE * memory_bytes(device) / sharing


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

    def let_go(self) -> None:
        """All is in a checkpoint."""
        self._held = None

    def write(self) -> None:
        """The state that is held, unless somebody else writes or has written it. From any thread, while the next step waits for others. Raises OSError."""
        held = self._held
        if held is None or max(_steps(self._folder), default=-1) >= held[0]:
            return
        step, state, about = held
        tensors = {name_of(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_flatten_with_path(state)[0]}
        parts = list(
            frame_parts(tensors, {"about": json.dumps(dict(about))})
        )  # as text: a metric's sum need not be finite
        with suppress(FileExistsError):
            self._write_to(_path(self._folder, step), parts)

    def _write_to(self, path: Path, parts: list[bytes | memoryview]) -> None:
        """All of it or nothing. Raises FileExistsError while somebody else writes."""
        partial = self._folder / PARTIAL
        with partial.open("xb") as file:
            try:
                check = 0
                for part in parts:
                    check = zlib.crc32(part, check)
                    file.write(part)
                file.write(check.to_bytes(4, "little"))
                file.flush()
                partial.rename(path)
            except BaseException:
                partial.unlink()
                raise


def agreed(folder: Path, *, beyond: int) -> int | None:
    """The step of the newest rescued state that is newer than a checkpoint; the same answer in all processes, which must all ask. What is broken or older is removed."""
    step = -1
    if jax.process_index() == 0:
        (folder / PARTIAL).unlink(missing_ok=True)  # whoever wrote it was killed
        for found in _steps(folder):
            if found <= beyond or not _is_whole(_path(folder, found)):
                _path(folder, found).unlink(missing_ok=True)
        step = max(_steps(folder), default=-1)
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
    return state, json.loads(header["about"])


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
    with suppress(OSError, ProtocolError):
        data = memoryview(path.read_bytes())
        if zlib.crc32(data[:-4]) == int.from_bytes(data[-4:], "little"):
            unpack(data[:-4])
            return True
    return False
