"""The demo's last screen, and the files that it leaves in the run folder: curves, pictures, card."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from rich.console import Console
from rich.table import Table

import shoal
from shoal import data
from shoal.cli.demo_settings import DemoSettings
from shoal.cli.panel import time_table
from shoal.cli.words import duration, size
from shoal.report.card import write_card
from shoal.report.curves import Line, Mark, draw_curves
from shoal.report.facts import Facts
from shoal.report.pictures import Shown, draw_pictures, terminal_pictures

FEDERATED, CENTRAL, ALONE = "test/accuracy", "central/accuracy", "alone/accuracy"
"""On all test pictures."""
WATCHED: Final = "watched/accuracy"
"""On those that every version is evaluated on while training goes on."""
_NUM_SHOWN: Final = 10


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What came of a demo, in numbers."""

    facts: Facts
    settings: DemoSettings
    data_name: str
    num_test: int
    """Test pictures."""
    passes: int
    """Over the pooled pictures, of the central training."""
    seconds: Mapping[str, float]
    """What the parts of this command took."""

    @property
    def num_watched(self) -> int:
        """Test pictures on which every version is evaluated."""
        return min(self.settings.num_watched, self.num_test)

    @property
    def reached_version(self) -> int | None:
        """The first version with the accuracy that was asked for, on all test pictures."""
        return self.facts.first_reaching(FEDERATED, self.settings.goal_accuracy)

    @property
    def seconds_to_goal(self) -> float | None:
        """From the start of the command to that version's commit, pauses left out."""
        version = self.reached_version
        return None if version is None else self.facts.seconds[version]

    def to_json(self, folder: Path) -> dict[str, Any]:
        facts = self.facts
        return {
            "accuracy": facts.last(FEDERATED), "central_accuracy": facts.last(CENTRAL), "alone_accuracy": facts.last(ALONE),
            "seconds_to_80": self.seconds_to_goal, "rounds_to_80": self.reached_version, "seconds": sum(self.seconds.values()),
            "rounds": facts.version, "devices": self.settings.devices, "passes": self.passes, "data": self.data_name,
            "seconds_by_part": dict(self.seconds), "device_seconds": {name: use.seconds for name, use in facts.usage.items()},
            "bytes_down": sum(use.bytes_down for use in facts.usage.values()),
            "bytes_up": sum(use.bytes_up for use in facts.usage.values()), "run": facts.run.id, "folder": str(folder),
        }  # fmt: skip


def write_files(outcome: Outcome, folder: Path, shown: Sequence[Shown]) -> list[Path]:
    """Writes curves, pictures and card."""
    facts, settings = outcome.facts, outcome.settings
    lines = [
        Line(f"{label}, on all {outcome.num_test:,}:", value)
        for label, name in (("central training", CENTRAL), ("one device alone", ALONE))
        if (value := facts.last(name)) is not None
    ]
    title = (
        f"{outcome.data_name} on {settings.devices} devices: accuracy on {outcome.num_watched:,} watched test pictures"
    )
    version, seconds = outcome.reached_version, outcome.seconds_to_goal
    mark = None
    if version is not None and seconds is not None:
        mark = Mark(version, f"{settings.goal_accuracy:.0%} of all {outcome.num_test:,} after {duration(seconds)}")
    curves = draw_curves(
        facts, folder / "curves.png", metric=WATCHED, title=title, label="federated", lines=lines, mark=mark
    )
    pictures = draw_pictures(shown, folder / "pictures.png")
    notes = [
        f"The accuracies in the first rows are on all {outcome.num_test:,} test pictures. While training went on, versions "
        f"were evaluated on the first {outcome.num_watched:,} of them (`watched/…`); nothing was chosen by these numbers.",
        f"Data set: {outcome.data_name}, dealt out to {settings.devices} made-up devices by Dirichlet({settings.alpha:g}).",
    ]
    rows = [(f"accuracy, {what}", value) for what, value, _ in _result_rows(outcome)]
    card = write_card(facts, folder, results=rows, told=(FEDERATED, CENTRAL, ALONE), notes=notes)
    return [card, curves, pictures]


