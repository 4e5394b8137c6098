"""The part of `shoal simulate` and `shoal runs show` that tells how metrics are distributed over users."""

from typing import Any

from shoal.cli import words
from shoal.cli.screen import Screen
from shoal.record.distribution import read_distributions
from shoal.record.store import Store
from shoal.report.over_users import over_users

_COLUMNS = (
    "over users",
    "version",
    "users",
    "worst tenth",
    "median",
    "best tenth",
    "from",
    "users at each value",
    "to",
)


def show(store: Store, run_id: str, screen: Screen) -> list[dict[str, Any]]:
    """A line for each metric; the same as JSON."""
    found = over_users(read_distributions(store.events(run_id)))
    if found:
        screen.line()
        rows = [
            (
                each.metric, str(each.version), str(each.users), words.value(each.worst), words.value(each.median),
                words.value(each.best), words.value(each.least), each.bars, words.value(each.most),
            )
            for each in found
        ]  # fmt: skip
        screen.table(_COLUMNS, rows, indent="  ")
    return [each.to_json() for each in found]
