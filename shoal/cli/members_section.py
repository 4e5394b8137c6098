"""What the processes of a training on a mesh saw of themselves, as `shoal runs show` prints it."""

from collections.abc import Sequence
from typing import Any

from shoal.cli import words
from shoal.cli.screen import Screen
from shoal.pod.seen import MemberSeen, slow, within_s
from shoal.record.store import RoundRow


def show(rounds: Sequence[RoundRow], screen: Screen) -> list[dict[str, Any]]:
    """Prints it, over all versions, and returns it for the JSON document."""
    found: dict[int, MemberSeen] = {}
    last: list[MemberSeen] = []
    for row in rounds:
        now = [MemberSeen.from_json(each) for each in row.configuration.get("members", ())]
        last = now or last
        for seen in now:
            found[seen.process] = found[seen.process].plus(seen) if seen.process in found else seen
    if not found:
        return []
    screen.line("\nprocesses, over all versions")
    screen.table(
        ("process", "steps", "half within", "90 % within", "waits for examples", "stood still", "memory", "life"),
        [
            (
                str(each.process), f"{sum(each.step_s):,}", words.duration(within_s(each.step_s, 0.5)), words.duration(within_s(each.step_s, 0.9)),
                f"{each.waited:.1%}", f"{each.stalls:,}", words.size(each.memory_bytes), str(each.life),
            )
            for _, each in sorted(found.items())
        ],
        indent="  ",
    )  # fmt: skip
    for process, why in slow(last).items():
        screen.line(f"  process {process} was slow at the last version: {why}")
    return [each.to_json() for _, each in sorted(found.items())]
