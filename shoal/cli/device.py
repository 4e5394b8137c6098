"""`shoal device`: plays the users of a population as devices of a fleet, in one process."""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from shoal.cli import options
from shoal.cli.host_checks import read_certificates
from shoal.cli.join import (
    STATE,
    Door,
    client_certificate,
    kept_line,
    pseudonym_window_s,
    read_invitation,
    refuse_unprotected,
    refuse_unwelcome,
)
from shoal.cli.join import join as come_in
from shoal.cli.screen import Screen, Stopwatch

if TYPE_CHECKING:
    from shoal.data import ExampleStore, Population
    from shoal.fleet.enrolment import Enrolled
    from shoal.plan.child_engines import EngineName
    from shoal.plan.priority import Priority

EPILOG = options.examples(
    "shoal device --join shoal1:… --data users/",
    "shoal device --server 127.0.0.1:8500 --data users/",
    "shoal device --server 127.0.0.1:8500 --data name:digits --users 100 --first 25 --count 25",
    "shoal device --server 127.0.0.1:8500 --data watches/ --population watches --task steps",
    "shoal device --server training.example.org:8500 --data me.npz --id anna --ca ca.pem --memory 4GiB --state kept/",
    "shoal device --server training.example.org:8500 --data steps.examples --id anna --ca ca.pem --state kept/",
    "shoal device --server training.example.org:8500 --data me.npz --ca ca.pem --secure --minimum 8 --colluders 2",
    "shoal device --server training.example.org:8500 --data me.npz --ca ca.pem --state kept/ --max-epsilon 8",
    "shoal device --server training.example.org:8500 --data me.npz --ca ca.pem --state kept/ --when charging --when idle --per-day cpu=20min",
    "shoal device --server training.example.org:8500 --data me.npz --ca ca.pem --runtime iree --key KEY",
    "shoal device --server training.example.org:8500 --data me.npz --ca ca.pem --state kept/ --telemetry HELPERS_KEY",
)


