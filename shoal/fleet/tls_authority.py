"""A TLS authority of your own in a folder: signs certificates of hosts, Edges and devices, as one command each.

`ca.pem` is for whoever is to believe it, `authority.key` (mode 0600) for nobody else: who has it can play any host or device.
"""

import datetime
import re
from pathlib import Path
from typing import Final, Literal

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from shoal.errors import DataError
from shoal.fleet.tls import authority_certificate, key_pem, leaf_certificate, pem, write_secret

CA_FILE: Final = "ca.pem"
KEY_FILE: Final = "authority.key"
AUTHORITY_DAYS: Final = 3_650.0
_NAME: Final = re.compile(r"[A-Za-z0-9_.:-]{1,64}")

Kind = Literal["server", "device"]


def make_authority(folder: Path, *, now: datetime.datetime) -> Path:
    """A new authority; returns where its certificate is. Raises DataError: there is one in the folder."""
    if (folder / KEY_FILE).exists():
        raise DataError(f"There is an authority in {folder} already, and it is not written over.")
    folder.mkdir(parents=True, exist_ok=True)
    key = ec.generate_private_key(ec.SECP256R1())
    made = authority_certificate(key, "shoal authority", now=now, days=AUTHORITY_DAYS)
    (folder / CA_FILE).write_bytes(pem(made))
    write_secret(folder / KEY_FILE, key_pem(key))  # last: what exists is complete
    return folder / CA_FILE


def issue(
    folder: Path, kind: Kind, names: list[str], *, now: datetime.datetime, days: float, into: Path | None = None
) -> tuple[Path, Path]:
    """A certificate and its key in files of their own; returns where they are. An older certificate of that name is written over.

    Args:
        folder: of an authority.
        kind: `server` serves, `device` asks; neither can do the other's part.
        names: of a server all names and addresses that it is reached under; of a device its name. The first names the files.
        now: from when on it is good.
        days: how long.
        into: folder of the files; None: the authority's.

    Raises:
        DataError: the folder has no authority, or a name cannot be one.
    """
    for name in names:
        if not _NAME.fullmatch(name):
            raise DataError(f"Expected a name of 1 to 64 letters, digits, '.', ':', '-' or '_', got {name[:80]!r}.")
    key_data, ca_data = _read(folder / KEY_FILE), _read(folder / CA_FILE)
    authority_key, ca = load_pem_private_key(key_data, None), x509.load_pem_x509_certificate(ca_data)
    assert isinstance(authority_key, ec.EllipticCurvePrivateKey)
    key = ec.generate_private_key(ec.SECP256R1())
    made = leaf_certificate(kind, names, key.public_key(), ca, authority_key, now=now, days=days)
    place, stem = into or folder, names[0].replace(":", "_")
    place.mkdir(parents=True, exist_ok=True)
    certificate, secret = place / f"{stem}.pem", place / f"{stem}.key"
    if secret == folder / KEY_FILE or certificate == folder / CA_FILE:
        raise DataError(f"{names[0]!r} is a name of the authority's own files: take another.")
    write_secret(secret, key_pem(key))
    certificate.write_bytes(pem(made) + ca_data)  # with the authority's: invitations name that by its hash
    return certificate, secret


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        raise DataError(f"There is no authority in {path.parent}: shoal enrol tls-authority makes one.") from None
