"""A name becomes validated, mapped memory; everything else is refused and left as it was."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import stat
import time

import pytest
from helpers import INIT_LOCK, OFFSETS, SHM, Raw, kind_of_error, ofd_lock, run
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import shmcoord.segment
from shmcoord import (
    LayoutMismatch,
    NoBackend,
    Router,
    Segment,
    SegmentCorrupt,
    SegmentForbidden,
    SegmentFull,
    SegmentNotFound,
    ShmcoordError,
    segments,
)

ROOT_ONLY = pytest.mark.skipif(os.geteuid() != 0, reason="needs root to chown or mount")
FIELDS = {
    "magic": (0, 8),
    "layout_major": (8, 2),
    "layout_minor": (10, 2),
    "header_bytes": (12, 4),
    "signature": (16, 8),
    "slots": (24, 4),
    "leases": (28, 4),
    "hot_offset": (32, 8),
    "record_offset": (40, 8),
    "lease_offset": (48, 8),
    "meta_offset": (56, 8),
    "total_bytes": (64, 8),
    "boot_id": (72, 16),
    "creator_uid": (88, 4),
    "creator_pid": (92, 4),
    "created_mono_ns": (96, 8),
    "created_wall_ns": (104, 8),
    "incarnation": (112, 8),
    "mode": (120, 4),
    "ready": (124, 4),
    "reserved": (128, 128),
}


def identity(name):
    info = os.lstat(SHM / name)
    return info.st_ino, info.st_mode, info.st_uid, info.st_nlink, info.st_mtime_ns


@pytest.fixture
def made(name):
    """A closed segment of 4 slots, 8 cells each; its bytes."""
    with Segment.open(name, slots=4, leases=8) as segment:
        segment.join("old", group="GREEN", endpoint="nowhere").leave()
    return (SHM / name).read_bytes()


# --- create and attach


def test_field_table_covers_the_header():
    assert sum(size for _, size in FIELDS.values()) == 256
    for (struct, field), offset in OFFSETS.items():
        if struct == "header":
            assert FIELDS[field][0] == offset


@pytest.mark.parametrize(("mode", "umask"), [(0o600, 0o077), (0o600, 0), (0o660, 0o077)])
def test_a_new_segment_is_a_plain_file_of_ours(name, mode, umask):
    before = os.umask(umask)
    try:
        with Segment.open(name, slots=3, leases=5, mode=mode) as segment:
            info = os.lstat(SHM / name)
            assert stat.S_ISREG(info.st_mode)
            assert stat.S_IMODE(info.st_mode) == mode
            assert info.st_nlink == 1
            assert info.st_uid == os.geteuid()
            assert info.st_size == segment.size_bytes
            # Allocated whole: no SIGBUS later, however full the file system gets.
            assert info.st_blocks * 512 >= info.st_size
            assert (segment.name, segment.slots, segment.leases) == (name, 3, 5)
            assert segment.writable
            assert abs(segment.created_at - time.time()) < 10
    finally:
        os.umask(before)


def test_a_segment_of_64_slots_is_at_most_512_kib(name):
    with Segment.open(name) as segment:
        assert segment.slots == 64
        assert segment.leases == 128
        assert segment.size_bytes <= 512 * 1024


@pytest.mark.parametrize(("slots", "leases"), [(1, 1), (4096, 1), (1, 1024), (65, 3)])
def test_geometry_is_kept_by_who_comes_later(name, slots, leases):
    with Segment.open(name, slots=slots, leases=leases) as first:
        last = first.join("n", group="g", endpoint="e")
        with Segment.open(name) as second, Segment.attach(name) as observer:
            for other in (second, observer):
                assert (other.slots, other.leases) == (slots, leases)
                assert other.created_at == first.created_at
                assert other.status("n").capacity == leases
        last.leave()


def test_an_observer_reads_and_changes_nothing(name, segment):
    with segment.join("B", group="GREEN", endpoint="e", interval_s=60):
        time.sleep(0.05)  # the beat thread is quiet now
        before = (SHM / name).read_bytes()
        with Segment.attach(name) as observer:
            assert not observer.writable
            assert [status.node for status in observer.snapshot()] == ["B"]
            assert observer.backend("B").queue == 0
            with pytest.raises(SegmentForbidden):
                observer.join("C", group="GREEN", endpoint="e")
            with pytest.raises(SegmentForbidden):
                observer.reap()
            with pytest.raises(ValueError, match="read-only"):
                Router(observer)
        assert (SHM / name).read_bytes() == before


def test_attach_never_creates(name):
    with pytest.raises(SegmentNotFound):
        Segment.attach(name)
    assert not (SHM / name).exists()
    with pytest.raises(SegmentNotFound):
        Segment.unlink(name)


def test_a_closed_segment_refuses_every_use(name):
    segment = Segment.open(name, slots=2, leases=2)
    node = segment.join("B", group="GREEN", endpoint="e")
    backend = segment.backend("B")
    segment.close()
    segment.close()
    assert segment.closed
    uses = [
        segment.snapshot,
        segment.is_stale,
        lambda: segment.is_mirror,
        segment.reap,
        lambda: segment.status("B"),
        lambda: segment.backend("B"),
        lambda: segment.join("C", group="GREEN", endpoint="e"),
        lambda: backend.queue,
        lambda: backend.state,
        lambda: backend.alive,
        node.begin,
        node.refresh,
        lambda: node.state,
        lambda: Router(segment).pick("GREEN"),
    ]
    for use in uses:
        with pytest.raises(ValueError, match=r"closed|left"):
            use()
    node.leave()
    with Segment.open(name) as again:
        assert again.snapshot() == ()


def test_unlink_lets_the_attached_go_on(name, segment):
    with segment.join("B", group="GREEN", endpoint="e") as node:
        assert not segment.is_stale()
        Segment.unlink(name)
        assert segment.is_stale()
        with node.request():
            assert segment.status("B").inflight == 1
        with Segment.open(name, slots=2, leases=2) as fresh:
            assert segment.is_stale()
            assert not fresh.is_stale()
            assert fresh.snapshot() == ()


def test_listing_names_whole_segments_only(new_name):
    good, garbage, short, fifo, half = (new_name() for _ in range(5))
    Segment.open(good, slots=1, leases=1).close()
    (SHM / garbage).write_bytes(secrets.token_bytes(8192))
    (SHM / short).write_bytes(b"x")
    os.mkfifo(SHM / fifo)
    (SHM / half).write_bytes(bytes(8192))
    found = segments()
    assert good in found
    assert not {garbage, short, fifo, half} & set(found)
    assert found == sorted(found)


# --- wrong arguments


@pytest.mark.parametrize(
    "bad",
    ["", ".", "..", "a/b", "/a", "../x", "a b", "ä", "x" * 65, "a\n", "\0", "a:b"],
)
@pytest.mark.parametrize("action", [Segment.open, Segment.attach, Segment.unlink])
def test_bad_names(action, bad):
    with pytest.raises(ValueError, match=r"A-Za-z0-9"):
        action(bad)


@pytest.mark.parametrize("bad", [None, 3, b"name", ["x"]])
@pytest.mark.parametrize("action", [Segment.open, Segment.attach, Segment.unlink, Router])
def test_names_are_str(action, bad):
    with pytest.raises(TypeError):
        action(bad)


def test_the_longest_and_oddest_names_work(new_name):
    prefix = new_name()
    for name in (prefix + "_" * (64 - len(prefix)), prefix + "-._"):
        Segment.open(name, slots=1, leases=1).close()
        assert name in segments()
        Segment.unlink(name)
        assert not (SHM / name).exists()


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"slots": 0}, ValueError),
        ({"slots": -1}, ValueError),
        ({"slots": 4097}, ValueError),
        ({"slots": 2**64}, ValueError),
        ({"slots": 1.0}, TypeError),
        ({"slots": "4"}, TypeError),
        ({"slots": True}, TypeError),
        ({"leases": 0}, ValueError),
        ({"leases": 1025}, ValueError),
        ({"leases": None}, TypeError),
        ({"mode": 0o10600}, ValueError),
        ({"mode": 0o400}, ValueError),
        ({"mode": "rw"}, (ValueError, TypeError)),
        ({"nonsense": 1}, TypeError),
    ],
)
def test_wrong_geometry_creates_nothing(name, options, error):
    with pytest.raises(error):
        Segment.open(name, **options)
    assert not (SHM / name).exists()


def test_handles_are_not_made_by_hand():
    for kind in (Segment, shmcoord.Backend, shmcoord.Lease, shmcoord.Node, shmcoord.Request):
        with pytest.raises(TypeError):
            kind()


# --- what took the name is not a file of ours


def plant_symlink(path, other):
    path.symlink_to(other)


def plant_dangling_symlink(path, other):
    path.symlink_to(f"{other}-nothing")


def plant_hard_link(path, other):
    os.link(other, path)


def plant_directory(path, other):
    path.mkdir()


def plant_fifo(path, other):
    os.mkfifo(path)


def plant_socket(path, other):
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))


def plant_world_writable(path, other):
    path.write_bytes(other.read_bytes())
    path.chmod(0o666)


def plant_group_writable(path, other):
    path.write_bytes(other.read_bytes())
    path.chmod(0o620)


PLANTS = [
    plant_symlink,
    plant_dangling_symlink,
    plant_hard_link,
    plant_directory,
    plant_fifo,
    plant_socket,
    plant_world_writable,
    plant_group_writable,
]


@pytest.mark.parametrize("plant", PLANTS)
@pytest.mark.parametrize("action", [Segment.open, Segment.attach])
def test_what_is_not_ours_is_refused_and_left_alone(new_name, plant, action):
    other, name = new_name(), new_name()
    Segment.open(other, slots=2, leases=2).close()
    plant(SHM / name, SHM / other)
    before = identity(name), (SHM / other).read_bytes()
    began = time.monotonic()
    # In a directory or by a link nothing was asked of the FIFO's other end: it must not hang.
    assert kind_of_error(lambda: action(name)) is SegmentForbidden
    assert time.monotonic() - began < 2
    assert (identity(name), (SHM / other).read_bytes()) == before
    assert not (SHM / f"{other}-nothing").exists()


@ROOT_ONLY
@pytest.mark.parametrize("action", [Segment.open, Segment.attach, Segment.unlink])
def test_a_file_of_another_user_is_refused(name, made, action):
    os.chown(SHM / name, 12345, 12345)
    before = identity(name)
    with pytest.raises(SegmentForbidden, match=r"uid 12345|not a file of ours"):
        action(name)
    assert identity(name) == before
    assert (SHM / name).read_bytes() == made


@pytest.mark.parametrize("plant", [plant_symlink, plant_directory, plant_fifo])
def test_unlink_removes_only_plain_files(new_name, plant):
    other, name = new_name(), new_name()
    Segment.open(other, slots=2, leases=2).close()
    plant(SHM / name, SHM / other)
    with pytest.raises(SegmentForbidden):
        Segment.unlink(name)
    assert os.path.lexists(SHM / name)


def test_wide_modes_only_for_who_asks(name):
    Segment.open(name, slots=1, leases=1, mode=0o666).close()
    with pytest.raises(SegmentForbidden, match="0666"):
        Segment.open(name)
    with pytest.raises(SegmentForbidden):
        Segment.attach(name)
    Segment.open(name, mode=0o666).close()
    Segment.attach(name, mode=0o666).close()


@ROOT_ONLY
def test_a_user_without_permission_gets_a_typed_error(name, made):
    said = run(
        """
