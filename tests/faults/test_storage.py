"""The file under the mapping: truncated, holes punched into it, the file system full."""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import signal

import pytest
from helpers import SHM, Raw, kind_of_error, run, wait_until

from shmcoord import (
    Router,
    Segment,
    SegmentCorrupt,
    SegmentNotFound,
    ShmcoordError,
)

PAGE = 4096
KEEP_SIZE_PUNCH_HOLE = 3

USER = """
segment = Segment.open(name)
node = segment.join("B", group="GREEN", endpoint="e", interval_s=60)
router = Router(segment)
router.acquire("GREEN").release()
say("ready")
hear()
for _ in range(3):
    segment.snapshot()
    router.acquire("GREEN").release()
say("unharmed")
hear()
"""


@pytest.mark.parametrize("left", [0, PAGE, 2 * PAGE])
def test_truncation_is_a_documented_limit(new_name, spawn, left, report):
    """Who has the segment mapped gets SIGBUS at its next access behind the new end.

    Only who may write to the segment may truncate it. The kernel offers no seal for files of
    /dev/shm (F_SEAL_SHRINK is for memfd alone), and a handler for SIGBUS would belong to the
    application. All that is promised: the death is a clean one, nothing is passed off as good, and
    others go on.
    """
    name, other = new_name(), new_name()
    for each in (name, other):
        Segment.open(each, slots=64, leases=8).close()
    victim, bystander = spawn(USER, name), spawn(USER, other)
    for child in (victim, bystander):
        assert child.hear() == "ready"
    os.truncate(SHM / name, left)
    victim.say()
    assert victim.process.wait(10) == -signal.SIGBUS
    bystander.say()
    assert bystander.hear() == "unharmed"
    # Who comes next gets a typed error, or makes it anew where nothing is left of it.
    assert kind_of_error(lambda: Segment.attach(name)) in (SegmentCorrupt, SegmentNotFound)
    if left:
        assert kind_of_error(lambda: Segment.open(name)) is SegmentCorrupt
        Segment.unlink(name)
    with (
        Segment.open(name, slots=4, leases=4) as segment,
        segment.join("B", group="GREEN", endpoint="e") as node,
        node.request(),
    ):
        assert segment.status("B").inflight == 1
    report(f"truncation to {left} bytes", "limit: SIGBUS", others_harmed=0, works_after="unlink")


def punch(path, offset, count):
    libc = ctypes.CDLL(None, use_errno=True)
    descriptor = os.open(path, os.O_RDWR)
    try:
        words = map(ctypes.c_long, (offset, count))
        if libc.fallocate(descriptor, KEEP_SIZE_PUNCH_HOLE, *words):
            pytest.skip(f"no holes: {os.strerror(ctypes.get_errno())}")
    finally:
        os.close(descriptor)


def test_holes_punched_while_in_use(new_name, count, report):
    """Zeros in place of each page, under a node, a router and an observer: nobody is harmed."""
    rounds = count(1, 60)
    holes = refused = 0
    for _ in range(rounds):
        pages = [None, *range(9)]
        for page in pages:
            name = new_name()
            with Segment.open(name, slots=16, leases=16) as segment, Router(segment) as router:
                observer = Segment.attach(name)
                node = segment.join("B", group="GREEN", endpoint="e", interval_s=0.002)
                lease = router.acquire("GREEN")
                running = node.begin()
                if page is None:
                    punch(SHM / name, 0, segment.size_bytes)
                else:
                    punch(SHM / name, page * PAGE, PAGE)
                holes += 1
                uses = [
                    observer.snapshot,
                    lambda segment=segment: segment.status("B"),
                    lambda router=router: router.acquire("GREEN").release(),
                    lambda router=router: str(router.explain("GREEN")),
                    lambda node=node, lease=lease: node.adopt(lease.token).end(),
                    lambda node=node: node.begin().end(),
                    lambda segment=segment: segment.reap(),
                    lambda segment=segment: segment.join("C", group="G", endpoint="e").leave(),
                    lambda name=name: Segment.attach(name).close(),
                    lambda name=name: Segment.open(name).close(),
                    node.refresh,
                ]
                for use in uses:
                    refused += kind_of_error(use) is not None
                with contextlib.suppress(ShmcoordError):
                    node.end(running)
                with contextlib.suppress(ShmcoordError):
                    lease.release()
                node.leave()
                observer.close()
            with contextlib.suppress(ShmcoordError):
                Segment.unlink(name)
            with Segment.open(name, slots=2, leases=2) as segment:
                segment.join("B", group="GREEN", endpoint="e").leave()
            Segment.unlink(name)
    assert refused
    report("holes punched while in use", holes=holes, typed_errors=refused, crashes=0)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="others divide by zero")
