"""What was seen of a run's devices, as `shoal runs show` prints it."""

from collections.abc import Sequence
from typing import Any, Final

from shoal.cli import words
from shoal.cli.screen import Screen
from shoal.fleet.analytics import Seen, quantile, total
from shoal.record.store import RoundRow

LEGEND: Final = "- came, v has the model, [ ] trains, + sends, ^ counted, # refused, x told to stop, ! lost, * gave up"
SHAPES_SHOWN: Final = 8
_PHASES: Final = {
    "wait": "check-in to assignment", "train": "fetch and train", "upload": "send the update",
    "group": "update to the close of its sum",
}  # fmt: skip


def show(rounds: Sequence[RoundRow], screen: Screen) -> dict[str, Any]:
    """Prints it, and returns it for the JSON document."""
    seen = total(row.analytics for row in rounds)
    if seen.counts:
        kept = "all rounds" if len(rounds) == max(row.number for row in rounds) else "the rounds that are kept"
        screen.line(f"\ndevices, over {kept} (each as often as it was taken; one that stays connected checks in once)")
        screen.line(f"  {_funnel(seen)}")
        _shapes(seen, screen)
        _times(seen, screen)
    if seen.errors:
        errors = sorted(seen.errors.items(), key=lambda item: -item[1].count)
        screen.line(f"  errors: {', '.join(f'{kind} ({each.count:,})' for kind, each in errors)}")
    return _document(seen)


def _funnel(seen: Seen) -> str:
    get = seen.counts.get
    later = f" (told to come later {get('told_later'):,})" if get("told_later") else ""
    late = "".join(f", {name} {get(name):,}" for name in ("patched", "discounted") if get(name))
    ends = {
        "told to stop": "released",
        "too late": "refused_late",
        "refused": "refused",
        "gave up": "gave_up",
        "lost": "lost",
    }
    others = "".join(f"; {what} {get(name):,}" for what, name in ends.items() if get(name))
    way = f"check-ins {get('check_ins', 0):,}{later} > selected {get('selected', 0):,} > counted {get('counted', 0):,}"
    return way + late + others


def _shapes(seen: Seen, screen: Screen) -> None:
    ended = sum(seen.shapes.values())
    if not ended:
        return
    shapes = sorted(seen.shapes.items(), key=lambda item: -item[1])
    rows = [(shape, f"{count:,}", f"{100 * count / ended:.1f} %") for shape, count in shapes[:SHAPES_SHOWN]]
    screen.table(("session", "number", "share"), rows, indent="  ")
    screen.line(f"  ({LEGEND})")


def _times(seen: Seen, screen: Screen) -> None:
    rows = [
        (_PHASES.get(phase, phase), words.duration(quantile(bins, 0.5)), words.duration(quantile(bins, 0.9)))
        for phase in _PHASES
        if (bins := seen.times.get(phase))
    ]
    if rows:
        screen.table(("a device's time", "half within", "90 % within"), rows, indent="  ")


def _document(seen: Seen) -> dict[str, Any]:
    return {
        "counts": seen.counts, "shapes": seen.shapes, "errors": {kind: each.count for kind, each in seen.errors.items()},
        "times": {
            phase: {"p50": quantile(bins, 0.5), "p90": quantile(bins, 0.9), "count": sum(bins.values())}
            for phase, bins in seen.times.items()
        },
    }  # fmt: skip
