"""SIGKILL of routers and nodes at random under load: nothing leaks, and capacity holds."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path

import history
import pytest
from helpers import Raw

CAPACITY = 4
BATCH = 250

LOAD = (
    history.WRITER
    + """
import socket
import psutil  # once, not in each child
import faultnative

kills, capacity, folder, mode = int(sys.argv[2]), int(sys.argv[3]), sys.argv[4], sys.argv[5]
clock = time.monotonic_ns
segment = Segment.open(name, slots=24, leases=8)
own = segment.join("own", group="GREEN", endpoint="-", capacity=capacity, interval_s=0.05)
kept = own.begin()  # which takes one of its cells
if mode == "count":
    kept.end()

def work_a_little():
    end = time.perf_counter() + random.random() * 100e-6
    while time.perf_counter() < end:
        pass

def route(path):
    "A router that gives tokens to nodes of other processes, now and then waits for capacity."
    log = Log(path)
    router = Router(name)
    sender = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    sender.setblocking(False)
    while True:
        held = []
        with contextlib.suppress(Saturated, NoBackend):
            for _ in range(random.randrange(1, 5)):
                patience = 0.01 if random.random() < 0.1 else 0
                lease = router.acquire("GREEN", patience, random.randrange(1, 4))
                key = key_of(lease.token)
                log.add(GOT, clock(), key)
                held.append((lease, key))
        for lease, key in held:
            if lease.endpoint != "-" and random.random() < 0.7:
                with contextlib.suppress(OSError):
                    sender.sendto(lease.token.encode(), lease.endpoint)
        work_a_little()
        for lease, key in held:
            log.add(GIVING, clock(), key)
            freed = lease.release()
            log.add(FREED if freed else LOST, clock(), key)

def serve(path, serial):
    "A node that adopts what routers send it, and is a router too."
    log = Log(path)
    mine = Segment.open(name)
    inbox = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    endpoint = f"{folder}/{serial}"
    inbox.bind(endpoint)
    inbox.settimeout(0.002)
    node = mine.join(
        f"n{serial}", group="GREEN", endpoint=endpoint, capacity=capacity, interval_s=0.05
    )
    slot, generation = faultnative.place(mine.backend(node.name))
    with open(path + ".node", "w") as file:
        file.write(str(slot << 32 | generation))
    while True:
        running = []
        with contextlib.suppress(OSError):
            for _ in range(random.randrange(1, 4)):
                token = inbox.recv(200).decode()
                with contextlib.suppress(LeaseLost):
                    request = node.adopt(token)
                    log.add(ADOPTED, clock(), key_of(token))
                    running.append((request, key_of(token)))
        work_a_little()
        for request, key in running:
            log.add(ENDING, clock(), key)
            request.end()

def count(path, serial):
    "A router of a wrong protocol: looks whether there is room, then takes; frees with a store."
    log = Log(path)
    backend = Segment.open(name).backend("own")
    slot, generation = faultnative.place(backend)
    number = 0
    while True:
        held = []
        for _ in range(random.randrange(1, 4)):
            number += 1
            taken = faultnative.take_by_count(backend, number & 0xFFFFFF)
            if taken is not None:
                key = (slot << 48 | generation << 16 | taken[0], serial << 32 | number)
                log.add(GOT, clock(), key)
                held.append((taken[0], key))
        work_a_little()
        for index, key in held:
            log.add(GIVING, clock(), key)
            faultnative.free_plainly(backend, index)
            log.add(FREED, clock(), key)

