"""Whether an order pays, found out while the job runs: it is predicted, measured against the order of layers, and given up where it does not.

    predicted --below threshold--> off           (nobody is bothered with measuring)
        |
        v
    measuring: pairs of steps, ours and by layers, in turns --the lower end of the gain is not above 0--> off
        |
        v
        on --after `again_after` steps--> measuring

A machine without I/O or clock: it says which order the next step takes, and is told how long it took.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal, final

import numpy as np

from shoal import validate

Which = Literal["ours", "layer"]
State = Literal["off", "measuring", "on"]
_TURNS: Final[tuple[Which, ...]] = ("ours", "layer", "layer", "ours")


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """Where it stands."""

    state: State
    why: str
    gain: float | None = None
    """Seconds of a step by layers over ours, less 1: the median of the pairs."""
    breaks_even_at: int | None = None
    """The step at which what ordering took has been paid back; None: it is not, or not known yet."""


@final
class Guard:
    """Of one training."""

    def __init__(
        self,
        predicted_gain: float,
        *,
        spent_s: float,
        threshold: float = 0.01,
        num_pairs: int = 10,
        again_after: int = 2000,
    ) -> None:
        """
        Args:
            predicted_gain: seconds of a step by layers over ours, less 1, by simulation.
            spent_s: what finding the order has taken: measuring stages, ordering.
            threshold: gain below which it is not worth while.
            num_pairs: of steps that are measured before it is decided.
            again_after: steps after which it is measured again.
        """
        validate.positive(num_pairs=num_pairs, again_after=again_after)
        self._threshold, self._num_pairs, self._again_after = threshold, num_pairs, again_after
        self._spent_s = spent_s
        self._step = 0
        self._seconds: dict[Which, list[float]] = {"ours": [], "layer": []}
        self._since = 0
        self._num_asked = 0
        if predicted_gain < threshold:
            why = f"a gain of {predicted_gain:.1%} is predicted, less than {threshold:.1%}"
            self.verdict = Verdict(state="off", why=why)
        else:
            why = f"a gain of {predicted_gain:.1%} is predicted; it is being measured"
            self.verdict = Verdict(state="measuring", why=why)

    def next(self) -> Which:
        """The order that the next step takes: asked once for each, perhaps before the one before is done."""
        if self.verdict.state == "measuring":
            self._num_asked += 1
            return _TURNS[(self._num_asked - 1) % len(_TURNS)]
        return "ours" if self.verdict.state == "on" else "layer"

    def took(self, which: Which, seconds: float) -> None:
        """A step is done."""
        validate.positive(seconds=seconds)
        self._step += 1
        self._since += 1
        if self.verdict.state == "measuring":
            self._seconds[which].append(seconds)
            if min(len(each) for each in self._seconds.values()) >= self._num_pairs:
                self._decide()
        elif self.verdict.state == "on" and self._since >= self._again_after:
            self._seconds = {"ours": [], "layer": []}
            self.verdict = Verdict(state="measuring", why="it is measured again", gain=self.verdict.gain)

    def _decide(self) -> None:
        pairs = zip(self._seconds["ours"], self._seconds["layer"], strict=False)
        gain, low = _median_and_low([layer / ours - 1 for ours, layer in pairs])
        self._since = 0
        if low > 0 and gain >= self._threshold:
            saved = float(np.median(self._seconds["layer"]) - np.median(self._seconds["ours"]))
            even = self._step + int(np.ceil(max(0.0, self._spent_s) / saved)) if saved > 0 else None
            why = f"steps are {gain:.1%} faster (at least {low:.1%})"
            self.verdict = Verdict(state="on", why=why, gain=gain, breaks_even_at=even)
        else:
            why = f"steps are {gain:.1%} faster (perhaps {low:.1%}), which is not surely a gain"
            self.verdict = Verdict(state="off", why=why, gain=gain)


def _median_and_low(gains: Sequence[float]) -> tuple[float, float]:
    """The median, and the lower end of its 95 % interval: by order statistics, which need no random numbers."""
    ordered = np.sort(gains)
    # The number of values below the median is binomial: mean n/2, standard deviation sqrt(n)/2.
    low = max(0, int(np.floor(len(ordered) / 2 - 0.98 * np.sqrt(len(ordered)))))
    return float(np.median(ordered)), float(ordered[low])