os.setgid(12345); os.setuid(12345)
for action in (Segment.open, Segment.attach, Segment.unlink):
    try:
        action(name)
    except SegmentForbidden as error:
        say("forbidden")
say(name in shmcoord.segments())
""",
        name,
    )
    assert said.split() == ["forbidden"] * 3 + ["False"]
    assert (SHM / name).read_bytes() == made


# --- what has the name is no whole segment of this layout


def refused(name, *errors):
    """Both ways in raise one of the errors; nothing is written."""
    content, before = (SHM / name).read_bytes(), identity(name)
    for action in (Segment.open, Segment.attach):
        assert kind_of_error(lambda action=action: action(name)) in errors
        assert (SHM / name).read_bytes() == content
        assert identity(name) == before
    assert name not in segments()


@pytest.mark.parametrize("size", [1, 3, 4, 100, 124, 127, 128, 255, 256, 4096, 100_000])
def test_garbage_of_any_size_is_refused(name, size):
    (SHM / name).write_bytes((b"\x7fELF garbage " * (size // 12 + 1))[:size])
    (SHM / name).chmod(0o600)
    refused(name, SegmentCorrupt)


@pytest.mark.parametrize("change", [-4096, -1, 1, 4096])
def test_wrong_size_is_refused(name, made, change):
    os.truncate(SHM / name, len(made) + change)
    refused(name, SegmentCorrupt)


@pytest.mark.parametrize(
    ("field", "value", "error"),
    [
        ("layout_major", 2, LayoutMismatch),
        ("layout_minor", 0, LayoutMismatch),
        ("layout_minor", 3, LayoutMismatch),
        ("signature", 1, LayoutMismatch),
        ("header_bytes", 512, LayoutMismatch),
        ("slots", 4097, SegmentCorrupt),
        ("slots", 5, SegmentCorrupt),
        ("leases", 0, SegmentCorrupt),
        ("hot_offset", 4104, SegmentCorrupt),
        ("record_offset", 4096, SegmentCorrupt),
        ("lease_offset", 8, SegmentCorrupt),
        ("meta_offset", 2**64 - 1, SegmentCorrupt),
        ("total_bytes", 2**63, SegmentCorrupt),
        ("incarnation", 0, SegmentCorrupt),
    ],
)
def test_a_foreign_header_says_what_is_wrong(name, made, field, value, error):
    offset, size = FIELDS[field]
    Raw(name).write(offset, value.to_bytes(size, "little"))
    refused(name, error)


def test_the_other_byte_order_is_told(name, made):
    Raw(name).write(0, made[:8][::-1])
    refused(name, LayoutMismatch)


def poke(segment, name):
    """Everything that a reader and a writer can do; typed errors are fine."""
    segment.snapshot()
    segment.to_numpy()
    segment.is_stale()
    with Router(segment) as router:
        router.explain("GREEN")
        for group in ("GREEN", ""):
            with contextlib.suppress(ShmcoordError):
                router.acquire(group).release()
    segment.reap()


def try_both(name):
    """Open and attach; what comes of it is a typed error and an untouched file, or a segment."""
    content, before = (SHM / name).read_bytes(), identity(name)
    for action in (Segment.attach, Segment.open):
        try:
            segment = action(name)
        except ShmcoordError:
            assert (SHM / name).read_bytes() == content
            assert identity(name) == before
        else:
            with segment:
                segment.snapshot()
                if segment.writable:
                    poke(segment, name)
    segments()


MANY = settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def restore(name, made):
    """The good segment again, in a file of its own."""
    (SHM / name).unlink(missing_ok=True)
    (SHM / name).write_bytes(made)
    (SHM / name).chmod(0o600)


@pytest.mark.parametrize("field", FIELDS)
@settings(MANY, max_examples=12)
@given(data=st.data())
def test_every_header_field_is_checked_or_ignored(name, made, field, data):
    offset, size = FIELDS[field]
    good = int.from_bytes(made[offset : offset + size], "little")
    most = 256**size - 1
    value = data.draw(
        st.sampled_from([0, max(good - 1, 0), min(good + 1, most), most, most // 2 + 1])
        | st.integers(0, most)
    )
    restore(name, made)
    Raw(name).write(offset, value.to_bytes(size, "little"))
    try_both(name)


@MANY
@given(
    changes=st.lists(
        st.tuples(st.integers(0, 255), st.binary(min_size=1, max_size=16)), min_size=1, max_size=6
    ),
    size=st.none() | st.integers(0, 20_000),
)
def test_headers_wrong_in_several_places(name, made, changes, size):
    restore(name, made)
    for offset, data in changes:
        Raw(name).write(offset, data)
    if size is not None:
        os.truncate(SHM / name, size)
    try_both(name)


@MANY
@given(
    start=st.integers(256, 12_000),
    data=st.binary(min_size=1, max_size=4096),
    ones=st.booleans(),
)
def test_nothing_in_the_tables_can_crash_a_reader(name, made, start, data, ones):
    """Every index, count and length that is read from shared memory is bounded before use."""
    restore(name, made)
    raw = Raw(name)
    raw.write(start, data[: len(made) - start])
    if ones:
        raw.write(384, b"\xff" * 512)
    for slot in range(4):
        if ones:
            raw.set("hot", "kind", 4, 1, slot)
    try_both(name)
    with Segment.open(name) as segment:
        for router in [Router(segment)]:
            for status in segment.snapshot():
                try:
                    router.pick(status.group)
                    router.acquire(status.group).release()
                except NoBackend:
                    pass
            router.close()
        with contextlib.suppress(ShmcoordError):
            segment.join("fresh", group="GREEN", endpoint="e").leave()


# --- half-made


@pytest.mark.parametrize("stage", ["empty", "allocated", "magic", "all but ready"])
def test_a_half_made_segment_is_started_over(name, made, stage):
    content = {
        "empty": b"",
        "allocated": bytes(len(made)),
        "magic": made[:8] + bytes(len(made) - 8),
        "all but ready": made[:124] + bytes(len(made) - 124),
    }[stage]
    restore(name, content)
    # Nobody finished creating it: for an observer there is none yet.
    assert kind_of_error(lambda: Segment.attach(name)) is SegmentNotFound
    assert (SHM / name).read_bytes() == content
    with Segment.open(name, slots=3, leases=3) as segment:
        assert segment.slots == 3
        assert segment.size_bytes == os.stat(SHM / name).st_size
        segment.join("B", group="GREEN", endpoint="e")
    Segment.attach(name).close()


def test_unready_with_participants_in_it_is_not_made_anew(name):
    """The header was damaged while nodes are there: their segment is not wiped under them."""
    with Segment.open(name, slots=2, leases=2) as segment:
        node = segment.join("B", group="GREEN", endpoint="e", interval_s=60)
        Raw(name).set("header", "ready", 4, 0)
        content = (SHM / name).read_bytes()
        with pytest.raises(SegmentCorrupt):
            Segment.open(name)
        assert (SHM / name).read_bytes() == content
        node.leave()


def test_creators_killed_at_random_leave_nothing_unusable(name):
    """Each round: a creator is killed somewhere inside, then somebody else opens."""
    said = run(
        """
