"""Processes that the benchmarks start: ready when they say so, gone when their stdin closes.

A child prints `ready` when it is, and ends when its standard input does. The pipe closes also when
the benchmarks are killed, so that nothing outlives them.
"""

from __future__ import annotations

import os
import secrets
import selectors
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
READY_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 10.0


class ChildError(RuntimeError):
    """A child ended, or stayed silent, before it was ready."""


def environment() -> dict[str, str]:
    """Returns the environment for children: they import the same tree as we do."""
    path = os.environ.get("PYTHONPATH", "")
    return os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{path}" if path else str(ROOT)}


def _await_ready(child: subprocess.Popen[str], what: str, timeout_s: float) -> str:
    assert child.stdout is not None
    deadline = time.monotonic() + timeout_s
    with selectors.DefaultSelector() as selector:
        selector.register(child.stdout, selectors.EVENT_READ)
        while selector.select(max(0.0, deadline - time.monotonic())):
            line = child.stdout.readline()
            if line.startswith("ready"):
                return line.removeprefix("ready").strip()
            if not line:
                raise ChildError(f"{what} ended before it was ready (exit code {child.wait()})")
    raise ChildError(f"{what} was not ready after {timeout_s:.0f} s")


def _stop(child: subprocess.Popen[str]) -> None:
    assert child.stdin is not None
    assert child.stdout is not None
    child.stdin.close()
    try:
        child.wait(STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()
    child.stdout.close()


@contextmanager
def children(commands: list[list[str]], timeout_s: float = READY_TIMEOUT_S) -> Iterator[list[str]]:
    """Starts `python -m <command>` for each command, at the same time.

    Yields:
        What each child said after `ready`, as soon as all are ready. All are stopped at the end.

    Raises:
        ChildError: one did not become ready.
    """
    started: list[subprocess.Popen[str]] = []
    try:
        for command in commands:
            started.append(
                subprocess.Popen(
                    [sys.executable, "-m", *command],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
                    cwd=ROOT,
                    env=environment(),
                )
            )
        yield [
            _await_ready(child, " ".join(command), timeout_s)
            for child, command in zip(started, commands, strict=True)
        ]
    finally:
        for child in started:
            _stop(child)


@contextmanager
def new_folder() -> Iterator[Path]:
    """Makes an empty folder of a short name that nothing else on the machine has."""
    folder = Path(tempfile.gettempdir()) / f"shmbench-{os.getpid()}-{secrets.token_hex(3)}"
    folder.mkdir(mode=0o700)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def until_stopped(period_s: float | None = None, words: str = "") -> Iterator[None]:
    """In a child: says ready and the words, then yields every `period_s` s until stdin closes."""
    print("ready", words, flush=True)
    with selectors.DefaultSelector() as selector:
        selector.register(sys.stdin, selectors.EVENT_READ)
        while not selector.select(period_s):
            yield
