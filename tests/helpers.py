"""What the tests of the core share: children over pipes, and the bytes of a segment.

A child is a Python process that runs a short script after `PRELUDE`; it talks by lines, and ends
when its standard input is closed. Bytes are found by the offsets that `_layout.h` asserts.
"""

from __future__ import annotations

import fcntl
import os
import re
import select
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import shmcoord
from shmcoord import ShmcoordError

SHM = Path("/dev/shm")
LAYOUT = Path(shmcoord.get_include(), "_layout.h").read_text()
OFFSETS = {
    (struct_, field): int(offset)
    for struct_, field, offset in re.findall(r"offsetof\(shmc_(\w+), (\w+)\) == (\d+)", LAYOUT)
}
SIZES = {name: int(size) for name, size in re.findall(r"sizeof\(shmc_(\w+)\) == (\d+), \"", LAYOUT)}
SYNC_OFFSET = 256
BITMAP_OFFSET = 384
TABLES_OFFSET = 4096
READY = 0x59444552
INIT_LOCK = 1 << 20
MEMBERSHIP_LOCK = (1 << 20) + 1
_F_OFD_SETLK = 37

#: What every child can use without importing it.
PRELUDE = """
import contextlib, gc, json, os, random, signal, sys, threading, time
import shmcoord
from shmcoord import *

name = sys.argv[1]

def say(*words):
    print(*words, flush=True)

def hear():
    return sys.stdin.readline().strip()

def forked(work):
    "Fork a child that runs `work`; its pid. It leaves without any clean-up."
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            code = work() or 0
        except BaseException:
            import traceback
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    return pid

def swarm(count, work):
    "Fork children that begin together; what `work(index)` gave in each, None where it died."
    gate, opener = os.pipe()
    pids, ends = [], []
    for index in range(count):
        end, mine = os.pipe()
        def run(index=index, mine=mine):
            os.close(opener)
            os.read(gate, 1)
            os.write(mine, json.dumps(work(index)).encode())
        pids.append(forked(run))
        os.close(mine)
        ends.append(end)
    os.close(gate)
    os.close(opener)
    results = []
    for end in ends:
        with open(end, "rb") as file:
            text = file.read()
        results.append(json.loads(text) if text else None)
    for pid in pids:
        os.waitpid(pid, 0)
    return results
"""


