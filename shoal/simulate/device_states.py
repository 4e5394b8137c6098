"""What simulated devices keep between rounds: on disk, a row for each, so that 100,000 of them take no memory.

    states/RUN/
      states.json     format, tensors, number of members, hash of their ids
      0.bin, 1.bin …  one file a tensor, a row a member, mapped; a row that was never written is zeros and takes no disk
      pending.bin     the rows that a round leaves, until they are in their places

They change when the version does that their round makes, neither before nor after::

    writing(v)  rows -> pending.bin (whole and on disk when it has that name)
    the record commits version v
    settle(v)   pending.bin -> rows, on disk; then it goes

Killed at any moment, `settle(head)` of the next life finds a pending file of the head's version, which it takes in (again:
it does no harm), or of one that was never committed, which it drops. Cost: each row is written twice; the files of the
round's tensors are synced once. Without a folder they are in memory, by the same rules.
"""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Final

import numpy as np

from shoal.errors import StoreError
from shoal.record.blobs import disk, make_folder, sync_folder
from shoal.tensors import Tensors, TensorSpec, sha256, to_bytes

FORMAT: Final = "shoal-device-states/1"
Keep = Callable[[str, Tensors], None]
"""(member, what it keeps)"""

_NUMBER: Final = np.dtype("<i8")


class DeviceStates:
    """See the module's text. One process at a time; not thread-safe."""

    def __init__(self, specs: Sequence[TensorSpec], members: Sequence[str], folder: Path | None) -> None:
        """
        Args:
            specs: what a device keeps; none: nothing is written anywhere.
            members: all devices, in an order that stays.
            folder: of the run's states, made where it is not there; None: in memory.

        Raises:
            StoreError: the folder has states of other devices, or of other tensors.
        """
        self.specs = tuple(specs)
        self._rows = {member: row for row, member in enumerate(members)}
        self._folder = folder if self.specs else None
        self._held: dict[str, Tensors] = {}
        self._waiting: tuple[int, dict[str, Tensors]] | None = None
        if self._folder is not None:
            make_folder(self._folder)
            _agree(self._folder / "states.json", _description(self.specs, members))
            self._maps = {spec.name: self._open(number, spec) for number, spec in enumerate(self.specs)}

    def read(self, member: str) -> Tensors | None:
        """What a device has kept: views, good until the next `settle`. Zeros, or None, where that is nothing yet."""
        if self._folder is None:
            return self._held.get(member)
        return {name: rows[self._rows[member]] for name, rows in self._maps.items()}

    @contextmanager
    def writing(self, version: int) -> Iterator[Keep]:
        """Gives what lays down, member by member, what they keep once `version` is committed.

        Raises:
            StoreUnavailable: the disk does not take it.
        """
        if not self.specs:
            yield lambda member, kept: None
        elif self._folder is None:
            waiting = dict[str, Tensors]()
            yield waiting.__setitem__
            self._waiting = version, waiting
        else:
            partial = self._pending.with_suffix(".partial")
            with disk(partial):
                file = partial.open("wb")
            with file:
                file.write(np.array(version, _NUMBER).tobytes())
                yield lambda member, kept: self._append(file, partial, self._rows[member], kept)
                with disk(partial):
                    _sync(file)
            with disk(partial):
                partial.replace(self._pending)
                sync_folder(self._pending.parent)

    def _append(self, file: BinaryIO, path: Path, row: int, kept: Tensors) -> None:
        with disk(path):
            file.write(np.array(row, _NUMBER).tobytes())
            for spec in self.specs:
                file.write(to_bytes(kept[spec.name]))

    def settle(self, version: int) -> None:
        """Takes in what was laid down for a version that is committed, `version` being the newest; drops what was not.

        Raises:
            StoreUnavailable: the disk does not take it. It is tried again by the next call.
        """
        if self._folder is None:
            waiting, self._waiting = self._waiting, None
            if waiting is not None and waiting[0] <= version:
                self._held |= waiting[1]
        elif self._pending.exists():
            with disk(self._pending), self._pending.open("rb") as file:
                if _number(file.read(8)) <= version:
                    self._put(file)
            self._pending.unlink()

    def _put(self, pending: BinaryIO) -> None:
        # By writes, not through the maps: a full disk is then an error, not the end of the process.
        with ExitStack() as stack:
            files = [
                stack.enter_context(self._path(number).open("r+b")) if spec.size_bytes else None
                for number, spec in enumerate(self.specs)
            ]
            while head := pending.read(8):
                for file, spec in zip(files, self.specs, strict=True):
                    if file is not None:
                        file.seek(_number(head) * spec.size_bytes)
                        file.write(pending.read(spec.size_bytes))
            for file in files:
                if file is not None:
                    _sync(file)

    @property
    def _pending(self) -> Path:
        assert self._folder is not None
        return self._folder / "pending.bin"

    def _path(self, number: int) -> Path:
        assert self._folder is not None
        return self._folder / f"{number}.bin"

    def _open(self, number: int, spec: TensorSpec) -> np.ndarray:
        shape = (len(self._rows), *spec.shape)
        if not spec.size_bytes or not self._rows:
            return np.zeros(shape, spec.numpy_dtype)  # nothing can be mapped
        with self._path(number).open("ab") as file:
            file.truncate(len(self._rows) * spec.size_bytes)  # a hole: it reads as zeros
        return np.memmap(self._path(number), spec.numpy_dtype, "r", shape=shape)


def states_folder(run_folder: Path, run_id: str) -> Path:
    """Where the states of a run are."""
    return run_folder / "states" / run_id


def _number(data: bytes) -> int:
    return int(np.frombuffer(data, _NUMBER)[0])


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _description(specs: Sequence[TensorSpec], members: Sequence[str]) -> dict[str, Any]:
    ids = sha256("\0".join(members).encode())
    tensors = [{"name": s.name, "shape": list(s.shape), "dtype": s.dtype} for s in specs]
    return {"format": FORMAT, "members": len(members), "ids": ids, "tensors": tensors}


def _agree(path: Path, description: dict[str, Any]) -> None:
    """Writes what the folder holds, or raises StoreError where it holds something else."""
    if not path.exists():
        partial = path.with_suffix(".partial")
        with disk(partial):
            with partial.open("wb") as file:
                file.write(json.dumps(description, indent=1, sort_keys=True).encode())
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
            sync_folder(path.parent)
        return
    try:
        found = json.loads(path.read_text())
        found["tensors"], found["members"]
    except (ValueError, TypeError, KeyError) as error:
        raise StoreError(f"{path} cannot be read ({error}): what devices kept is lost with it. Begin anew.") from error
    if found != description:
        what = "tensors" if found["tensors"] != description["tensors"] else "devices"
        raise StoreError(
            f"{path.parent} holds states of other {what} ({found['members']} devices) than the run has "
            f"({description['members']}): go on with the same data in the same order, or begin anew."
        )
