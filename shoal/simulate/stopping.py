"""Early stopping of a simulation: the run's rule, held against what its record and its rounds say."""

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final, final

from shoal.errors import DataError
from shoal.metric_names import LEFT_OUT, is_tail
from shoal.plan.manifest import Manifest
from shoal.record.store import EventRow, Store
from shoal.simulate.measuring import Measured
from shoal.stop_when import StopWhen

if TYPE_CHECKING:
    from shoal.simulate.engine import RoundResult

CONFIG: Final = "stop_when"
"""Where a run's config has its rule."""


def keep_stop_when(store: Store, run_id: str, rule: StopWhen | None) -> None:
    """Makes this the rule of the run from now on; None: it has none."""
    config = dict(store.run(run_id).config)
    config.pop(CONFIG, None)
    store.set_config(run_id, config if rule is None else {**config, CONFIG: rule.to_json()})


@final
class Stopping:
    """When the run ends."""

    def __init__(self, store: Store, run_id: str, manifest: Manifest, measured: Measured) -> None:
        """
        Raises:
            DataError: the rule's metric is none that the run will have.
        """
        self._store, self._run_id = store, run_id
        value: Mapping[str, Any] | None = store.run(run_id).config.get(CONFIG)
        self._rule = None if value is None else StopWhen.from_json(value)
        self._points: list[tuple[int, float]] = []
        self.why = ""
        """Why the run ends; empty while it goes on."""
        if self._rule is None:
            return
        self._check(self._rule.metric, manifest, measured)
        found: dict[int, float] = {}
        for row in store.metrics(run_id, self._rule.metric):
            if row.scope != "class":  # a cohort's are of the version that its round began with
                found[row.version + (row.scope == "cohort")] = row.value
        self._points = sorted(found.items())
        self._decide(self._rule)

    def saw(self, result: "RoundResult") -> str:
        """A round is over. Says why it was the last, into the record too; empty if it was not.

        Raises:
            DataError: the cohort has no such metric.
        """
        if self._rule is None:
            return ""
        name = self._rule.metric
        if name in result.metrics:
            self._points.append((result.version, result.metrics[name]))
            self._decide(self._rule)
        elif not self._points and _is_cohorts(name):
            known = ", ".join(name for name in result.metrics if _is_cohorts(name)) or "none"
            raise DataError(f"The run is to stop by {name!r}, which its cohorts do not have; they have {known}.")
        return self.why

    def _decide(self, rule: StopWhen) -> None:
        """What ends the run goes into its record."""
        self.why = rule.why(self._points)
        if self.why:
            created_s = self._store.run(self._run_id).created_s
            event = EventRow(time_s=time.time() - created_s, kind="stopped_early", data={"why": self.why})
            self._store.journal(self._run_id, [event])

    def _check(self, name: str, manifest: Manifest, measured: Measured) -> None:
        own = sorted({spec.tensor.name.removeprefix("metric/").rpartition("/")[0] for spec in manifest.metrics})
        known = [] if measured.held_out is None else own
        known = known + ([] if measured.left_out is None else [f"{LEFT_OUT}{each}" for each in own])
        base = name.rpartition("/")[0] if is_tail(name) else name
        if base not in known and not (_is_cohorts(name)):
            hint = "" if known else " Give examples to measure on (held_out=…, --held-out), or leave users out."
            raise DataError(
                f"The run is to stop by {name!r}, which it will not have; it will have {', '.join(known) or 'none'}, and those of "
                f"the cohorts ({manifest.server.metrics_prefix}/…).{hint}"
            )


def _is_cohorts(name: str) -> bool:
    return "/" in name and not name.startswith(LEFT_OUT) and not is_tail(name)