path = f"/dev/shm/{name}"
stages = {}
for round in range(3000):  # as a rule 120: until enough of them died in the middle
    if round >= 120 and stages.get("empty", 0) + stages.get("half", 0) >= 3:
        break
    pid = forked(lambda: Segment.open(name, slots=512, leases=128).close())
    if round % 4:
        while not os.path.exists(path):
            pass
    end = time.perf_counter() + random.random() * 0.0008
    while time.perf_counter() < end:
        pass
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    if not os.path.exists(path):
        stage = "absent"
    elif not os.stat(path).st_size:
        stage = "empty"
    else:
        with open(path, "rb") as file:
            stage = "whole" if file.read(128)[124:] != bytes(4) else "half"
    stages[stage] = stages.get(stage, 0) + 1
    with Segment.open(name, slots=2, leases=2) as segment:
        assert segment.slots == (512 if stage == "whole" else 2), (stage, segment.slots)
        segment.join("B", group="GREEN", endpoint="e").leave()
        assert segment.size_bytes == os.stat(path).st_size
    Segment.unlink(name)
say(json.dumps(stages))
""",
        name,
    )
    stages = json.loads(said)
    assert stages.get("empty", 0) + stages.get("half", 0) > 0


def test_a_creator_that_stands_still_is_told(name, monkeypatch):
    """Somebody holds the init lock and does not go on: an error in bounded time, no polling on."""
    (SHM / name).write_bytes(b"")
    (SHM / name).chmod(0o600)
    monkeypatch.setattr(shmcoord.segment, "_INIT_PATIENCE_S", 0.1)
    with ofd_lock(SHM / name, INIT_LOCK), pytest.raises(SegmentCorrupt, match="creating"):
        Segment.open(name)
    assert (SHM / name).read_bytes() == b""
    Segment.open(name).close()


@pytest.mark.parametrize("action", [Segment.open, Segment.attach])
def test_ready_in_the_middle_of_the_look(name, made, monkeypatch, action):
    """The creator stores `ready` between two reads of who comes second: a whole segment."""
    Raw(name).set("header", "ready", 4, 0)
    with ofd_lock(SHM / name, INIT_LOCK):  # the creator at work
        really = os.pread

        def pread(descriptor, count, offset):
            data = really(descriptor, count, offset)
            if Raw(name).read(124, 4) == bytes(4):
                Raw(name).write(124, made[124:128])
            return data

        monkeypatch.setattr(os, "pread", pread)
        try:
            action(name).close()
        except SegmentNotFound:
            assert action == Segment.attach  # "nobody finished creating it" was true at first
    assert (SHM / name).read_bytes() == made


def test_many_processes_open_at_once(name):
    """64 of them, several times: one makes the segment, all have the same one."""
    said = run(
        """
