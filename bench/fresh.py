"""Fresh interpreters: how long one takes from start to exit, and how much memory it ends with.

They run without the .pth files of the environment (`-S`, then `import site`, which is what an
interpreter has done when it starts otherwise): a package that is installed for development puts a
finder there which imports a good part of what shmcoord needs, and would make `import shmcoord` look
cheaper than it is.
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import shmcoord

_REPORT = """
with open("/proc/self/smaps_rollup") as file:
    sizes = {line.split()[0]: line.split()[1] for line in file if "kB" in line}
print(sizes["Rss:"], sizes["Pss:"])
"""


@dataclass(frozen=True)
class Memory:
    """Resident memory in MiB: all pages, and with shared pages divided among their users."""

    rss_mib: float
    pss_mib: float


_PATH = os.pathsep.join(
    [str(Path(shmcoord.__file__).resolve().parent.parent), sysconfig.get_path("purelib")]
)


def _run(code: str, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-S", *options, "-c", f"import site\n{code}"],
        env=os.environ | {"PYTHONDONTWRITEBYTECODE": "", "PYTHONPATH": _PATH},
        cwd=tempfile.gettempdir(),
        capture_output=True,
        text=True,
        check=True,
    )


class Start:
    """A `bench.paired.Timed`: starts `python -c code` and waits for its end."""

    def __init__(self, code: str) -> None:
        self._code = code

    def run(self, n: int) -> float:
        """Starts it n times, one after the other; returns seconds."""
        start = time.perf_counter()
        for _ in range(n):
            _run(self._code)
        return time.perf_counter() - start


def memory(code: str) -> Memory:
    """Runs the code in a fresh interpreter; returns its memory at the end."""
    rss, pss = (int(word) / 1024 for word in _run(code + _REPORT).stdout.split())
    return Memory(rss, pss)


def import_times(module: str, most: int = 12) -> list[tuple[str, float]]:
    """Returns the modules that took longest to import, with their own milliseconds."""
    lines = _run(f"import {module}", "-X", "importtime").stderr.splitlines()[1:]
    parts = [line.removeprefix("import time:").split("|") for line in lines]
    times = [(name.strip(), int(own) / 1000) for own, _, name in parts]
    return sorted(times, key=lambda item: -item[1])[:most]
