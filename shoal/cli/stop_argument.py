"""`--stop-when` of the command line: METRIC:reaches=VALUE,patience=ROUNDS,least=AMOUNT, or none."""

from typing import Any

from shoal.stop_when import StopWhen

NONE = "none"
_KINDS = {"reaches": float, "patience": int, "least": float, "better": str}


def parse_stop_when(text: str) -> StopWhen | None:
    """When a run ends early; None for `none`.

    >>> rule = parse_stop_when("accuracy:patience=20,least=0.001")
    >>> rule.metric, rule.patience, rule.least
    ('accuracy', 20, 0.001)

    Raises:
        ValueError: it is no such rule.
    """
    if text == NONE:
        return None
    metric, _, rest = text.partition(":")
    given: dict[str, Any] = {}
    try:
        for part in rest.split(","):
            name, _, value = part.partition("=")
            if name not in _KINDS or name in given:
                raise ValueError(f"expected {' | '.join(_KINDS)}, each once, got {name!r}")
            given[name] = _KINDS[name](value)
        return StopWhen(metric, **given)
    except ValueError as error:
        raise ValueError(
            f"Expected --stop-when METRIC:reaches=VALUE or METRIC:patience=ROUNDS (both, and least=AMOUNT, between commas), or "
            f"{NONE}; got {text!r}: {error}"
        ) from error