def work(index):
    segment = Segment.open(name, slots=100 + index, leases=4)
    info = os.stat(f"/dev/shm/{name}")
    return [segment.slots, segment.created_at, info.st_ino, segment.is_stale()]

for round in range(6):
    results = swarm(64, work)
    assert None not in results, results
    assert len({tuple(result) for result in results}) == 1, results
    assert not results[0][3]
    Segment.unlink(name)
say("same")
""",
        name,
    )
    assert said == "same\n"


def test_many_processes_open_and_unlink_at_once(name):
    """Makers and removers of the same name: each gets a segment that is whole."""
    said = run(
        """
def work(index):
    for _ in range(40):
        with Segment.open(name, slots=4, leases=4) as segment:
            with segment.join(f"n{index}", group="g", endpoint="e"):
                assert segment.status(f"n{index}").node == f"n{index}"
        with contextlib.suppress(SegmentNotFound):
            Segment.unlink(name)
    return "ok"

results = swarm(4, work)
assert results == ["ok"] * 4, results
""",
        name,
    )
    assert said == ""


# --- from before the last boot


def test_a_segment_from_before_the_last_boot(name, made):
    Raw(name).write(72, secrets.token_bytes(16))
    content, before = (SHM / name).read_bytes(), identity(name)
    with pytest.raises(SegmentCorrupt, match="boot"):
        Segment.attach(name)
    assert (identity(name), (SHM / name).read_bytes()) == (before, content)
    with Segment.open(name, slots=3, leases=3) as segment:  # nobody of then is alive: made anew
        assert segment.slots == 3
        assert identity(name)[0] != before[0]
        assert segment.snapshot() == ()
        Segment.attach(name).close()


# --- a full file system


@ROOT_ONLY
def test_a_full_file_system_is_an_error_and_no_sigbus(name):
    said = run(
        """
