"""Processes that wait for capacity, for the tests of waiting."""

from __future__ import annotations

import select
import time
from collections.abc import Callable, Sequence

from helpers import Child, Raw, wait_until

#: Waits whenever it hears a time-out in seconds; says what came of it and after how long.
#: `lost_s` replaces the bounded wait that is the net under lost wake-ups.
WAITER = """
import shmcoord.waiting
lost_s = float(sys.argv[2])
if lost_s:
    shmcoord.waiting.LOST_WAKEUP_S = lost_s
router = Router(name)
with contextlib.suppress(Saturated):
    router.acquire("GREEN").release()
say("ready")
while True:
    words = hear().split()
    if not words:
        break
    if len(words) > 1:  # a step to end or stop at
        os.environ[words[1]] = words[2]
    try:
        lease = router.acquire("GREEN", timeout_s=float(words[0]))
    except Saturated as error:
        say("saturated", time.monotonic(), error.retry_after_s)
        continue
    say("served", time.monotonic())
    hear()
    lease.release()
"""


def waiting(name: str) -> int:
    """Routers that wait."""
    return Raw(name).number("sync", "waiters", 4)


def queue_up(name: str, child: Child, line: str = "20") -> None:
    """Have a child wait, behind all who wait already; returns when it has queued and looked."""
    before = waiting(name)
    child.say(line)
    wait_until(lambda: waiting(name) > before, 10)
    time.sleep(0.01)  # its turn is shown, and it has looked once, as everybody does who queues


def make_waiter(spawn: Callable[..., Child], name: str, lost_s: float = 0.0) -> Child:
    """A child that is ready to wait."""
    child = spawn(WAITER, name, lost_s)
    assert child.hear() == "ready"
    return child


def served_at(child: Child, timeout_s: float = 20.0) -> float:
    """When it was served, on the monotonic clock."""
    word, at = child.hear(timeout_s).split()[:2]
    assert word == "served"
    return float(at)


def next_served(children: Sequence[Child], timeout_s: float = 20.0) -> Child:
    """Whichever of them is served next."""
    files = {child.process.stdout: child for child in children}
    ready, _, _ = select.select(list(files), [], [], timeout_s)
    assert ready, "nobody was served"
    child = files[ready[0]]
    served_at(child)
    return child