def show(outcome: Outcome, folder: Path, shown: Sequence[Shown], files: Sequence[Path], console: Console) -> None:
    """The last screen."""
    title = f"Accuracy on all {outcome.num_test:,} test pictures"
    table = Table(title=title, title_justify="left", title_style="bold", box=None, padding=(0, 2, 0, 0))
    for style in ({}, {"justify": "right", "style": "bold"}, {"style": "dim"}):
        table.add_column("", **style)  # type: ignore[arg-type]
    for row in _result_rows(outcome):
        table.add_row(*row)
    console.print()
    console.print(table)
    console.print()
    console.print(_time_sentence(outcome))
    console.print()
    for drawn in terminal_pictures(shown, colour=console.color_system is not None):
        console.print(drawn, no_wrap=True, crop=True)
    console.print()
    console.print(time_table(_parts(outcome), title="Where the time went"))
    console.print(time_table(_device_seconds(outcome), title="Seconds of devices and server, added up over them"))
    console.print()
    for what, path in zip(("Card", "Curves", "Pictures"), files, strict=True):
        console.print(f"{what + ':':10}{path}", soft_wrap=True, highlight=False)
    console.print(f"{'Run:':10}{folder}", soft_wrap=True, highlight=False)
    console.print("\nUse the model:\n", highlight=False)
    for line in model_lines(folder, outcome.data_name):
        console.print(f"    {line}", soft_wrap=True, highlight=False, markup=False)


def model_lines(folder: Path, data_name: str) -> tuple[str, str, str]:
    """The lines of Python that load the model and predict."""
    images = f'shoal.data.load("{data_name}").test.fields["image"][:10]'
    if data_name == "digits":
        images = "np.zeros((10, 28, 28, 1), np.uint8)"  # its own are 8x8: the demo enlarges them
    return (
        "import numpy as np, shoal" if data_name == "digits" else "import shoal",
        f'model = shoal.load("{folder.as_posix()}")',
        f"print(model.predict({images}).argmax(-1))",
    )


def sample(folder: Path, dataset: data.Dataset) -> list[Shown]:
    """The first test picture of each class, and what the last version says."""
    labels = dataset.test.fields["label"]
    chosen = np.unique(labels, return_index=True)[1][:_NUM_SHOWN]
    images = dataset.test.fields["image"][chosen]
    said = shoal.load(folder).predict({"image": images}).argmax(-1)
    names = dataset.classes
    return [
        Shown(image, names[int(guess)], names[int(truth)])
        for image, guess, truth in zip(images, said, labels[chosen], strict=True)
    ]


def _result_rows(outcome: Outcome) -> list[tuple[str, str, str]]:
    facts, settings = outcome.facts, outcome.settings
    rows = [
        ("federated", FEDERATED, f"{settings.devices} devices, {facts.version} rounds of {settings.goal}"),
        ("central training", CENTRAL, f"all pictures in one place, {outcome.passes} passes, the same net and settings"),
        (
            "one device alone", ALONE,
            f"its own pictures only, {settings.alone_passes} passes; median of {settings.alone}",
        ),
    ]  # fmt: skip
    return [
        (what, f"{value:.1%}" if (value := facts.last(name)) is not None else "–", note) for what, name, note in rows
    ]


def _time_sentence(outcome: Outcome) -> str:
    goal, seconds = outcome.settings.goal_accuracy, outcome.seconds_to_goal
    if seconds is None:
        return f"{goal:.0%} was not reached in {outcome.facts.version} rounds."
    return f"{goal:.0%} after {duration(seconds)} from the start, by version {outcome.reached_version}."


def _parts(outcome: Outcome) -> list[tuple[str, float, str]]:
    notes = {
        "data": "load, deal out, write a file a device",
        "start": "trace and sign the plan, start 1 + n processes",
        "rounds": "until the last version is committed; compilation is in the first",
        "evaluate": "the last version on all test pictures",
        "compare": "central training, and devices alone, side by side",
        "report": "card, curves, pictures",
    }
    rows = [(part, seconds, notes.get(part, "")) for part, seconds in outcome.seconds.items()]
    return [*rows, ("in all", sum(outcome.seconds.values()), "")]


def _device_seconds(outcome: Outcome) -> list[tuple[str, float, str]]:
    usage = outcome.facts.usage
    notes = {
        "compute": "training steps",
        "padding": "the part of compute that went into filling up batches",
        "compile": "starting the runner; the plan's programs, or loading them from the cache",
        "data": "reading and batching examples",
        "wait": "for their turn: a process fetches once for all its devices, and trains one at a time",
        "wire": "fetching plan and model, sending updates: "
        f"{size(sum(u.bytes_down for u in usage.values()))} down, {size(sum(u.bytes_up for u in usage.values()))} up",
        "commit": "server: mean, server rule, record, to the disk",
        "evaluate": "server: test pictures, in a process of its own",
    }
    return [(phase, usage[phase].seconds, note) for phase, note in notes.items() if phase in usage]
