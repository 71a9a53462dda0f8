"""A CA, and for each host a certificate and a key: what mutual TLS between bridges needs."""

from __future__ import annotations

import contextlib
import datetime
import ipaddress
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from shmcoord.errors import ShmcoordError

__all__ = ["KeysError", "generate"]

_HOST = re.compile(r"[A-Za-z0-9_-]{1,63}")
_CA_NAME = "shmcoord bridge CA"
# A clock that is a little behind finds a new certificate valid all the same.
_EARLIER = datetime.timedelta(minutes=5)


class KeysError(ShmcoordError, ValueError):
    """The files cannot be made, or are there already."""


def generate(directory: Path, hosts: Mapping[str, Sequence[str]], *, days: int = 825) -> list[Path]:
    """Make the CA if there is none, and a certificate and a key for each host.

    Args:
        directory: Where; it is made, for its owner alone.
        hosts: For each host's name, which becomes the common name that the access rules go by, the
            addresses at which its bridge listens.
        days: How long all of them are valid.

    Returns:
        The files that were written. Keys have the mode 0600.

    Raises:
        KeysError: A name is wrong, or a host has a certificate here already (remove it first).
    """
    for host in hosts:
        if not _HOST.fullmatch(host):
            raise KeysError(f"host name {host!r} does not match {_HOST.pattern}")
        for path in (directory / f"{host}.pem", directory / f"{host}.key"):
            if path.exists():
                raise KeysError(f"{path} is there already; remove it to make a new one")
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    written: list[Path] = []
    ca, ca_key = _authority(directory, days, written)
    for host, addresses in hosts.items():
        key = ec.generate_private_key(ec.SECP256R1())
        certificate = _certificate(host, addresses, key, ca, ca_key, days)
        written.append(_write_key(directory / f"{host}.key", key))
        written.append(_write(directory / f"{host}.pem", _pem(certificate), 0o644))
    return written


def _authority(
    directory: Path, days: int, written: list[Path]
) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
    ca_path, key_path = directory / "ca.pem", directory / "ca.key"
    if ca_path.exists():
        try:
            ca = x509.load_pem_x509_certificate(ca_path.read_bytes())
            key = serialization.load_pem_private_key(key_path.read_bytes(), password=None)
        except (OSError, ValueError) as error:
            raise KeysError(f"the CA in {directory} cannot be used: {error}") from error
        if not isinstance(key, ec.EllipticCurvePrivateKey):
            raise KeysError(f"{key_path} is no key that was made here")
        return ca, key
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, _CA_NAME)])
    ca = (
        _builder(name, name, key, days)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(signs_certificates=True), critical=True)
        .sign(key, hashes.SHA256())
    )
    written.append(_write_key(key_path, key))
    written.append(_write(ca_path, _pem(ca), 0o644))
    return ca, key


def _certificate(
    host: str,
    addresses: Sequence[str],
    key: ec.EllipticCurvePrivateKey,
    ca: x509.Certificate,
    ca_key: ec.EllipticCurvePrivateKey,
    days: int,
) -> x509.Certificate:
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, host)])
    known = [_general_name(text) for text in dict.fromkeys([host, *addresses])]
    both = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
    return (
        _builder(name, ca.subject, key, days)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.SubjectAlternativeName(known), critical=False)
        .add_extension(x509.ExtendedKeyUsage(both), critical=False)
        .add_extension(_usage(signs_certificates=False), critical=True)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key()), critical=False
        )
        .sign(ca_key, hashes.SHA256())
    )


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey, days: int
) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.timezone.utc)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _EARLIER)
        .not_valid_after(now + datetime.timedelta(days=days))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        encipher_only=False,
        decipher_only=False,
    )


def _general_name(text: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(text))
    except ValueError:
        return x509.DNSName(text)


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


def _write_key(path: Path, key: ec.EllipticCurvePrivateKey) -> Path:
    data = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    return _write(path, data, 0o600)


def _write(path: Path, data: bytes, mode: int) -> Path:
    """Write a new file, whole or not at all."""
    begun = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(os.open(begun, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
            file.write(data)
        begun.rename(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            begun.unlink()
        raise KeysError(f"{path}: {error.strerror}") from error
    return path
