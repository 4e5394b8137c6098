"""`shoal privacy`: what a run has spent of privacy, and how much noise a budget needs."""

from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from shoal.cli import options
from shoal.cli.screen import Screen

if TYPE_CHECKING:
    import numpy as np

EPILOG = options.examples(
    "shoal privacy runs/digits",
    "shoal privacy runs/digits --plot spent.png",
    "shoal privacy --epsilon 8 --delta 1e-6 --rounds 100",
    "shoal privacy --epsilon 8 --rounds 512 --min-separation 64",
)


def privacy(
    run: Annotated[
        Path | None, typer.Argument(metavar="RUN", help="The run folder, or one of several: then the newest.")
    ] = None,
    plot: Annotated[Path | None, typer.Option("--plot", help="Draw epsilon over releases into this PNG.")] = None,
    epsilon: Annotated[
        float | None, typer.Option("--epsilon", help="Without RUN: the budget that noise is to be found for.")
    ] = None,
    delta: Annotated[float, typer.Option("--delta", help="Without RUN: what it is stated at.")] = 1e-6,
    rounds: Annotated[int, typer.Option("--rounds", min=1, help="Without RUN: of the training.")] = 100,
    min_separation: Annotated[
        int,
        typer.Option(
            "--min-separation", min=1, help="Without RUN: rounds from one that has a device to the next that may."
        ),
    ] = 1,
    run_id: options.RunId = None,
    json: options.AsJson = False,
) -> None:
    """Say what a run has spent of its population's privacy budget, in words and numbers; or how much noise a budget needs."""
    screen = Screen(json=json)
    if run is None:
        return _calibrate(screen, epsilon, delta, rounds, min_separation)
    if epsilon is not None:
        raise ValueError("Expected RUN or --epsilon, got both: --epsilon is for a run that is still to be made.")
    from shoal.errors import DataError
    from shoal.report.examples_spent import statement_of_examples
    from shoal.report.facts import read_facts
    from shoal.report.privacy_spent import statement

    facts = read_facts(run, run_id)
    spent, of_examples = facts.spent, facts.of_examples
    if spent is None and of_examples is None:
        raise DataError(
            f"Run {facts.run.id} has no noise, so it spends nothing and promises nothing: see docs/privacy.md for Privacy(noise_multiplier=…) and "
            "Privacy(examples=…)."
        )
    if spent is None and plot is not None:
        raise ValueError(
            "Expected no --plot for a run with noise on examples alone: each device has a budget of its own."
        )
    told = [statement(spent)] if spent is not None else []
    told += [statement_of_examples(of_examples)] if of_examples is not None else []
    screen.line("\n\n".join(told).replace("**", ""))
    document: dict[str, Any] = {"run": facts.run.id}
    if spent is not None:
        if plot is not None:
            from shoal.report.privacy_picture import draw_spent

            screen.line(f"picture: {draw_spent(spent, plot)}")
        document |= {
            "epsilon": spent.epsilon, "delta": spent.privacy.delta, "budget": spent.privacy.epsilon,
            "releases": [{**release.data, "count": count} for release, count in (spent.here + spent.elsewhere).items()],
            "unsettled": spent.unsettled,
        }  # fmt: skip
    screen.document(document | ({"examples": of_examples.to_json()} if of_examples is not None else {}))


def _calibrate(screen: Screen, epsilon: float | None, delta: float, rounds: int, min_separation: int) -> None:
    if epsilon is None:
        raise ValueError("Expected a RUN, or --epsilon (with --delta and --rounds) to find the noise for.")
    from shoal.privacy.accounting import calibrate, participations
    from shoal.privacy.correlated import Schedule, fit_blt, tree_errors, tree_sensitivity

    most = participations(rounds, min_separation)
    own, one = calibrate(epsilon, delta, releases=most), calibrate(epsilon, delta)
    devices = calibrate(epsilon, delta, releases=most, rdp=_rdp_of_devices)
    schedule = Schedule(steps=rounds, min_separation=min_separation, participations=most)
    blt = fit_blt(schedule)
    found = {
        "independent": (own, own * rounds**0.5),
        "distributed": (devices, devices * rounds**0.5),
        "blt": (one, float(one * blt.sensitivity(schedule) * blt.errors(rounds)[-1])),
        "tree": (one, float(one * tree_sensitivity(schedule) * tree_errors(rounds).max())),
    }
    screen.line(
        f"epsilon {epsilon:g} at delta {delta:g} for {rounds} rounds, a device in {'each' if most == rounds else f'at most {most}'} of them:"
    )
    for name, (multiplier, learned) in found.items():
        how = {
            "independent": "noise of each round's own",
            "distributed": "distributed=True",
        }.get(name, f'correlated=Correlated(rounds={rounds}, kind="{name}")')
        enough = ceil(1e4 * multiplier) / 1e4  # what is printed keeps to the budget, too
        least = "at least " if name == "distributed" else ""
        screen.line(
            f"  noise_multiplier={enough:.4f}, {how}: {least}{learned:.1f} clip norms of noise in all rounds' sum"
        )
    screen.document({
        "epsilon": epsilon, "delta": delta, "rounds": rounds, "min_separation": min_separation, "participations": most,
        "noise_multiplier": own,
        **{name: {"noise_multiplier": multiplier, "noise_in_sum": learned} for name, (multiplier, learned) in found.items()},
    })  # fmt: skip


def _rdp_of_devices(noise_multiplier: float) -> "np.ndarray":
    """The curve of a release whose noise devices add, as the ledger has it, on sums as fine as 32 bits make them."""
    from shoal.privacy.spending import Release

    return Release(noise_multiplier=noise_multiplier, l2=2.0**20, elements=10**6).rdp()
