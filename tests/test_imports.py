"""Imports point one way, cost little, and the tree says nothing that does not belong there."""

from __future__ import annotations

import ast
import graphlib
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import shmcoord

PACKAGE = Path(shmcoord.__file__).resolve().parent
ROOT = Path(__file__).resolve().parent.parent

#: What each module of the package may import and cimport of the others: what is below it. A
#: package stands for its modules; "" is shmcoord itself, the face for users.
MAY_IMPORT: dict[str, set[str]] = {
    # the bytes and the system
    "_atomics": set(),
    "_bell": set(),
    "_entry": set(),
    "_layout": set(),
    "_posix": set(),
    "_steps": set(),
    # leaves of plain Python
    "errors": set(),
    "policy": {"decision"},
    "update": set(),
    "waiters": {"doorbell"},
    "waiting": {"waiters"},
    # native: the only code that touches shared memory
    "segment": {"_atomics", "_layout", "_posix", "_steps", "errors"},
    "status": {"_atomics", "_layout", "_posix", "_steps", "segment"},
    "cells": {"_atomics", "_bell", "_layout", "_posix", "_steps", "segment", "status"},
    "beat": {"_atomics", "_layout", "_posix", "_steps", "cells", "segment", "status"},
    "liveness": {
        *("_atomics", "_layout", "_posix", "_steps", "beat", "cells", "errors", "segment"),
        "status",
    },
    "turns": {
        *("_atomics", "_layout", "_posix", "_steps", "cells", "doorbell", "liveness"),
        *("segment", "status"),
    },
    "doorbell": {"_atomics", "_bell", "_posix", "liveness", "segment"},
    "budget": {"_atomics", "errors", "segment"},
    "backend": {"_atomics", "_layout", "cells", "segment", "status"},
    "lease": {
        "_atomics",
        "cells",
        "_layout",
        "_steps",
        "backend",
        "errors",
        "liveness",
        "segment",
        "status",
    },
    "picker": {"_atomics", "_layout", "cells", "policy", "status"},
    "table": {"_atomics", "_layout", "backend", "liveness", "picker", "status"},
    "explain": {
        *("_atomics", "_layout", "_posix", "backend", "cells", "decision", "liveness", "picker"),
        *("policy", "status", "table"),
    },
    "trace": {"_atomics", "_layout", "_posix", "decision", "liveness", "segment", "status"},
    "observe": {
        "_atomics",
        "cells",
        "_layout",
        "_posix",
        "backend",
        "errors",
        "liveness",
        "segment",
        "status",
    },
    # the two sides that users hold
    "node": {
        *("_atomics", "_layout", "_posix", "errors", "lease", "liveness", "segment", "status"),
        *("_steps", "cells", "update"),
    },
    "decision": {"backend", "status"},
    # what hosts tell each other of their nodes
    "origin": {"_atomics", "_entry", "_layout", "_posix", "cells", "liveness", "segment", "status"},
    "mirror": {
        *("_atomics", "_entry", "_layout", "_posix", "cells", "errors", "lease", "liveness"),
        *("node", "segment", "status"),
    },
    "groups": {
        *("_atomics", "_layout", "_posix", "backend", "decision", "errors", "explain", "liveness"),
        *("picker", "segment", "status", "table"),
    },
    "router": {
        *("_atomics", "_layout", "_posix", "backend", "budget", "cells", "decision", "errors"),
        *("groups", "lease", "liveness", "picker", "policy", "segment", "status", "table"),
        *("trace", "turns", "waiting"),
    },
    "bulk": {"status"},
    "api": {"backend", "bulk", "decision", "node", "observe", "segment", "status", "trace"},
    # sending
    "transport": {"errors"},
    "hedging": {"backend", "errors", "lease"},
    "course": {"backend", "budget", "decision", "errors", "lease", "router", "transport"},
    "dispatch": {
        *("backend", "budget", "course", "decision", "errors", "hedging", "lease", "router"),
        "transport",
    },
    # faces for what other libraries send
    "grpc": {
        *("api", "backend", "course", "decision", "errors", "lease", "node", "router", "segment"),
        *("status", "transport", "waiters"),
    },
    "http": {
        *("api", "backend", "course", "decision", "errors", "lease", "node", "router", "segment"),
        *("status", "transport"),
    },
    "": {
        *("api", "backend", "decision", "dispatch", "errors", "lease", "node", "policy", "router"),
        *("grpc", "http", "segment", "status", "transport"),
    },
    # faces
    "bridge": {"api", "errors", "mirror", "origin"},
    "cli": {"", "bridge", "decision", "errors", "policy", "segment", "status"},
    "__main__": {"cli"},
}

