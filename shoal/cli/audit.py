"""`shoal audit`: a task's privacy put to the test."""

from typing import Annotated

import typer

from shoal.cli import options
from shoal.cli.screen import Screen
from shoal.told import Told

EPILOG = options.examples(
    "shoal audit task.py --data users/ --rounds 20",
    "shoal audit task.py --data name:digits --users 100 --rounds 5 --canaries 1000 --json",
)


def audit(
    task: Annotated[str, typer.Argument(metavar="TASK", help="The task: file.py, file.py:name or module:name.")],
    data: options.Data = "",
    user_column: options.UserColumn = "",
    split: options.Split = "iid",
    users: options.Users = 20,
    rounds: Annotated[
        int, typer.Option("--rounds", min=1, help="Rounds of the audit, with every device in each.")
    ] = 10,
    canaries: Annotated[
        int, typer.Option("--canaries", min=10, help="Devices that half are in by a coin's toss; more tell more.")
    ] = 400,
    seed: Annotated[int, typer.Option("--seed", help="Of coins, canaries and training.")] = 0,
    json: options.AsJson = False,
) -> None:
    """Train a task once among canaries and say what epsilon that refutes. Fails where it refutes the one that the task claims.

    A canary is a device that sends a random direction as long as the clip norm allows; half of them are in the run, by the toss of a coin each.
    How well the trained model tells which are in bounds its epsilon from below (docs/privacy.md).
    """  # fmt: skip
    with Told() as told:
        from shoal.cli import data_argument
        from shoal.cli.round_lines import RoundLines
        from shoal.cli.task_argument import load_task
        from shoal.simulate.layout import use_all_cores

        screen = Screen(json=json)
        if not data:
            raise ValueError("Expected --data PATH (or --data name:digits): whose examples are to be trained on?")
        use_all_cores()
        chosen = load_task(task)
        told.check()
        population = data_argument.open_data(data, split=split, users=users, user_column=user_column)
        from shoal.audit.audited import audited

        found = audited(
            chosen, population, rounds=rounds, canaries=canaries, seed=seed, on_round=RoundLines(0, rounds, screen)
        )
        told.check()
    bound, claimed = found.bound, found.claimed
    screen.line(
        f"{bound.right} of {bound.guesses} guesses about {bound.canaries} canaries were right: with {bound.confidence:.0%} confidence epsilon is "
        f"at least {bound.epsilon:.3g} at delta {bound.delta:g}."
    )
    screen.line(
        "The task has no noise and claims no epsilon." if claimed is None
        else f"The ledger says {claimed:.3g}: " + ("REFUTED." if found.refutes else "not refuted, which is no proof.")
    )  # fmt: skip
    screen.document({
        "epsilon_at_least": bound.epsilon, "delta": bound.delta, "confidence": bound.confidence, "right": bound.right,
        "guesses": bound.guesses, "canaries": bound.canaries, "claimed": claimed, "refuted": found.refutes, "rounds": rounds,
    })  # fmt: skip
    if found.refutes:
        raise typer.Exit(1)