class Child:
    """One process of a test, ended by its own pid."""

    def __init__(self, code: str, *args: object, executable: tuple[str, ...] = ()) -> None:
        self._buffer = b""
        self.process = subprocess.Popen(
            [*executable, sys.executable, "-c", PRELUDE + code, *map(str, args)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )

    @property
    def pid(self) -> int:
        return self.process.pid

    def say(self, line: str = "") -> None:
        """Send it one line."""
        assert self.process.stdin is not None
        self.process.stdin.write(line.encode() + b"\n")
        self.process.stdin.flush()

    def hear(self, timeout_s: float = 20.0) -> str:
        """Its next line."""
        assert self.process.stdout is not None
        descriptor = self.process.stdout.fileno()
        deadline = time.monotonic() + timeout_s
        while b"\n" not in self._buffer:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([descriptor], [], [], left)[0]:
                raise AssertionError(f"child {self.pid} said nothing for {timeout_s} s")
            data = os.read(descriptor, 65536)
            if not data:
                raise AssertionError(f"child {self.pid} ended: {self.process.wait()}")
            self._buffer += data
        line, self._buffer = self._buffer.split(b"\n", 1)
        return line.decode()

    def kill(self) -> None:
        """SIGKILL, and wait until it is gone."""
        self.process.kill()
        self.process.wait()

    def stop(self) -> None:
        """SIGSTOP, and wait until it stands."""
        os.kill(self.pid, signal.SIGSTOP)
        wait_until(lambda: Path(f"/proc/{self.pid}/stat").read_text().split(") ")[1][0] == "T")

    def go_on(self) -> None:
        """SIGCONT."""
        os.kill(self.pid, signal.SIGCONT)

    def finish(self, timeout_s: float = 20.0) -> int:
        """Close its input and wait for its regular end; its exit code."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        return self.process.wait(timeout_s)

    def close(self) -> None:
        """End it if it still runs; give back the pipes."""
        if self.process.poll() is None:
            self.kill()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                with suppress(BrokenPipeError):
                    pipe.close()


def run(code: str, *args: object, timeout_s: float = 60.0, executable: tuple[str, ...] = ()) -> str:
    """Run a script to its end; what it said. Its exit code must be 0."""
    child = Child(code, *args, executable=executable)
    try:
        said, _ = child.process.communicate(timeout=timeout_s)
    finally:
        child.close()
    assert child.process.returncode == 0, f"exit code {child.process.returncode}; said {said!r}"
    return said.decode()


def wait_until(
    predicate: Callable[[], object], timeout_s: float = 10.0, every_s: float = 0.002
) -> float:
    """Wait for something to become true; how long it took, seconds."""
    began = time.monotonic()
    while not predicate():
        if time.monotonic() - began > timeout_s:
            raise AssertionError(f"did not happen within {timeout_s} s: {predicate}")
        time.sleep(every_s)
    return time.monotonic() - began


def kind_of_error(action: Callable[[], object]) -> type[BaseException] | None:
    """Run it; the type of the library's error that it raised, None without."""
    try:
        action()
    except ShmcoordError as error:
        return type(error) if str(error) else None
    return None


@contextmanager
def ofd_lock(path: Path, byte: int) -> Iterator[None]:
    """Hold the open-file-description lock on one byte, as another process would."""
    descriptor = os.open(path, os.O_RDWR)
    try:
        fcntl.fcntl(descriptor, _F_OFD_SETLK, struct.pack("hhqqi4x", fcntl.F_WRLCK, 0, byte, 1, 0))
        yield
    finally:
        os.close(descriptor)


class Raw:
    """The bytes of a segment, read and written past the library."""

    def __init__(self, name: str) -> None:
        self.path = SHM / name
        self.slots = self.number("header", "slots", 4)
        self.leases = self.number("header", "leases", 4)

    def read(self, offset: int, count: int) -> bytes:
        with self.path.open("rb") as file:
            file.seek(offset)
            return file.read(count)

    def write(self, offset: int, data: bytes) -> None:
        with self.path.open("r+b") as file:
            file.seek(offset)
            file.write(data)

    def offset(self, struct_: str, field: str, slot: int = 0) -> int:
        """Where a field of a slot (or of the header) lies in the file."""
        base = {
            "header": 0,
            "sync": SYNC_OFFSET,
            "hot": TABLES_OFFSET,
            "record": self.number("header", "record_offset", 8) if struct_ == "record" else 0,
            "meta": self.number("header", "meta_offset", 8) if struct_ == "meta" else 0,
        }[struct_]
        zero = {"magic": 0, "epoch": 0, "load": 0, "seq": 0, "name": 0}
        within = OFFSETS.get((struct_, field), zero.get(field))
        assert within is not None, field
        return base + slot * SIZES[struct_] + within

    def number(self, struct_: str, field: str, size: int, slot: int = 0) -> int:
        return int.from_bytes(self.read(self.offset(struct_, field, slot), size), "little")

    def set(self, struct_: str, field: str, size: int, value: int, slot: int = 0) -> None:
        self.write(self.offset(struct_, field, slot), value.to_bytes(size, "little"))

    def cells(self, slot: int) -> list[int]:
        """The lease cells of one slot."""
        offset = self.number("header", "lease_offset", 8) + slot * self.leases * 8
        return list(struct.unpack(f"<{self.leases}Q", self.read(offset, self.leases * 8)))

    def taken(self) -> int:
        """Lease cells that are not free, of all slots."""
        return sum(cell != 0 for slot in range(self.slots) for cell in self.cells(slot))
