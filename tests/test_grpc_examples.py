"""examples/helloworld runs as told, and differs from plain gRPC by one line on each side."""

from __future__ import annotations

import contextlib
import difflib
import re
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc_protos
import pytest

EXAMPLE = Path(__file__).parents[1] / "examples" / "helloworld"


@pytest.fixture
def folder(tmp_path: Path, new_name: Callable[[], str]) -> Path:
    """A copy that meets no other segment; ports are chosen by the system."""
    folder = shutil.copytree(EXAMPLE, tmp_path / "helloworld")
    for file in ("greeter_server.py", "greeter_client.py"):
        text = (folder / file).read_text()
        assert "shm_hello" in text
    name = new_name()
    for file in ("greeter_server.py", "greeter_client.py"):
        text = (folder / file).read_text().replace("shm_hello", name)
        (folder / file).write_text(text)
    return folder


@contextlib.contextmanager
def server(folder: Path, name: str) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, str(folder / "greeter_server.py"), name, "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline().startswith(f"{name} serves")
        yield process
    finally:
        process.send_signal(signal.SIGINT)
        try:
            assert process.wait(10) == 0
        finally:
            process.kill()
            process.wait()
            process.stdout.close()


def ask(folder: Path) -> Counter[str]:
    """Who answered how often."""
    done = subprocess.run(
        [sys.executable, str(folder / "greeter_client.py")],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    said = [
        re.fullmatch(r"Hello, number (\d), from (\w)!", line) for line in done.stdout.splitlines()
    ]
    assert [line and line[1] for line in said] == [str(number) for number in range(6)]
    return Counter(line[2] for line in said if line)


def test_it_runs(folder: Path):
    with server(folder, "B"):
        with server(folder, "D"):
            assert set(ask(folder)) <= {"B", "D"}
        assert ask(folder) == {"B": 6}  # D has drained and left


@pytest.mark.parametrize("side", ["server", "client"])
def test_one_line_is_another(side: str):
    texts = [
        (EXAMPLE / f"greeter_{side}{which}.py").read_text().splitlines() for which in ("_plain", "")
    ]
    # What the first line says of itself, imports and empty lines aside.
    before, after = (
        [line for line in text[1:] if line and not re.match("import|from .* import", line)]
        for text in texts
    )
    changed = [line for line in difflib.ndiff(before, after) if line[0] in "+-"]
    assert [line[0] for line in changed] == ["-", "+"]
    assert "grpc." in changed[0]
    assert "shmcoord.grpc." in changed[1]
    assert set(texts[1]) - set(texts[0]) >= {"import shmcoord.grpc"}


def test_the_generated_code_is_up_to_date():
    assert (EXAMPLE / "helloworld.proto").read_bytes() == (
        grpc_protos.PROTOS / "helloworld.proto"
    ).read_bytes()
    made = grpc_protos.generated("python", "grpc_python")
    serialized = re.compile(r"AddSerializedFile\((b'.*')\)")
    mine, new = (
        serialized.search((folder / "helloworld_pb2.py").read_text()) for folder in (EXAMPLE, made)
    )
    assert mine is not None
    assert new is not None
    # Other versions of the generator write other Python around it.
    assert mine[1] == new[1], "generate again: see examples/helloworld/README.md"
