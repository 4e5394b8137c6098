"""`shoal telemetry`: what devices' days add up to, and the helper without which nobody sees that."""

import math
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from shoal.cli import options
from shoal.cli.screen import Screen

if TYPE_CHECKING:
    from shoal.privacy.telemetry import Total
    from shoal.record.store import TelemetryRow

HELPER_EPILOG = options.examples(
    "shoal telemetry helper helper/ --port 8600",
    "shoal telemetry helper helper/ --address 0.0.0.0 --port 8600 --tls --minimum 500",
)
SHOW_EPILOG = options.examples(
    "shoal telemetry show runs/digits", "shoal telemetry show runs/digits --days 7 --plot hours.png"
)
app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Counts of devices' days, of which only sums with noise are seen (docs/telemetry.md).",
    epilog=options.examples("shoal telemetry helper helper/ --port 8600", "shoal telemetry show runs/digits"),
)
SURE: Final = 1.96
"""Standard deviations on either side that hold 95 % of a normal distribution."""
BAR: Final = 40
DELTA: Final = 1e-6


@app.command("show", epilog=SHOW_EPILOG)
def show(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The run folder, or one of several: then the newest.")],
    days: Annotated[
        int | None, typer.Option("--days", min=1, help="The last days that were told of.", show_default="all")
    ] = None,
    plot: Annotated[Path | None, typer.Option("--plot", help="Draw the hours of the day into this PNG.")] = None,
    run_id: options.RunId = None,
    json: options.AsJson = False,
) -> None:
    """Say what devices' days add up to, each total with the range that holds it in 95 of 100 cases."""
    import numpy as np

    from shoal.errors import DataError
    from shoal.privacy.telemetry import BOUNDS, SCHEMA, totals

    screen = Screen(json=json)
    rows, run_id = _rows(run, run_id, days)
    rows = [row for row in rows if row.schema == SCHEMA.hex() and len(row.sums) == BOUNDS.size]
    if not rows:
        raise DataError(
            f"Run {run_id} has no telemetry of this version's form. It needs --telemetry, of the host and of devices, and a day's first "
            "sum comes up to two days after it, once enough devices have told (docs/telemetry.md)."
        )
    sums = np.sum([row.sums for row in rows], axis=0)
    found = totals(sums, variance=sum(row.noise**2 for row in rows))
    reports, told = sum(row.reports for row in rows), sorted({row.day for row in rows})
    screen.line(f"{reports} reports of {len(told)} days, {_date(told[0])} to {_date(told[-1])} (UTC)")
    screen.line()
    _tell(screen, found)
    screen.line()
    day, all_days = _epsilons(rows)
    screen.line(
        f"one device's day: epsilon {day:.2g}; all {len(told)}: {all_days:.2g}; at delta {DELTA:g}, against all who see these sums, the host included"
    )
    if plot is not None:
        _draw(found, reports, plot)
        screen.line(f"picture: {plot}")
    screen.document({
        "run": run_id, "reports": reports, "days": [_date(day) for day in told], "epsilon_of_a_day": day, "epsilon_of_all": all_days,
        "delta": DELTA,
        "totals": {total.name: {"value": total.value, "standard_error": total.error} for total in found},
        "plot": None if plot is None else str(plot),
    })  # fmt: skip


@app.command("helper", epilog=HELPER_EPILOG)
def helper(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Where it keeps its key and what it has opened.")],
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="Where to listen; 0: any free port.")] = 8600,
    address: Annotated[str, typer.Option("--address", help="Interface to listen on; 0.0.0.0 for all.")] = "127.0.0.1",
    minimum: Annotated[int, typer.Option("--minimum", min=1, help="Fewest reports in a sum that is opened.")] = 64,
    noise: Annotated[
        float, typer.Option("--noise", min=1.0, help="Noise on each total of a day, in the units of docs/telemetry.md.")
    ] = 27.0,
    tls: Annotated[bool, typer.Option("--tls", help="Encrypt, with a certificate made for this folder.")] = False,
    tls_cert: Annotated[Path | None, typer.Option("--tls-cert", help="PEM file of its certificate chain.")] = None,
    tls_key: Annotated[Path | None, typer.Option("--tls-key", help="PEM file of its key.")] = None,
    insecure: Annotated[bool, typer.Option("--insecure", help="Allow listening on a network without TLS.")] = False,
    json: options.AsJson = False,
) -> None:
    """Open sums of telemetry for a host.

    To be run by somebody who does not join the host's operator: together they could read every report, apart neither can. Prints the key that
    devices are given with --telemetry.
    """  # fmt: skip
    from shoal.cli import telemetry_helper
    from shoal.cli.host_checks import check_port, check_tls
    from shoal.fleet.telemetry_helper import Terms

    check_tls(address, tls=tls, cert=tls_cert, key=tls_key, insecure=insecure)
    check_port(address, port)
    telemetry_helper.run(
        telemetry_helper.Settings(
            folder=folder, address=address, port=port, terms=Terms(minimum=minimum, noise=noise), make_tls=tls,
            tls_cert=tls_cert, tls_key=tls_key,
        ),
        screen=Screen(json=json),
    )  # fmt: skip


def _rows(run: Path, run_id: str | None, days: int | None) -> "tuple[list[TelemetryRow], str]":
    from shoal.record.run import latest_run
    from shoal.record.sqlite import open_store

    found = latest_run(run, task=run_id or "")
    store = open_store(found.path, read_only=True)
    try:
        rows = list(store.telemetry(found.run.id))
    finally:
        store.close()
    kept = set(sorted({row.day for row in rows})[-days:] if days else {row.day for row in rows})
    return [row for row in rows if row.day in kept], found.run.id


def _epsilons(rows: "list[TelemetryRow]") -> tuple[float, float]:
    """Of the day that costs a device most, and of all: a device's day is in one of that day's sums, perhaps the one with the least noise."""
    from shoal.privacy.accounting import epsilon_of_zcdp
    from shoal.privacy.telemetry import rho

    each = [rho(min(row.noise for row in rows if row.day == day)) for day in {row.day for row in rows}]
    return epsilon_of_zcdp(max(each), DELTA), epsilon_of_zcdp(math.fsum(each), DELTA)


def _tell(screen: Screen, found: "tuple[Total, ...]") -> None:
    highest = max((total.value for total in found if total.name.startswith("hour/")), default=0)
    rows = []
    for total in found:
        bar = ""
        if total.name.startswith("hour/") and highest > 0:
            bar = "█" * round(BAR * max(0, total.value) / highest)
        rows.append([total.name, str(total.value), f"± {math.ceil(SURE * total.error)}", bar])
    screen.table(["what", "total", "95 %", ""], rows)


def _draw(found: "tuple[Total, ...]", reports: int, path: Path) -> None:
    from shoal.report.telemetry_picture import draw_hours

    hours = [total for total in found if total.name.startswith("hour/")]
    draw_hours([each.value / reports for each in hours], [SURE * each.error / reports for each in hours], path)


def _date(day: int) -> str:
    return time.strftime("%Y-%m-%d", time.gmtime(day * 86_400))
