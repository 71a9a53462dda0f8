"""A fork: the child's copies of all handles are dead, the parent and its slots unharmed.

Each test is a script, so that the interpreter of the test run itself is never forked.
"""

from __future__ import annotations

import textwrap

import pytest
from helpers import Raw, run, wait_until

from shmcoord import Health, Segment

SETUP = """
segment = Segment.open(name, slots=8, leases=8)
observer = Segment.attach(name)
node = segment.join("B", group="GREEN", endpoint="e", capacity=4, interval_s=0.05, gauges=("kv",))
router = Router(segment)
named = Router(name)
lease = router.acquire("GREEN")
adopted = router.acquire("GREEN")
request = node.adopt(adopted.token)
begun = node.begin()
backend = segment.backend("B")
picked = router.pick("GREEN")
status = segment.status("B")

def unharmed(slots=6):
    time.sleep(0.12)  # beats go by
    assert backend.alive and segment.status("B").health == Health.ALIVE
    assert (node.inflight, segment.status("B").inflight) == (3, 3), node.inflight
    assert segment.reap() == 0
    with Segment.open(name) as other:
        try:
            other.join("B", group="x", endpoint="e")
        except NodeExists:
            pass
        else:
            raise AssertionError("the parent's name was taken")
        free = []
        with contextlib.suppress(SegmentFull):
            while True:
                free.append(other.join(f"f{len(free)}", group="x", endpoint="e"))
        assert len(free) == slots, "slots of the parent are the parent's"
    with node.request():
        assert node.inflight == 4
    assert lease.release() is True
    assert adopted.release() is False
    node.end(request)
    node.end(begun)
    assert node.inflight == 0
    with router.acquire("GREEN"), named.acquire("GREEN"):
        assert segment.status("B").inflight == 2
    node.publish(kv=1.0)

def child(work):
    pid = forked(work)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert code == 0, code
"""


def forked(code: str, name: str) -> str:
    return run(SETUP + textwrap.dedent(code), name)


USES = {
    "segment.snapshot": "segment.snapshot()",
    "segment.status": "segment.status('B')",
    "segment.backend": "segment.backend('B')",
    "segment.to_numpy": "segment.to_numpy()",
    "segment.join": "segment.join('C', group='x', endpoint='e')",
    "segment.reap": "segment.reap()",
    "segment.is_stale": "segment.is_stale()",
    "observer.snapshot": "observer.snapshot()",
    "node.begin": "node.begin()",
    "node.request": "node.request()",
    "node.adopt": "node.adopt(lease.token)",
    "node.end": "node.end(begun)",
    "node.publish": "node.publish(kv=2.0)",
    "node.refresh": "node.refresh()",
    "node.drain": "node.drain()",
    "node.resume": "node.resume()",
    "node.shutdown": "node.shutdown()",
    "node.leave": "node.leave()",
    "node.state": "node.state",
    "node.inflight": "node.inflight",
    "node.refused": "node.refused",
    "node.busy": "node.busy",
    "node.waiting": "node.waiting",
    "node.waiting=": "node.waiting = 5",
    "node.busy=": "node.busy = True",
    "request.end": "request.end()",
    "backend.queue": "backend.queue",
    "backend.state": "backend.state",
    "backend.alive": "backend.alive",
    "picked.queue": "picked.queue",
    "lease.release": "lease.release()",
    "with lease": "with lease: pass",
    "with node": "with node: pass",
    "with request": "with request: pass",
    "router.pick": "router.pick('GREEN')",
    "router.explain": "router.explain('GREEN')",
    "router.acquire": "router.acquire('GREEN')",
    "router.acquire waiting": "router.acquire('GREEN', timeout_s=5)",
    "router.acquire_async": "import asyncio; asyncio.run(router.acquire_async('GREEN'))",
    "router.close": "router.close()",
    "router.mark_unreachable": "router.mark_unreachable(picked)",
    "named.pick": "named.pick('GREEN')",
    "Router(segment)": "Router(segment).pick('GREEN')",
}


