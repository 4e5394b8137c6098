"""`shoal predict`: a version of a run, or the model that a device has kept, on examples from a file."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from shoal.cli import options, words
from shoal.cli.device import parse_key
from shoal.cli.join import kept_key
from shoal.cli.screen import Screen, Stopwatch

if TYPE_CHECKING:
    import numpy as np

    from shoal.api import Model
    from shoal.fleet.kept_model import KeptModel

EPILOG = options.examples(
    "shoal predict runs/digits images.npy",
    "shoal predict runs/digits test.npz --version 10 --out predictions.npz",
    "shoal predict kept/ images.npy --device anna",
)
SHOWN: Final = 10


def predict(
    run: Annotated[
        Path,
        typer.Argument(
            metavar="RUN", help="The run folder, or one of several: then the newest. Or a device's --state folder."
        ),
    ],
    input: Annotated[Path, typer.Argument(metavar="INPUT", help="An .npz of fields, or an .npy of the only field.")],
    version: Annotated[
        int | None, typer.Option("--version", min=0, help="Which version.", show_default="the newest")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Write the predictions to this .npz.")] = None,
    run_id: options.RunId = None,
    device: Annotated[
        str,
        typer.Option(
            "--device", help="In a device's folder: its name, whose own leaves are used.", show_default="none"
        ),
    ] = "",
    task: Annotated[
        str, typer.Option("--task", help="In a device's folder: which task's model.", show_default="the only one")
    ] = "",
    key: Annotated[
        str,
        typer.Option(
            "--key",
            help="In a device's folder: whose plans are run; needed where they are native code, unless the device came in by a line.",
        ),
    ] = "",
    json: options.AsJson = False,
) -> None:
    """Predict with a version of a run, or with the newest that a device was sent.

    The task's source is not needed. On a device no host is asked, and no data leave."""
    from shoal.fleet.device_file import FILE_NAME as DEVICE_FILE

    screen, watch = Screen(json=json), Stopwatch()
    fields = _read(input)
    if out is not None and out.suffix != ".npz":
        raise ValueError(f"Expected --out FILE.npz, got {out}.")
    if any((run / name).exists() for name in ("models", DEVICE_FILE)):
        if version is not None or run_id is not None:
            raise ValueError(
                f"Expected neither --version nor --id with {run}, a device's folder: it keeps the newest version."
            )
        return _on_device(run, fields, device, task, parse_key(key) or kept_key(run), out, screen, watch)
    if device or task or key:
        raise ValueError(
            f"Expected a device's --state folder with --device, --task and --key, got {run}, which holds no models."
        )
    try:
        from shoal.api import load
        from shoal.record.run import latest_run
    except ModuleNotFoundError as error:
        raise ValueError(
            f"{run} is no device's --state folder, and to read runs all of shoal has to be installed."
        ) from error

    found = latest_run(run, task=run_id or "")
    run = found.path
    model = load(run, version=version, task=found.run.id)
    if not model.plan.manifest.variants("predict"):
        raise ValueError(
            f"Task {model.name!r} has no `predict`. Give it one: (params, state, batch) -> (B, …); where {run} has runs of "
            "other tasks, name one with --id."
        )
    watch.lap("load")
    made = model.predict(fields)
    watch.lap("predict")
    _tell(model, _written(model, made, out), out, f"run: {run}", screen, watch)


def _on_device(
    state: Path,
    given: "dict[str, np.ndarray] | np.ndarray",
    device: str,
    task: str,
    trusted: bytes | None,
    out: Path | None,
    screen: Screen,
    watch: Stopwatch,
) -> None:
    from asyncio import run

    from shoal.cli.device_process import Settings, make_host, runtime_of
    from shoal.fleet import kept_model
    from shoal.fleet.device_host import name_of_run
    from shoal.plan.train import only_field

    model = kept_model.find(state, task, trusted)
    if model.is_native and trusted is None:
        raise ValueError(
            f"Expected --key with {state}: the programs that it keeps are native code (`shoal device --runtime iree`), which is run for "
            "nobody but the key that you name; `shoal host` printed it."
        )
    fields = given if isinstance(given, dict) else {only_field(model.plan.manifest, given): given}
    settings = Settings(
        server="", users=(), state=state, trusted_key=trusted, engine="iree" if model.is_native else "jax"
    )
    host = make_host(settings, runtime_of(settings), looks_only=True)
    watch.lap("start")
    if device and host.state(name_of_run(model.run, model.plan.public_key), device, model.plan.manifest) is None:
        screen.say(f"nothing of {device!r} is kept in {state}: the model's own leaves are used")
    try:
        made = run(host.predict(device, fields, task=model.name))
    finally:
        host.close()
    watch.lap("predict")
    _tell(model, _written(model, made, out), out, f"run: {model.run}, kept in {state}", screen, watch)


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


def _written(model: "Model | KeptModel", made: "np.ndarray", out: Path | None) -> "dict[str, np.ndarray]":
    arrays = {"prediction": made} | ({"class": made.argmax(-1)} if _classifies(model, made) else {})
    if out is not None:
        from shoal.data import npz

        npz.write(out, arrays)
    return arrays


def _classifies(model: "Model | KeptModel", made: "np.ndarray") -> bool:
    """Whether predictions are scores of classes: the task says so by having an accuracy."""
    outputs = {spec.name for program in model.plan.manifest.variants("evaluate") for spec in program.outputs}
    return made.ndim == 2 and made.shape[1] > 1 and any(name.startswith("metric/accuracy/") for name in outputs)


def _tell(
    model: "Model | KeptModel",
    arrays: "dict[str, np.ndarray]",
    out: Path | None,
    where: str,
    screen: Screen,
    watch: Stopwatch,
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
    screen.line(f"wrote: {out}" if out else where)
    document: dict[str, Any] = {"task": model.name, "version": model.version, "out": None if out is None else str(out)}
    screen.document({**document, **{name: value.tolist() for name, value in arrays.items()}})
