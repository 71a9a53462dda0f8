"""CPU time of processes and of the machine, from /proc."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

_TICK_S = 1 / os.sysconf("SC_CLK_TCK")


def process_cpu_s(pid: int) -> float:
    """User and system time that a process has used so far, in seconds.

    Raises:
        FileNotFoundError: it is gone.
    """
    text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    fields = text.rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) * _TICK_S


def cpu_s(pids: Iterable[int]) -> float:
    """The same for several together."""
    return sum(process_cpu_s(pid) for pid in pids)


def machine_busy_s() -> float:
    """Time for which the machine's cores were busy so far, summed over them, in seconds."""
    line = Path("/proc/stat").read_text(encoding="ascii").partition("\n")[0]
    user, nice, system, _idle, _iowait, irq, softirq, steal, *_ = map(int, line.split()[1:])
    return (user + nice + system + irq + softirq + steal) * _TICK_S
