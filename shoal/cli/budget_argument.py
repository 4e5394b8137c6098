"""--per-day, --max-temperature: what taking part may cost a machine, as people write it."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Final

from shoal.cli.words import parse_duration, parse_size

if TYPE_CHECKING:
    from shoal.fleet.impact import ImpactBudget


def _percent(text: str) -> float:
    made = float(text.removesuffix("%"))
    if not 0.0 < made <= 100.0:
        raise ValueError(f"Expected a share of 0 to 100 %, got {text!r}.")
    return made


_PARSED: Final[dict[str, tuple[str, Callable[[str], float]]]] = {
    "cpu": ("cpu_s", parse_duration),
    "bytes": ("moved_bytes", parse_size),
    "battery": ("battery_percent", _percent),
    "memory": ("memory_bytes", parse_size),
}


def parse_budget(per_day: Sequence[str], celsius: float | None) -> "ImpactBudget":
    """The budget that `NAME=VALUE` of each --per-day and --max-temperature make.

    Raises:
        ValueError: an unknown name, one twice, or no value of its kind.
    """
    from shoal.fleet.impact import ImpactBudget

    given: dict[str, float] = {}
    for text in per_day:
        name, _, value = text.partition("=")
        if name not in _PARSED or _PARSED[name][0] in given:
            raise ValueError(
                f"Expected --per-day NAME=VALUE with NAME one of {' | '.join(_PARSED)}, each once, got {text!r}."
            )
        field, parse = _PARSED[name]
        try:
            given[field] = parse(value)
        except ValueError as error:
            raise ValueError(f"Expected --per-day {name}=VALUE to be such as {_LIKE[name]}, got {text!r}.") from error
    return ImpactBudget(**given, celsius=celsius)  # type: ignore[arg-type]


_LIKE: Final = {"cpu": "cpu=10min", "bytes": "bytes=100MB", "battery": "battery=5%", "memory": "memory=2GiB"}