def test_every_handle_raises_in_the_child(name):
    """Each use in a child of its own; it says what was wrong with which."""
    said = forked(
        f"""
        uses = {USES!r}
        for what, code in uses.items():
            def work():
                try:
                    exec(code, globals())
                except ForkedHandle as error:
                    assert "parent" in str(error)
                except BaseException as error:
                    say(what, "raised", repr(error))
                else:
                    say(what, "raised nothing")
            code = os.waitstatus_to_exitcode(os.waitpid(forked(work), 0)[1])
            if code != 0:
                say(what, "ended the child:", code)
        unharmed()
        """,
        name,
    )
    assert said == ""


def test_what_was_read_before_is_the_childs(name):
    forked(
        """
        def work():
            assert (status.node, status.inflight, status.gauges) == ("B", 3, {"kv": 0.0})
            assert (backend.node, backend.endpoint, lease.node) == ("B", "e", "B")
            assert (segment.name, segment.slots) == (name, 8)
            assert "parent" in repr(segment)
            repr(node), repr(lease), repr(router), repr(backend)
            assert segment.closed
        child(work)
        unharmed()
        """,
        name,
    )


@pytest.mark.parametrize(
    "end",
    [
        "os._exit(0)",
        "sys.exit(0)",  # with atexit handlers and the collection of everything
        "os.kill(os.getpid(), signal.SIGKILL)",
        "os.execv('/bin/true', ['true'])",
    ],
)
def test_the_end_of_a_child_frees_nothing_of_the_parent(name, end):
    forked(
        f"""
        pid = os.fork()
        if pid == 0:
            {end}
        os.waitpid(pid, 0)
        unharmed()
        """,
        name,
    )


def test_collecting_the_copies_in_the_child_harms_nobody(name):
    forked(
        """
        def work():
            global segment, observer, node, router, named, lease, adopted, request, begun, backend
            global picked
            del segment, observer, node, router, named, lease, adopted, request, begun, backend
            del picked
            gc.collect()
        child(work)
        unharmed()
        """,
        name,
    )


def test_the_child_opens_and_joins_anew(name):
    forked(
        """
        def work():
            mine = Segment.open(name)
            assert mine.status("B").inflight == 3
            assert mine.backend("B").alive
            with mine.join("child", group="PINK", endpoint="e", interval_s=0.02) as own:
                with own.request():
                    assert mine.status("child").pid == os.getpid()
                    time.sleep(0.1)
                    assert mine.status("child").health == Health.ALIVE
                    assert mine.status("child").heartbeat_age_s < 0.08
                with Router(name) as routing:
                    with routing.acquire("PINK") as taken:
                        with own.adopt(taken.token):
                            pass
                    with routing.acquire("GREEN"):
                        try:
                            routing.acquire("GREEN", timeout_s=0.1)
                        except Saturated:
                            pass
                        else:
                            raise AssertionError("above capacity")
        child(work)
        assert [s.node for s in segment.snapshot()] == ["B"]
        unharmed()
        """,
        name,
    )


def test_a_node_of_the_child_dies_with_the_child(name):
    forked(
        """
        gate, opener = os.pipe()
        def work():
            own = Segment.open(name).join("child", group="PINK", endpoint="e", interval_s=30)
            running = own.begin()
            os.write(opener, b"j")
            time.sleep(20)
        pid = forked(work)
        os.read(gate, 1)
        born = segment.backend("child")
        alive, queue = born.alive, born.queue
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        assert (alive, queue) == (True, 1)
        assert not born.alive
        assert segment.reap() == 2
        unharmed()
        """,
        name,
    )


def test_a_parent_killed_while_its_child_lives(name, spawn):
    """The child's copies of descriptors and memory keep nothing of the parent alive."""
    parent = spawn(
        SETUP
        + """
pid = os.fork()
if pid == 0:
    time.sleep(20)
    os._exit(0)
say(pid)
hear()
""",
        name,
    )
    orphan = int(parent.hear())
    try:
        with Segment.open(name) as segment:
            backend = segment.backend("B")
            assert backend.alive
            parent.kill()
            assert not backend.alive
            assert segment.status("B").health == Health.DEAD
            freed = []
            wait_until(lambda: freed.append(segment.reap()) or sum(freed) >= 5, 5)
            assert sum(freed) == 5, "node, router, and three leases"
            with segment.join("B", group="GREEN", endpoint="heir"):
                assert segment.status("B").endpoint == "heir"
            assert Raw(name).taken() == 0
    finally:
        import os
        import signal

        os.kill(orphan, signal.SIGKILL)


