"""The barriers of the core as a compiler for aarch64 makes them: the core's own inline functions.

x86 keeps stores in order whatever the source says, so a forgotten order does no harm there and is
never noticed. aarch64 needs an instruction for each. A probe module, compiled by Cython from the
core's .pxd files, has each function under a name of its own; its assembly is read. The controls
compile the same probe with an order taken away, and must not pass.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path

import pytest
from programs import SOURCE, report

COMPILER = "aarch64-linux-gnu-gcc"

pytestmark = [
    pytest.mark.skipif(
        shutil.which(COMPILER) is None,
        reason=f"{COMPILER} is missing (Debian packages gcc-aarch64-linux-gnu, "
        "libc6-dev-arm64-cross)",
    ),
    pytest.mark.skipif(
        importlib.util.find_spec("Cython") is None, reason="Cython is missing (extra `test`)"
    ),
]

PROBE = """\
# cython: language_level=3
from libc.stdint cimport uint32_t, uint64_t
from shmcoord._atomics cimport cas_seqcst_u64
from shmcoord._layout cimport shmc_hot, shmc_record
from shmcoord.cells cimport notify_freed, owner_is_dead
from shmcoord.lease cimport free_cell, is_open, take_cell
from shmcoord.segment cimport mapping_t
from shmcoord.status cimport record_read, record_write

cdef public void probe_record_write(shmc_record* record, const uint64_t* words,
                                    uint32_t count) noexcept nogil:
    record_write(record, words, count)

cdef public int probe_record_read(const shmc_record* record, uint64_t* words,
                                  uint32_t count) noexcept nogil:
    return record_read(record, words, count)

cdef public int probe_take_cell(uint64_t* row, uint32_t first, uint32_t end,
                                uint64_t value) noexcept nogil:
    return take_cell(row, first, end, value)

cdef public int probe_is_open(const shmc_hot* hot, uint32_t generation) noexcept nogil:
    return is_open(hot, generation)

cdef public int probe_free_cell(mapping_t* m, shmc_hot* hot, uint32_t generation, uint64_t* cell,
                                uint64_t value, uint32_t cost) noexcept nogil:
    return free_cell(m, hot, generation, cell, value, cost)

cdef public int probe_owner_is_dead(const mapping_t* m, uint64_t cell) noexcept nogil:
    return owner_is_dead(m, cell)

cdef public void probe_notify_freed(mapping_t* m) noexcept nogil:
    notify_freed(m, 0)

cdef public int probe_adopt(uint64_t* cell, uint64_t expected, uint64_t value) noexcept nogil:
    return cas_seqcst_u64(cell, expected, value)
