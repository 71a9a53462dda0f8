"""Nonsense in words that routers share: it costs nobody his processor, or his retries for good."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers import Raw

import shmcoord

FULL = os.environ.get("SHMCOORD_FAULTS", "") == "full"
WAITS_S = 0.5
#: A caller waits; whatever the word says, its thread sleeps. Prints processor seconds of each wait.
CHILD = """
import json, mmap, os, sys, threading, time
from shmcoord import Router, Saturated, Segment
name, waits_s, rounds = sys.argv[1], float(sys.argv[2]), int(sys.argv[3])
took = []
with Segment.open(name, slots=4, leases=2) as segment:
    node = segment.join("A", group="G", endpoint="e", capacity=1)
    with Router(segment) as router, open(f"/dev/shm/{name}", "r+b") as file:
        words = mmap.mmap(file.fileno(), 0)
        held = router.acquire("G")
        for number in range(rounds):
            def garble():
                time.sleep(0.05)
                value = (7, 2, 2**31 + 1, 2**32 - 1)[number % 4].to_bytes(4, "little")
                for slot in range(4):
                    words[4096 + 128 * slot + 72 : 4096 + 128 * slot + 76] = value
            threading.Thread(target=garble).start()
            began = time.process_time()
            try:
                router.acquire("G", waits_s)
            except Saturated:
                took.append(time.process_time() - began)
        held.release()
        router.acquire("G", 1).release()
    node.leave()
Segment.unlink(name)
print(json.dumps(took))
"""


def waits(folder: Path, name: str, rounds: int) -> list[float]:
    done = subprocess.run(
        [sys.executable, "-c", CHILD, name, str(WAITS_S), str(rounds)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
        timeout=60 + 2 * rounds,
        check=True,
    )
    took: list[float] = json.loads(done.stdout)
    return took


def test_a_wrong_wake_word_wakes_once(
    name: str, count: Callable[[int, int], int], report: Callable[..., None]
):
    rounds = count(4, 40)
    took = waits(Path(shmcoord.get_include()).parent, name, rounds)
    report(
        "nonsense in the wake word of a router that waits",
        waits=len(took),
        processor_time_most=f"{max(took) * 1e3:.0f} ms of {WAITS_S * 1e3:.0f}",
    )
    assert len(took) == rounds
    assert max(took) < WAITS_S / 4


def take_note_of_1_alone(package: Path) -> None:
    """Take out that any odd value is made even."""
    path = package / "turns.pyx"
    text = path.read_text()
    changed = text.replace(
        "cas_seqcst_u32(&hot.wake, wake, wake + 1)", "cas_seqcst_u32(&hot.wake, 1, 2)"
    )
    assert changed != text
    path.write_text(changed)


@pytest.mark.skipif(not FULL, reason="full counts only: a build of its own")
def test_a_router_that_believes_the_word_is_found(
    name: str, changed_build: Callable[..., Path], report: Callable[..., None]
):
    """The control: it runs all the time that it should sleep."""
    took = waits(changed_build("wake", take_note_of_1_alone, SHMCOORD_DEBUG="1"), name, 4)
    report(
        "nonsense in the wake word of a router that waits, control: 1 alone is taken note of",
        processor_time_most=f"{max(took) * 1e3:.0f} ms of {WAITS_S * 1e3:.0f}",
    )
    assert max(took) > WAITS_S / 4


def test_a_debt_that_nobody_can_owe_is_forgiven(name: str, report: Callable[..., None]):
    """And the control: one that somebody can owe is earned back, request by request."""
    wrong = [10**12 + 1, 2**48, 2**63, 2**64 - 1000, 2**64 - 1]
    with shmcoord.Segment.open(name, slots=4, leases=2), shmcoord.Router(name) as router:
        budget = router.retry_budget(ratio=0.2, burst=10)
        for debt in wrong:
            Raw(name).set("sync", "retry_debt", 8, debt)
            assert budget.left == 0
            assert not budget.spend()
            budget.earn()
            assert budget.left == 10
            assert budget.spend()
        Raw(name).set("sync", "retry_debt", 8, 10**12)
        budget.earn()
        owed = Raw(name).number("sync", "retry_debt", 8)
    assert owed == 10**12 - 200
    report("nonsense in the retry budget", debts=len(wrong), forgiven=len(wrong), control_owed=owed)
