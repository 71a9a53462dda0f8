"""Builds modules against the installed shmcoord, as any downstream module would be built.

`python -m bench.native` builds `_native.pyx` into bench/build/, or another source that is named;
`load()` does so when it is needed, in a process of its own, and imports it.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import ModuleType

import shmcoord
from bench.children import ROOT, environment

HERE = Path(__file__).resolve().parent
SOURCE = HERE / "_native.pyx"
FOLDER = HERE / "build"


class NotBuiltError(RuntimeError):
    """There is no compiler, no Cython, or the source does not compile."""


def _built(source: Path) -> Path:
    return FOLDER / f"{source.stem}{sysconfig.get_config_var('EXT_SUFFIX')}"


def _is_fresh(source: Path) -> bool:
    built = _built(source)
    if not built.exists():
        return False
    package = Path(shmcoord.__file__).parent
    sources = [
        source,
        Path(__file__),
        *source.parent.glob("*.pxd"),
        *package.glob("*.h"),
        *package.glob("*.pxd"),
    ]
    return all(path.stat().st_mtime < built.stat().st_mtime for path in sources)


def build(source: Path = SOURCE) -> None:
    """Translates, compiles and links."""
    from Cython.Build import cythonize
    from setuptools import Distribution, Extension

    # Cython looks for shmcoord's .pxd files where the package is, gcc for its headers there too.
    include = Path(shmcoord.get_include())
    # Without -falign-loops the same instructions take 3.3 or 5.2 ns a record, by where in a cache
    # line the linker happens to put the loop.
    extension = Extension(
        source.stem,
        [str(source)],
        include_dirs=[str(include)],
        extra_compile_args=["-O3", "-falign-loops=32"],
    )
    modules = cythonize(
        [extension],
        build_dir=str(FOLDER),
        include_path=[str(Path(shmcoord.__file__).resolve().parent.parent), str(ROOT)],
        force=True,
        quiet=True,
    )
    command = Distribution({"name": "bench-native", "ext_modules": modules}).get_command_obj(
        "build_ext"
    )
    command.build_lib = str(FOLDER)
    command.build_temp = str(FOLDER)
    command.ensure_finalized()
    command.run()


def load(source: Path = SOURCE) -> ModuleType:
    """Returns the compiled module, built first if it is missing or older than its sources.

    Raises:
        NotBuiltError: with the last line of what the build said.
    """
    if not _is_fresh(source):
        done = subprocess.run(
            [sys.executable, "-m", "bench.native", str(source)],
            cwd=ROOT,
            env=environment(),
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            last = (done.stderr.strip() or done.stdout.strip()).splitlines()[-1:]
            raise NotBuiltError(f"{source.name} does not build: {''.join(last)}")
    spec = importlib.util.spec_from_file_location(source.stem, _built(source))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    build(*map(Path, sys.argv[1:]))
