"""Counts, the report, and the builds of the fault harness.

`make test` runs every row at a reduced count, `make faults` at the full one (SHMCOORD_FAULTS=full).
Each row prints one line `FAULT <row>: <what was counted>`, and writes it as JSON to the file that
SHMCOORD_FAULTS_JSON names, of which `fault_table.py` makes the table of docs/reliability.md. A run
replaces there what was written of its own tests and leaves the rest: runs of single files add up.

Fixtures:
    full: whether the full counts are wanted.
    count: `count(reduced, full)` is the one of both that is wanted.
    report: `report("row", kills=300, leaked=0)` prints and keeps the row's line.
    step_build: a folder for PYTHONPATH with the package built with step hooks (`_steps.pxd`).
    spawn_step: `spawn` (see tests/conftest.py), but children import the package of `step_build`.
    changed_build: builds a copy of the package with other switches, or with something taken out.
    preloaded: the library of native/coverage.c.
    native: the module of native/, built against the package that is being tested.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import fault_table
import pytest
from fault_helpers import with_path
from helpers import Child

import shmcoord

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
FULL = os.environ.get("SHMCOORD_FAULTS", "") == "full"
#: Seconds for one test. The first one that needs a build also waits for the compiler.
TIMEOUT_S = 3600 if FULL else 300
#: Seconds after which a build of other sources is removed.
OLD_BUILD_S = 7 * 86400
#: Where each row is written as a line of JSON; "" for nowhere.
JSON = os.environ.get("SHMCOORD_FAULTS_JSON", "")
_rows: list[fault_table.Row] = []
_others: list[fault_table.Row] = []
_took: dict[str, float] = {}


def _append(entry: fault_table.Row) -> None:
    if JSON:
        with open(JSON, "a") as file:  # one write: lines of parallel runs do not mix
            file.write(json.dumps(entry) + "\n")


def _machine() -> str:
    """What ran it, in words."""
    model = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.machine(),
    )
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    return (
        f"{model}, {os.cpu_count()} cores, {memory:.0f} GiB, Linux {platform.release()}, "
        f"CPython {platform.python_version()}"
    )


def pytest_collection_finish(session: pytest.Session) -> None:
    """What is run now takes the place of what earlier runs have written of the same tests."""
    when = time.strftime("%Y-%m-%d")
    _others.append({"machine": _machine(), "full": FULL, "when": when})
    if JSON:
        fault_table.forget(Path(JSON), {item.nodeid for item in session.items})
    _append(_others[-1])


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """What failed is written too, beside what it may have said before; and how long it took."""
    outcome = yield
    result = outcome.get_result()  # type: ignore[attr-defined]
    if result.failed:
        _others.append({"failed": item.nodeid})
        _append(_others[-1])
    _took[item.nodeid] = _took.get(item.nodeid, 0.0) + result.duration
    if result.when == "teardown":
        _others.append({"seconds": round(_took[item.nodeid], 1), "of": item.nodeid})
        _append(_others[-1])


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents and item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(TIMEOUT_S))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """All rows together at the end, where output was captured until now."""
    if _rows:
        terminalreporter.section("faults" + (" (full counts)" if FULL else " (reduced counts)"))
        for line in fault_table.render(_rows, _others).splitlines():
            terminalreporter.write_line(line)


@pytest.fixture(scope="session")
def full() -> bool:
    """Whether the full counts are wanted."""
    return FULL


@pytest.fixture(scope="session")
def count() -> Callable[[int, int], int]:
    """Chooses between the reduced and the full count of a row."""
    return lambda reduced, full: full if FULL else reduced


@pytest.fixture
def report() -> Callable[..., None]:
    """Prints a row's line and keeps it for the table."""

    def write(row: str, *words: object, **counts: object) -> None:
        said = [str(word) for word in words]
        said += [f"{name.replace('_', ' ')} {value}" for name, value in counts.items()]
        print(f"FAULT {row}: {', '.join(said)}")  # noqa: T201
        test = os.environ.get("PYTEST_CURRENT_TEST", "").removesuffix(" (call)")
        kept = {
            key: value if isinstance(value, int | float | list) else str(value)
            for key, value in counts.items()
        }
        entry = {"row": row, "words": list(map(str, words)), "counts": kept}
        _rows.append({**entry, "control": "control" in row, "test": test, "full": FULL})
        _append(_rows[-1])

    return write


# --- builds, kept from session to session and shared by sessions that run at the same time


def _digest(paths: list[Path], *more: str) -> str:
    """Names what a build is made of: sources, interpreter, compiler of Cython, switches."""
    import Cython

    digest = hashlib.sha256(repr((sys.version, Cython.__version__, more)).encode())
    for path in sorted(paths):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


@functools.cache
def _builds() -> Path:
    """A folder that only we can write to, and that others find again."""
    folder = Path(tempfile.gettempdir(), f"shmcoord-faults-{os.geteuid()}")
    folder.mkdir(mode=0o700, exist_ok=True)
    info = folder.lstat()
    if folder.is_symlink() or info.st_uid != os.geteuid() or info.st_mode & 0o022:
        return Path(tempfile.mkdtemp(prefix="shmcoord-faults-"))  # somebody else's: build anew
    return folder


