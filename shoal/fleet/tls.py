"""A certificate for a host that has none: signed by an authority that is made for this one run and then forgotten.

The authority's private key is never written: it signs one server certificate and is gone, so that nobody can ever sign
another that devices of this run would believe. Files, in `RUN/tls/`: `ca.pem` for the devices, `server.pem`, and
`server.key` (mode 0600). For a fleet in earnest use certificates of your own authority.
"""

import datetime
import ipaddress
import os
import socket
from collections.abc import Iterable
from pathlib import Path
from typing import Final

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
        chain.write_bytes(made_chain)
        _write_secret(key, made_key)  # last: what exists is complete
    return read_tls(key, chain), authority


def read_tls(key: Path, chain: Path) -> Tls:
    """A server's key and chain from PEM files. Raises StoreError where one cannot be read."""
    try:
        return Tls(key.read_bytes(), chain.read_bytes())
    except OSError as error:
        raise StoreError(f"Cannot read the TLS file {error.filename}: {error.strerror}.") from error


def make_tls(names: Iterable[str]) -> tuple[bytes, bytes, bytes]:
    """Server key, server certificate and authority's certificate, as PEM, good for these names and addresses."""
    now = datetime.datetime.now(datetime.UTC) - datetime.timedelta(minutes=5)  # clocks differ
    authority_key, server_key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    authority_name = _name("shoal run authority")
    authority = (
        _certificate(authority_name, authority_name, authority_key.public_key(), now)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(authority_key.public_key()), critical=False)
        .add_extension(_usage(signs_certificates=True), critical=True)
        .sign(authority_key, hashes.SHA256())
    )
    server = (
        _certificate(_name("shoal host"), authority_name, server_key.public_key(), now)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.SubjectAlternativeName(_alternatives(names)), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(authority_key.public_key()), critical=False)
        .add_extension(x509.ExtendedKeyUsage([x509.oid.ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(_usage(signs_certificates=False), critical=True)
        .sign(authority_key, hashes.SHA256())
    )
    secret = server_key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    return secret, server.public_bytes(Encoding.PEM), authority.public_bytes(Encoding.PEM)


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
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, now: datetime.datetime
) -> x509.CertificateBuilder:
    builder = x509.CertificateBuilder().subject_name(subject).issuer_name(issuer).public_key(key)
    builder = builder.serial_number(x509.random_serial_number()).not_valid_before(now)
    return builder.not_valid_after(now + datetime.timedelta(days=VALID_DAYS))  # fmt: skip


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


def _write_secret(path: Path, data: bytes) -> None:
    partial = path.with_suffix(".partial")
    partial.unlink(missing_ok=True)
    with os.fdopen(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(data)
    partial.replace(path)
