"""`shoal replay`: a round's machine, run again from what it was told."""

from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from shoal.cli import options
from shoal.cli.screen import Screen

if TYPE_CHECKING:
    from shoal.fleet.round_events import Command, Event
    from shoal.fleet.round_log import Replay, Step

EPILOG = options.examples("shoal replay runs/digits --round 7", "shoal replay runs/digits --round 7 --json")


def replay(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The run folder, or one of several: then the newest.")],
    round: Annotated[int, typer.Option("--round", min=1, help="Which round; those before the newest are forgotten.")],
    run_id: options.RunId = None,
    json: options.AsJson = False,
) -> None:
    """Run a round's machine again from its events, check that it decides the same, and tell the story.

    Devices are numbered as they appear; a number means nothing outside its round.
    """
    from shoal.errors import DataError
    from shoal.fleet.round_log import replay as run_again
    from shoal.record.run import open_run
    from shoal.report.explain import find_round

    screen = Screen(json=json)
    with open_run(run, run_id=run_id) as opened:
        rows = {row.number: row for row in opened.store.rounds(opened.id)}
        find_round(list(rows.values()), round)
        data = opened.store.round_log(opened.id, round)
        if data is None:
            kept = [number for number in rows if opened.store.round_log(opened.id, number) is not None]
            has = f"those of rounds {kept[0]} to {kept[-1]}" if kept else "none"
            raise DataError(
                f"The events of round {round} are not in the record, which keeps {has}: the newest of a host or a virtual fleet "
                "are kept, of rounds that have ended and whose host did not die in them."
            )
    made = run_again(data)
    _tell(made, round, screen)
    screen.line(_end(made, rows[round].state))
    screen.document(_document(made, round))


def _tell(made: "Replay", round: int, screen: Screen) -> None:
    screen.line(f"round {round}: {len(made.steps)} events, run again with the same decisions\n")
    rows = []
    for steps in _like(made.steps):
        first = steps[0]
        events = _event(first.event) if len(steps) == 1 else f"{len(steps)} x {type(first.event).__name__.lower()}"
        said = "; ".join(_command(command, made.began_s) for command in first.commands)
        rows.append((f"{first.time_s:.3f}", first.phase.value, events, said))
    screen.table(("s", "phase", "event", "decision"), rows)
    if made.left_out:
        screen.line(f"\n(cut: {made.left_out} events more came than are kept of a round)")


def _like(steps: "tuple[Step, ...]") -> "Iterator[list[Step]]":
    """Steps one by one; those that follow one another, are of one kind and made no difference, together."""
    numbered = groupby(
        enumerate(steps),
        key=lambda item: (type(item[1].event), item[1].phase) if not item[1].commands else item[0],
    )
    for _, group in numbered:
        yield [step for _, step in group]


def _event(event: "Event") -> str:
    from shoal.fleet import round_events as r

    match event:
        case r.Started(version, round):
            return f"the run is taken up at version {version}, after round {round}"
        case r.Arrived(devices, edge):
            return f"arrived{_at(edge)}: {_names(devices)}"
        case r.Left(device):
            return f"left: device {device}"
        case r.Joined(nonce, version):
            return f"joined: {_member(nonce)}, on version {version}"
        case r.Counted(nonce, _, staleness, edge):
            return f"counted{_at(edge)}: {_member(nonce)}{f', {staleness} versions late' if staleness else ''}"
        case r.Released(nonce):
            return f"released: {_member(nonce)}"
        case r.Away(nonce):
            return f"lost its connection: {_member(nonce)}"
        case r.Stored(nonces):
            return f"a group is stored: {len(nonces)} members"
        case r.Committed(version):
            return f"version {version} is committed"
        case r.Failed(why):
            return f"the commit failed: {why}"
        case r.Abandoned():
            return "the round before was abandoned"
        case _:
            return {"Tick": "it is time", "Stop": "asked to stop"}[type(event).__name__]


def _command(command: "Command", began_s: float) -> str:
    from shoal.fleet import round_events as r

    match command:
        case r.OpenRound(round, base_version):
            return f"open round {round} on version {base_version}"
        case r.Assign(devices):
            return f"assign {_names(devices)}"
        case r.StoreGroup():
            return "store the group"
        case r.Gather():
            return "let small groups come together at one Edge"
        case r.CommitRound(_, reason):
            return f"commit: {reason}"
        case r.AbandonRound(_, reason):
            return f"abandon: {reason}"
        case r.Finish():
            return "finish the run"
        case r.WakeAt(time_s):
            return f"wake at {time_s - began_s:.3f} s"


def _at(edge: str) -> str:
    return f" at {edge}" if edge else ""


def _names(devices: tuple[str, ...]) -> str:
    shown = ", ".join(devices[:8])
    return f"{'device' if len(devices) == 1 else f'{len(devices)} devices'} {shown}{', …' if len(devices) > 8 else ''}"


def _member(nonce: bytes) -> str:
    return f"device {int.from_bytes(nonce, 'big')}"


def _end(made: "Replay", state: str) -> str:
    from shoal.fleet import round_events as r

    close = made.close
    if close is None:
        return "\nthe log does not hold how the round ended"
    how = "commit" if isinstance(close, r.CommitRound) else "be abandoned"
    became = "" if (state == "committed") == isinstance(close, r.CommitRound) else f", but it was {state}"
    end = made.end
    return (
        f"\nit was to {how}, because: {close.reason}{became}. Then {end.counted} were counted, {end.outstanding} still out, "
        f"{end.waiting} waiting."
    )


def _document(made: "Replay", round: int) -> dict[str, Any]:
    close = made.close
    return {
        "round": round, "same": True, "left_out": made.left_out,
        "close": None if close is None else {"how": type(close).__name__, "reason": close.reason},
        "steps": [
            {"time_s": step.time_s, "phase": step.phase.value, "event": _event(step.event),
             "commands": [_command(command, made.began_s) for command in step.commands]}
            for step in made.steps
        ],
    }  # fmt: skip