#: What they may import from outside the standard library; whoever is not here, nothing.
MAY_IMPORT_OUTSIDE: dict[str, set[str]] = {
    "update": {"psutil"},
    "api": {"numpy"},
    "bulk": {"numpy"},
    "transport.grpc": {"grpc"},
    "transport._grpc_common": {"grpc"},
    "transport._grpc_links": {"grpc"},
    "transport._grpc_threads": {"grpc"},
    "transport._grpc_asyncio": {"grpc"},
    "transport._grpc_aio_links": {"grpc"},
    "grpc": {"google", "grpc", "opentelemetry"},
    "http": {"httpx"},
    "bridge.config": {"msgspec"},
    "bridge.frame": {"msgspec"},
    "bridge.keys": {"cryptography"},
    "bridge._zenoh": {"zenoh"},
    "cli": {"click", "rich"},
}

CYTHON_OWN = {"cython", "cpython", "libc", "posix"}
SOURCES = sorted(
    path for path in PACKAGE.rglob("*") if path.suffix in (".py", ".pyx", ".pxd") and path.is_file()
)


def _module(path: Path) -> str:
    """`transport.local` for shmcoord/transport/local.py, `` for shmcoord/__init__.py."""
    parts = list(path.relative_to(PACKAGE).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


NAMES = {_module(path) for path in SOURCES}


def _unit(module: str) -> str:
    """The row of the table for a module."""
    return module if module in MAY_IMPORT else module.split(".")[0]


def _imports(path: Path) -> Iterator[str]:
    """Dotted names of everything that a file imports or cimports, wherever in it."""
    text = path.read_text()
    if path.suffix == ".py":
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Import):
                yield from (alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{path.name}: a relative import"
                assert node.module is not None
                yield from (f"{node.module}.{alias.name}" for alias in node.names)
        return
    for match in re.finditer(
        r"^[ \t]*from[ \t]+([\w.]+)[ \t]+c?import[ \t]+(\([^)]*\)|[^\n#]+)", text, re.M
    ):
        for name in re.findall(r"\w+(?: as \w+)?|\*", match.group(2)):
            yield f"{match.group(1)}.{name.split(' ')[0]}"
    for match in re.finditer(r"^[ \t]*c?import[ \t]+([\w., \t]+)", text, re.M):
        yield from (name.split()[0] for name in match.group(1).split(","))


def _targets(path: Path) -> tuple[set[str], set[str]]:
    """Modules of ours that a file imports, and top-level names from elsewhere."""
    ours, outside = set(), set()
    for name in _imports(path):
        top, _, rest = name.partition(".")
        if top != "shmcoord":
            outside.add(top)
            continue
        while rest and rest not in NAMES:  # the last words may name things, not modules
            rest = rest.rpartition(".")[0]
        ours.add(rest)
    return ours, outside


def test_the_parser_sees_all_forms(tmp_path: Path) -> None:
    native = tmp_path / "a.pyx"
    native.write_text(
        "cimport cython\nfrom shmcoord.status cimport (\n    NodeInfo,\n    word_make as wm,\n)\n"
        "def f():\n    import os.path, numpy as np\n    from shmcoord import update\n"
        'cdef extern from "x.h":\n    pass\nfrom shmcoord._layout cimport *  # all\n'
    )
    assert _targets(native) == ({"status", "update", "_layout"}, {"cython", "os", "numpy"})
    plain = tmp_path / "b.py"
    plain.write_text("def f():\n    from shmcoord.status import State\nimport grpc.aio, shmcoord\n")
    assert _targets(plain) == ({"status", ""}, {"grpc"})


def test_the_table_has_no_cycle_and_no_ghosts() -> None:
    list(graphlib.TopologicalSorter(MAY_IMPORT).static_order())
    assert {_unit(name) for name in NAMES} == set(MAY_IMPORT)
    assert {name for names in MAY_IMPORT.values() for name in names} <= set(MAY_IMPORT)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_one_way(path: Path) -> None:
    module = _module(path)
    unit = _unit(module)
    ours, outside = _targets(path)
    wrong = {name for name in ours if _unit(name) != unit and _unit(name) not in MAY_IMPORT[unit]}
    assert not wrong, f"{module} must not import {wrong}: see MAY_IMPORT"
    allowed = set(MAY_IMPORT_OUTSIDE.get(module, MAY_IMPORT_OUTSIDE.get(unit, set())))
    if path.suffix != ".py":
        allowed |= CYTHON_OWN
    wrong = outside - set(sys.stdlib_module_names) - allowed
    assert not wrong, f"{module} must not import {wrong}: see MAY_IMPORT_OUTSIDE"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_the_library_prints_nothing(path: Path) -> None:
    """What it has to say goes through logging; the command line has its own output."""
    if path.suffix == ".py":
        called = {
            node.func.id
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
        }
        assert "print" not in called
    else:
        assert not re.search(r"\b(print|printf|puts)\s*\(", path.read_text())


def _fresh(code: str, cwd: Path, *args: str) -> dict[str, list[str]]:
    """Run code in a new interpreter; `loaded()` there says what was imported since its start."""
    prelude = """
import sys
before = set(sys.modules)
def loaded():
    tops = {name.split(".")[0] for name in set(sys.modules) - before}
    # cython_runtime and _cython_<version> are put there by compiled modules, not imported.
    own = {name for name in tops if name.startswith(("_cython", "cython_runtime"))}
    return sorted(tops - set(sys.stdlib_module_names) - own)
"""
    done = subprocess.run(
        [sys.executable, "-c", prelude + code, *args],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    result: dict[str, list[str]] = json.loads(done.stdout)
    return result


def test_import_pulls_in_nothing_but_the_standard_library(tmp_path: Path, name: str) -> None:
    """psutil comes with the first join, NumPy and gRPC with who asks for them."""
    found = _fresh(
        """
import shmcoord
found = {"import": loaded()}
with shmcoord.Segment.open(sys.argv[1], slots=4, leases=4) as segment:
    shmcoord.segments(); segment.snapshot()
    with shmcoord.Router(sys.argv[1]) as router:
        router.explain("G")
    found["used"] = loaded()
    with segment.join("A", group="G", endpoint="a:1"):
        found["joined"] = loaded()
    shmcoord.Dispatcher
    found["dispatcher"] = loaded()
import json
print(json.dumps(found))
""",
        tmp_path,
        name,
    )
    assert found["import"] == ["shmcoord"]
    assert found["used"] == ["shmcoord"]
    assert found["joined"] == ["psutil", "shmcoord"]
    assert found["dispatcher"] == ["psutil", "shmcoord"]


def test_every_public_name_can_be_had(tmp_path: Path) -> None:
    found = _fresh(
        """
import json, shmcoord
missing = [name for name in shmcoord.__all__ if not hasattr(shmcoord, name)]
print(json.dumps({"missing": missing, "absent": [str(hasattr(shmcoord, "no_such_name"))]}))
""",
        tmp_path,
    )
    assert found == {"missing": [], "absent": ["False"]}


#: What has no place in the repository, and what it would be.
FORBIDDEN = {
    r"(?<![\w.)}\]])/(?:root|home|Users|work|workspace)/\w": "a path of somebody's machine",
    r"(?i)\b(?:extra-)?index-url\b|\btrusted-host\b": "a package registry",
    r"(?i)https?://[^\s\"'<>]*/simple\b": "a package registry",
    r"(?i)\b(?:issue|ticket|bug|pull request|PR) ?#? ?\d+\b": "a number of a tracker",
    r"(?<![\w&/#'\"(])#\d+\b(?!\w)": "a number of a tracker",
    r"(?i)\bco-authored-by\b|\bgenerated (?:by|with) an? \w*(?:bot|model|assistant)\b": "a by-line",
    r"\b[A]I\b|\bL[L]Ms?\b|(?i:\bchat[b]ot\b)": "a tool",
    r"\b[T]ODO\b|\bF[I]XME\b|\bX[X]X\b": "unfinished work",
}


def _tracked() -> list[Path]:
    done = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if done.returncode:
        pytest.skip("not a git checkout, so nobody knows which files belong to it")
    paths = (ROOT / name for name in done.stdout.split("\0") if name)
    return [
        path
        for path in paths
        # Pictures have colours, which look like numbers of a tracker.
        if path.is_file() and path.suffix != ".svg" and path != Path(__file__).resolve()
    ]


def test_the_repository_names_nothing_that_does_not_belong() -> None:
    found = []
    for path in _tracked():
        try:
            lines = path.read_text().splitlines()
        except UnicodeDecodeError:
            continue
        for number, line in enumerate(lines, 1):
            found += [
                f"{path.relative_to(ROOT)}:{number}: {what}: {line.strip()[:100]}"
                for pattern, what in FORBIDDEN.items()
                if re.search(pattern, line)
            ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "line",
    [
        "see /home/somebody/x.py",
        "cd /root/src",
        "--index-url https://packages.example/simple",
        "as said in issue 12",
        "fixes #7",
        "# TO" + "DO: later",
    ],
)
def test_forbidden_things_are_noticed(line: str) -> None:
    assert any(re.search(pattern, line) for pattern in FORBIDDEN)


@pytest.mark.parametrize("line", ["a/home/page", "color: #123abc", "{x!r:#018x}", "&#39;", "# 7 x"])
def test_other_things_are_not(line: str) -> None:
    assert not any(re.search(pattern, line) for pattern in FORBIDDEN)
