"""mypy --strict accepts user code over both plug-ins, and finds what is wrong in it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import grpc_protos
import pytest

pytestmark = pytest.mark.lint
CODE = Path(__file__).parent / "typed" / "user_code.py"
ROOT = Path(__file__).parents[1]

#: What is changed in the code, and what mypy says then.
WRONG = {
    "group of a channel": (
        'shmcoord.grpc.aio.channel("shm_host1", group="GREEN")',
        'shmcoord.grpc.aio.channel("shm_host1", group=1)',
        'Argument "group" to "channel" has incompatible type "int"; expected "str"',
    ),
    "no group": (
        'shmcoord.grpc.channel(group="GREEN", router=router)',
        "shmcoord.grpc.channel(router=router)",
        'Missing named argument "group" for "channel"',
    ),
    "segment of a server": (
        'executor_workers=8, node="B", segment=segment.name,',
        'executor_workers=8, node="B", segment=8,',
        'Argument "segment" to "server" has incompatible type "int"',
    ),
    "kind of a channel": (
        "server: grpc.aio.Server = shmcoord.grpc.aio.server(",
        "server: grpc.Server = shmcoord.grpc.aio.server(",
        'variable has type "Server"',
    ),
    "request": (
        "await greeter.SayHello(REQUEST, timeout=1.0)",
        "await greeter.SayHello(HERE, timeout=1.0)",
        'has incompatible type "Point"; expected "HelloRequest"',
    ),
}


def _mypy(file: Path, cache: Path) -> str:
    """What mypy says about a file."""
    pytest.importorskip("mypy", reason="mypy is not installed (extra `dev`)")
    pytest.importorskip("mypy_protobuf", reason="mypy-protobuf is not installed (extra `test`)")
    stubs = grpc_protos.generated("mypy", "mypy_grpc")
    # What is installed says nothing of itself to users; here it is found beside them.
    options = ["--strict", "--config-file=", f"--cache-dir={cache}", "--follow-imports=silent"]
    done = subprocess.run(
        [sys.executable, "-m", "mypy", *options, file],
        env={**os.environ, "MYPYPATH": f"{stubs}{os.pathsep}{ROOT}"},
        cwd=file.parent,
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    return done.stdout + done.stderr


def test_user_code_is_well_typed_and_mistakes_are_found(tmp_path: Path):
    cache = tmp_path / "cache"
    assert _mypy(CODE, cache).startswith("Success"), _mypy(CODE, cache)
    text = CODE.read_text()
    wrong = tmp_path / "wrong.py"
    for right, changed, _ in WRONG.values():
        assert text.count(right) == 1, right
        text = text.replace(right, changed)
    wrong.write_text(text)
    said = _mypy(wrong, cache)
    for kind, (_, _, says) in WRONG.items():
        assert says in said, (kind, said)
    assert len([line for line in said.splitlines() if ": error:" in line]) >= len(WRONG)
