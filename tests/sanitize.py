"""Tests of the core and the fuzzers on a build with AddressSanitizer and UBSan.

`make sanitize`, or `python tests/sanitize.py [arguments for pytest]`. The build is made of a copy
of the tree in a temporary folder; the tree itself keeps its own. Needs gcc with its sanitizers.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PARTS = ("setup.py", "pyproject.toml", "README.md", "LICENSE", "shmcoord", "tests")
CORE = (
    "segment", "liveness", "status", "lease", "node", "observe", "picker", "router", "waiting",
    "fork", "update", "dispatch", "lifecycle", "turns", "trace", "budget", "table", "policies",
    "hedging", "origin", "mirror", "mirror_leases", "mirror_routing",
)  # fmt: skip
FAULTS = ("header", "storage", "exhausted", "namespaces", "fuzz")
#: Overruns a block of the heap by ctypes: must be reported, or nothing would be.
CONTROL = """
import ctypes
block = ctypes.create_string_buffer(64)
ctypes.memmove(block, bytes(256), 256)
"""


def library(name: str) -> str:
    """The path of a library of the compiler."""
    command = ["gcc", f"-print-file-name={name}"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def copy(folder: Path) -> None:
    """The tree, without what was built in it."""
    made = shutil.ignore_patterns("*.so", "*.c.new", "__pycache__", ".*")
    for part in PARTS:
        source = ROOT / part
        if source.is_dir():
            shutil.copytree(source, folder / part, ignore=made)
        else:
            shutil.copy(source, folder / part)
    for generated in (folder / "shmcoord").glob("*.c"):
        generated.unlink()


def build(folder: Path) -> dict[str, str]:
    """Build the copy; the environment to run it in."""
    flags = "-O1 -g1 -fsanitize-coverage=trace-pc"
    subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--inplace", f"-j{os.cpu_count() or 1}"],
        cwd=folder,
        env={**os.environ, "SHMCOORD_SANITIZE": "1", "CFLAGS": flags},
        stdout=subprocess.DEVNULL,
        check=True,
    )
    shim = folder / "coverage.so"
    source = folder / "tests" / "faults" / "native" / "coverage.c"
    subprocess.run(["gcc", "-O2", "-shared", "-fPIC", "-o", shim, source], check=True)
    return {
        **os.environ,
        "LD_PRELOAD": " ".join([library("libasan.so"), library("libubsan.so"), str(shim)]),
        # Both signals are for tests of files with parts missing; a small quarantine gives memory
        # back.
        "ASAN_OPTIONS": "detect_leaks=0:handle_sigbus=0:handle_sigfpe=0:quarantine_size_mb=8",
        "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
        "PYTHONMALLOC": "malloc",
        "PYTHONPATH": str(folder),
        "SHMCOORD_SANITIZED": "1",
    }


def main() -> int:
    with tempfile.TemporaryDirectory(prefix="shmcoord-sanitize-") as name:
        folder = Path(name)
        folder.chmod(0o755)  # some tests go on as another user
        copy(folder)
        environment = build(folder)
        control = subprocess.run(
            [sys.executable, "-c", CONTROL],
            env=environment,
            cwd=folder,
            capture_output=True,
            text=True,
            check=False,
        )
        if "heap-buffer-overflow" not in control.stderr:
            print("the control was not reported: AddressSanitizer is not at work", file=sys.stderr)  # noqa: T201
            return 1
        tests = [f"tests/test_{module}.py" for module in CORE]
        tests += [f"tests/faults/test_{module}.py" for module in FAULTS]
        if any(not argument.startswith("-") for argument in sys.argv[1:]):
            tests = []  # others are named
        command = [sys.executable, "-m", "pytest", "-q", "--timeout=600", *sys.argv[1:], *tests]
        return subprocess.run(command, cwd=folder, env=environment, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
