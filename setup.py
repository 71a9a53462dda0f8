"""Builds the native modules of shmcoord.

Environment switches, for development:
    SHMCOORD_SANITIZE=1   AddressSanitizer and UndefinedBehaviorSanitizer
    SHMCOORD_COVERAGE=1   line tracing of Cython code
    SHMCOORD_DEBUG=1      no optimisation, debug symbols
    SHMCOORD_STEPS=1      tests may end the process behind any step of the protocol (_steps.pxd)
"""

import os
import sys
from pathlib import Path

from Cython.Build import cythonize
from setuptools import Extension, setup

if not sys.platform.startswith("linux"):
    raise SystemExit(
        "shmcoord supports Linux only (x86-64 and aarch64): it is built on robust futexes and "
        f"open-file-description locks, which {sys.platform} does not have."
    )


def switch(name: str) -> bool:
    """Whether the environment turns a switch on."""
    return os.environ.get(name, "") not in ("", "0")


SANITIZE = switch("SHMCOORD_SANITIZE")
COVERAGE = switch("SHMCOORD_COVERAGE")
DEBUG = switch("SHMCOORD_DEBUG")

compile_args = ["-std=gnu11", "-Wall", "-Wextra", "-Wno-unused-parameter", "-g"]
# The meta entries are read and written as words.
compile_args += ["-fno-strict-aliasing"]
compile_args += ["-Wno-missing-field-initializers", "-Wno-cast-function-type"]
link_args: list[str] = []
macros: list[tuple[str, str | None]] = []
compile_args += ["-O0"] if DEBUG else ["-O2"]
if DEBUG:
    macros.append(("SHMCOORD_DEBUG", "1"))
if switch("SHMCOORD_STEPS"):
    macros.append(("SHMCOORD_STEPS", "1"))
if SANITIZE:
    flags = ["-fsanitize=address,undefined", "-fno-omit-frame-pointer"]
    compile_args += flags
    link_args += flags
if COVERAGE:
    macros.append(("CYTHON_TRACE_NOGIL", "1"))

# The picker's scan over many candidates is bound by instructions: unrolled it takes 5 to 10 % less.
module_args = {"picker": ["-funroll-loops"]}

# Each extension is one .pyx beside its .pxd; the two headers belong to all of them.
modules = sorted(path.stem for path in Path("shmcoord").glob("*.pyx"))
headers = ["shmcoord/_atomics.h", "shmcoord/_layout.h"]
extensions = [
    Extension(
        f"shmcoord.{module}",
        [f"shmcoord/{module}.pyx"],
        include_dirs=["shmcoord"],
        depends=headers,
        define_macros=macros,
        extra_compile_args=compile_args + module_args.get(module, []),
        extra_link_args=link_args,
    )
    for module in modules
]

setup(
    ext_modules=cythonize(
        extensions,
        nthreads=os.cpu_count() or 1,
        compiler_directives={
            "language_level": 3,
            "binding": False,
            "embedsignature": True,
            "linetrace": COVERAGE,
        },
    )
)
