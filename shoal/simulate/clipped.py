"""Says once where a loss is so large that what is reported of it may have been clipped.

A metric is an exact sum, so each example's part has a bound. Who sets one knows it; that of a loss is `LOSS_BOUND`
by default. As long as the mean of a loss that is never negative is below a thousandth of that, no more than every thousandth
example can have been beyond.
"""

import logging
from collections.abc import Mapping
from typing import Final, final

from shoal.plan.manifest import Manifest
from shoal.task import LOSS_BOUND

log = logging.getLogger("shoal.simulate")

SHARE: Final = 1e-3


@final
class Clipped:
    """Looks at the metrics of each round."""

    def __init__(self, manifest: Manifest) -> None:
        default = LOSS_BOUND[1] * manifest.training.max_examples
        self._wide = {
            spec.tensor.name.removeprefix("metric/").removesuffix("/numerator")
            for spec in (*manifest.sums, *manifest.metrics)
            if spec.tensor.name.endswith("/numerator") and spec.bound >= default
        }

    def look(self, metrics: Mapping[str, float]) -> None:
        """Warns of the first metric that may be clipped, and of no other after it."""
        for name, value in metrics.items():
            if name.rpartition("/")[2] in self._wide and abs(value) >= SHARE * LOSS_BOUND[1]:
                log.warning(
                    "%s is %.4g: what an example has beyond %g counts as that in the metric, though not in training. Scale the "
                    "targets, or set the metric's bound (loss_bound=…, Sum(bound=…))",
                    name, value, LOSS_BOUND[1],
                )  # fmt: skip
                self._wide = set()
                return
