"""The linters, as tests: each is skipped, with the reason, where it is not installed."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = sysconfig.get_path("scripts")

pytestmark = pytest.mark.lint


@pytest.mark.parametrize(
    ("module", "command"),
    [
        ("ruff", ["-m", "ruff", "check", "--quiet", "."]),
        ("ruff", ["-m", "ruff", "format", "--check", "--quiet", "."]),
        ("mypy", ["-m", "mypy"]),
        ("cython_lint", [str(Path(SCRIPTS, "cython-lint")), "shmcoord", "bench"]),
    ],
    ids=["ruff-check", "ruff-format", "mypy", "cython-lint"],
)
def test_clean(module: str, command: list[str]) -> None:
    if importlib.util.find_spec(module) is None:
        pytest.skip(f"{module} is not installed (extra `dev`)")
    done = subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        # cython-lint looks for pycodestyle on PATH.
        env={**os.environ, "PATH": os.pathsep.join([SCRIPTS, os.environ.get("PATH", "")])},
        capture_output=True,
        text=True,
        timeout=110,
    )
    assert done.returncode == 0, done.stdout + done.stderr