serial = done = 0
running, killed = {}, []
while done < kills:
    while len(running) < 6 and done + len(running) < kills:
        serial += 1
        path = f"{folder}/{serial}.log"
        if mode == "count":
            work = lambda: count(path, serial)
        elif serial % 3:
            work = lambda: route(path)
        else:
            work = lambda: serve(path, serial)
        running[forked(work)] = path
    time.sleep(random.random() * 0.012)
    if mode == "count" and not done:
        time.sleep(1)  # what leaks takes room away: first let them go above the capacity
    if random.random() < 0.05:
        segment.reap()
    pid = random.choice(list(running))
    before = clock()
    os.kill(pid, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert code == -signal.SIGKILL, f"died by itself: {code}"
    killed.append((running.pop(pid), before))
    done += 1

# The beats alone: what a router held is swept, and the load word is right, within two of them.
def beats():
    with open(f"/dev/shm/{name}", "rb", buffering=0) as file:
        file.seek(4096 + faultnative.place(segment.backend("own"))[0] * 128 + 8)
        return int.from_bytes(file.read(8), "little")
if mode == "count":
    kept = own.begin()
start = beats()
while beats() < start + 3:  # so that two whole ones have passed
    time.sleep(0.001)
word = segment.status("own").inflight
held = own.inflight
kept.end()
freed = segment.reap()
left = segment.reap()
say(json.dumps({
    "killed": killed, "word": word, "held": held, "freed": freed, "left": left,
    "nodes": [status.node for status in segment.snapshot()],
    "own": (lambda slot, generation: slot << 32 | generation)(
        *faultnative.place(segment.backend("own"))
    ),
}))
hear()
"""
)


def batch(name, spawn, folder, kills, mode):
    """One segment, so many kills; what the history shows and what was left behind."""
    folder.mkdir()
    child = spawn(LOAD, name, kills, CAPACITY, folder, mode)
    result = json.loads(child.hear(60 + kills * 0.5))
    processes = []
    for path, before in result.pop("killed"):
        if not Path(path).exists():
            continue  # killed before it could write
        node = Path(path + ".node")
        place = int(node.read_text() or "0") if node.exists() else 0
        processes.append(history.Process(Path(path), before, place or None))
    found = history.check(processes, result.pop("own"))
    raw = Raw(name)
    bitmap = int.from_bytes(raw.read(384, 512), "little")
    result |= {
        "leases": found.leases,
        "adopted": found.adopted,
        "most": found.most,
        "doubled": found.doubled,
        "unexplained": found.unexplained,
        "cells": raw.taken(),
        "slots": bin(bitmap).count("1"),
        "waiters": raw.number("sync", "waiters", 4),
    }
    child.finish()
    shutil.rmtree(folder)
    return result


def test_routers_and_nodes_killed_at_random(new_name, spawn_native, tmp_path, count, report):
    total, done, seen, most = count(150, 10_000), 0, Counter(), 0
    while done < total:
        kills = min(BATCH, total - done)
        result = batch(new_name(), spawn_native, tmp_path / "load", kills, "library")
        assert result["most"] <= CAPACITY
        assert result["doubled"] == result["unexplained"] == 0
        assert (result["word"], result["held"]) == (1, 1), "beside what it held itself"
        assert result["left"] == 0
        assert (result["cells"], result["slots"], result["nodes"]) == (0, 1, ["own"])
        done += kills
        most = max(most, result["most"])
        seen.update({what: result[what] for what in ("leases", "adopted", "waiters", "cells")})
        seen["slots"] += result["slots"] - 1
    report(
        "SIGKILL of routers and nodes at random",
        kills=done,
        leases=seen["leases"],
        adopted=seen["adopted"],
        leaked_leases=seen["cells"],
        leaked_slots=seen["slots"],
        most_at_once=f"{most} of {CAPACITY}",
        wrong_load_words=0,
        waiters_left_counted=seen["waiters"],
    )
    assert most == CAPACITY
    assert seen["adopted"] > done


def test_counting_instead_of_owning_is_found(new_name, spawn_native, tmp_path, report):
    """The control: a plain count is above the capacity and leaks."""
    result = batch(new_name(), spawn_native, tmp_path / "load", 30, "count")
    report(
        "SIGKILL of routers at random, control by counting",
        kills=30,
        most_at_once=f"{result['most']} of {CAPACITY}",
        leaked_leases=result["held"] - 1,
    )
    assert result["most"] > CAPACITY
    assert result["held"] > 1


@pytest.mark.parametrize(
    ("entries", "finding"),
    [
        ([[(1, 10, 7, 1), (2, 20, 7, 1)], [(1, 15, 7, 2), (2, 30, 7, 2)]], "doubled"),
        ([[(1, 10, 7, 1), (2, 20, 7, 1), (4, 21, 7, 1)]], "unexplained"),
        ([[(1, 10, 7, 1), (2, 20, 7, 1), (3, 21, 7, 1)], [(5, 15, 7, 1)]], "doubled"),
        ([[(1, 10, 7, 1)], [(1, 15, 8, 1), (2, 16, 8, 1)]], "most"),
    ],
    ids=["two in a cell", "lost while all lived", "freed though adopted", "held until killed"],
)
def test_the_check_of_a_history_finds(tmp_path, entries, finding):
    processes = []
    for number, of_one in enumerate(entries):
        path = tmp_path / str(number)
        data = b"".join(history.ENTRY.pack(*entry) for entry in of_one)
        path.write_bytes(len(of_one).to_bytes(history.ENTRY.size, "little") + data)
        processes.append(history.Process(path, 100, None))
    found = getattr(history.check(processes, 0), finding)
    assert found == (2 if finding == "most" else 1)
