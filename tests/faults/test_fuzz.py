"""Random and coverage-guided inputs over all tables of a segment while they are in use.

Both run fuzzing.py in a process of its own on an instrumented build, with guard pages around each
mapping (native/coverage.c). At full counts that build also has AddressSanitizer and UBSan.

The guided engine is the one in fuzzing.py: it keeps the inputs that take a pair of basic blocks, or
a number of times through one, that none took before, as seen by gcc's trace-pc. atheris (libFuzzer)
over the same counters was tried, one run each: in 5 s 500 to 1,600 cases where this one made 4,000
to 4,900, fewer pairs reached, and the control not found in a minute.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import fuzzing
import pytest

import shmcoord

FUZZING = Path(__file__).with_name("fuzzing.py")
FULL = os.environ.get("SHMCOORD_FAULTS", "") == "full"
#: The package under test is an instrumented build with sanitizers itself (tests/sanitize.py).
SANITIZED = os.environ.get("SHMCOORD_SANITIZED", "") == "1"
SANITIZE = FULL and not SANITIZED
TRACE = "-fsanitize-coverage=trace-pc"


def library(name: str) -> str:
    """The path of a library of the compiler."""
    command = ["gcc", f"-print-file-name={name}"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def preload(shim: Path) -> dict[str, str]:
    """What the environment needs for an instrumented build."""
    if SANITIZED:
        return {}
    libraries = [str(shim)]
    if SANITIZE:
        libraries[:0] = [library("libasan.so"), library("libubsan.so")]
    return {
        "LD_PRELOAD": " ".join(libraries),
        "ASAN_OPTIONS": "detect_leaks=0:quarantine_size_mb=8",
        "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
        "PYTHONMALLOC": "malloc" if SANITIZE else "default",
    }


@pytest.fixture
def instrumented(changed_build) -> Callable[..., Path]:
    """Builds the package instrumented; with sanitizers at full counts."""

    def make(change: Callable[[Path], None] | None = None) -> Path:
        if SANITIZED and change is None:
            return Path(shmcoord.get_include()).parent
        if SANITIZE or SANITIZED:
            return changed_build("asan", change, SHMCOORD_SANITIZE="1", CFLAGS=f"-O1 -g1 {TRACE}")
        return changed_build("coverage", change, SHMCOORD_DEBUG="1", CFLAGS=f"-g0 {TRACE}")

    return make


def fuzz(folder: Path, shim: Path, name: str, engine: str, seconds: float, cases: int, *more: str):
    """Run the fuzzer to its end; the finished process, cases, places reached, errors by kind."""
    done = subprocess.run(
        [sys.executable, FUZZING, name, engine, str(seconds), str(cases), *more],
        cwd=folder,
        env={**os.environ, **preload(shim), "PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
        errors="replace",
        timeout=seconds + 300,
        check=False,
    )
    if done.returncode:
        return done, 0, 0, {}
    return done, *json.loads(done.stdout)


def with_sanitizers() -> str:
    return "ASan and UBSan" if SANITIZE or SANITIZED else "guard pages"


def test_every_word_of_the_layout_is_changed():
    """Fields that a later layout adds are not forgotten: all that the header asserts."""
    text = (Path(shmcoord.get_include()) / "_layout.h").read_text()
    tables = {"header": (fuzzing.HEADER, 0), "sync": (fuzzing.SYNC, 256)}
    tables |= {"hot": (fuzzing.HOT, 0), "meta": (fuzzing.META, 0)}
    asserted = re.findall(r"offsetof\(shmc_(\w+), (\w+)\) == (\d+)", text)
    assert len(asserted) > 40
    for struct, field, at in asserted:
        if struct in tables:
            places, base = tables[struct]
            assert base + int(at) in dict(places), f"{struct}.{field}"


def test_random_bytes_while_in_use(name, instrumented, preloaded, count, report):
    cases = count(20_000 if SANITIZED else 4000, 100_000)
    done, ran, places, errors = fuzz(instrumented(), preloaded, name, "random", 3000, cases)
    assert done.returncode == 0, done.stderr[-6000:]
    assert ran == cases
    assert {"LeaseLost", "NoBackend", "SegmentCorrupt", "NodeNotFound"} <= set(errors)
    assert places > 500, "nothing was instrumented"
    report(
        "random bytes in every table while in use",
        f"with {with_sanitizers()}",
        cases=ran,
        typed_errors=sum(errors.values()),
        crashes=0,
        hangs=0,
        edges=places,
    )


def test_coverage_guided(name, instrumented, preloaded, count, report):
    seconds = count(5, 300)
    done, ran, places, errors = fuzz(instrumented(), preloaded, name, "guided", seconds, 10**9)
    assert done.returncode == 0, done.stderr[-6000:]
    assert ran > 10 * seconds
    report(
        "coverage-guided fuzzing",
        f"with {with_sanitizers()}",
        seconds=seconds,
        cases=ran,
        typed_errors=sum(errors.values()),
        crashes=0,
        hangs=0,
        edges=places,
    )


@pytest.mark.parametrize("engine", ["random", "guided"])
def test_a_trusting_reader_is_found(name, instrumented, preloaded, engine, report):
    """The control: a reader that believes a count in the segment."""
    done, *_ = fuzz(instrumented(), preloaded, name, engine, 60, 10**6, "trusting")
    assert done.returncode != 0, "the control was not found"
    assert "reads out of bounds" in done.stderr
    report(f"fuzzing, control: a trusting reader, engine {engine}", "found")


def believe_counts(package: Path) -> None:
    """Take out the bound of the number of gauges."""
    path = package / "status.pyx"
    text = path.read_text()
    changed = text.replace("min(meta.gauge_count, <uint32_t>SHMC_GAUGES_MAX)", "meta.gauge_count")
    assert changed != text
    path.write_text(changed)


@pytest.mark.skipif(not FULL, reason="full counts only: a build of its own")
def test_a_core_without_a_bound_is_found(name, instrumented, preloaded, report):
    """The control: the core itself, less one bound."""
    done, *_ = fuzz(instrumented(believe_counts), preloaded, name, "random", 600, 10**6)
    assert done.returncode != 0, "the control was not found"
    assert "AddressSanitizer" in done.stderr or "runtime error" in done.stderr, done.stderr[-3000:]
    report("fuzzing, control: the core less one bound", f"found with {with_sanitizers()}")
