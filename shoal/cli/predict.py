"""`shoal predict`: a version of a run, on examples from a file."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from shoal.cli import options, words
from shoal.cli.screen import Screen, Stopwatch

if TYPE_CHECKING:
    import numpy as np

    from shoal.api import Model

EPILOG = options.examples(
    "shoal predict runs/digits images.npy",
    "shoal predict runs/digits test.npz --version 10 --out predictions.npz",
)
SHOWN: Final = 10


def predict(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The run folder, or one of several: then the newest.")],
    input: Annotated[Path, typer.Argument(metavar="INPUT", help="An .npz of fields, or an .npy of the only field.")],
    version: Annotated[
        int | None, typer.Option("--version", min=0, help="Which version.", show_default="the newest")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Write the predictions to this .npz.")] = None,
    run_id: options.RunId = None,
    json: options.AsJson = False,
) -> None:
    """Predict with a version of a run.

    The task's source is not needed."""
    screen, watch = Screen(json=json), Stopwatch()
    fields = _read(input)
    if out is not None and out.suffix != ".npz":
        raise ValueError(f"Expected --out FILE.npz, got {out}.")
    import shoal
    from shoal.record.run import latest_run

    found = latest_run(run, task=run_id or "")
    run = found.path
    model = shoal.load(run, version=version, task=found.run.id)
    if not model.plan.manifest.variants("predict"):
        raise ValueError(
            f"Task {model.name!r} has no `predict`. Give it one: (params, state, batch) -> (B, …); where {run} has runs of "
            "other tasks, name one with --id."
        )
    watch.lap("load")
    made = model.predict(fields)
    watch.lap("predict")
    arrays = {"prediction": made} | ({"class": made.argmax(-1)} if _classifies(model, made) else {})
    if out is not None:
        from shoal.data import npz

        npz.write(out, arrays)
    _tell(model, arrays, out, run, screen, watch)


def _read(path: Path) -> "dict[str, np.ndarray] | np.ndarray":
    import numpy as np

    from shoal.data import npz
    from shoal.errors import DataError

    if path.suffix == ".npz":
        return npz.read(path)
    if path.suffix != ".npy":
        raise ValueError(f"Expected INPUT to be an .npz or an .npy file, got {path}.")
    try:
        array: np.ndarray = np.load(path, allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise DataError(f"Cannot read {path}: it is no .npy file of numbers.") from error
    if not array.ndim:
        raise DataError(f"Expected {path} to hold examples (N, …), got a single number.")
    return array


def _classifies(model: "Model", made: "np.ndarray") -> bool:
    """Whether predictions are scores of classes: the task says so by having an accuracy."""
    outputs = {spec.name for program in model.plan.manifest.variants("evaluate") for spec in program.outputs}
    return made.ndim == 2 and made.shape[1] > 1 and any(name.startswith("metric/accuracy/") for name in outputs)


def _tell(
    model: "Model", arrays: "dict[str, np.ndarray]", out: Path | None, run: Path, screen: Screen, watch: Stopwatch
) -> None:
    import numpy as np

    made = arrays["prediction"]
    screen.line(
        f"{model.name} version {model.version}: {words.count(len(made), 'prediction')} of shape {list(made.shape[1:])}"
    )
    for number, row in enumerate(made[:SHOWN]):
        chosen = f"class {arrays['class'][number]}  " if "class" in arrays else ""
        numbers = np.array2string(row, precision=3, suppress_small=True, threshold=12, max_line_width=10_000)
        screen.line(f"  {number:3}  {chosen}{numbers}")
    if len(made) > SHOWN:
        screen.line(f"  … {len(made) - SHOWN} more{'' if out else '; --out FILE.npz writes them all'}")
    screen.line(f"where the time went: {words.phases(watch.seconds, total=watch.total)}")
    screen.line(f"wrote: {out}" if out else f"run: {run}")
    document: dict[str, Any] = {"task": model.name, "version": model.version, "out": None if out is None else str(out)}
    screen.document({**document, **{name: value.tolist() for name, value in arrays.items()}})
