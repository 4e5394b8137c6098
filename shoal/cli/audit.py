"""`shoal audit`: a task's privacy put to the test."""

import time
from collections.abc import Callable
from enum import Enum
from typing import TYPE_CHECKING, Annotated, Any, Final, final

import typer

from shoal.cli import options, words
from shoal.cli.screen import Screen
from shoal.told import Told

if TYPE_CHECKING:
    from shoal.audit.membership import Membership
    from shoal.data import Population
    from shoal.task import Task

EPILOG = options.examples(
    "shoal audit task.py --data users/ --rounds 20",
    "shoal audit task.py --data name:digits --users 100 --rounds 5 --canaries 1000 --json",
    "shoal audit task.py --data users/ --attack membership --shadows 16",
    "shoal audit task.py --data users/ --attack inversion --at-most 0.5",
)
NO_CLAIM: Final = "The task has no noise on its sums and claims no epsilon of a device."


class Attack(Enum):
    canaries = "canaries"
    membership = "membership"
    inversion = "inversion"


def audit(
    task: Annotated[str, typer.Argument(metavar="TASK", help="The task: file.py, file.py:name or module:name.")],
    data: options.Data = "",
    attack: Annotated[
        Attack,
        typer.Option(
            "--attack",
            help="canaries: a lower bound on epsilon. membership: does the loss tell what was trained on? inversion: examples read from updates.",
        ),
    ] = Attack.canaries,
    user_column: options.UserColumn = "",
    split: options.Split = "iid",
    users: options.Users = 20,
    rounds: Annotated[
        int,
        typer.Option(
            "--rounds", min=1, help="Rounds of the audit, with every device in as many as may be (inversion: one)."
        ),
    ] = 10,
    canaries: Annotated[
        int, typer.Option("--canaries", min=10, help="Devices that half are in by a coin's toss; more tell more.")
    ] = 400,
    shadows: Annotated[
        int,
        typer.Option(
            "--shadows", min=0, help="Models that membership compares with, an even number; 0: by the loss only."
        ),
    ] = 8,
    trials: Annotated[int, typer.Option("--trials", min=1, help="Rounds of each kind that inversion reads.")] = 10,
    at_most: Annotated[
        float | None,
        typer.Option(
            "--at-most",
            help="Fail where more is found. canaries: epsilon's lower bound. membership: the share of members that is found, the lower end of its "
            "interval, by the better way. inversion: of the task as it is, 0: what chance gives, 1: the example itself.",
        ),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Of coins, halves, canaries and training.")] = 0,
    json: options.AsJson = False,
) -> None:
    """Attack a task's training and say what was found, with an interval. Fails where canaries refute what the task claims.

    canaries: devices that send a random direction as long as the clip norm allows, half of them in the run by the toss of a coin each. How well the
    trained model tells which are in bounds its epsilon from below. membership: trained on half of each user's examples, the model's losses
    are to tell which half. inversion: examples read back out of one device's update, of a group's sum, and of that with noise
    (docs/privacy.md).
    """  # fmt: skip
    with Told() as told:
        from shoal.audit.learned import check_shadows
        from shoal.cli import data_argument
        from shoal.cli.round_lines import RoundLines
        from shoal.cli.task_argument import load_task
        from shoal.simulate.layout import use_all_cores

        screen = Screen(json=json)
        if not data:
            raise ValueError("Expected --data PATH (or --data name:digits): whose examples are to be trained on?")
        if attack is Attack.membership:
            check_shadows(shadows)
        use_all_cores()
        chosen = load_task(task)
        told.check()
        population = data_argument.open_data(data, split=split, users=users, user_column=user_column)
        match attack:
            case Attack.canaries:
                lines = RoundLines(0, rounds, screen)
                document, found = _canaries(chosen, population, screen, rounds, canaries, seed, lines)
            case Attack.membership:
                document, found = _membership(chosen, population, screen, rounds, shadows, seed)
            case Attack.inversion:
                document, found = _inversion(chosen, population, screen, trials, seed)
        told.check()
    exceeds = at_most is not None and found > at_most
    if exceeds:
        screen.line(f"More than --at-most {at_most:g}: {found:.3g}.")
    screen.document({"attack": attack.value, **document, "found": found, "exceeds": exceeds})
    if document.get("refuted", False) or exceeds:
        raise typer.Exit(1)


def _canaries(
    task: "Task", users: "Population", screen: Screen, rounds: int, canaries: int, seed: int, on_round: Callable[[Any], None]
) -> tuple[dict[str, Any], float]:  # fmt: skip
    from shoal.audit.audited import audited

    found = audited(task, users, rounds=rounds, canaries=canaries, seed=seed, on_round=on_round)
    bound, claimed = found.bound, found.claimed
    screen.line(
        f"{bound.right} of {bound.guesses} guesses about {bound.canaries} canaries were right: with {bound.confidence:.0%} confidence epsilon is "
        f"at least {bound.epsilon:.3g} at delta {bound.delta:g}."
    )
    screen.line(
        NO_CLAIM if claimed is None
        else f"The ledger says {claimed:.3g}: " + ("REFUTED." if found.refutes else "not refuted, which is no proof.")
    )  # fmt: skip
    return {
        "epsilon_at_least": bound.epsilon, "delta": bound.delta, "confidence": bound.confidence, "right": bound.right,
        "guesses": bound.guesses, "canaries": bound.canaries, "claimed": claimed, "refuted": found.refutes, "rounds": rounds,
    }, bound.epsilon  # fmt: skip


def _membership(
    task: "Task", users: "Population", screen: Screen, rounds: int, shadows: int, seed: int
) -> tuple[dict[str, Any], float]:
    from shoal.audit.learned import learned

    found = learned(
        task, users, rounds=rounds, shadows=shadows, seed=seed, on_round=ModelLines(1 + shadows, rounds, screen)
    )
    tests = {"loss": found.by_loss, "likelihood ratio": found.by_likelihood}
    made = {name: test for name, test in tests.items() if test is not None}
    for name, test in made.items():
        screen.line(
            f"by the {name}: {test.found:.1%} of the members are found ({test.low:.1%} to {test.high:.1%}) where {test.wrong:.0%} of the others are "
            f"accused; area under the curve {test.auc:.3f} (0.5: nothing is told)."
        )
    screen.line(
        NO_CLAIM if found.claimed is None
        else f"The ledger says epsilon {found.claimed:.3g} at delta {found.delta:g}, of a device with all its examples; this attack is no test of that."
    )  # fmt: skip
    document = {name.replace(" ", "_"): _told(test) for name, test in made.items()}
    return {
        **document, "examples": found.examples, "shadows": found.shadows, "claimed": found.claimed, "delta": found.delta, "rounds": rounds,
    }, max(test.low for test in made.values())  # fmt: skip


def _told(test: "Membership") -> dict[str, float]:
    return {"found": test.found, "low": test.low, "high": test.high, "wrong": test.wrong, "auc": test.auc}


@final
class ModelLines:
    """Is told of each round of several trainings, one after the other, and says a line of each training."""

    def __init__(
        self, models: int, rounds: int, screen: Screen, *, now_s: Callable[[], float] = time.perf_counter
    ) -> None:
        self._models, self._rounds, self._screen, self._now_s = models, rounds, screen, now_s
        self._began_s, self._done = now_s(), 0

    def __call__(self, result: Any) -> None:
        self._done += 1
        took_s = self._now_s() - self._began_s
        left_s = took_s / self._done * (self._models * self._rounds - self._done)
        trained, rounds = divmod(self._done, self._rounds)
        if rounds:
            self._screen.live(f"model {trained + 1}/{self._models}  round {rounds}/{self._rounds}")
        else:
            self._screen.say(f"model {trained}/{self._models}  {words.duration(took_s)}  {words.duration(left_s)} left")


def _inversion(
    task: "Task", users: "Population", screen: Screen, trials: int, seed: int
) -> tuple[dict[str, Any], float]:
    from shoal.audit.read_back import read_back

    found = read_back(task, users, trials=trials, seed=seed)
    for each in found:
        (guessed, *_), (known, low, high) = each.guessed, each.known
        screen.line(
            f"{each.what}: what is read correlates {known:.3f} ({low:.3f} to {high:.3f}) with an example, by the best neuron; {guessed:.3f} by the one "
            "that moved most" + (f"; {each.chance[0]:.3f} with examples of others." if each.chance is not None else ".")
        )
    rows = [
        {
            "round": each.what,
            "devices": each.devices,
            "noise": each.noise,
            "guessed": each.guessed,
            "known": each.known,
            "chance": each.chance,
            "beyond_chance": each.beyond_chance,
        }
        for each in found
    ]
    return {"rounds": rows, "trials": trials}, found[-1].beyond_chance
