"""`shoal check`: a line for each thing that a task must keep, and what it costs."""

import typer

from shoal.cli import options, words
from shoal.cli.screen import Screen, Stopwatch

EPILOG = options.examples(
    "shoal check task.py",
    "shoal check examples/one_task.py:task --data users/",
    "shoal check task.py --data visits.csv --user-column patient",
    "shoal check task.py --data name:digits --users 50 --json",
)


def check(
    task: options.TaskName,
    data: options.Data = "",
    user_column: options.UserColumn = "",
    split: options.Split = "iid",
    users: options.Users = 20,
    json: options.AsJson = False,
) -> None:
    """Check a task: pass or fail, a line each.

    Whether its functions keep their contracts, it can be exported and learns on the data; and what a device needs for
    it. Without --data, random examples take the data's place. Exits with 1 if anything fails.
    """
    from shoal.cli import data_argument
    from shoal.cli.task_argument import load_task

    screen, watch = Screen(json=json), Stopwatch()
    population = data_argument.open_data(data, split=split, users=users, user_column=user_column) if data else None
    watch.lap("data")
    screen.live("loading the task")
    chosen = load_task(task)
    watch.lap("loading")
    from shoal import testing

    report = testing.check(chosen, population, on_line=lambda line: screen.line(str(line)))
    watch.lap("checks")
    failed = [line.name for line in report.lines if line.status == "fail"]
    counts = f"{sum(line.status == 'pass' for line in report.lines)} pass, {len(failed)} fail"
    screen.line(f"task {report.task}: {counts}; where the time went: {words.phases(watch.seconds, total=watch.total)}")
    screen.document(
        {
            "task": report.task,
            "ok": report.ok,
            "lines": [vars(line) for line in report.lines],
            "total_seconds": watch.total,
        }
    )
    if not report.ok:
        screen.say(f"shoal: task {report.task} fails: {', '.join(failed)}.")
        raise typer.Exit(1)