def test_trusting_the_header_again_dies_of_a_hole(name, spawn_native, report):
    """The control: who reads the number of slots from the header each time divides by zero."""
    child = spawn_native(
        """
import faultnative
segment = Segment.open(name, slots=16, leases=16)
node = segment.join("B", group="GREEN", endpoint="e", interval_s=60)
backend = segment.backend("B")
say(faultnative.trusting_cell(backend))
hear()
say(faultnative.trusting_cell(backend))
""",
        name,
    )
    assert child.hear() == "0"
    punch(SHM / name, 0, PAGE)
    child.say()
    assert child.process.wait(10) in (-signal.SIGFPE, -signal.SIGSEGV, -signal.SIGBUS)
    died = signal.Signals(-child.process.returncode).name
    report("holes punched, control: the header is read again", f"dies of {died}")


def test_a_hole_over_a_living_node(name, segment, spawn_node, report):
    """Its death word is gone: nobody routes to it, its slot stays its own, its end harms nobody."""
    child = spawn_node(name, "B")
    with segment.join("other", group="GREEN", endpoint="e") as other:
        punch(SHM / name, Raw(name).offset("hot", "load", 0) & -PAGE, PAGE)
        assert segment.reap() == 0
        assert not [status for status in segment.snapshot() if status.node == "B" and status.queue]
        child.kill()
        wait_until(lambda: segment.reap() >= 0)
        other.leave()
    with segment.join("B", group="GREEN", endpoint="e") as node, node.request():
        assert segment.status("B").inflight == 1
    report("a hole over a living node", crashes=0, works_after="join")


FULL_TMPFS = """
import ctypes, mmap
libc = ctypes.CDLL(None, use_errno=True)
NEWNS, PRIVATE = 0x20000, 0x44000
if libc.unshare(NEWNS) or libc.mount(b"none", b"/", None, PRIVATE, None):
    say("skip: no mount namespace:", os.strerror(ctypes.get_errno())); sys.exit()
if libc.mount(b"tmpfs", b"/dev/shm", b"tmpfs", 0, b"size=256k"):
    say("skip: no tmpfs:", os.strerror(ctypes.get_errno())); sys.exit()
rounds = int(sys.argv[2])
small = Segment.open("small", slots=4, leases=4)
node = small.join("B", group="GREEN", endpoint="e", interval_s=0.01)
router = Router(small)
full = made = levels = 0
for round in range(rounds):
    for pages in range(0, 52, 3):  # that are left free
        levels += 1
        with open("/dev/shm/filler", "wb", buffering=0) as filler:
            with contextlib.suppress(OSError):
                while filler.write(bytes(4096)) == 4096:
                    pass
            filler.truncate(max(filler.tell() // 4096 * 4096 - 4096 * pages, 0))
        for slots in (1, 16, 32, 64):
            try:
                with Segment.open(name, slots=slots, leases=8) as segment:
                    # Whole: each page can be written to, however full it is now.
                    with open("/dev/shm/filler", "ab", buffering=0) as filler:
                        before = filler.tell()
                        with contextlib.suppress(OSError):
                            while filler.write(bytes(4096)) == 4096:
                                pass
                        for i in range(slots):
                            segment.join(f"n{i}", group="g", endpoint="e").leave()
                        filler.truncate(before)
                made += 1
                Segment.unlink(name)
            except SegmentFull as error:
                assert "no room" in str(error), error
                full += 1
            assert not os.path.exists(f"/dev/shm/{name}"), "a part of it stays"
        with node.request():
            router.acquire("GREEN").release()
            assert small.status("B").health == Health.ALIVE
        os.unlink("/dev/shm/filler")
        Segment.open(name, slots=64, leases=8).close()  # works again afterwards
        Segment.unlink(name)

# The control: a file that was only made long, not allocated, and then filled up around it.
def sparse():
    with open("/dev/shm/sparse", "w+b") as file:
        file.truncate(64 * 4096)
        memory = mmap.mmap(file.fileno(), 0)
        with open("/dev/shm/filler", "wb", buffering=0) as filler:
            with contextlib.suppress(OSError):
                while filler.write(bytes(4096)) == 4096:
                    pass
        for page in range(64):
            memory[page * 4096] = 1

_, status = os.waitpid(forked(sparse), 0)
say(levels, full, made, os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0)
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to mount")
def test_a_full_file_system_at_every_level(name, count, report):
    said = run(FULL_TMPFS, name, count(1, 200), timeout_s=1800)
    if said.startswith("skip"):
        pytest.skip(said.strip())
    levels, full, made, control = map(int, said.split())
    assert full > levels / 2
    assert made > levels / 2
    assert control == signal.SIGBUS, "the control did not die of a full file system"
    report(
        "full tmpfs",
        levels=levels,
        segment_full=full,
        made=made,
        sigbus=0,
        parts_left_behind=0,
        control_not_allocated="SIGBUS",
    )
