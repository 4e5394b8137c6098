"""Which bytes move first: orders of transfers from a step's own trace, and whether they pay. `README.md` beside this says how data flows."""

from typing import Final, Literal, get_args

OrderName = Literal["auto", "tac", "tic", "layer", "tree", "random"]
"""`auto`: by `tac` where that pays, else by layers."""
ORDER_NAMES: Final[tuple[OrderName, ...]] = get_args(OrderName)
