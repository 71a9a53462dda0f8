"""Certificates that exist for one test only, made by openssl."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

EC = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes")


def need_openssl() -> None:
    """Skips the test where there is none."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed")


def openssl(*arguments: object, folder: Path) -> None:
    subprocess.run(
        ["openssl", *map(str, arguments)], cwd=folder, check=True, capture_output=True, timeout=60
    )


def make_authority(folder: Path, name: str) -> None:
    """`name`.pem and `name`.key: somebody who signs."""
    files = ("-keyout", f"{name}.key", "-out", f"{name}.pem")
    openssl("req", "-x509", *EC, *files, "-days", 2, "-subj", f"/CN={name}", folder=folder)


def make_certificate(folder: Path, authority: str, name: str, also: str) -> None:
    """`name`.pem and `name`.key, signed by an authority, for the names in `also`."""
    files = ("-keyout", f"{name}.key", "-out", f"{name}.csr")
    openssl("req", *EC, *files, "-subj", f"/CN={name}", folder=folder)
    (folder / f"{name}.ext").write_text(f"subjectAltName={also}\n")
    signer = ("-CA", f"{authority}.pem", "-CAkey", f"{authority}.key", "-CAcreateserial")
    files = ("-in", f"{name}.csr", "-out", f"{name}.pem", "-extfile", f"{name}.ext")
    openssl("x509", "-req", *files, *signer, "-days", 2, folder=folder)
