"""What the devices of a process are doing, on the screen; and when nobody answers them any more."""

import asyncio
import sys
import time
from collections import Counter
from collections.abc import Sequence
from typing import Final

from shoal.cli import words
from shoal.cli.screen import Screen
from shoal.errors import NetworkError
from shoal.fleet.device import Device
from shoal.fleet.device_host import DeviceHost

_CUT: Final = "Socket closed"
STATUS_S: Final = 0.5
UNWATCHED_S: Final = 2.0
"""Between two looks at the devices where nobody looks on: a process that waits is to cost nothing."""
LINE_S: Final = 10.0
"""Between two lines of status where nobody looks on."""


class Crew:
    """What the devices of this process are doing, and how long they did what."""

    def __init__(
        self, server: str, patience_s: float, screen: Screen, host: DeviceHost, *, has_authority: bool
    ) -> None:
        """
        Args:
            server, has_authority: where the host is, and whether its certificate is asked for.
            patience_s: without any answer before it gives up.
            screen, host: where it is shown, and what the devices share.
        """
        self._server, self._patience_s, self._screen, self._host = server, patience_s, screen, host
        self._has_authority = has_authority
        self.devices: Sequence[Device] = ()
        self.seconds: dict[str, float] = {}
        self._stages: dict[Device, tuple[str, float]] = {}
        self._answered_s = time.monotonic()

    def heard(self, device: Device) -> None:
        """A device is at another stage."""
        now_s = time.monotonic()
        stage, since_s = self._stages.get(device, ("", now_s))
        self.seconds[stage] = self.seconds.get(stage, 0.0) + now_s - since_s
        self._stages[device] = (device.progress.stage, now_s)
        # "waiting" is said when a check-in is sent, which needs no answer yet; every other stage needs one.
        if device.progress.stage not in ("reconnecting", "waiting", "connecting"):
            self._answered_s = now_s

    async def watch(self, devices: Sequence[Device]) -> None:
        """Shows the status until it is cancelled. Raises NetworkError when patience is at its end."""
        self.devices = devices
        line_s, told, is_watched = time.monotonic(), "", _is_watched()
        while True:
            await asyncio.sleep(STATUS_S if is_watched else min(UNWATCHED_S, max(STATUS_S, self._patience_s / 4)))
            now_s = time.monotonic()
            if self._is_alone():
                self._give_up(now_s)
            else:
                self._answered_s = now_s
            text = f"{self._text()}  down {words.size(self._host.fetching.down_bytes)}"
            self._screen.live(text)
            if now_s - line_s >= LINE_S and text != told and not is_watched:
                line_s, told = now_s, text
                self._screen.say(text)

    def _is_alone(self) -> bool:
        stages = [device.progress.stage for device in self.devices]
        return bool(stages) and all(s in ("reconnecting", "connecting", "finished") for s in stages)

    def _give_up(self, now_s: float) -> None:
        if now_s - self._answered_s > self._patience_s:
            last = next((d.progress.last_error for d in self.devices if d.progress.last_error), "no answer")
            raise NetworkError(
                f"No answer from {self._server} for {words.duration(self._patience_s)} ({last}).{self._hint(last)} Is the host "
                "running, and are --server and --ca right? The run may also be over."
            )

    def _hint(self, error: str) -> str:
        """What a host with TLS does to a device without is all that gRPC tells of it."""
        return " If it has TLS, give --join LINE, or --ca FILE." if not self._has_authority and _CUT in error else ""

    def _text(self) -> str:
        stages = Counter(device.progress.stage for device in self.devices)
        doing = ", ".join(f"{number} {stage}" for stage, number in sorted(stages.items()))
        last = next((d.progress.last_error for d in self.devices if d.progress.stage == "reconnecting"), "")
        return f"{doing}  {self.totals()}" + (f"  (last: {last[:160]}){self._hint(last)}" if last else "")

    def totals(self) -> str:
        """Counts over the devices, in words."""
        p = [device.progress for device in self.devices]
        counts = {
            "counted": sum(x.counted for x in p), "refused": sum(x.refused for x in p),
            "released": sum(x.released for x in p), "tries that failed": sum(x.failures for x in p),
        }  # fmt: skip
        return ", ".join(f"{number} {name}" for name, number in counts.items() if number or name == "counted")


def _is_watched() -> bool:
    return sys.stderr.isatty()
