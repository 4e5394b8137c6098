"""Numbers as people read them: durations, sizes, counts, curves. And sizes as people write them."""

import re
from collections.abc import Mapping, Sequence
from typing import Final

_UNITS: Final = {
    "": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30,
    "t": 1 << 40, "kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30, "tib": 1 << 40,
}  # fmt: skip
_SECONDS: Final = {"s": 1.0, "min": 60.0, "h": 3600.0, "d": 86_400.0}
_BARS: Final = "▁▂▃▄▅▆▇█"


def duration(seconds: float) -> str:
    """A duration in two figures or so.

    >>> duration(0.0042), duration(3.14159), duration(75), duration(7384)
    ('4 ms', '3.1 s', '1 min 15 s', '2 h 3 min')
    """
    if seconds < 0.9995:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def size(num_bytes: float) -> str:
    """A number of bytes.

    >>> size(812), size(15_300), size(4 << 30)
    ('812 B', '14.9 KiB', '4.0 GiB')
    """
    for unit in ("B", "KiB", "MiB", "GiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.0f} B" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.1f} TiB"


def parse_size(text: str) -> int:
    """The bytes that a text like `4GiB`, `512 MB` or `1000000` names.

    >>> parse_size("4GiB"), parse_size("1.5 kB"), parse_size("17")
    (4294967296, 1500, 17)

    Raises:
        ValueError: it names no size above zero.
    """
    found = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([a-zA-Z]*)\s*", text)
    unit = _UNITS.get(found[2].lower()) if found else None
    made = int(float(found[1]) * unit) if found and unit else 0
    if made < 1:
        raise ValueError(f"Expected a size like 4GiB, 512MiB or 1000000 (bytes), got {text!r}.")
    return made


def parse_duration(text: str) -> float:
    """The seconds, above 0, that a text like `90s`, `15min`, `12h` or `7d` names.

    >>> parse_duration("15min"), parse_duration("1.5 h")
    (900.0, 5400.0)

    Raises:
        ValueError: it names none.
    """
    found = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([a-z]*)\s*", text)
    unit = _SECONDS.get(found[2]) if found else None
    made = float(found[1]) * unit if found and unit else 0.0
    if not 0.0 < made < float("inf"):
        raise ValueError(f"Expected a time such as 90s, 15min, 12h or 7d, got {text!r}.")
    return made


def count(number: float, what: str) -> str:
    """A number and its noun: `1 user`, `1,438 examples`."""
    return f"{number:,.0f} {what}{'' if number == 1 else 's'}"


def value(number: float) -> str:
    """A metric in four figures."""
    return f"{number:.4g}"


def values(metrics: Mapping[str, float]) -> str:
    """`accuracy 0.8712, loss 0.4134`."""
    return ", ".join(f"{name} {value(number)}" for name, number in metrics.items())


def phases(seconds: Mapping[str, float], *, total: float | None = None) -> str:
    """Where the time went, longest first; what is no hundredth of a second is left out."""
    told = sorted(((s, name) for name, s in seconds.items() if s >= 0.005), reverse=True)
    text = ", ".join(f"{name} {duration(s)}" for s, name in told) or "nothing took time"
    return text if total is None else f"{text} (in all {duration(total)})"


def sparkline(numbers: Sequence[float], *, width: int = 40) -> str:
    """A curve in one line of at most `width` characters; what is no number is a space.

    >>> sparkline([0, 1, 2, 3])
    '▁▃▆█'
    """
    chosen = [numbers[i * len(numbers) // width] for i in range(width)] if len(numbers) > width else list(numbers)
    if len(numbers) > width:
        chosen[-1] = numbers[-1]
    finite = [x for x in chosen if abs(x) < float("inf")]
    if not finite:
        return " " * len(chosen)
    low, span = min(finite), max(finite) - min(finite)
    top = len(_BARS) - 1
    return "".join(
        _BARS[round((x - low) / span * top) if span else 0] if abs(x) < float("inf") else " " for x in chosen
    )
