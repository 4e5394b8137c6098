"""Pace steering: when a device should come again (Bonawitz et al. 2019, section 2.3). Nothing is kept of any device.

An Edge sees how many devices come in a second, and knows how long it lately told them to stay away; the two together say
how many there are (Little's law: number = rate x delay). It wants `MARGIN` times what the rounds take, so it makes the
delay longer while more come and shorter while fewer do. Since a new delay shows only when it is over, it is changed
slowly, over about its own length (an integrator behind a delay: it is stable below a gain of pi/2). So the daily swing is followed, and a large population is
spread evenly. Where even all devices together are hardly enough for a round, spreading them would keep them apart: they
are asked to come when the next round is expected to open.
"""

from math import exp, log
from typing import Final

MARGIN: Final = 2.0
"""Devices that should come for each that a round takes."""
MEMORY_S: Final = 300.0
"""Over which the rate of arrivals is smoothed."""
GAIN: Final = 0.7
LEAST_S: Final = 5.0
MOST_S: Final = 4 * 3600.0
"""Longest mean delay: a device that stays away for longer may have lost its reason to come."""
SPREAD: Final = 0.5
"""A window reaches from this part of the mean delay below it to as much above."""
TOGETHER: Final = 0.1
"""Of a round's length: the window of those who should come together."""
FIRST_PERIOD_S: Final = 60.0


class Pace:
    """See the module's text. Times are of one clock, in seconds; it never goes back."""

    def __init__(self, *, devices_a_round: int, now_s: float, resting: int = 0, most_s: float = MOST_S) -> None:
        """
        Args:
            devices_a_round: that a round takes.
            now_s: the time.
            resting: devices beside them that may wait and cannot be taken.
            most_s: longest mean delay.
        """
        self._wanted, self._most_s = devices_a_round, most_s
        self.pool = devices_a_round + max(devices_a_round, 10) + resting
        """How many of those that come and go are let in to wait: were all that rest among them, there is room for those that a round takes."""
        self._period_s, self._opened_s = FIRST_PERIOD_S, now_s
        self._rate, self._seen_s = 0.0, now_s
        self.delay_s = FIRST_PERIOD_S
        """The mean delay at the moment."""

    def arrived(self, number: int, now_s: float) -> None:
        """So many devices came."""
        self._forget(now_s)
        self._rate += number / MEMORY_S

    def opened(self, now_s: float) -> None:
        """A round opened, the first or one after a commit."""
        if now_s > self._opened_s:
            self._period_s += 0.2 * (now_s - self._opened_s - self._period_s)
        self._opened_s = now_s

    @property
    def population(self) -> float:
        """How many devices there seem to be."""
        return self._rate * self.delay_s

    def window(self, now_s: float) -> tuple[float, float]:
        """From when to when, in seconds from now, a device that goes away should come again."""
        self._forget(now_s)
        if self.population < MARGIN * self._wanted and self._period_s < self._most_s:
            next_s = max(LEAST_S, self._opened_s + self._period_s - now_s)
            return next_s, next_s + max(LEAST_S, TOGETHER * self._period_s)
        return (1.0 - SPREAD) * self.delay_s, (1.0 + SPREAD) * self.delay_s

    def _forget(self, now_s: float) -> None:
        passed_s = now_s - self._seen_s
        if passed_s <= 0.0:
            return
        self._seen_s = now_s
        self._rate *= exp(-passed_s / MEMORY_S)
        wanted_rate = MARGIN * self._wanted / self._period_s
        if self._rate > 0.0:
            step = min(1.0, GAIN * passed_s / self.delay_s)
            changed = self.delay_s * exp(step * (log(self._rate) - log(wanted_rate)))  # their quotient may be 0
            self.delay_s = min(self._most_s, max(LEAST_S, changed))
