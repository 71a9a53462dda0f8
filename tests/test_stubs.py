"""The stubs say what the native modules do: stubtest, and the signatures that it cannot see."""

from __future__ import annotations

import ast
import importlib
import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import shmcoord

PACKAGE = Path(shmcoord.__file__).resolve().parent
MODULES = sorted(path.stem for path in PACKAGE.glob("*.pyx"))
HERE = Path(__file__).resolve().parent

# Name, kind ("", "*", "**" or "kw") and default of each parameter but self and cls.
Parameters = list[tuple[str, str, object]]


@pytest.mark.lint
def test_stubtest(tmp_path: Path) -> None:
    pytest.importorskip("mypy", reason="mypy is not installed (extra `dev`)")
    done = subprocess.run(
        [
            *(sys.executable, "-m", "mypy.stubtest", "shmcoord", "--concise"),
            *("--mypy-config-file", str(HERE.parent / "pyproject.toml")),
            *("--allowlist", str(HERE / "stubtest-allowlist.txt")),
        ],
        cwd=PACKAGE.parent,
        # Its cache is its own: other runs of mypy must not find half of ours.
        env={**os.environ, "MYPY_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=110,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_each_native_module_has_one_stub() -> None:
    assert sorted(path.stem for path in PACKAGE.glob("*.pyi")) == MODULES
    assert (PACKAGE / "py.typed").exists()


def _parameters(arguments: ast.arguments) -> Parameters:
    positional = [*arguments.posonlyargs, *arguments.args]
    missing: list[ast.expr | None] = [None] * (len(positional) - len(arguments.defaults))
    pairs = list(zip(positional, [*missing, *arguments.defaults], strict=True))
    found = [(arg.arg, "", default) for arg, default in pairs]
    if arguments.vararg is not None:
        found.append((arguments.vararg.arg, "*", None))
    found += [
        (arg.arg, "kw", default)
        for arg, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
    ]
    if arguments.kwarg is not None:
        found.append((arguments.kwarg.arg, "**", None))
    return [
        (name, kind, "required" if default is None else ast.literal_eval(default))
        for name, kind, default in found
        if name not in ("self", "cls")
    ]


def _embedded(documentation: str | None) -> Parameters | None:
    """The signature that Cython puts before a docstring; None if there is none."""
    match = re.match(r"[\w.]+(\(.*\))$", (documentation or "").split("\n")[0])
    if match is None:
        return None
    untyped = re.sub(r"\b[A-Za-z_]\w* (?=[A-Za-z_])", "", match.group(1))  # "Mapping segment"
    function = ast.parse(f"def f{untyped}: ...").body[0]
    assert isinstance(function, ast.FunctionDef)
    return _parameters(function.args)


def _stub_functions(module: str) -> dict[str, ast.arguments]:
    """`function` and `Class.method` of a stub; setters are attributes."""
    found = {}
    tree = ast.parse((PACKAGE / f"{module}.pyi").read_text())
    for owner in [tree, *(node for node in tree.body if isinstance(node, ast.ClassDef))]:
        prefix = "" if isinstance(owner, ast.Module) else f"{owner.name}."
        for node in owner.body:
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                words = {ast.unparse(decorator) for decorator in node.decorator_list}
                if words <= {"classmethod", "staticmethod"}:
                    found[prefix + node.name] = node.args
    return found


@pytest.mark.parametrize("module", MODULES)
def test_signatures_are_those_of_the_native_code(module: str) -> None:
    """Compiled functions have no signature for `inspect`; the first line of their text does."""
    native = importlib.import_module(f"shmcoord.{module}")
    checked = 0
    for path, arguments in _stub_functions(module).items():
        if path.split(".")[-1] in ("__new__", "__eq__", "__hash__", "__exit__", "__enter__"):
            continue
        stub = _parameters(arguments)
        if path.endswith(".__init__"):
            owner = getattr(native, path.split(".")[0])
            runtime = _embedded(inspect.getdoc(owner)) or []
            if {kind for _, kind, _ in stub} == {"*", "**"}:  # Never: not to be called
                with pytest.raises(TypeError):
                    owner()
                continue
            # Cython prints parameters behind *args before them.
            assert {(n, d) for n, _, d in runtime} == {(n, d) for n, _, d in stub}, path
        else:
            target: object = native
            for word in path.split("."):
                target = inspect.getattr_static(target, word)
            text = target.__func__.__doc__ if isinstance(target, staticmethod) else target.__doc__
            assert _embedded(text) == stub, path
        checked += 1
    assert checked or module in (
        *("status", "beat", "cells", "liveness", "backend", "picker", "explain"),
    )


@pytest.mark.parametrize("module", MODULES)
def test_stubs_have_no_docstrings(module: str) -> None:
    """They stand in the .pyx, once."""
    for node in ast.walk(ast.parse((PACKAGE / f"{module}.pyi").read_text())):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            assert ast.get_docstring(node) is None


def test_a_wrong_signature_is_noticed() -> None:
    """The comparison itself can fail."""
    assert _embedded("Node.end(self, handle, failed=False)") == [
        ("handle", "", "required"),
        ("failed", "", False),
    ]
    assert _embedded("reap(Mapping mapping)") == [("mapping", "", "required")]
    assert _embedded("open(cls, name, *, mode=0o600)\nText.") == [
        ("name", "", "required"),
        ("mode", "kw", 384),
    ]
    assert _embedded("Whether it has left.") is None
