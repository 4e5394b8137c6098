"""What a run's `Retention` does not keep goes while the run goes on: many small versions at a time, large ones one by one."""

from typing import Final

from shoal.plan.manifest import Manifest
from shoal.record.retention import Retention
from shoal.record.store import Store

AT_ONCE_BYTES: Final = 64 << 20
"""Old versions lie about until they are as large as this, or as many as `MOST_AT_ONCE`."""
MOST_AT_ONCE: Final = 1000
COPIES: Final = 3
"""Of the model in a version, at most: a server rule may keep two tensors beside each."""


class Sweeping:
    """Sweeps the record of one run."""

    def __init__(self, store: Store, run_id: str, kept: Retention | None, manifest: Manifest) -> None:
        """`kept`: None keeps all."""
        self._store, self._run_id, self._kept = store, run_id, kept
        version_bytes = COPIES * sum(spec.size_bytes for spec in manifest.broadcast)
        self._at_once = max(1, min(MOST_AT_ONCE, AT_ONCE_BYTES // max(1, version_bytes)))
        self._swept = 0

    def after(self, version: int, *, is_over: bool = False) -> None:
        """A version was committed, or the run is over."""
        if self._kept is None:
            return
        before = max(0, version + 1 - self._kept.recent)
        if before - self._swept >= (1 if is_over else self._at_once):
            with self._store.settling:
                self._store.sweep(
                    self._run_id, since_version=self._swept, before_version=before, every=self._kept.every,
                    finals_before=before,
                )  # fmt: skip
            self._swept = before
