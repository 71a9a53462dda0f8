"""Hosts that only speak: `python -m bench.bridge.stand_ins`, the first line what they are.

They stand in for hosts of which only what they send to the hosts under observation matters: the
frames are real ones, of real segments with as many nodes, sent over real links once per tick, with
the load of all nodes changed in between; what others would send to them is not sent.
"""

from __future__ import annotations

import contextlib
import json
import random
import sys
import threading
import time
from typing import Any

from shmcoord import Segment
from shmcoord.bridge.engine import EngineConfig, engine
from shmcoord.bridge.sending import Sender


class _Deaf:
    def on_frame(self, host: str, frame: bytes) -> None:
        pass

    def on_host(self, host: str, up: bool) -> None:
        pass


def main() -> None:
    """Speak until the input ends."""
    told: dict[str, Any] = json.loads(sys.stdin.readline())
    ended = threading.Event()
    threading.Thread(target=lambda: (sys.stdin.read(), ended.set()), daemon=True).start()
    with contextlib.ExitStack() as stack:
        nodes, bridges = [], []
        for host, listen in told["hosts"].items():
            name = f"{told['prefix']}.{host}"
            segment = stack.enter_context(Segment.open(name, slots=2 * told["nodes"], leases=16))
            nodes += [
                segment.join(f"{host}-{i}", group="G", endpoint=f"127.0.0.1:{i + 1}", capacity=4)
                for i in range(told["nodes"])
            ]
            bridge = engine("zenoh")()
            bridge.start(
                EngineConfig(host, told["realm"], (listen,), (), tuple(told["to"])), _Deaf()
            )
            bridges.append((bridge, Sender(host, [name], warns_of_local=False)))
        print("ready", flush=True)
        chance = random.Random(2)
        tick_s, turn, begun = told["tick_s"], 0, time.monotonic()
        step_s = tick_s / len(bridges)  # hosts are not in step
        while not ended.wait(max(begun + turn * step_s - time.monotonic(), 0.0)):
            if turn % len(bridges) == 0:
                for node in nodes:
                    node.waiting = chance.randrange(3)
            bridge, sender = bridges[turn % len(bridges)]
            bridge.publish(sender.frame(full=turn // len(bridges) % round(1 / tick_s) == 0))
            turn += 1
        for bridge, sender in bridges:
            bridge.stop()
            sender.close()


if __name__ == "__main__":
    main()
