"""What a device has done, and is doing: for whoever looks at it."""

from dataclasses import dataclass
from typing import Final

FINISHED: Final = "finished"
"""Stage at which the host has said that the run is over."""


@dataclass
class Progress:
    """Counts since the process began."""

    stage: str = "connecting"
    counted: int = 0
    refused: int = 0
    released: int = 0
    failures: int = 0
    last_error: str = ""
    up_bytes: int = 0