@pytest.mark.parametrize("depth", [2])
def test_grandchildren(name, depth):
    forked(
        """
        def grandchild():
            for use in (node.begin, segment.snapshot, lambda: router.pick("GREEN")):
                try:
                    use()
                except ForkedHandle:
                    continue
                raise AssertionError("worked")
        def work():
            own = Segment.open(name)
            mine = own.join("child", group="PINK", endpoint="e")
            def below():
                grandchild()
                try:
                    mine.begin()
                except ForkedHandle:
                    return 0
                return 1
            pid = os.fork()
            if pid == 0:
                os._exit(below())
            assert os.waitpid(pid, 0)[1] == 0
            assert own.backend("child").alive
            mine.leave()
        child(work)
        unharmed()
        """,
        name,
    )


def test_a_handle_closed_before_the_fork_takes_no_memory_of_the_child(name):
    """Its addresses may be the child's own by now: nothing is unmapped there."""
    run(
        """
import ctypes
closed = Segment.open(name, slots=512, leases=64)
size = closed.size_bytes
line = next(line for line in open("/proc/self/maps") if line.strip().endswith(name))
address = int(line.split("-")[0], 16)
closed.close()
pid = os.fork()
if pid == 0:
    code = 1
    try:
        libc = ctypes.CDLL(None)
        libc.mmap.restype = ctypes.c_void_p
        libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
        # Private, anonymous, readable and writable; the kernel heeds the wish if the place is free.
        mine = libc.mmap(address, size, 3, 0x22, -1, 0)
        assert mine == address, "the parent's mapping was inherited"
        ctypes.memset(mine, 7, size)
        del closed
        gc.collect()
        assert ctypes.string_at(mine, size) == bytes([7]) * size
        code = 0
    finally:
        os._exit(code)
assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0, "the child lost its own memory"
""",
        name,
    )


def test_forks_while_threads_are_inside_of_everything(name):
    """No lock of the library stays held in the child, whatever the other threads did."""
    run(
        SETUP
        + """
stop = threading.Event()
def working():
    while not stop.is_set():
        with contextlib.suppress(Saturated):
            with node.request(), named.acquire("GREEN"):
                pass
def joining():
    while not stop.is_set():
        with Segment.open(name) as mine:
            with mine.join("coming", group="y", endpoint="e", interval_s=0.001):
                pass
def waiting():
    while not stop.is_set():
        with contextlib.suppress(Saturated):
            named.acquire("GREEN", timeout_s=0.002).release()
threads = [threading.Thread(target=work) for work in (working, joining, waiting)]
for thread in threads:
    thread.start()

def work():
    with Segment.open(name) as mine:
        with mine.join(f"c{os.getpid()}", group="z", endpoint="e", interval_s=0.005) as own:
            with Router(name) as routing, routing.acquire("z") as taken:
                with own.adopt(taken.token):
                    time.sleep(0.006)
                    assert mine.status(own.name).inflight == 1
    try:
        named.acquire("GREEN", timeout_s=1)
    except ForkedHandle:
        return 0
    return 1

for _ in range(25):
    pid = forked(work)
    end = time.monotonic() + 10
    while True:
        done, code = os.waitpid(pid, os.WNOHANG)
        if done:
            break
        if time.monotonic() > end:
            os.kill(pid, signal.SIGKILL)
            raise AssertionError("a child hangs")
        time.sleep(0.001)
    assert code == 0, code
stop.set()
for thread in threads:
    thread.join()
unharmed(5)
""",
        name,
    )


def test_started_commands_inherit_nothing(name):
    run(
        SETUP
        + """
import subprocess
running = subprocess.Popen(["sleep", "60"])
link = [os.readlink(f"/proc/{running.pid}/fd/{fd}") for fd in os.listdir(f"/proc/{running.pid}/fd")]
assert not [path for path in link if "/dev/shm" in path], link
running.kill()
running.wait()
unharmed()
""",
        name,
    )