def device(
    server: Annotated[str, typer.Option("--server", help="HOST:PORT of the host.")] = "",
    join: Annotated[
        str,
        typer.Option("--join", metavar="LINE", help="A line of `shoal invite`, in place of --server, --ca and --key."),
    ] = "",
    data: options.Data = "",
    user_column: options.UserColumn = "",
    split: options.Split = "iid",
    users: options.Users = 20,
    first: Annotated[int, typer.Option("--first", min=0, help="The first user to play, from 0.")] = 0,
    count: Annotated[
        int | None, typer.Option("--count", min=1, help="How many users to play.", show_default="all from the first on")
    ] = None,
    id: Annotated[
        str, typer.Option("--id", help="Name of the device; with several users, what their names begin with.")
    ] = "",
    ca: Annotated[
        Path | None, typer.Option("--ca", help="PEM file of the authority that signed the host's certificate.")
    ] = None,
    server_name: Annotated[
        str, typer.Option("--server-name", help="Name in the host's certificate, if it is another.")
    ] = "",
    client_cert: Annotated[
        Path | None, typer.Option("--client-cert", help="PEM file of this device's certificate, for hosts that ask.")
    ] = None,
    client_key: Annotated[Path | None, typer.Option("--client-key", help="PEM file of its key.")] = None,
    key: Annotated[
        str,
        typer.Option("--key", help="Key whose plans are run, 64 hexadecimal digits; else that of the first plan seen."),
    ] = "",
    population: Annotated[
        list[str] | None,
        typer.Option(
            "--population",
            help="Which population the device is of; may be repeated: it works for one at a time.",
            show_default="default",
        ),
    ] = None,
    pseudonyms: Annotated[
        str,
        typer.Option(
            "--pseudonyms",
            metavar="WINDOW",
            help="Check in under another name in each window of time, 24h say (docs/operating.md).",
            show_default="always under one name",
        ),
    ] = "",
    task: Annotated[
        list[str] | None, typer.Option("--task", help="A task to serve, by name; may be repeated.", show_default="any")
    ] = None,
    state: Annotated[
        Path | None, typer.Option("--state", help="Folder for what devices keep between rounds; else in memory.")
    ] = None,
    secure: Annotated[
        bool,
        typer.Option(
            "--secure", help="Serve only tasks whose host sees sums of updates, none singly (docs/privacy.md)."
        ),
    ] = False,
    minimum: Annotated[
        int, typer.Option("--minimum", min=1, help="Serve only tasks whose sums are over at least so many devices.")
    ] = 1,
    colluders: Annotated[
        int,
        typer.Option(
            "--colluders", min=0, help="Join only secure groups that withstand so many members that help the host."
        ),
    ] = 0,
    noise: Annotated[
        float,
        typer.Option(
            "--noise",
            min=0.0,
            help="Join only secure groups whose members add noise of so many clip norms to their sum.",
            show_default="any",
        ),
    ] = 0.0,
    max_epsilon: Annotated[
        float | None,
        typer.Option(
            "--max-epsilon",
            help="Serve only tasks with noise on examples, until that is spent of each; needs --state (docs/privacy.md).",
            show_default="no limit",
        ),
    ] = None,
    delta: Annotated[float, typer.Option("--delta", help="What --max-epsilon is stated at.")] = 1e-6,
    member: Annotated[
        Path | None,
        typer.Option("--member", help="The device's key, by `shoal enrol device`: join certified groups only."),
    ] = None,
    certificate: Annotated[
        str, typer.Option("--certificate", help="Of that key, as `shoal enrol certify` printed it.")
    ] = "",
    telemetry: Annotated[
        str,
        typer.Option(
            "--telemetry",
            metavar="KEY",
            help="Tell once a day what happened, as counts that only sums are seen of; KEY is the helper's (docs/telemetry.md).",
            show_default="nothing is told",
        ),
    ] = "",
    memory: Annotated[str, typer.Option("--memory", help="Most memory that a plan may take.")] = "8GiB",
    accelerators: Annotated[
        int,
        typer.Option(
            "--accelerators", min=1, help="Of this machine, that share each batch; the device is a pod of them."
        ),
    ] = 1,
    threads: Annotated[
        int | None, typer.Option("--threads", min=1, help="Threads to compute with.", show_default="one for each core")
    ] = None,
    patience: Annotated[
        float, typer.Option("--patience", min=0.0, help="Seconds without any answer from the host before giving up.")
    ] = 300.0,
    visits: Annotated[
        bool, typer.Option("--visits", help="Come and go: leave after each update, come again when the host says.")
    ] = False,
    when: Annotated[
        list[str] | None,
        typer.Option(
            "--when",
            metavar="CONDITION",
            help="Work only while charging, idle or unmetered; may be repeated.",
            show_default="always",
        ),
    ] = None,
    probe: Annotated[
        str,
        typer.Option(
            "--probe",
            metavar="COMMAND | file:PATH",
            help='What says whether these hold, as JSON such as {"charging": true}.',
            show_default="the system",
        ),
    ] = "",
    settle: Annotated[str, typer.Option("--settle", help="How long they hold before it begins.")] = "30s",
    per_day: Annotated[
        list[str] | None,
        typer.Option(
            "--per-day",
            metavar="NAME=VALUE",
            help="Most that a day may cost this machine: cpu=20min, bytes=100MB, battery=5%, memory=2GiB; may be repeated.",
            show_default="no limit",
        ),
    ] = None,
    max_temperature: Annotated[
        float | None,
        typer.Option(
            "--max-temperature",
            help="Degrees Celsius at which it stops, where they can be read.",
            show_default="no limit",
        ),
    ] = None,
    rest: Annotated[
        str,
        typer.Option(
            "--rest", help="Least time from an update to the next training, such as 12h.", show_default="none"
        ),
    ] = "",
    priority: Annotated[
        str, typer.Option("--priority", help="Towards other programs: lowest, low or normal.")
    ] = "lowest",
    runtime: Annotated[
        str,
        typer.Option(
            "--runtime",
            help="What runs programs: jax, or iree: no JAX here, native code from --key's holder (docs/devices.md).",
        ),
    ] = "jax",
    insecure: Annotated[bool, typer.Option("--insecure", help="Allow a host on a network without TLS.")] = False,
    in_process: Annotated[
        bool, typer.Option("--in-process", help="Run programs in this process, without limits: for trials.")
    ] = False,
    with_parent: Annotated[
        bool, typer.Option("--with-parent", help="End when the process that started this one ends.")
    ] = False,
    json: options.AsJson = False,
) -> None:
    """Take part in training as a device.

    Checks in, trains on your data when asked, and reports the update; the data are never sent. Ends when the run is over. Programs come signed, and run in a child process under limits.
    """  # fmt: skip
    from shoal import validate
    from shoal.cli.ending import end_with_parent
    from shoal.fleet import address
    from shoal.fleet.conditions import CONDITIONS

    parent = end_with_parent() if with_parent else 0
    screen, watch = Screen(json=json), Stopwatch()
    invitation = None
    if not server and not join and state is not None and (join := kept_line(state)):
        screen.say(f"comes in by the line that is kept in {state}")
    if join:
        said = {"--server": server, "--ca": ca, "--key": key, "--server-name": server_name}
        invitation = read_invitation(join, {**said, "--population": population}, state=state)
    else:
        if not server:
            raise ValueError(
                "Expected --server HOST:PORT, or --join LINE of `shoal invite`, which the --state folder keeps for the next time."
            )
        address.split(server, what="--server")
    if not data:
        raise ValueError("Expected --data PATH (or --data name:digits): what should this device learn from?")
    trusted = parse_key(key)
    if invitation is not None:
        trusted = invitation.plan_key
        if invitation.token and state is None:
            state = STATE
            screen.say(f"what this host knows the device by is kept in {state} (--state)")
    engine = _engine(runtime, trusted)
    if accelerators > 1 and engine == "iree":
        raise ValueError("--accelerators is for --runtime jax: IREE's programs run on one.")
    limit = options_memory(memory)
    for condition in when or ():
        validate.one_of(CONDITIONS, **{"--when": condition})
    authority = None if ca is None else read_certificates(ca, option="--ca")
    if server_name and authority is None:
        raise ValueError("--server-name is for a host with TLS: give its authority with --ca FILE too.")
    if id and len(id.encode()) > 100:
        raise ValueError("Expected an --id of at most 100 bytes.")

    if max_epsilon is not None and state is None:
        raise ValueError(
            "Expected --state FOLDER with --max-epsilon: a device that forgets what it spent spends it again."
        )
    if (secure or member is not None) and state is None:
        screen.say(
            "without --state this device forgets, when it ends, what it has revealed; updates may then be offered twice"
        )
    window_s = pseudonym_window_s(
        pseudonyms, member=member, client=client_cert, joins=invitation is not None and bool(invitation.token)
    )
    client = client_certificate(client_cert, client_key)
    populations = tuple(dict.fromkeys(population or ("default",)))
    if len(populations) > 1 and (alone := "--member" if member else "--telemetry" if telemetry else ""):
        raise ValueError(f"Expected one --population with {alone}, got {', '.join(populations)}.")
    door = Door(server=server, population=populations[0], key=key, authority=authority, server_name=server_name)
    if invitation is not None:
        populations = (invitation.population,)
        door = come_in(invitation, state=state, patience_s=patience, screen=screen)
    refuse_unprotected(door, insecure=insecure)
    refuse_unwelcome(door, client)
    if telemetry and state is None:
        raise ValueError(
            "Expected --state FOLDER with --telemetry: a device that forgets what it told of tells of a day twice."
        )
    helper = _helper(telemetry)
    enrolled = _enrolled(member, certificate, door.population, key=door.key)

    from shoal.cli import data_argument, device_process
    from shoal.cli.budget_argument import parse_budget
    from shoal.cli.words import parse_duration
    from shoal.fleet.example_ledger import ExampleBudget
    from shoal.fleet.floor import Floor
    from shoal.fleet.politeness import Politeness

    budget = None if max_epsilon is None else ExampleBudget(epsilon=max_epsilon, delta=delta)
    impact = parse_budget(per_day or (), max_temperature)
    store = data_argument.open_store(data, split=split, users=users, user_column=user_column)
    if store is not None:
        examples: Population | ExampleStore = store
        chosen: tuple[str, ...] = (id or store.path.stem,)
    else:
        examples = data_argument.open_data(data, split=split, users=users, user_column=user_column)
        chosen = device_process.choose(examples, first=first, count=count)
    if enrolled is not None and len(chosen) != 1:
        raise ValueError(
            f"Expected one user with --member, which is one device's key, got {len(chosen)}; take --count 1."
        )
    watch.lap("data")
    settings = device_process.Settings(
        server=door.server, users=chosen, id=id, authority=door.authority, server_name=door.server_name or None, trusted_key=trusted,
        client=client.read() if client else None, token=door.token, pseudonym_window_s=window_s,
        state=state, memory_bytes=limit, threads=threads, accelerators=accelerators, patience_s=patience, in_process=in_process, visits=visits,
        politeness=Politeness(when=tuple(when or ()), probe=probe, settle_s=parse_duration(settle), budget=impact),
        rest_s=parse_duration(rest) if rest else 0.0,
        priority=_priority(priority), engine=engine, populations=populations, tasks=tuple(task or ()),
        identity=enrolled.identity if enrolled else None, telemetry=helper,
        floor=Floor(
            secure=secure, minimum_group=minimum, colluders=colluders, noise=noise, authority=enrolled.authority if enrolled else None, examples=budget,
            pseudonymous=bool(window_s),
        ),
    )  # fmt: skip
    device_process.run(settings, examples, screen=screen, watch=watch, parent=parent)


