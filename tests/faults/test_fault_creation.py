"""64 processes create the same segment at once: one initialises, all attach to the same memory."""

from __future__ import annotations

import json

from helpers import run

PROCESSES = 64

#: Each round is a name that all of them open at the same instant, when their timers ring.
CREATORS = """
rounds, processes = int(sys.argv[2]), int(sys.argv[3])
start = time.monotonic() + 0.5

def together(number):
    time.sleep(max(start + number * 0.012 - time.monotonic(), 0))

def work(index):
    segments = []
    for number in range(rounds):
        together(number)
        segment = Segment.open(f"{name}.{number}", slots=processes, leases=2)
        with open(f"/dev/shm/{name}.{number}", "rb") as file:
            header = file.read(256)
        segments.append([header.hex(), segment.is_stale()])
        segment.close()
    return segments

def careless(index):
    "Creates as one would without O_EXCL, without a lock and without `ready`."
    segments = []
    for number in range(rounds):
        together(number)
        fd = os.open(f"/dev/shm/{name}.{number}", os.O_RDWR | os.O_CREAT, 0o600)
        if os.fstat(fd).st_size == 0:
            os.ftruncate(fd, 4096)
            os.pwrite(fd, os.urandom(8) * 32, 0)
        segments.append([os.pread(fd, 256, 0).hex(), False])
        os.close(fd)
    return segments

seen = swarm(processes, work if sys.argv[4] == "library" else careless)
assert None not in seen, "one of them failed"
say(json.dumps([
    [len({header for header, _ in of_round}), sum(stale for _, stale in of_round)]
    for of_round in zip(*seen)
]))
for number in range(rounds):
    os.unlink(f"/dev/shm/{name}.{number}")
"""


def test_64_processes_create_at_once(name, count, report):
    rounds = count(20, 1000)
    said = json.loads(run(CREATORS, name, rounds, PROCESSES, "library", timeout_s=900))
    headers = [headers for headers, _ in said]
    report(
        "64 processes create at once",
        rounds=rounds,
        opened=rounds * PROCESSES,
        initialised_once=headers.count(1),
        stale=sum(stale for _, stale in said),
    )
    assert headers == [1] * rounds
    assert not any(stale for _, stale in said)


def test_careless_creation_is_found(name, report):
    said = json.loads(run(CREATORS, name, 60, PROCESSES, "careless"))
    wrong = sum(headers > 1 for headers, _ in said)
    report("64 processes create at once, control", rounds=60, initialised_more_than_once=wrong)
    assert wrong > 0
