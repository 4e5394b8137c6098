"""What servers hold, on disk: a file for each server and step, whole or not there, read by any number of servers."""

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, final

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from shoal.errors import StoreError
from shoal.local import Named

KEPT: Final = 2
_PART: Final = re.compile(r"part(\d+)of(\d+)\.safetensors")


@final
class Parts:
    """Of one run."""

    def __init__(self, folder: Path) -> None:
        """`folder`: made when something is written."""
        self._folder = folder

    def latest(self) -> int | None:
        """The newest step of which all parts are there."""
        return max(self._whole(), default=None)

    def _steps(self) -> list[int]:
        found = self._folder.glob("*") if self._folder.exists() else ()
        return sorted(int(place.name) for place in found if place.name.isdigit())

    def _whole(self) -> list[int]:
        """Steps of which all parts are there, oldest first."""
        return [step for step in self._steps() if self._parts(step)]

    def _parts(self, step: int) -> list[Path]:
        """All parts of one writing of a step; none where none is whole. Servers of another number may have written some of it, too."""
        place = self._folder / f"{step:08d}"
        found = {path.name: path for path in place.iterdir()}
        numbers = {int(part[2]) for part in map(_PART.fullmatch, found) if part}
        for number in sorted(numbers):
            names = [f"part{server}of{number}.safetensors" for server in range(number)]
            if found.keys() >= set(names):
                return [found[name] for name in names]
        return []

    def write(
        self, step: int, server: int, num_servers: int, params: Named, opt: Mapping[int, Any], about: Mapping[str, Any]
    ) -> None:
        """One server's part.

        Args:
            step: that has been taken.
            server, num_servers: which part it is, of how many.
            params: name -> tensor.
            opt: number of a leaf of the optimizer's state -> its value.
            about: what a run that goes on must have in common.
        """
        place = self._folder / f"{step:08d}"
        place.mkdir(parents=True, exist_ok=True)
        arrays = {f"param/{name}": np.asarray(value, order="C") for name, value in params.items()}
        arrays |= {f"opt/{number:05d}": np.asarray(value, order="C") for number, value in opt.items()}
        path = place / f"part{server}of{num_servers}.safetensors"
        beside = path.with_suffix(f".new{server}")
        save_file(arrays, beside, metadata={"about": json.dumps(dict(about))})
        beside.replace(path)
        if server == 0:
            oldest = min(self._whole()[-KEPT:], default=0)
            for old in self._steps():
                if old < oldest:
                    shutil.rmtree(self._folder / f"{old:08d}", ignore_errors=True)

    def read(self, step: int, about: Mapping[str, Any]) -> tuple[Named, dict[int, Any]]:
        """All parameters and leaves of a step.

        Raises:
            StoreError: it cannot be read, or its run was another.
        """
        params: Named = {}
        opt: dict[int, Any] = {}
        place = self._folder / f"{step:08d}"
        paths = self._parts(step)
        try:
            for path in paths:
                for name, value in load_file(path).items():
                    kind, _, rest = name.partition("/")
                    if kind == "param":
                        params[rest] = value
                    else:
                        opt[int(rest)] = value
            kept = json.loads(_about(paths[0]))
        except (OSError, SafetensorError, ValueError) as error:
            raise StoreError(f"Checkpoint {place} cannot be read: {error}") from error
        for name, value in about.items():
            if kept.get(name) != value:
                raise StoreError(
                    f"The run began with {name}={kept.get(name)!r}, and would go on with {value!r}: its steps would be others. Go on with what it began "
                    "with, or begin anew in another folder."
                )
        return params, opt


def _about(path: Path) -> str:
    from safetensors import safe_open

    with safe_open(path, framework="numpy") as file:
        return str((file.metadata() or {}).get("about", "{}"))