import ctypes, subprocess
libc = ctypes.CDLL(None, use_errno=True)
NEWNS, PRIVATE = 0x20000, 0x44000
if libc.unshare(NEWNS) or libc.mount(b"none", b"/", None, PRIVATE, None):
    say("skip: no mount namespace:", os.strerror(ctypes.get_errno())); sys.exit()
if libc.mount(b"tmpfs", b"/dev/shm", b"tmpfs", 0, b"size=128k"):
    say("skip: no tmpfs:", os.strerror(ctypes.get_errno())); sys.exit()
small = Segment.open("small", slots=4, leases=4)
node = small.join("B", group="GREEN", endpoint="e")
for slots in (64, 4096):
    try:
        Segment.open(name, slots=slots)
    except SegmentFull as error:
        assert "no room" in str(error), error
    else:
        raise AssertionError("it fitted")
    assert not os.path.exists(f"/dev/shm/{name}"), "a part of it stays"
with open("/dev/shm/filler", "wb", buffering=0) as filler:
    with contextlib.suppress(OSError):
        while filler.write(bytes(4096)):
            pass
# Full to the last page: what is there works, with every page of it.
with node.request():
    other = small.join("C", group="GREEN", endpoint="e")
    with Router(small) as router:
        router.acquire("GREEN").release()
    assert {status.node for status in small.snapshot()} == {"B", "C"}
try:
    Segment.open(name, slots=1, leases=1)
except SegmentFull:
    say("full")
""",
        name,
    )
    if said.startswith("skip"):
        pytest.skip(said.strip())
    assert said == "full\n"


def test_errors_name_the_segment(name):
    for action in (Segment.attach, Segment.unlink):
        with pytest.raises(SegmentNotFound, match=name):
            action(name)
    assert issubclass(SegmentFull, ShmcoordError)
