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

from shmcoord.bridge.endpoints import NAME
from shmcoord.errors import ShmcoordError

__all__ = ["KeysError", "generate"]

_CA = "ca"  # what its files are called
# A name that is found by a resolver; underscores since the names of hosts may have them.
_DNS = re.compile(r"(?!.{254})[A-Za-z0-9_-]{1,63}(\.[A-Za-z0-9_-]{1,63})*")
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
        days: How long all of them are valid, at least 1. No certificate outlives its CA: one that
            is made by a CA that was here already ends with it.

    Returns:
        The files that were written. Keys have the mode 0600.

    Raises:
        KeysError: A name or an address is wrong, a host has a certificate here already (remove it
            first), or the CA that is here cannot be used. Nothing was overwritten.
    """
    if days < 1:
        raise KeysError(f"certificates cannot be valid for {days} days")
    names: dict[str, list[x509.GeneralName]] = {}
    for host, addresses in hosts.items():
        if not NAME.fullmatch(host):
            raise KeysError(f"host name {host!r} does not match {NAME.pattern}")
        if host == _CA:
            raise KeysError(f"a host cannot be called {_CA!r}: its files would be those of the CA")
        names[host] = [_general_name(text) for text in dict.fromkeys([host, *addresses])]
        for path in (directory / f"{host}.pem", directory / f"{host}.key"):
            if path.exists():
                raise KeysError(f"{path} is there already; remove it to make a new one")
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    written: list[Path] = []
    ca, ca_key = _authority(directory, days, written)
    for host, known in names.items():
        key = ec.generate_private_key(ec.SECP256R1())
        certificate = _certificate(host, known, key, ca, ca_key, days)
        written.append(_write_key(directory / f"{host}.key", key))
        written.append(_write(directory / f"{host}.pem", _pem(certificate), 0o644))
    return written


def _authority(
    directory: Path, days: int, written: list[Path]
) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
    ca_path, key_path = directory / f"{_CA}.pem", directory / f"{_CA}.key"
    if ca_path.exists() or key_path.exists():
        try:
            ca = x509.load_pem_x509_certificate(ca_path.read_bytes())
            key = serialization.load_pem_private_key(key_path.read_bytes(), password=None)
        except (OSError, ValueError) as error:
            raise KeysError(f"the CA in {directory} cannot be used: {error}") from error
        if not isinstance(key, ec.EllipticCurvePrivateKey):
            raise KeysError(f"{key_path} is no key that was made here")
        if ca.public_key() != key.public_key():
            raise KeysError(f"{key_path} is not the key of {ca_path}")
        if ca.not_valid_after_utc <= _now():
            raise KeysError(
                f"{ca_path} has expired at {ca.not_valid_after_utc:%Y-%m-%d %H:%M} UTC; "
                "make a new CA and new certificates for all hosts, in another directory"
            )
        return ca, key
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, _CA_NAME)])
    ca = (
        _builder(name, name, key, _now() + datetime.timedelta(days=days))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(signs_certificates=True), critical=True)
        .sign(key, hashes.SHA256())
    )
    written.append(_write_key(key_path, key))
    written.append(_write(ca_path, _pem(ca), 0o644))
    return ca, key


def _certificate(
    host: str,
    known: list[x509.GeneralName],
    key: ec.EllipticCurvePrivateKey,
    ca: x509.Certificate,
    ca_key: ec.EllipticCurvePrivateKey,
    days: int,
) -> x509.Certificate:
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, host)])
    ends = min(_now() + datetime.timedelta(days=days), ca.not_valid_after_utc)
    both = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
    return (
        _builder(name, ca.subject, key, ends)
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
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey, ends: datetime.datetime
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(_now() - _EARLIER)
        .not_valid_after(ends)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.timezone.utc)


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
        if not _DNS.fullmatch(text):
            raise KeysError(f"{text!r} is no address and no name of a machine") from None
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
    """Write a new file, whole or not at all; one that is there already stays as it is."""
    begun = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(os.open(begun, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
            file.write(data)
        os.link(begun, path)
    except OSError as error:
        raise KeysError(f"{path}: {error.strerror}") from error
    finally:
        with contextlib.suppress(OSError):
            begun.unlink()
    return path
