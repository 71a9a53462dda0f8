"""A checkout whose native modules are not built says which command builds them."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import shmcoord

PACKAGE = Path(shmcoord.__file__).resolve().parent


@pytest.fixture
def unbuilt(tmp_path: Path) -> Path:
    """A folder with a copy of the package as the repository has it: sources only."""
    shutil.copytree(
        PACKAGE,
        tmp_path / "shmcoord",
        ignore=shutil.ignore_patterns("*.so", "*.c", "__pycache__"),
    )
    return tmp_path


def _import(folder: Path, statement: str) -> str:
    """The last line of standard error of an import that has to fail."""
    code = f"import sys; sys.path.insert(0, {str(folder)!r}); {statement}"
    # -S: without site-packages, so that the installed package cannot fill in.
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 1, done.stdout + done.stderr
    return done.stderr.strip().splitlines()[-1]


@pytest.mark.parametrize(
    "statement",
    ["import shmcoord", "from shmcoord import Router", "import shmcoord.status"],
)
def test_the_message_has_the_command(unbuilt: Path, statement: str) -> None:
    last = _import(unbuilt, statement)
    assert last.startswith("ModuleNotFoundError: shmcoord's native modules are not built")
    assert "pip install -e ." in last
    assert "make build" in last


def test_another_missing_module_is_not_mistaken_for_ours(unbuilt: Path) -> None:
    (unbuilt / "shmcoord" / "api.py").write_text("import surely_not_there\n")
    assert _import(unbuilt, "import shmcoord") == (
        "ModuleNotFoundError: No module named 'surely_not_there'"
    )
