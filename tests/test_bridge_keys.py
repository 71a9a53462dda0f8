"""Certificates of bridges: what is made, and that nothing is ever made over."""

from __future__ import annotations

import datetime
import ipaddress
import os
import socket
import ssl
import threading
from pathlib import Path

import pytest

pytest.importorskip("cryptography", reason="the extra `bridge` is not installed")

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec

from shmcoord.bridge import keys
from shmcoord.bridge.keys import KeysError, generate


def content(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in os.listdir(folder)}


def certificate(path: Path) -> x509.Certificate:
    return x509.load_pem_x509_certificate(path.read_bytes())


def test_files(tmp_path: Path) -> None:
    folder = tmp_path / "keys"
    made = generate(folder, {"a": ["10.0.0.1", "a.example"], "b": []})
    assert {path.name for path in made} == {
        *("ca.key", "ca.pem", "a.key", "a.pem", "b.key", "b.pem")
    }
    assert folder.stat().st_mode & 0o777 == 0o700
    for path in made:
        assert path.stat().st_mode & 0o777 == (0o600 if path.suffix == ".key" else 0o644)
    ca = (folder / "ca.pem").read_bytes()
    assert [path.name for path in generate(folder, {"c": []})] == ["c.key", "c.pem"]
    assert (folder / "ca.pem").read_bytes() == ca
    with pytest.raises(KeysError, match=r"a\.pem is there already"):
        generate(folder, {"a": []})
    with pytest.raises(KeysError, match="host name"):
        generate(folder, {"a/b": []})
    (folder / "ca.key").unlink()
    with pytest.raises(KeysError, match="cannot be used"):
        generate(folder, {"d": []})
    assert not (folder / "d.pem").exists()
    assert not [name for name in os.listdir(folder) if name.startswith(".")]


def test_certificates_are_what_openssl_takes(tmp_path: Path) -> None:
    generate(tmp_path, {"a": ["127.0.0.1"], "b": []})
    server = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=str(tmp_path / "ca.pem"))
    server.load_cert_chain(tmp_path / "a.pem", tmp_path / "a.key")
    server.verify_mode = ssl.CERT_REQUIRED
    client = ssl.create_default_context(cafile=str(tmp_path / "ca.pem"))
    client.load_cert_chain(tmp_path / "b.pem", tmp_path / "b.key")
    names = []
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            plain, _ = listener.accept()
            with plain, server.wrap_socket(plain, server_side=True) as secure:
                shown = secure.getpeercert()
                assert shown is not None
                names.append(dict(pair[0] for pair in shown["subject"])["commonName"])  # type: ignore[misc]
                secure.sendall(b"x")

        thread = threading.Thread(target=serve)
        thread.start()
        with (
            socket.create_connection(listener.getsockname()) as plain,
            client.wrap_socket(plain, server_hostname="127.0.0.1") as secure,
        ):
            assert secure.recv(1) == b"x"
        thread.join()
    assert names == ["b"]


def test_what_a_certificate_says(tmp_path: Path) -> None:
    generate(tmp_path, {"a": ["10.0.0.1", "fd00::1", "a.example"]}, days=30)
    made, ca = certificate(tmp_path / "a.pem"), certificate(tmp_path / "ca.pem")
    assert made.subject.rfc4514_string() == "CN=a"
    known = made.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert known.get_values_for_type(x509.DNSName) == ["a", "a.example"]
    assert known.get_values_for_type(x509.IPAddress) == [
        ipaddress.ip_address(text) for text in ("10.0.0.1", "fd00::1")
    ]
    assert isinstance(made.public_key(), ec.EllipticCurvePublicKey)
    made.verify_directly_issued_by(ca)
    left = made.not_valid_after_utc - datetime.datetime.now(datetime.timezone.utc)
    assert datetime.timedelta(days=29) < left <= datetime.timedelta(days=30)
    assert not made.extensions.get_extension_for_class(x509.BasicConstraints).value.ca


def test_no_certificate_outlives_its_ca(tmp_path: Path) -> None:
    generate(tmp_path, {"a": []}, days=30)
    generate(tmp_path, {"b": []}, days=300)
    ends = certificate(tmp_path / "ca.pem").not_valid_after_utc
    assert certificate(tmp_path / "b.pem").not_valid_after_utc == ends


def test_a_ca_that_has_expired_signs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generate(tmp_path, {"a": []}, days=30)
    before = content(tmp_path)
    later = datetime.datetime.now(datetime.timezone.utc) + datetime.timedelta(days=31)
    monkeypatch.setattr(keys, "_now", lambda: later)
    with pytest.raises(KeysError, match=r"ca\.pem has expired"):
        generate(tmp_path, {"b": []})
    assert content(tmp_path) == before


@pytest.mark.parametrize("lost", ["ca.pem", "ca.key"])
def test_half_a_ca_is_not_made_whole_by_another(tmp_path: Path, lost: str) -> None:
    generate(tmp_path, {"a": []})
    (tmp_path / lost).unlink()
    before = content(tmp_path)
    with pytest.raises(KeysError, match="cannot be used"):
        generate(tmp_path, {"b": []})
    assert content(tmp_path) == before


def test_the_key_of_another_ca(tmp_path: Path) -> None:
    for folder in ("one", "other"):
        generate(tmp_path / folder, {"a": []})
    (tmp_path / "one" / "ca.key").write_bytes((tmp_path / "other" / "ca.key").read_bytes())
    with pytest.raises(KeysError, match=r"is not the key of"):
        generate(tmp_path / "one", {"b": []})
    assert not (tmp_path / "one" / "b.pem").exists()


@pytest.mark.parametrize(
    ("hosts", "days", "why"),
    [
        ({"good": [], "ca": []}, 1, "cannot be called 'ca'"),
        ({"good": [], "h\n": []}, 1, "host name"),
        ({"good": [], "h": ["b\u00fccher.example"]}, 1, "is no address"),
        ({"good": [], "h": ["a b"]}, 1, "is no address"),
        ({"good": [], "h": ["*.example"]}, 1, "is no address"),
        ({"good": []}, 0, "0 days"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_written(
    tmp_path: Path, hosts: dict[str, list[str]], days: int, why: str
) -> None:
    with pytest.raises(KeysError, match=why):
        generate(tmp_path / "keys", hosts, days=days)
    assert not (tmp_path / "keys").exists()


def test_a_file_that_came_in_between_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two that make keys at once: the second to write fails, whatever it has looked at before."""
    generate(tmp_path, {"a": []})
    before = content(tmp_path)
    monkeypatch.setattr(Path, "exists", lambda path: path.name == "ca.pem")
    with pytest.raises(KeysError, match=r"a\.key: File exists"):
        generate(tmp_path, {"a": []})
    assert content(tmp_path) == before
