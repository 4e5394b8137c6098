"""Names of what members of a secure group say that others than its machine must know."""

from typing import Final

MASKED: Final = "masked"
"""Phase, and name of the tensor that is pushed: an update under its masks, packed."""
