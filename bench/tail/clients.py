"""The ways to send a request: gRPC's own balancers, and those that choose the node themselves.

All of them use the same gRPC client (grpc.aio) and send the same bytes.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import grpc.aio

import shmcoord
from bench.tail.node import GROUP
from bench.tail.wire import METHOD
from shmcoord.transport.grpc import LEASE_KEY

STATUS_AGE_S = 2.0
"""How often a router looks at the nodes' status where it does so from time to time only."""

_CONNECT_TIMEOUT_S = 20.0
OPTIONS: tuple[tuple[str, Any], ...] = (
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.enable_retries", 0),
)
Call = Callable[..., Awaitable[bytes]]


@dataclass(frozen=True)
class ClientSettings:
    """How a router sends.

    Attributes:
        kind: a name of CLIENTS.
        targets: for `balanced`, the addresses of one channel; else those of the nodes by number.
        balancer: for `balanced`, a gRPC load balancing configuration.
        segment: shmcoord's segment.
        policy: for `leased`, a name of shmcoord's policies.
        options: for `leased`, further arguments of the router.
        patience_s: for `leased`, how long it waits for capacity.
        seed: for what is drawn.
    """

    kind: str
    targets: tuple[str, ...]
    balancer: dict[str, Any] = field(default_factory=lambda: {"pick_first": {}})
    segment: str = ""
    policy: str = ""
    options: dict[str, Any] = field(default_factory=dict)
    patience_s: float = 30.0
    seed: int = 0


class Client(Protocol):
    """One router's way to send; used by many tasks of one event loop."""

    async def open(self) -> None:
        """Connects to all whom it may send to."""

    async def send(self, request: bytes, key: int, timeout_s: float) -> tuple[int, bytes]:
        """Sends a request; returns when it left this router (monotonic_ns), and the answer.

        Raises:
            grpc.RpcError: as gRPC says.
            shmcoord.Saturated: nobody had capacity.
        """

    async def close(self) -> None:
        """Ends the connections."""


def _channel(targets: Sequence[str], balancer: dict[str, Any]) -> grpc.aio.Channel:
    config = json.dumps({"loadBalancingConfig": [balancer]})
    options = [*OPTIONS, ("grpc.service_config", config)]
    return grpc.aio.insecure_channel(f"ipv4:{','.join(targets)}", options=options)


async def _connect(channels: Sequence[grpc.aio.Channel]) -> None:
    ready = asyncio.gather(*(channel.channel_ready() for channel in channels))
    await asyncio.wait_for(ready, _CONNECT_TIMEOUT_S)


class Balanced:
    """One channel; gRPC chooses among its addresses."""

    def __init__(self, settings: ClientSettings) -> None:
        self._channel = _channel(settings.targets, settings.balancer)
        self._call: Call = self._channel.unary_unary(METHOD)

    async def open(self) -> None:
        """One address connected is enough for gRPC: the warm-up does the others."""
        await _connect([self._channel])

    async def send(self, request: bytes, key: int, timeout_s: float) -> tuple[int, bytes]:
        """As `Client.send`."""
        sent_ns = time.monotonic_ns()
        return sent_ns, await self._call(request, timeout=timeout_s)

    async def close(self) -> None:
        """As `Client.close`."""
        await self._channel.close()


class _PerNode:
    """A channel per node."""

    def __init__(self, settings: ClientSettings) -> None:
        self.settings = settings
        self.rng = random.Random(settings.seed)
        self._channels = [_channel([target], {"pick_first": {}}) for target in settings.targets]
        self.calls: list[Call] = [channel.unary_unary(METHOD) for channel in self._channels]

    async def open(self) -> None:
        await _connect(self._channels)

    async def close(self) -> None:
        for channel in self._channels:
            await channel.close()


class LeastKnown(_PerNode):
    """The node on which this router itself has the fewest requests; ties at random."""

    def __init__(self, settings: ClientSettings) -> None:
        super().__init__(settings)
        self._outstanding = [0] * len(self.calls)

    async def send(self, request: bytes, key: int, timeout_s: float) -> tuple[int, bytes]:
        """As `Client.send`."""
        counts = self._outstanding
        least = min(counts)
        node = self.rng.choice([number for number, count in enumerate(counts) if count == least])
        counts[node] += 1
        try:
            sent_ns = time.monotonic_ns()
            return sent_ns, await self.calls[node](request, timeout=timeout_s)
        finally:
            counts[node] -= 1


class OldStatus(_PerNode):
    """The node with the shortest queue when this router last looked, every two seconds."""

    def __init__(self, settings: ClientSettings) -> None:
        super().__init__(settings)
        self._segment = shmcoord.Segment.attach(settings.segment)
        self._queues = [0] * len(self.calls)
        self._look_at = time.monotonic() + self.rng.random() * STATUS_AGE_S

    def _look(self) -> None:
        for status in self._segment.snapshot():
            self._queues[int(status.node.rpartition("-")[2])] = status.queue

    async def open(self) -> None:
        """Connects, and looks for the first time."""
        self._look()
        await super().open()

    async def send(self, request: bytes, key: int, timeout_s: float) -> tuple[int, bytes]:
        """As `Client.send`."""
        if time.monotonic() >= self._look_at:
            self._look()
            self._look_at = time.monotonic() + STATUS_AGE_S
        least = min(self._queues)
        ties = [number for number, queue in enumerate(self._queues) if queue == least]
        sent_ns = time.monotonic_ns()
        return sent_ns, await self.calls[self.rng.choice(ties)](request, timeout=timeout_s)

    async def close(self) -> None:
        """As `Client.close`."""
        self._segment.close()
        await super().close()


class Leased(_PerNode):
    """shmcoord: reserves, then sends with the lease, which the node adopts."""

    def __init__(self, settings: ClientSettings) -> None:
        super().__init__(settings)
        self._router = shmcoord.Router(settings.segment, policy=settings.policy, **settings.options)
        self._by_endpoint = dict(zip(settings.targets, self.calls, strict=True))
        self._has_key = settings.policy == "affinity"

    async def send(self, request: bytes, key: int, timeout_s: float) -> tuple[int, bytes]:
        """As `Client.send`."""
        patience_s = self.settings.patience_s
        if self._has_key:
            lease = await self._router.acquire_async(GROUP, timeout_s=patience_s, key=f"key-{key}")
        else:
            lease = await self._router.acquire_async(GROUP, timeout_s=patience_s)
        with lease:
            sent_ns = time.monotonic_ns()
            call = self._by_endpoint[lease.endpoint]
            metadata = ((LEASE_KEY, lease.token),)
            return sent_ns, await call(request, metadata=metadata, timeout=timeout_s)

    async def close(self) -> None:
        """As `Client.close`."""
        self._router.close()
        await super().close()


_CLIENTS: dict[str, Callable[[ClientSettings], Client]] = {
    "balanced": Balanced,
    "least-known": LeastKnown,
    "old-status": OldStatus,
    "leased": Leased,
}


def make_client(settings: ClientSettings) -> Client:
    """Makes the client of that kind."""
    return _CLIENTS[settings.kind](settings)
