"""The process that fuzzes: wrong bytes in a segment, calls in between. Run by test_fuzz.py.

An input is a list of steps: a byte below 128 changes a place of the segment (a field of any table,
or any bytes), one above makes a call on a node, a router, an observer, or on a copy of the segment
that is opened anew. Whatever is not an error of the library ends the process.

Arguments: the segment's name, the engine, seconds, cases at most, and `trusting` for the control: a
reader that believes a count which it finds in the segment.
"""

from __future__ import annotations

import asyncio
import ctypes
import faulthandler
import json
import logging
import mmap
import os
import random
import struct
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

from shmcoord import POLICIES, Lease, Router, Segment, ShmcoordError, segments

SLOTS, LEASES = 6, 4
HANG_S = 60
HOT = ((0, 8), (8, 8), (16, 8), (24, 8), (32, 4), (36, 4), (40, 4), (44, 4), (48, 8), (56, 8))
HOT += ((64, 4), (68, 4), (72, 4), (76, 4), (80, 8), (120, 8))
#: What a router shows of those who wait: whether it was told, and two turns of ticket and group.
TURNS = ((44, 4), (72, 4), (88, 8), (96, 8), (104, 8), (112, 8))
HOT += TURNS[2:]
SYNC = ((256, 8), (264, 4), (268, 4), (272, 8), (280, 8), (288, 8), (296, 8))
META = ((0, 8), (60, 4), (64, 8), (124, 4), (128, 8), (380, 4), (384, 4), (388, 4), (392, 8))
META += ((400, 8), (408, 8), (416, 8), (424, 4), (428, 4), (432, 8), (440, 8), (448, 8))
META += ((476, 4), (960, 4), (964, 4))
HEADER = ((0, 8), (8, 2), (10, 2), (12, 4), (16, 8), (24, 4), (28, 4), (32, 8), (40, 8), (48, 8))
HEADER += (
    (56, 8),
    (64, 8),
    (72, 8),
    (88, 4),
    (92, 4),
    (96, 8),
    (104, 8),
    (112, 8),
    (120, 4),
    (124, 4),
)
SPECIAL = (0, 1, 2, 3, 0x40000000, 0x3FFFFFFF, 2**31, 2**32 - 1, 2**48, 2**62, 2**63, 2**64 - 1)