"""

#: How a compare-and-swap may be made, by what the compiler is told of the processor.
TARGETS = {
    "any": [],  # calls libgcc, which looks at the processor
    "exclusives": ["-mno-outline-atomics"],
    "armv8.1": ["-march=armv8.1-a"],
}

Assembly = dict[str, list[str]]


def _pyconfig(folder: Path) -> None:
    """Debian keeps one pyconfig.h per architecture; ours has the same sizes of everything."""
    multiarch = sysconfig.get_config_var("MULTIARCH") or ""
    version = f"python{sys.version_info[0]}.{sys.version_info[1]}"
    ours = Path("/usr/include", multiarch, version, "pyconfig.h")
    if multiarch and ours.exists():
        theirs = folder / "aarch64-linux-gnu" / version
        theirs.mkdir(parents=True)
        shutil.copy(ours, theirs)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Assembly]:
    """Compiles the probe with further options; the instructions of each function."""
    folder = tmp_path_factory.mktemp("aarch64")
    (folder / "probe.pyx").write_text(PROBE)
    _pyconfig(folder)
    subprocess.run(
        [sys.executable, "-m", "cython", "-3", "-I", str(SOURCE.parent), "probe.pyx"],
        cwd=folder,
        check=True,
        timeout=100,
    )
    known: dict[tuple[str, ...], Assembly] = {}

    def make(*options: str) -> Assembly:
        if options not in known:
            subprocess.run(
                [
                    *(COMPILER, "-std=gnu11", "-O2", "-w", "-fno-strict-aliasing", "-S"),
                    *(f"-I{path}" for path in (SOURCE, sysconfig.get_path("include"), folder)),
                    *options,
                    *("probe.c", "-o", "probe.s"),
                ],
                cwd=folder,
                check=True,
                timeout=100,
            )
            known[options] = _functions((folder / "probe.s").read_text())
        return known[options]

    return make


def _functions(text: str) -> Assembly:
    """The instructions of the probes, in the order of the text."""
    found: Assembly = {}
    for name, body in re.findall(r"^(probe_\w+):\n(.*?)^\t\.size\t\1,", text, re.M | re.S):
        lines = (re.sub(r"\s+", " ", line.split("//")[0]).strip() for line in body.splitlines())
        found[name] = [line for line in lines if line and not line.startswith((".", "//"))]
    return found


def _accesses(instructions: list[str]) -> list[str]:
    """Accesses to memory other than the stack, and barriers: "dmb ish", "stlr", "cas" and so on."""
    found = []
    for line in instructions:
        name = line.split()[0]
        if name == "dmb":
            found.append(line)
        elif re.fullmatch(r"bl", name) and "__aarch64_" in line:
            found.append(line.split()[1])
        elif re.match(r"(ld|st|cas|swp)", name) and "[sp" not in line:
            found.append(name)
    return found


def _is(pattern: str, accesses: list[str]) -> bool:
    return re.fullmatch(pattern, " ; ".join(accesses)) is not None


_LOAD = r"ldr|ldp|ldur"
_STORE = r"str|stp|stur"
#: A compare-and-swap that is acquire and release, in any of its forms.
_CAS = r"(?:__aarch64_cas8_acq_rel|casal|ldaxr ; stlxr)"
_ACQUIRE = r"(?:ldar|ldapr)"

#: seq ; barrier ; words from private memory to the copy ; commit
WRITE = rf"(?:{_LOAD}) ; dmb ish(?: ; (?:{_LOAD}) ; (?:{_STORE}))+ ; stlr"
#: seq ; words from the copy to private memory ; barrier ; seq again
READ = rf"{_ACQUIRE}(?: ; (?:{_LOAD}) ; (?:{_STORE}))+ ; dmb ish(?:ld)? ; (?:{_LOAD})"


def _problems(assembly: Assembly) -> set[str]:
    """The functions that lack an order which the memory model proofs rest on."""
    accesses = {name: _accesses(body) for name, body in assembly.items()}
    expected = {
        "probe_record_write": WRITE,
        "probe_record_read": READ,
        "probe_take_cell": rf"(?:{_LOAD}) ; {_CAS}",
        "probe_adopt": _CAS,
        # seq_cst loads are ldar: an ldapr might be taken before an earlier stlxr
        "probe_is_open": "ldar ; ldar",
        "probe_owner_is_dead": rf"(?:{_LOAD})(?: ; (?:{_LOAD}))* ; {_ACQUIRE}"
        rf"(?: ; (?:{_LOAD}))* ; {_ACQUIRE}",
    }
    assert set(expected) < set(accesses), "the compiler has left out a probe"
    wrong = {name for name, pattern in expected.items() if not _is(pattern, accesses[name])}
    # Freeing: the CAS comes first, and the look at the waiters is an ldar.
    if not re.match(rf"(?:(?:{_LOAD}) ; )*{_CAS} ; ", " ; ".join(accesses["probe_free_cell"])):
        wrong.add("probe_free_cell")
    if not re.match(rf"(?:(?:{_LOAD}) ; )*ldar", " ; ".join(accesses["probe_notify_freed"])):
        wrong.add("probe_notify_freed")
    return wrong


@pytest.mark.parametrize("target", TARGETS)
def test_every_order_has_its_instruction(compiled: Callable[..., Assembly], target: str) -> None:
    assembly = compiled(*TARGETS[target])
    for name in ("probe_record_write", "probe_record_read", "probe_take_cell"):
        report(f"aarch64, {target}: {name[6:]}: {' ; '.join(_accesses(assembly[name]))}")
    assert _problems(assembly) == set(), assembly


#: What is taken away -> options that do so, and the functions that must be found wrong.
CONTROLS = {
    "no fences": (
        ["-D__atomic_thread_fence(order)=((void)0)"],
        {"probe_record_write", "probe_record_read"},
    ),
    "release is relaxed": (
        ["-U__ATOMIC_RELEASE", "-D__ATOMIC_RELEASE=__ATOMIC_RELAXED"],
        {"probe_record_write"},
    ),
    "acquire is relaxed": (
        ["-U__ATOMIC_ACQUIRE", "-D__ATOMIC_ACQUIRE=__ATOMIC_RELAXED"],
        {"probe_record_read", "probe_owner_is_dead"},
    ),
    "seq_cst is relaxed": (
        ["-U__ATOMIC_SEQ_CST", "-D__ATOMIC_SEQ_CST=__ATOMIC_RELAXED"],
        {
            "probe_take_cell",
            "probe_adopt",
            "probe_is_open",
            "probe_free_cell",
            "probe_notify_freed",
        },
    ),
}


@pytest.mark.parametrize("control", CONTROLS)
def test_control(compiled: Callable[..., Assembly], control: str) -> None:
    options, wrong = CONTROLS[control]
    assert _problems(compiled(*options)) == wrong
