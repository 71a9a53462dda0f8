"""Every field of the header, wrong in every way; other layouts; what is no segment at all."""

from __future__ import annotations

import contextlib
import functools
import os
import random
import re
import shutil
import signal
import subprocess
import time
from collections import Counter
from pathlib import Path

import pytest
from helpers import LAYOUT, SHM, Raw, kind_of_error, wait_until
from test_segment import FIELDS, PLANTS, identity, restore, try_both

import shmcoord
from shmcoord import (
    LayoutMismatch,
    NoBackend,
    Router,
    Segment,
    SegmentCorrupt,
    SegmentForbidden,
    SegmentNotFound,
    segments,
)

#: What nobody computes with: any value of it is accepted.
FOR_PEOPLE = {"creator_uid", "creator_pid", "created_mono_ns", "created_wall_ns", "reserved"}
SLOTS, LEASES = 4, 8
BAD_NAMES = ["", ".", "..", "a/b", "/a", "../x", "a b", "ä", "x" * 65, "a\n", "\0", "a:b", "a\0b"]


@pytest.fixture
def made(name):
    """A closed segment; its bytes."""
    with Segment.open(name, slots=SLOTS, leases=LEASES) as segment:
        segment.join("old", group="GREEN", endpoint="nowhere").leave()
    return (SHM / name).read_bytes()


