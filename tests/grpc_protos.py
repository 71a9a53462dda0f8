"""Python code for the protos of the examples, generated when it is first needed.

The fixture `example_services` (conftest.py) puts it on the path and hands out `grpc_services`.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from importlib.metadata import version
from pathlib import Path

import pytest

PROTOS = Path(__file__).parent / "protos"
#: Ignored by git; `make clean` removes it.
CACHE = Path(__file__).parents[1] / "build" / "protos"


def generated(*plugins: str) -> Path:
    """The folder with `helloworld_pb2.py` and so on, made now or by an earlier session.

    Args:
        plugins: What protoc writes: "python", "pyi", "grpc_python", "mypy", "mypy_grpc".
    """
    pytest.importorskip("grpc_tools", reason="grpcio-tools is not installed (extra `test`)")
    sources = sorted(PROTOS.glob("*.proto"))
    made_of = [path.read_bytes() for path in sources]
    made_of += [f"{plugins} {version('grpcio-tools')}".encode()]
    if any(plugin.startswith("mypy") for plugin in plugins):
        made_of.append(version("mypy-protobuf").encode())
    target = CACHE / hashlib.sha256(b"\0".join(made_of)).hexdigest()[:16]
    if target.is_dir():
        return target
    CACHE.mkdir(parents=True, exist_ok=True)
    # Renamed into place when whole: sessions that run at the same time see all or nothing.
    part = Path(tempfile.mkdtemp(prefix="part-", dir=CACHE))
    path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", "")])
    try:
        done = subprocess.run(
            [
                *(sys.executable, "-m", "grpc_tools.protoc", f"-I{PROTOS}"),
                *(f"--{plugin}_out={part}" for plugin in plugins),
                *(path.name for path in sources),
            ],
            env={**os.environ, "PATH": path},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        try:
            part.rename(target)
        except OSError:  # another session was faster
            if not target.is_dir():
                raise
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return target


def importable() -> Path:
    """`generated`, on the path of this process."""
    folder = generated("python", "grpc_python")
    if str(folder) not in sys.path:
        sys.path.append(str(folder))
    return folder
