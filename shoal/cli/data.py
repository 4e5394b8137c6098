"""`shoal data`: what is in an example store; central data pushed into the stores of devices."""

from pathlib import Path
from typing import Annotated

import typer

from shoal.cli import options, words
from shoal.cli.screen import Screen, Stopwatch

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Example stores of devices, and central data pushed into them (docs/data.md).",
    epilog=options.examples(
        "shoal data show steps.examples",
        "shoal data push name:digits --shards 8 --port 8600 --run pushes/digits",
        "shoal data take --server 127.0.0.1:8600 --ticket TICKET --store digits.examples",
    ),
)

SHOW_EPILOG = options.examples("shoal data show steps.examples")
PUSH_EPILOG = options.examples(
    "shoal data push name:digits --shards 8 --port 8600 --run pushes/digits",
    "shoal data push name:digits --shards 8 --split dirichlet:0.3 --port 8600 --run pushes/digits",
    "shoal data push scans.npz --shards 100 --population lab --address 0.0.0.0 --port 8600 --tls --run pushes/scans",
)
TAKE_EPILOG = options.examples(
    "shoal data take --server 127.0.0.1:8600 --ticket TICKET --store digits.examples",
    "shoal data take --server push.example.org:8600 --ticket TICKET --key KEY --ca ca.pem --store scans.examples --most 2GB --stay",
)


@app.command(epilog=SHOW_EPILOG)
def show(
    store: Annotated[Path, typer.Argument(help="An example store, NAME.examples.")], json: options.AsJson = False
) -> None:
    """What an example store holds: how many examples, how old, what they look like, and its limits."""
    from dataclasses import asdict
    from math import isfinite

    from shoal.data.example_store import ExampleStore

    with ExampleStore(store, must_exist=True) as opened:
        held = opened.statistics()
    limits = held.limits
    told = [
        *([f"{words.duration(limits.max_age_s)} of age"] if isfinite(limits.max_age_s) else []),
        *([words.count(limits.max_examples, "example")] if isfinite(limits.max_examples) else []),
        *([words.size(limits.max_bytes)] if isfinite(limits.max_bytes) else []),
    ]
    screen = Screen(json=json)
    screen.line(f"{words.count(held.examples, 'example')}, {words.size(held.size_bytes)}")
    if held.examples:
        screen.line(f"oldest: {words.duration(held.oldest_s)} ago")
    for name, (shape, dtype) in held.spec.items():
        screen.line(f"field {name}: {dtype}{list(shape)}")
    screen.line(f"limits: {', '.join(told) or 'none'}")
    if held.shards:
        screen.line(f"taken by `shoal data take`: {words.count(held.shards, 'shard')}")
    screen.document(asdict(held))


@app.command(epilog=PUSH_EPILOG)
def push(
    data: Annotated[
        str,
        typer.Argument(
            metavar="DATA", help="What is given out: a file or folder as for --data, or name:NAME of a data set."
        ),
    ],
    shards: Annotated[
        int, typer.Option("--shards", min=1, max=10_000, help="How many parts, one for each device that takes one.")
    ],
    run: Annotated[Path, typer.Option("--run", help="Folder of the push; the same command goes on with it.")],
    population: Annotated[
        str, typer.Option("--population", help="Of the devices that are to have the data.")
    ] = "default",
    split: Annotated[
        str, typer.Option("--split", help="How it is dealt out to shards: iid, dirichlet:ALPHA or shards:NUMBER.")
    ] = "iid",
    seed: Annotated[int, typer.Option("--seed", min=0, help="What the split is drawn by.")] = 0,
    user_column: options.UserColumn = "",
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="Where to listen; 0: any free port.")] = 8600,
    address: Annotated[str, typer.Option("--address", help="Interface to listen on; 0.0.0.0 for all.")] = "127.0.0.1",
    patience: Annotated[
        str,
        typer.Option("--patience", help="How long a shard waits for a device that has gone, before another gets it."),
    ] = "10min",
    tls: Annotated[bool, typer.Option("--tls", help="Encrypt, with a certificate made for this push.")] = False,
    tls_cert: Annotated[
        Path | None, typer.Option("--tls-cert", help="PEM file of the server's certificate chain.")
    ] = None,
    tls_key: Annotated[Path | None, typer.Option("--tls-key", help="PEM file of the server's key.")] = None,
    insecure: Annotated[bool, typer.Option("--insecure", help="Allow listening on a network without TLS.")] = False,
    ready_file: Annotated[
        Path | None, typer.Option("--ready-file", help="Write HOST:PORT there once devices can come.")
    ] = None,
    with_parent: Annotated[
        bool, typer.Option("--with-parent", help="End when the process that started this one ends.")
    ] = False,
    json: options.AsJson = False,
) -> None:
    """Push central data into the stores of devices, which then train as any fleet.

    Serves until every shard is in a device's store. Only devices that run `shoal data take` with this push's ticket get any. After Ctrl-C, a kill or a crash the same command goes on.
    """  # fmt: skip
    from shoal.cli import push_process
    from shoal.cli.ending import end_with_parent
    from shoal.cli.host_checks import check_port, check_tls
    from shoal.cli.words import parse_duration

    parent = end_with_parent() if with_parent else 0
    check_tls(address, tls=tls, cert=tls_cert, key=tls_key, insecure=insecure)
    check_port(address, port)
    settings = push_process.Settings(
        data=data, shards=shards, folder=run, population=population, split=split, seed=seed, user_column=user_column,
        address=address, port=port, patience_s=parse_duration(patience), make_tls=tls, tls_cert=tls_cert, tls_key=tls_key,
        ready_file=ready_file,
    )  # fmt: skip
    push_process.run(settings, screen=Screen(json=json), watch=Stopwatch(), parent=parent)


