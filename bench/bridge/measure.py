"""What is measured of a world: ages, cost, and how soon a host is out of routing."""

from __future__ import annotations

import signal
import statistics
import time

from bench.bridge.world import TICK_S, World, until
from shmcoord import Router, Segment

_PAUSE_S = 0.0017  # between two looks; in no step with the tick


def ages(world: World, seconds: float) -> list[float]:
    """Return how old what h1 sees of node N0 of h2 was, at each look, in seconds."""
    found = []
    ends = time.monotonic() + seconds
    with Segment.attach(world.mirror("h1", "h2")) as mirror:
        while (now := time.monotonic()) < ends:
            found.append(now - mirror.status("N0").gauges["stamp"])
            time.sleep(_PAUSE_S)
    return found


def cost(world: World, seconds: float) -> dict[str, float]:
    """Return what the bridge of h1 costs: CPU in percent of a core, bytes per second, memory."""
    bridge = world.bridges["h1"]
    before, cpu_s, begun = bridge.ask(), bridge.cpu_s(), time.monotonic()
    time.sleep(seconds)
    after, took_s = bridge.ask(), time.monotonic() - begun
    cpu_s = bridge.cpu_s() - cpu_s
    frames = sum(one["taken"] for one in after["heard"]) - sum(
        one["taken"] for one in before["heard"]
    )
    return {
        "cpu_percent": 100 * cpu_s / took_s,
        "frames_in_per_s": frames / took_s,
        "bytes_out_per_s": (after["sent"]["bytes"] - before["sent"]["bytes"])
        / took_s
        * (world.count - 1),
        "frame_bytes": (after["sent"]["bytes"] - before["sent"]["bytes"])
        / (after["sent"]["frames"] - before["sent"]["frames"]),
        "memory_bytes": bridge.memory_bytes(),
        "threads": bridge.threads(),
        "nodes": sum(one["nodes"] for one in after["heard"]),
    }


def routing(world: World, rounds: int = 200, each: int = 500) -> dict[str, float]:
    """Return medians, in ns, of a pick and of acquire + release, here and in the mirror.

    The same nodes; rounds of the two alternate.
    """
    times: dict[str, list[float]] = {"pick": [], "pick_mirror": [], "take": [], "take_mirror": []}
    with Router(world.segment("h2")) as near, Router(world.mirror("h1", "h2")) as far:
        for _ in range(rounds):
            for router, suffix in ((near, ""), (far, "_mirror")):
                begun = time.perf_counter_ns()
                for _ in range(each):
                    router.pick("G")
                times["pick" + suffix].append((time.perf_counter_ns() - begun) / each)
                begun = time.perf_counter_ns()
                for _ in range(each):
                    router.acquire("G").release()
                times["take" + suffix].append((time.perf_counter_ns() - begun) / each)
    found = {name: statistics.median(values) for name, values in times.items()}
    for what in ("pick", "take"):
        ratios = [b / a for a, b in zip(times[what], times[what + "_mirror"], strict=True)]
        found[what + "_ratio"] = statistics.median(ratios)
    return found


def losses(world: World, times: int) -> dict[str, list[float]]:
    """Return how long, in seconds, until nodes of h2 are out of routing on h1, and back again.

    `killed`: SIGKILL of its bridge; `frozen`: SIGSTOP; `cut`: the link forwards nothing any more.
    """
    found: dict[str, list[float]] = {
        f"{what}{back}": [] for what in ("killed", "frozen", "cut") for back in ("", "_back")
    }

    def note(what: str) -> None:
        found[what].append(until(lambda: not world.is_alive(), f"{what}: N0 is out"))

    def note_back(what: str) -> None:
        found[what + "_back"].append(until(world.is_alive, f"{what}: N0 is back"))

    for turn in range(times):
        settle = 0.5 + TICK_S * turn / times
        time.sleep(settle)
        world.bridges["h2"].signal(signal.SIGKILL)
        note("killed")
        world.bridges["h2"].close()
        world.bridges["h2"] = world.bridge("h2")
        note_back("killed")
        time.sleep(settle)
        world.bridges["h2"].signal(signal.SIGSTOP)
        note("frozen")
        time.sleep(0.5)
        world.bridges["h2"].signal(signal.SIGCONT)
        note_back("frozen")
        time.sleep(settle)
        world.relay.cut()
        note("cut")
        time.sleep(0.5)
        world.relay.heal()
        note_back("cut")
    return found
