"""`shoal edge`: holds sessions of devices for a host that is in another process or on another machine."""

from pathlib import Path
from typing import Annotated

import typer

from shoal.cli import options
from shoal.cli.screen import Screen
from shoal.fleet.entrance import PER_ADDRESS

EPILOG = options.examples(
    "shoal edge --coordinator 127.0.0.1:8600 --credential runs/digits/edges.key --port 8501",
    "shoal edge --coordinator train.example.org:8600 --credential edges.key --ca ca.pem --address 0.0.0.0 "
    "--tls-cert edge.pem --tls-key edge.key --public edge-1.example.org:8500",
)


def edge(
    coordinator: Annotated[str, typer.Option("--coordinator", help="HOST:PORT where the host lets Edges attach.")],
    credential: Annotated[Path, typer.Option("--credential", help="The run's edges.key, a copy of it elsewhere.")],
    name: Annotated[
        str, typer.Option("--name", help="Its own among the Edges.", show_default="of machine and process")
    ] = "",
    port: Annotated[
        int, typer.Option("--port", min=0, max=65535, help="Where to listen for devices; 0: any free port.")
    ] = 8500,
    address: Annotated[str, typer.Option("--address", help="Interface to listen on; 0.0.0.0 for all.")] = "127.0.0.1",
    public: Annotated[
        str,
        typer.Option("--public", help="HOST:PORT where devices find just this Edge.", show_default="where it listens"),
    ] = "",
    share_port: Annotated[
        bool, typer.Option("--share-port", help="Several Edges of this machine listen on the port (Linux).")
    ] = False,
    ca: Annotated[
        Path | None, typer.Option("--ca", help="PEM file of the authority that signed the host's certificate.")
    ] = None,
    server_name: Annotated[
        str, typer.Option("--server-name", help="Name in the host's certificate, if it is another.")
    ] = "",
    tls_cert: Annotated[
        Path | None, typer.Option("--tls-cert", help="PEM file of the certificate chain shown to devices.")
    ] = None,
    tls_key: Annotated[Path | None, typer.Option("--tls-key", help="PEM file of its key.")] = None,
    client_ca: Annotated[
        Path | None,
        typer.Option("--client-ca", help="PEM file of an authority: only devices with a certificate of it come in."),
    ] = None,
    per_address: Annotated[
        int,
        typer.Option(
            "--per-address",
            min=1,
            help="Most sessions of one network address at once, and new ones of it a minute.",
        ),
    ] = PER_ADDRESS,
    insecure: Annotated[bool, typer.Option("--insecure", help="Allow listening on a network without TLS.")] = False,
    restarts: Annotated[
        Path | None,
        typer.Option("--restarts", help="Run folder on this machine, whose host is started again if it dies."),
    ] = None,
    json: options.AsJson = False,
) -> None:
    """Hold sessions of devices for a host elsewhere.

    The host is started with --edge-port or --edges. An Edge keeps nothing that matters: it may be killed and started
    again at any time, and devices go on with another. Ends when the run is over.
    """  # fmt: skip
    import os
    import socket

    from shoal.cli import edge_process
    from shoal.cli.host_checks import check_client_ca, check_tls
    from shoal.fleet.address import split
    from shoal.fleet.proxy import is_loopback

    place, _ = split(coordinator, what="--coordinator")
    check_tls(address, tls=False, cert=tls_cert, key=tls_key, insecure=insecure)
    check_client_ca(client_ca, tls=tls_cert is not None)
    if public:
        split(public, what="--public")
    if ca is None and not insecure and not is_loopback(place):
        raise ValueError(
            f"Refused to reach {coordinator} without encryption: give --ca; --insecure if the network is trusted."
        )
    edge_process.run(
        edge_process.Settings(
            coordinator=coordinator, credential=credential, name=name or f"{socket.gethostname()}-{os.getpid()}",
            address=address, port=port, public=public, shares_port=share_port, ca=ca, server_name=server_name,
            tls_cert=tls_cert, tls_key=tls_key, restarts=restarts, client_ca=client_ca, per_address=per_address,
        ),
        screen=Screen(json=json),
    )  # fmt: skip