@app.command(epilog=TAKE_EPILOG)
def take(
    server: Annotated[str, typer.Option("--server", help="HOST:PORT of the push.")],
    ticket: Annotated[str, typer.Option("--ticket", help="As `shoal data push` prints it.")],
    store: Annotated[Path, typer.Option("--store", help="NAME.examples; made where there is none.")],
    key: Annotated[
        str,
        typer.Option(
            "--key", help="Key whose data are taken, 64 hexadecimal digits; else that of the first push seen."
        ),
    ] = "",
    population: Annotated[str, typer.Option("--population", help="Which population the device is of.")] = "default",
    most: Annotated[str, typer.Option("--most", help="Bytes of one push that are taken at most.")] = "2GB",
    stay: Annotated[
        bool, typer.Option("--stay", help="Take another shard as long as there are any and they have room.")
    ] = False,
    ca: Annotated[
        Path | None, typer.Option("--ca", help="PEM file of the authority that signed the server's certificate.")
    ] = None,
    server_name: Annotated[
        str, typer.Option("--server-name", help="Name in the server's certificate, if it is another.")
    ] = "",
    patience: Annotated[str, typer.Option("--patience", help="How long nothing may work before giving up.")] = "5min",
    with_parent: Annotated[
        bool, typer.Option("--with-parent", help="End when the process that started this one ends.")
    ] = False,
    json: options.AsJson = False,
) -> None:
    """Take a shard of central data into this device's example store, for `shoal device --data NAME.examples`.

    After Ctrl-C, a kill or a crash the same command goes on where it was.
    """
    from shoal.cli import take_process
    from shoal.cli.ending import end_with_parent
    from shoal.cli.host_checks import read_certificates
    from shoal.cli.words import parse_duration, parse_size
    from shoal.fleet import address
    from shoal.fleet.take import Terms

    parent = end_with_parent() if with_parent else 0
    address.split(server, what="--server")
    if server_name and ca is None:
        raise ValueError("--server-name is for a server with TLS: give its authority with --ca FILE too.")
    terms = Terms(
        ticket=_hexadecimal(ticket, 16, "--ticket"),
        population=population,
        key=_hexadecimal(key, 32, "--key") if key else None,
        most_bytes=parse_size(most),
        stays=stay,
        patience_s=parse_duration(patience),
    )
    authority = None if ca is None else read_certificates(ca, option="--ca")
    take_process.run(
        terms, store, server, authority, server_name or None, screen=Screen(json=json), watch=Stopwatch(), parent=parent
    )


def _hexadecimal(text: str, size: int, option: str) -> bytes:
    try:
        made = bytes.fromhex(text)
    except ValueError:
        made = b""
    if len(made) != size:
        raise ValueError(
            f"Expected {option} of {2 * size} hexadecimal digits, as `shoal data push` prints it, got {text[:80]!r}."
        )
    return made
