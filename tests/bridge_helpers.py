"""Several hosts in one process: bridges over the engine for tests, each with its own mirrors."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from helpers import wait_until

from shmcoord import Health, Segment
from shmcoord.bridge._memory import Hub, MemoryBridge, hub
from shmcoord.bridge.config import BridgeConfig, parse
from shmcoord.bridge.service import BridgeService

SUSPECT_S = 0.25


def until(true: Callable[[], object], what: str, timeout_s: float = 5.0) -> float:
    """Wait until something is so; how long it took, seconds."""
    try:
        return wait_until(true, timeout_s, every_s=0.001)
    except AssertionError:
        raise AssertionError(f"not within {timeout_s:g} s: {what}") from None


class World:
    """Hosts with a segment and a bridge each; the segments of host h are named by `segment`."""

    def __init__(self, prefix: str, hosts: tuple[str, ...], **settings: object) -> None:
        self.prefix = prefix
        self.hosts = hosts
        self.settings = settings
        self.services: dict[str, BridgeService] = {}
        self.segments = {
            host: Segment.open(self.segment(host), slots=16, leases=8) for host in hosts
        }

    @property
    def net(self) -> Hub:
        """The network between them."""
        return hub(self.prefix.replace(".", "-"))

    def segment(self, host: str) -> str:
        """Name of the segment of a host."""
        return f"{self.prefix}.{host}"

    def mirror(self, at: str, of: str) -> str:
        """Name of the mirror, on one host, of the segment of another."""
        return f"{self.segment(of)}.{at}"

    def config(self, host: str, **settings: object) -> BridgeConfig:
        """What the bridge of a host is configured with."""
        raw = {
            "realm": self.prefix.replace(".", "-"),
            "engine": "memory",
            "suspect_after_s": SUSPECT_S,
            "mirror": "{segment}.{host}",
            "hosts": {
                name: {
                    "listen": [f"tcp/127.0.0.1:{1000 + i}"],
                    "segments": [self.segment(name)],
                }
                for i, name in enumerate(self.hosts)
            },
            **self.settings,
            **settings,
        }
        return parse(raw, host=host, source="test")

    def start(self, host: str) -> BridgeService:
        """Start the bridge of a host."""
        config = self.config(host)
        service = BridgeService(config, MemoryBridge())
        service.start()
        self.services[host] = service
        return service

    def stop(self, host: str) -> None:
        """Stop it."""
        self.services.pop(host).close()

    def seen(self, at: str, of: str) -> dict[str, tuple[str, int]]:
        """What the mirror on one host shows of another: health and queue of each node."""
        with contextlib.suppress(Exception), Segment.attach(self.mirror(at, of)) as segment:
            return {
                status.node: (str(status.health), status.queue) for status in segment.snapshot()
            }
        return {}

    def health(self, at: str, of: str) -> set[str]:
        """The healths that it shows."""
        return {health for health, _ in self.seen(at, of).values()}

    def alive(self, at: str, of: str) -> set[str]:
        """The nodes that it shows alive."""
        return {n for n, (health, _) in self.seen(at, of).items() if health == str(Health.ALIVE)}


@contextlib.contextmanager
def world(prefix: str, *hosts: str, **settings: object) -> Iterator[World]:
    """Hosts whose bridges run."""
    made = World(prefix, hosts, **settings)
    try:
        for host in hosts:
            made.start(host)
        yield made
    finally:
        for host in list(made.services):
            made.stop(host)
        for segment in made.segments.values():
            segment.close()