def _enrolled(member: Path | None, certificate: str, population: str, *, key: str) -> "Enrolled | None":
    if (member is None) != (not certificate):
        raise ValueError("Expected --member FILE and --certificate together: a key, and the authority's word for it.")
    if member is None:
        return None
    if not key:
        raise ValueError(
            "Expected --key with --member: against a server that may lie its word for whose plans are run is not enough."
        )
    from shoal.fleet.enrolment import Enrolled, read_secret

    return Enrolled.of(read_secret(member), certificate, population=population, wall_s=time.time())


def _priority(text: str) -> "Priority":
    for known in ("lowest", "low", "normal"):
        if text == known:
            return known
    raise ValueError(f"Expected --priority lowest, low or normal, got {text!r}.")


def _engine(runtime: str, trusted: bytes | None) -> "EngineName":
    if runtime == "iree":
        if trusted is None:
            raise ValueError(
                "Expected --key with --runtime iree: its programs are native code, which this device runs for nobody but the key that you "
                "name. `shoal host` prints it."
            )
        return "iree"
    if runtime != "jax":
        raise ValueError(f"Expected --runtime of jax | iree, got {runtime!r}.")
    return "jax"


def options_memory(text: str) -> int:
    """The bytes of --memory."""
    from shoal.cli.words import parse_size

    made = parse_size(text)
    if made < 1 << 20:
        raise ValueError(f"Expected --memory of at least 1MiB, got {text!r}.")
    return made


def _helper(text: str) -> bytes | None:
    if not text:
        return None
    from shoal.privacy.masks import are_keys  # what it needs is much

    try:
        made = bytes.fromhex(text)
    except ValueError:
        made = b"?"
    if not are_keys(made):
        raise ValueError(
            f"Expected --telemetry KEY of 64 hexadecimal digits, as `shoal telemetry helper` prints it, got {text!r}."
        )
    return made


def parse_key(text: str) -> bytes | None:
    """The bytes of --key; None where it is empty."""
    try:
        made = bytes.fromhex(text)
    except ValueError:
        made = b"?"
    if made and len(made) != 32:
        raise ValueError(f"Expected --key of 64 hexadecimal digits, as `shoal host` prints it, got {text!r}.")
    return made or None
