"""The .pxd files and headers are public: a module outside of the tree builds against them."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
from helpers import Child

import shmcoord
from shmcoord import NoBackend, Router, Segment, State

pytest.importorskip("Cython", reason="Cython is not installed (extra `test`)")
pytest.importorskip("setuptools", reason="setuptools is not installed (extra `test`)")

SOURCE = '''
# cython: language_level=3, boundscheck=False
"""Reads a node's load word and record, and picks by a policy of its own, all without the GIL."""
from libc.stdint cimport uint32_t, uint64_t

from shmcoord._atomics cimport load_acquire_u32, load_acquire_u64
from shmcoord._layout cimport (
    SHMC_R_GAUGES,
    SHMC_R_GENERATION,
    SHMC_R_SERVED,
    SHMC_RECORD_WORDS,
    SHMC_STATE_OPEN,
    shmc_record,
)
from shmcoord.backend cimport Backend
from shmcoord.cells cimport death_is_alive
from shmcoord.picker cimport candidates_t, is_open, native_policy, pick_t
from shmcoord.status cimport (
    bits_to_double,
    record_read,
    word_generation,
    word_inflight,
    word_queue,
    word_state,
    word_waiting,
)


def read_load(Backend backend not None):
    cdef uint64_t word
    backend.mapping.check()
    with nogil:
        word = load_acquire_u64(&backend.hot.load)
    return {
        "generation": word_generation(word) == backend.info.generation & 0xFFFF,
        "open": word_state(word) == SHMC_STATE_OPEN,
        "waiting": word_waiting(word),
        "inflight": word_inflight(word),
        "alive": bool(death_is_alive(load_acquire_u32(&backend.hot.death))),
    }


def read_record(Backend backend not None):
    cdef uint64_t words[32]
    cdef const shmc_record* record
    cdef bint whole
    backend.mapping.check()
    record = &backend.m.record[backend.info.slot]
    with nogil:
        whole = record_read(record, words, SHMC_RECORD_WORDS)
    return {
        "whole": bool(whole),
        "generation": words[SHMC_R_GENERATION] == backend.info.generation,
        "served": words[SHMC_R_SERVED],
        "gauge": bits_to_double(words[SHMC_R_GAUGES]),
    }


cdef int _longest(candidates_t* table, const pick_t* pick) noexcept nogil:
    """The living open node with the longest queue; the contrary of what is wanted."""
    cdef uint32_t i
    cdef int found = -1
    cdef long long most = -1
    cdef uint64_t word
    for i in range(table.count):
        if is_open(&table.items[i], pick, &word) and <long long>word_queue(word) > most:
            most = word_queue(word)
            found = <int>i
    return found


LONGEST = native_policy("longest", _longest)
'''

SETUP = """
import sys
from pathlib import Path
from Cython.Build import cythonize
from setuptools import Extension, setup
import shmcoord

include = shmcoord.get_include()
setup(
    name="downstream",
    script_args=["-q", "build_ext", "--inplace"],
    ext_modules=cythonize(
        [Extension("downstream", ["downstream.pyx"], include_dirs=[include])],
        include_path=[str(Path(include).parent)],
        quiet=True,
    ),
)
"""

NODES = """
segment = Segment.open(name)
nodes = [
    segment.join(word, group="G", endpoint=f"{word}:1", gauges=("fill",), interval_s=0.05)
    for word in ("A", "B", "C")
]
a, b, c = nodes
held = [a.begin(), a.begin()]
a.waiting = 3
for failed in (False, True, False):
    b.end(b.begin(), failed=failed)
b.publish(fill=0.25)
held.append(c.begin())
say("joined")
hear()
a.drain()
say("drained")
hear()
"""


@pytest.fixture(scope="module")
def downstream(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    """The compiled module."""
    folder = tmp_path_factory.mktemp("downstream")
    (folder / "downstream.pyx").write_text(SOURCE)
    (folder / "build.py").write_text(SETUP)
    done = subprocess.run(
        [sys.executable, "build.py"], cwd=folder, capture_output=True, text=True, timeout=110
    )
    assert done.returncode == 0, done.stdout + done.stderr
    path = folder / f"downstream{sysconfig.get_config_var('EXT_SUFFIX')}"
    spec = importlib.util.spec_from_file_location("downstream", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_headers_are_where_get_include_says() -> None:
    include = Path(shmcoord.get_include())
    headers = {"_atomics.h", "_layout.h", "_atomics.pxd", "_layout.pxd", "status.pxd"}
    assert {name for name in headers if not (include / name).is_file()} == set()


def test_a_native_reader_sees_nodes_of_another_process(
    downstream: ModuleType, name: str, spawn: Callable[..., Child]
) -> None:
    with Segment.open(name, slots=8, leases=8) as segment:
        child = spawn(NODES, name)
        assert child.hear() == "joined"
        backends = [segment.backend(node) for node in ("A", "B", "C")]
        a, b, c = backends

        assert downstream.read_load(a) == {
            "generation": True,
            "open": True,
            "waiting": 3,
            "inflight": 2,
            "alive": True,
        }
        record = downstream.read_record(b)
        assert record == {"whole": True, "generation": True, "served": 3, "gauge": 0.25}
        status = segment.status("B")
        assert (status.served, status.gauges) == (record["served"], {"fill": record["gauge"]})

        # A (5) before C (1) before B (0); then A drains, then everybody is dead.
        with Router(segment, policy=downstream.LONGEST) as router:
            assert router.policy == "longest"
            assert router.pick("G") == a
            with router.acquire("G", exclude=[a]) as lease:
                assert lease.backend == c
            child.say()
            assert child.hear() == "drained"
            assert a.state is State.DRAINING
            assert not downstream.read_load(a)["open"]
            assert router.pick("G") == c
            assert router.explain("G").chosen == c
            child.kill()
            assert not downstream.read_load(c)["alive"]
            with pytest.raises(NoBackend):
                router.pick("G")
        segment.reap()


def test_a_closed_handle_is_refused(downstream: ModuleType, name: str) -> None:
    with Segment.open(name, slots=4, leases=4) as segment:
        node = segment.join("A", group="G", endpoint="a:1")
        backend = segment.backend("A")
        assert downstream.read_load(backend)["alive"]
        assert not node.left
    with pytest.raises(ValueError, match="closed"):
        downstream.read_load(backend)
    with pytest.raises(TypeError):
        downstream.read_load(None)
