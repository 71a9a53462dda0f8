"""A client on one host of a cluster: `python hosts_client.py CONFIG HOST`, a line of JSON each."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
import time
from collections import Counter
from typing import Any

import grpc
import grpc.aio

import shmcoord
from servers import client, config
from servers.pb import shmcoord_cluster_pb2 as pb
from servers.pb import shmcoord_cluster_pb2_grpc as pb_grpc


class Asker:
    """Asks the gateway of the cluster."""

    def __init__(self, file: str, host: str) -> None:
        self._cluster = config.load(file)
        self._host = host
        self._held: list[Any] = []
        self._routers: list[shmcoord.Router] = []

    def seen(self) -> dict[str, str]:
        """Node -> health, of all segments that a router of this host opens."""
        found = {}
        for name in self._cluster.segments_at(self._host):
            with contextlib.suppress(shmcoord.ShmcoordError), shmcoord.Segment.attach(name) as seg:
                found |= {status.node: str(status.health) for status in seg.snapshot()}
        return found

    async def queries(
        self,
        count: int = 1,
        concurrency: int = 1,
        teams: tuple[str, ...] = (),
        timeout_s: float = 20.0,
        seconds: float = 0.0,
        words: tuple[str, ...] = ("code0001",),
    ) -> dict[str, Any]:
        """Ask `count` queries, or for so many seconds; what came of them.

        `answered`; `rows` of the last; `served`: node -> parts; `errors`: code -> how often;
        `slowest_s`: of any, failed ones included.
        """
        request = pb.QueryRequest(words=words, teams=teams, limit=0)
        served, errors = Counter[str](), Counter[str]()
        found: dict[str, Any] = {"answered": 0, "rows": None, "slowest_s": 0.0}
        ends = time.monotonic() + seconds
        left = count

        async def work(stub: Any) -> None:
            nonlocal left
            while left > 0 or time.monotonic() < ends:
                left -= 1
                begun = time.monotonic()
                try:
                    answer = await client.ask(stub, request, timeout_s)
                except client.QueryError as error:
                    errors[error.code.name] += 1
                    await asyncio.sleep(0.01)
                else:
                    found["answered"] += 1
                    found["rows"] = len(answer.rows)
                    served.update(part.node for part in answer.summary.parts)
                found["slowest_s"] = max(found["slowest_s"], time.monotonic() - begun)

        at = self._cluster.endpoint(self._cluster.leader)
        async with grpc.aio.insecure_channel(at) as channel:
            stub = pb_grpc.GatewayStub(channel)
            await asyncio.gather(*(work(stub) for _ in range(concurrency)))
        return {**found, "served": served, "errors": errors}

    def hold(self, team: str, count: int, host: str) -> int:
        """Take so many leases on the nodes of a team that live on one host."""
        at = list(self._cluster.hosts).index(host)
        router = shmcoord.Router(self._cluster.segments_at(self._host)[at])
        self._routers.append(router)
        self._held += [router.acquire(team) for _ in range(count)]
        return len(self._held)

    def let_go(self) -> int:
        """Release all of them."""
        held, self._held = self._held, []
        for lease in held:
            lease.release()
        for router in self._routers:
            router.close()
        self._routers = []
        return len(held)

    def obey(self, do: str, **options: Any) -> Any:
        """Do one thing."""
        if do == "queries":
            return asyncio.run(self.queries(**options))
        return getattr(self, do)(**options)


def main() -> None:
    """Until nobody asks any more."""
    asker = Asker(sys.argv[1], sys.argv[2])
    for line in sys.stdin:
        sys.stdout.write(json.dumps(asker.obey(**json.loads(line))) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
