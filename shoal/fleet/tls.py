"""A certificate for a host that has none: signed by an authority that is made for this one run and then forgotten.

The authority's private key is never written: it signs one server certificate and is gone, so that nobody can ever sign
another that devices of this run would believe. Files, in `RUN/tls/`: `ca.pem` for the devices, `server.pem`, and
`server.key` (mode 0600). Several hosts under one authority: `tls_authority.py`.
"""

import datetime
import ipaddress
import os
import socket
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Final, Literal

import psutil
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

from shoal.errors import StoreError
from shoal.fleet.grpc_server import Tls

FOLDER: Final = "tls"
VALID_DAYS: Final = 825
CLOCKS_DIFFER: Final = datetime.timedelta(minutes=5)


def load_or_make_tls(run_folder: Path, *, address: str) -> tuple[Tls, Path]:
    """The server's key and chain, made the first time, and where the authority's certificate is.

    Args:
        run_folder: of the run.
        address: where the host listens; it is in the certificate, beside this machine's names and addresses.
    """
    folder = run_folder / FOLDER
    key, chain, authority = folder / "server.key", folder / "server.pem", folder / "ca.pem"
    if not key.exists():
        folder.mkdir(parents=True, exist_ok=True)
        made_key, made_chain, made_authority = make_tls([address, *machine_names()])
        authority.write_bytes(made_authority)
        chain.write_bytes(made_chain + made_authority)  # devices that were invited know the authority's hash only
        write_secret(key, made_key)  # last: what exists is complete
    return read_tls(key, chain), authority


def read_tls(key: Path, chain: Path) -> Tls:
    """A server's key and chain from PEM files. Raises StoreError where one cannot be read."""
    try:
        return Tls(key.read_bytes(), chain.read_bytes())
    except OSError as error:
        raise StoreError(f"Cannot read the TLS file {error.filename}: {error.strerror}.") from error


def make_tls(names: Iterable[str]) -> tuple[bytes, bytes, bytes]:
    """Server key, server certificate and authority's certificate, as PEM, good for these names and addresses."""
    now = datetime.datetime.now(datetime.UTC)
    authority_key, server_key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    authority = authority_certificate(authority_key, "shoal run authority", now=now, days=VALID_DAYS)
    server = leaf_certificate(
        "server", list(names), server_key.public_key(), authority, authority_key, now=now, days=VALID_DAYS
    )
    return key_pem(server_key), pem(server), pem(authority)


def authority_certificate(
    key: ec.EllipticCurvePrivateKey, name: str, *, now: datetime.datetime, days: float
) -> x509.Certificate:
    """What signs others, by itself."""
    return (
        _certificate(_name(name), _name(name), key.public_key(), now, days)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(_usage(signs_certificates=True), critical=True)
        .sign(key, hashes.SHA256())
    )


def leaf_certificate(
    kind: Literal["server", "device"],
    names: Sequence[str],
    key: ec.EllipticCurvePublicKey,
    authority: x509.Certificate,
    authority_key: ec.EllipticCurvePrivateKey,
    *,
    now: datetime.datetime,
    days: float,
) -> x509.Certificate:
    """Of a server, good for these names and addresses, or of a device of that name: neither is good for the other's part."""
    is_server = kind == "server"
    purpose = x509.oid.ExtendedKeyUsageOID.SERVER_AUTH if is_server else x509.oid.ExtendedKeyUsageOID.CLIENT_AUTH
    subject = _name("shoal host" if is_server else names[0])
    return (
        _certificate(subject, authority.subject, key, now, days)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.SubjectAlternativeName(_alternatives(names)), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(authority_key.public_key()), critical=False)
        .add_extension(x509.ExtendedKeyUsage([purpose]), critical=False)
        .add_extension(_usage(signs_certificates=False), critical=True)
        .sign(authority_key, hashes.SHA256())
    )


def key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(Encoding.PEM)


def pin_of(chain: bytes) -> bytes:
    """SHA-256 of the last certificate of a chain (PEM): what an invitation has devices believe.

    Raises:
        StoreError: there is none in it.
    """
    try:
        return x509.load_pem_x509_certificates(chain)[-1].fingerprint(hashes.SHA256())
    except (ValueError, IndexError) as error:
        raise StoreError(f"Expected PEM certificates as a TLS chain, got something else: {error}.") from error


def names_in(chain: bytes) -> list[str]:
    """Names and addresses that the first certificate of a chain (PEM) is good for, names first."""
    first = x509.load_pem_x509_certificates(chain)[0]
    try:
        found = first.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return []
    addresses = [str(address) for address in found.get_values_for_type(x509.IPAddress)]
    return [*found.get_values_for_type(x509.DNSName), *addresses]


def machine_names() -> list[str]:
    """Names and addresses under which this machine may be reached."""
    addresses = [
        address.address.split("%")[0]
        for found in psutil.net_if_addrs().values()
        for address in found
        if address.family in (socket.AF_INET, socket.AF_INET6)
    ]
    return ["localhost", "127.0.0.1", "::1", socket.gethostname(), *addresses]


def _certificate(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, now: datetime.datetime, days: float
) -> x509.CertificateBuilder:
    builder = x509.CertificateBuilder().subject_name(subject).issuer_name(issuer).public_key(key)
    builder = builder.serial_number(x509.random_serial_number()).not_valid_before(now - CLOCKS_DIFFER)
    return builder.not_valid_after(now + datetime.timedelta(days=days))


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates, key_cert_sign=signs_certificates, crl_sign=signs_certificates,
        content_commitment=False, key_encipherment=False, data_encipherment=False, key_agreement=False,
        encipher_only=False, decipher_only=False,
    )  # fmt: skip


def _name(common: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common)])


def _alternatives(names: Iterable[str]) -> list[x509.GeneralName]:
    made: list[x509.GeneralName] = []
    for name in dict.fromkeys(names):
        try:
            made.append(x509.IPAddress(ipaddress.ip_address(name)))
        except ValueError:
            if name and name.isascii():
                made.append(x509.DNSName(name))
    return made


def write_secret(path: Path, data: bytes) -> None:
    """A file that only its owner reads, whole or not at all."""
    partial = path.with_suffix(".partial")
    partial.unlink(missing_ok=True)
    with os.fdopen(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(data)
    partial.replace(path)