def build_once(kind: str, digest: str, make: Callable[[Path], None]) -> Path:
    """The folder that `make` filled, in this session or an earlier one.

    Built under a file lock and renamed into place when whole, so that sessions which run at the
    same time share it, and one that is interrupted leaves nothing behind that counts.
    """
    home = _builds()
    target = home / f"{kind}-{digest}"
    with open(home / f"{kind}-{digest}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.is_dir():
            part = Path(tempfile.mkdtemp(prefix=f"{kind}-part-", dir=home))
            try:
                make(part)
                part.rename(target)
            finally:
                shutil.rmtree(part, ignore_errors=True)
        os.utime(target)
    for other in home.glob("*-*"):
        with contextlib.suppress(OSError):
            if time.time() - other.stat().st_mtime > OLD_BUILD_S:
                shutil.rmtree(other) if other.is_dir() else other.unlink()
    return target


def _compile(folder: Path, **switches: str) -> None:
    """Run the folder's setup.py."""
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--inplace", f"-j{os.cpu_count() or 1}"],
        cwd=folder,
        env={**os.environ, **switches},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def package_copy(kind: str, change: Callable[[Path], None] | None = None, **switches: str) -> Path:
    """A build of a copy of the package, by its own setup.py, for PYTHONPATH.

    Args:
        kind: part of the folder's name.
        change: edits the copy before it is built, to take out a protection; its name tells one
            change from another.
        switches: what setup.py reads from the environment, such as SHMCOORD_STEPS="1".
    """
    package = ROOT / "shmcoord"
    patterns = ("*.pyx", "*.pxd", "*.h", "*.py")
    sources = [path for pattern in patterns for path in package.rglob(pattern)]
    changed = change.__code__.co_code.hex() + repr(change.__code__.co_consts) if change else ""
    digest = _digest([*sources, ROOT / "setup.py"], changed, repr(sorted(switches.items())))

    def make(folder: Path) -> None:
        for path in sources:
            target = folder / path.relative_to(ROOT)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, target)
        shutil.copy(ROOT / "setup.py", folder)
        if change is not None:
            change(folder / "shmcoord")
        _compile(folder, **switches)
        shutil.rmtree(folder / "build", ignore_errors=True)
        for made in (folder / "shmcoord").glob("*.c"):
            made.unlink()

    return build_once(kind, digest, make)


@pytest.fixture(scope="session")
def changed_build() -> Callable[..., Path]:
    """`package_copy`, for builds with other switches or without a protection."""
    pytest.importorskip("Cython", reason="Cython is not installed (extra `test`)")
    pytest.importorskip("setuptools", reason="setuptools is not installed (extra `test`)")
    return package_copy


@pytest.fixture(scope="session")
def preloaded() -> Path:
    """native/coverage.c as a library, to be preloaded where a build is traced."""
    if shutil.which("gcc") is None:
        pytest.skip("no gcc, whose instrumentation is used")
    source = HERE / "native" / "coverage.c"

    def make(folder: Path) -> None:
        command = ["gcc", "-O2", "-shared", "-fPIC", "-o", str(folder / "coverage.so"), str(source)]
        subprocess.run(command, check=True)

    return build_once("preload", _digest([source]), make) / "coverage.so"


@pytest.fixture(scope="session")
def step_build() -> Path:
    """The package with step hooks; children get it through PYTHONPATH."""
    pytest.importorskip("Cython", reason="Cython is not installed (extra `test`)")
    pytest.importorskip("setuptools", reason="setuptools is not installed (extra `test`)")
    # Not optimised: what is tested is where a process ends, and the compiler is three times faster.
    return package_copy("steps", SHMCOORD_STEPS="1", SHMCOORD_DEBUG="1")


@pytest.fixture
def spawn_step(step_build: Path) -> Iterator[Callable[..., Child]]:
    """Starts children on the build with step hooks; they are ended with the test."""
    with contextlib.ExitStack() as children:

        def start(code: str, *args: object) -> Child:
            child = Child(code, *args, executable=with_path(step_build))
            children.callback(child.close)
            return child

        yield start


SETUP = """
from pathlib import Path
from Cython.Build import cythonize
from setuptools import Extension, setup
import shmcoord

include = shmcoord.get_include()
setup(
    name="faultnative",
    ext_modules=cythonize(
        [
            Extension(
                "faultnative",
                ["faultnative.pyx"],
                include_dirs=[include],
                extra_compile_args=["-O2", "-std=gnu11", "-fno-strict-aliasing"],
            )
        ],
        include_path=[str(Path(include).parent)],
        quiet=True,
    ),
)
"""


@pytest.fixture(scope="session")
def native_path() -> Path:
    """The folder with the compiled module `faultnative`, for children's PYTHONPATH."""
    pytest.importorskip("Cython", reason="Cython is not installed (extra `test`)")
    pytest.importorskip("setuptools", reason="setuptools is not installed (extra `test`)")
    include = Path(shmcoord.get_include())
    public = [*include.glob("*.h"), *include.glob("*.pxd")]
    source = HERE / "native" / "faultnative.pyx"

    def make(folder: Path) -> None:
        shutil.copy(source, folder)
        (folder / "setup.py").write_text(SETUP)
        _compile(folder)
        shutil.rmtree(folder / "build", ignore_errors=True)

    return build_once("native", _digest([source, *public], SETUP, str(include)), make)


@pytest.fixture(scope="session")
def native(native_path: Path) -> ModuleType:
    """The compiled module `faultnative`."""
    path = native_path / f"faultnative{sysconfig.get_config_var('EXT_SUFFIX')}"
    spec = importlib.util.spec_from_file_location("faultnative", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def spawn_native(native_path: Path) -> Iterator[Callable[..., Child]]:
    """Starts children that can `import faultnative`; they are ended with the test."""
    with contextlib.ExitStack() as children:

        def start(code: str, *args: object) -> Child:
            child = Child(code, *args, executable=with_path(native_path))
            children.callback(child.close)
            return child

        yield start