def wrong_values(good, size, randoms, rng):
    most = 256**size - 1
    values = {0, 1, good - 1, good + 1, most, most // 2, most // 2 + 1, good << 1, good << 32}
    values |= {rng.getrandbits(8 * size) for _ in range(randoms)}
    return sorted(value for value in values if 0 <= value <= most and value != good)


def leads_outside(made, field, value):
    """Whether a reader that trusts the header would leave the file (the negative control)."""
    offset, size = FIELDS[field]
    header = bytearray(made[:256])
    header[offset : offset + size] = value.to_bytes(size, "little")

    def number(of):
        at, count = FIELDS[of]
        return int.from_bytes(header[at : at + count], "little")

    slots, leases = number("slots"), number("leases")
    ends = [
        number("hot_offset") + slots * 128,
        number("record_offset") + slots * 640,
        number("lease_offset") + slots * leases * 8,
        number("meta_offset") + slots * 1024,
        number("total_bytes"),
    ]
    return max(ends) > len(made)


def test_every_field_of_the_header(name, made, count, report):
    rng = random.Random(2)
    randoms = count(2, 1000)
    outcomes = Counter()
    outside = 0
    for field, (offset, size) in FIELDS.items():
        good = int.from_bytes(made[offset : offset + size], "little")
        for value in wrong_values(good, size, randoms, rng):
            restore(name, made)
            Raw(name).write(offset, value.to_bytes(size, "little"))
            outside += leads_outside(made, field, value)
            error = kind_of_error(lambda: Segment.attach(name).close())
            outcomes[error.__name__ if error else "accepted"] += 1
            if field in FOR_PEOPLE:
                assert error is None, (field, value)
            elif field in ("layout_major", "layout_minor", "signature", "header_bytes"):
                assert error is LayoutMismatch, (field, value)
            elif field == "ready" and value == 0:
                assert error is SegmentNotFound
            elif field in ("incarnation", "mode"):
                impossible = value == 0 if field == "incarnation" else value > 0o777
                assert error is (SegmentCorrupt if impossible else None), (field, value)
            elif field == "leases" and 4 < value < 8:
                # The same offsets and size follow from it: fewer cells, all of them inside.
                assert error is None
            else:
                assert error is SegmentCorrupt, (field, value)
            try_both(name)
    assert outside > len(FIELDS), "the control: a reader that trusts the header is led outside"
    report(
        "header fields",
        fields=len(FIELDS),
        cases=sum(outcomes.values()),
        **outcomes,
        control_would_read_outside=outside,
    )


def test_random_headers(name, made, count, report):
    rng = random.Random(3)
    cases = count(150, 20_000)
    for _ in range(cases):
        restore(name, made)
        for _ in range(rng.randint(1, 6)):
            offset, size = rng.choice(list(FIELDS.values()))
            Raw(name).write(offset, rng.randbytes(rng.randint(1, size)))
        if rng.random() < 0.2:
            os.truncate(SHM / name, rng.randint(0, 2 * len(made)))
        try_both(name)
    report("random headers", cases=cases, untyped_errors=0)


def test_the_header_changes_under_who_is_attached(name, count, report):
    """They compute with a private copy: nobody is led astray by what comes later."""
    rng = random.Random(4)
    cases = count(60, 5000)
    with Segment.open(name, slots=SLOTS, leases=LEASES) as segment, Router(segment) as router:
        with segment.join("B", group="GREEN", endpoint="e", interval_s=60) as node:
            good = Raw(name).read(0, 256)
            router.acquire("GREEN").release()
            for _ in range(cases):
                offset, size = rng.choice(list(FIELDS.values()))
                Raw(name).write(offset, rng.randbytes(size))
                with node.request():
                    assert segment.status("B").inflight == 1
                assert router.acquire("GREEN").release()
                assert node.adopt(router.acquire("GREEN").token) is not None
            Raw(name).write(0, good)
        Segment.attach(name).close()
    report("header changed while in use", cases=cases, unharmed=cases)


def test_a_damaged_ready_word_harms_no_observer(name, spawn, report):
    """The next one to open takes it for half-made; it must not cut the file under observers."""
    Segment.open(name, slots=512).close()
    observer = spawn(
        """
with Segment.attach(name) as segment:
    say("attached")
    hear()
    for _ in range(100):
        assert segment.snapshot() == ()
    say(segment.is_stale())
""",
        name,
    )
    assert observer.hear() == "attached"
    Raw(name).set("header", "ready", 4, 0)
    with Segment.open(name, slots=1, leases=1) as fresh:
        assert fresh.slots == 1
        observer.say()
        assert observer.hear() == "True"
        assert observer.finish() == 0
    report("ready word damaged under an observer", observers_killed=0)


@pytest.mark.parametrize("stage", ["allocated", "magic", "all but ready"])
@pytest.mark.parametrize("action", [Segment.open, Segment.attach])
def test_in_the_making_between_two_looks(name, made, monkeypatch, stage, action, report):
    """Empty when `ready` is looked at, half-made when the header is: no damaged segment."""
    whole = {"allocated": 0, "magic": 8, "all but ready": 124}[stage]
    half = made[:whole] + bytes(len(made) - whole)
    os.truncate(SHM / name, 0)
    really = os.pread

    def pread(descriptor, size, offset):
        data = really(descriptor, size, offset)
        if not os.stat(SHM / name).st_size:
            Raw(name).write(0, half)
        return data

    monkeypatch.setattr(os, "pread", pread)
    if action == Segment.attach:
        assert kind_of_error(lambda: action(name)) is SegmentNotFound
    else:
        action(name, slots=1, leases=1).close()
    report(f"in the making: {stage}, {action.__name__}", wrong_errors=0)


MINOR = int(re.search(r"define SHMC_LAYOUT_MINOR (\d+)", LAYOUT)[1])
CHANGES = {
    "layout before": {8: (0).to_bytes(2, "little")},
    "layout after": {8: (2).to_bytes(2, "little")},
    "minor before": {10: (MINOR - 1).to_bytes(2, "little")},
    "minor after": {10: (MINOR + 1).to_bytes(2, "little")},
    "header longer": {12: (320).to_bytes(4, "little")},
    "signature of 32-bit alignment": {},
    "other byte order": {},
}


@pytest.mark.parametrize("what", CHANGES)
def test_other_layouts_are_refused_untouched(name, made, what, report):
    content = bytearray(made)
    for offset, data in CHANGES[what].items():
        content[offset : offset + len(data)] = data
    if what == "signature of 32-bit alignment":
        signature = int.from_bytes(made[16:24], "little")
        changed = signature & ~(0xF << 60) | 4 << 60  # _Alignof(uint64_t) is 4 there
        content[16:24] = changed.to_bytes(8, "little")
    if what == "other byte order":
        for offset, size in FIELDS.values():
            if size <= 8:
                content[offset : offset + size] = content[offset : offset + size][::-1]
    restore(name, bytes(content))
    before = identity(name)
    for action in (Segment.open, Segment.attach):
        assert kind_of_error(lambda action=action: action(name)) is LayoutMismatch
    assert name not in segments()
    assert (SHM / name).read_bytes() == content
    assert identity(name) == before
    report(f"layout: {what}", refused=2, bytes_written=0)


def test_a_32_bit_build_does_not_compile(tmp_path, report):
    compiler = shutil.which("gcc")
    if compiler is None:
        pytest.skip("no gcc")
    header = Path(shmcoord.get_include(), "_layout.h").read_text()
    without = re.sub(r"_Static_assert\(sizeof\(void \*\).*\n", "", header)
    assert without != header

    def compiles(text, *flags):
        (tmp_path / "layout.h").write_text(text)
        command = [compiler, *flags, "-std=gnu11", "-ffreestanding", "-fsyntax-only", "-x", "c"]
        done = subprocess.run(
            [*command, tmp_path / "layout.h"], capture_output=True, text=True, check=False
        )
        return done.returncode == 0, done.stderr

    if not compiles("int x;", "-m32")[0]:
        pytest.skip("this compiler has no -m32")
    assert compiles(header)[0]
    refused, why = compiles(header, "-m32")
    assert not refused
    assert "64-bit hosts only" in why
    assert compiles(without, "-m32")[0], "the control: nothing else would have refused it"
    report("32-bit build", "refused by a static assertion", "control without it compiles")


def test_what_is_no_file_of_ours(new_name, count, report):
    rounds = count(2, 100)
    slowest = 0.0
    refused = 0
    other = new_name()
    Segment.open(other, slots=2, leases=2).close()
    content = (SHM / other).read_bytes()
    for _ in range(rounds):
        for plant in PLANTS:
            name = new_name()
            plant(SHM / name, SHM / other)
            before = identity(name)
            for action in (Segment.open, Segment.attach):
                began = time.monotonic()
                error = kind_of_error(lambda action=action, name=name: action(name))
                slowest = max(slowest, time.monotonic() - began)
                assert error is SegmentForbidden, plant
                refused += 1
            assert identity(name) == before
            path = SHM / name
            path.rmdir() if plant.__name__ == "plant_directory" else path.unlink()
        if os.geteuid() == 0:
            name = new_name()
            restore(name, content)
            os.chown(SHM / name, 12345, 12345)
            for action in (Segment.open, Segment.attach, Segment.unlink):
                assert kind_of_error(lambda a=action, name=name: a(name)) is SegmentForbidden
                refused += 1
            (SHM / name).unlink()
        for bad in BAD_NAMES:
            for action in (Segment.open, Segment.attach, Segment.unlink):
                with pytest.raises(ValueError, match="A-Za-z0-9"):
                    action(bad)
                refused += 1
    assert (SHM / other).read_bytes() == content
    assert slowest < 2
    report(
        "no file of ours", kinds=len(PLANTS) + 1, refused=refused, slowest_ms=f"{slowest * 1e3:.1f}"
    )


def test_a_look_at_the_content_alone_takes_what_is_not_ours(new_name, report):
    """The control: who opens the name and finds a good header is content, whatever it is."""
    other = new_name()
    Segment.open(other, slots=2, leases=2).close()
    content = (SHM / other).read_bytes()
    taken = []
    for plant in PLANTS:
        name = new_name()
        plant(SHM / name, SHM / other)
        with contextlib.suppress(OSError):
            descriptor = os.open(SHM / name, os.O_RDWR | os.O_NONBLOCK)
            if os.read(descriptor, 256) == content[:256]:
                taken.append(plant.__name__.removeprefix("plant_"))
            os.close(descriptor)
    report("no file of ours, control by content alone", taken=taken)
    assert len(taken) >= 2


def test_a_plain_open_would_hang_on_a_fifo(name, spawn, report):
    """The control of the row above: without O_NONBLOCK the FIFO holds its victim."""
    os.mkfifo(SHM / name)
    child = spawn("say('here'); os.open(f'/dev/shm/{name}', os.O_RDONLY); say('opened')", name)
    assert child.hear() == "here"
    with contextlib.suppress(AssertionError):
        child.hear(0.5)
        pytest.fail("it did not hang")
    child.kill()
    assert child.process.returncode == -signal.SIGKILL
    report("FIFO, control without O_NONBLOCK", "hangs")


# --- from before the last boot, and made anew


def test_from_before_the_last_boot(name, made, count, report):
    rounds = count(10, 2000)
    for _ in range(rounds):
        restore(name, made)
        Raw(name).write(FIELDS["boot_id"][0], os.urandom(16))
        before = identity(name)
        with pytest.raises(SegmentCorrupt, match="last boot"):
            Segment.attach(name)
        assert identity(name) == before
        with Segment.open(name, slots=2, leases=2) as segment:
            assert segment.slots == 2
            assert identity(name)[0] != before[0] or segment.snapshot() == ()
            with segment.join("B", group="GREEN", endpoint="e") as node, node.request():
                assert segment.status("B").inflight == 1
    report("host reboot (old boot id)", rounds=rounds, made_anew=rounds)


def test_without_the_boot_id_the_dead_of_the_last_boot_live(name, spawn_node, report):
    """The control: the bytes that a reboot leaves behind, with a boot id that passes.

    No kernel marks a death word over a reboot: it still says alive.
    """
    with Segment.open(name, slots=SLOTS, leases=LEASES) as segment:
        boot_id = Raw(name).read(FIELDS["boot_id"][0], 16)
        child = spawn_node(name, "B")
        assert segment.backend("B").alive
        left = (SHM / name).read_bytes()
        child.kill()
    for found in (os.urandom(16), boot_id):
        (SHM / name).unlink()
        restore(name, left)
        Raw(name).write(FIELDS["boot_id"][0], found)
        if found != boot_id:
            with pytest.raises(SegmentCorrupt, match="last boot"):
                Segment.attach(name)
    with Segment.attach(name) as segment:
        alive = segment.backend("B").alive
        report(
            "host reboot (old boot id), control without comparing it", dead_taken_for_alive=alive
        )
        assert alive


def test_keeping_the_old_memory_is_found(name, spawn_node, report):
    """The control of the row below: a mapping alone never sees who joined the new segment."""
    with Segment.open(name, slots=SLOTS, leases=LEASES) as segment:
        node = segment.join("old", group="GREEN", endpoint="e", interval_s=0.05)
        Segment.unlink(name)
        fresh = spawn_node(name, "new")
        with Router(name) as router:
            assert wait_for(router, "new") < 5
        with pytest.raises(AssertionError, match="did not happen"):
            wait_until(lambda: "new" in {status.node for status in segment.snapshot()}, 1.5)
        node.leave()
        assert fresh.finish() == 0
    report("unlinked and made anew, control: a mapping alone", "never sees the new node")


def test_made_anew_while_attached(name, spawn_node, count, report):
    """Routers go over, nodes and observers are told; what was reserved before stays good."""
    rounds = count(2, 30)
    slowest = 0.0
    for round_ in range(rounds):
        segment = Segment.open(name, slots=SLOTS, leases=LEASES)
        node = segment.join("old", group="GREEN", endpoint="e", interval_s=0.05)
        with Router(segment) as router:
            lease = router.acquire("GREEN")
            Segment.unlink(name)
            assert segment.is_stale()
            fresh = spawn_node(name, f"new{round_}")
            slowest = max(slowest, wait_for(router, f"new{round_}"))
            wait_until(functools.partial(getattr, node, "stale"), 5)
            assert lease.release(), "on the memory it was taken on"
            assert node.inflight == 0
        node.leave()
        segment.close()
        assert fresh.finish() == 0
        Segment.unlink(name)
    report("unlinked and made anew", rounds=rounds, routers_over_after_s=f"{slowest:.2f}")


def wait_for(router, node):
    """Until the router picks this node; seconds."""

    def picks():
        try:
            return router.pick("GREEN").node == node
        except NoBackend:
            return False

    return wait_until(picks, 5)