class Steps:
    """Numbers out of an input; 0 once it is used up."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.at = 0

    def take(self, size: int) -> bytes:
        piece = self.data[self.at : self.at + size]
        self.at += size
        return piece.ljust(size, b"\0")

    def number(self, size: int = 1) -> int:
        return int.from_bytes(self.take(size), "little")


class Target:
    """A segment with a living node and router in it, put right again before each input."""

    def __init__(self, name: str, trusting: bool) -> None:
        self.name = name
        self.copy = f"{name}.copy"
        self.trusting = trusting
        self.errors: dict[str, int] = {}
        self.segment = Segment.open(name, slots=SLOTS, leases=LEASES)
        self.observer = Segment.attach(name)
        self.node = self.segment.join(
            "A", group="G", endpoint="e", capacity=3, interval_s=3600, gauges=("g", "h")
        )
        self.router = Router(self.segment)
        self.router.acquire("G").release()
        self.waiting = Router(self.segment)  # another one, whose callers wait
        self.waiting.acquire("G").release()
        self.thread = ThreadPoolExecutor(1)
        with open(f"/dev/shm/{name}", "r+b") as file:
            self.map = mmap.mmap(file.fileno(), 0)
        self.clean = bytes(self.map)
        record, lease, meta = struct.unpack_from("<QQQ", self.clean, 40)
        self.meta = meta
        places = [*HEADER, *SYNC, (384, 8), (384, 1), (392, 8)]
        for slot in range(SLOTS):
            places += [(4096 + 128 * slot + at, size) for at, size in HOT]
            places += [(record + 640 * slot, 8)]
            # A node's status; or a router's decisions, of four words each.
            places += [(record + 640 * slot + 64 + 8 * word, 8) for word in (0, 1, 2, 3, 6, 40)]
            places += [(record + 640 * slot + 64 + 8 * word, 8) for word in (7, 8, 16, 60, 63)]
            places += [(lease + 8 * (LEASES * slot + cell), 8) for cell in range(LEASES)]
            places += [(meta + 1024 * slot + at, size) for at, size in META]
        self.places = places
        self.turns = [(268, 4), (280, 8)]
        self.turns += [
            (4096 + 128 * slot + at, size) for slot in range(SLOTS) for at, size in TURNS
        ]
        self.calls = [
            self.observe,
            lambda steps: self.segment.reap(),
            lambda steps: self.segment.status("AZ"[steps.number() % 2]),
            lambda steps: str(self.router.explain("G")),
            lambda steps: self.router.pick("G").queue,
            lambda steps: self.router.acquire("G", cost=1 + steps.number(2) % 0xFFFF).release(),
            self.adopt,
            self.forge,
            self.serve,
            lambda steps: self.segment.join("Z", group="G", endpoint="e").leave(),
            self.other_policies,
            self.open_copy,
            lambda steps: segments(),
            self.metrics,
            self.wait,
            self.decisions,
            self.budget,
            lambda steps: str(
                self.router.explain("G", key=steps.number(), cost=1 + steps.number())
            ),
        ]

    def one(self, data: bytes) -> None:
        """Run one input."""
        faulthandler.dump_traceback_later(HANG_S, exit=True)
        self.map[:] = self.clean
        steps = Steps(data)
        while steps.at < len(data):
            what = steps.number()
            if what < 128:
                self.change(what, steps)
                continue
            try:
                self.calls[what % len(self.calls)](steps)
            except ShmcoordError as error:
                kind = type(error).__name__
                self.errors[kind] = self.errors.get(kind, 0) + 1
            except BaseException:
                print("input:", data.hex(), file=sys.stderr)  # noqa: T201
                raise

    def change(self, what: int, steps: Steps) -> None:
        if what < 8:  # any bytes anywhere behind the header
            count = 1 + steps.number() % 32
            at = 256 + steps.number(2) % (len(self.clean) - 256 - count)
            self.map[at : at + count] = steps.take(count)
            return
        at, size = self.places[steps.number(2) % len(self.places)]
        good = int.from_bytes(self.clean[at : at + size], "little")
        value = steps.number(size)
        if what < 64:
            value = SPECIAL[value % len(SPECIAL)]
        elif what < 96:
            value = good + (value % 9) - 4
        self.map[at : at + size] = (value % 256**size).to_bytes(size, "little")

    def observe(self, steps: Steps) -> None:
        for status in self.observer.snapshot():
            repr((status, status.gauges, status.uptime_s, hash(status), status == status))
        if self.trusting:
            for slot in range(SLOTS):
                (count,) = struct.unpack_from("<I", self.map, self.meta + 1024 * slot + 428)
                assert count <= 16, "the control reads out of bounds"

    def adopt(self, steps: Steps) -> None:
        lease = self.router.acquire("G", timeout_s=0, explain=True)
        at, size = self.places[steps.number(2) % len(self.places)]
        self.map[at : at + size] = steps.take(size)
        with suppress(ShmcoordError), self.node.adopt(lease.token):
            pass
        lease.release()

    def forge(self, steps: Steps) -> None:
        good = f"1-{struct.unpack_from('<Q', self.clean, 112)[0]:x}-0-1"
        token = (good, "", "1", steps.take(8).hex())[steps.number() % 4]
        for _ in range(2):
            token += f"-{steps.number(8):x}"
        self.node.adopt(token).end()

    def serve(self, steps: Steps) -> None:
        with self.node.request(), self.node.request():
            self.node.waiting = steps.number(2)
        handles = [self.node.begin() for _ in range(steps.number() % 8)]
        for handle in handles:
            self.node.end(handle)

    def metrics(self, steps: Steps) -> None:
        self.node.publish(g=1.0, h=float(steps.number()))
        repr((self.node.inflight, self.node.state))
        with suppress(ValueError):  # the word says that the node is shut down
            self.node.drain()
            self.node.resume()

    def other_policies(self, steps: Steps) -> None:
        policy = list(POLICIES)[steps.number() % len(POLICIES)]
        with Router(self.segment, policy=policy, seed=1) as router:
            router.pick("G", key=policy)
            router.acquire("G", key=policy).release()
            str(router.explain("G", key=policy))

    def wait(self, steps: Steps) -> None:
        """Callers that wait, of two routers, while their turns are changed and a cell is freed."""
        leases = []
        with suppress(ShmcoordError):
            while len(leases) < 2 * LEASES:
                leases.append(self.router.acquire("G"))
        try:
            acquire = self.on_a_loop if steps.number() % 3 == 0 else self.waiting.acquire
            waits = self.thread.submit(acquire, "G", 0.002)
            for _ in range(steps.number() % 4):
                at, size = self.turns[steps.number() % len(self.turns)]
                self.map[at : at + size] = steps.take(size)
            if leases and steps.number() % 2:
                leases.pop().release()
            with suppress(ShmcoordError):
                self.router.acquire("G", 0.001).release()
            waits.result().release()
        finally:
            for lease in leases:
                lease.release()

    def on_a_loop(self, group: str, timeout_s: float) -> Lease:
        return asyncio.run(self.waiting.acquire_async(group, timeout_s))

    def decisions(self, steps: Steps) -> None:
        group = (None, "G", "nobody")[steps.number() % 3]
        for past in self.observer.decisions(group):
            repr((past, str(past), hash(past)))

    def budget(self, steps: Steps) -> None:
        budget = self.router.retry_budget(steps.number() / 100, float(steps.number()))
        for _ in range(steps.number() % 8):
            budget.spend()
            budget.earn()
        assert 0 <= budget.left <= 255

    def open_copy(self, steps: Steps) -> None:
        """What somebody finds who comes now; nobody has an owner lock on the copy."""
        path = f"/dev/shm/{self.copy}"
        with suppress(FileNotFoundError):
            os.unlink(path)
        size = steps.number(2) if steps.number() % 8 == 0 else len(self.clean)
        with open(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(self.map[:size])
        with suppress(ShmcoordError), Segment.attach(self.copy) as segment:
            segment.snapshot()
        with Segment.open(self.copy, slots=1, leases=1) as segment:
            segment.snapshot()
            with suppress(ShmcoordError), Router(segment) as router:
                router.acquire("G").release()
            with suppress(ShmcoordError):
                segment.join("Z", group="G", endpoint="e").leave()
            with suppress(ShmcoordError):
                segment.decisions()
            segment.reap()

    def close(self) -> None:
        self.map[:] = self.clean
        for name in (self.name, self.copy):
            with suppress(ShmcoordError):
                Segment.unlink(name)


# --- engines


def seeded() -> random.Random:
    seed = random.SystemRandom().getrandbits(32)
    print("seed", seed, file=sys.stderr)  # noqa: T201
    return random.Random(seed)


def run_random(one, cover, end, most):
    """Inputs by chance; no feedback."""
    rng = seeded()
    for case in range(most):
        if time.monotonic() > end:
            return case
        one(rng.randbytes(rng.randint(1, 120)))
    return most


def run_guided(one, cover, end, most):
    """Mutations of the inputs that took a way through the core that none took before."""
    rng = seeded()
    corpus = [bytes(rng.randbytes(24)) for _ in range(8)]
    for case in range(most):
        if time.monotonic() > end:
            return case
        data = bytearray(rng.choice(corpus))
        for _ in range(rng.randint(1, 5)):
            at = rng.randint(0, len(data))
            match rng.randint(0, 4):
                case 0:
                    data[at : at + 1] = rng.randbytes(1)
                case 1:
                    data[at:at] = rng.randbytes(rng.randint(1, 12))
                case 2:
                    del data[at : at + rng.randint(1, 12)]
                case 3:
                    data[at:] = rng.choice(corpus)[-rng.randint(1, 40) :]
                case 4 if at < len(data):
                    data[at] ^= 1 << rng.randint(0, 7)
        data = bytes(data[:400])
        one(data)
        if cover is not None and cover.cover_new():
            corpus.append(data)
    return most


def main() -> None:
    name, engine, seconds, most = sys.argv[1], sys.argv[2], float(sys.argv[3]), int(sys.argv[4])
    logging.disable()
    target = Target(name, "trusting" in sys.argv)
    cover = ctypes.CDLL(None)
    if not hasattr(cover, "cover"):
        cover = None
    else:
        cover.cover(1)
    run = {"random": run_random, "guided": run_guided}[engine]
    cases = run(target.one, cover, time.monotonic() + seconds, most)
    faulthandler.cancel_dump_traceback_later()
    target.close()
    places = 0
    if cover is not None:
        cover.cover(0)
        cover.cover_new()
        places = cover.cover_total()
    print(json.dumps([cases, places, target.errors]))  # noqa: T201


if __name__ == "__main__":
    main()
