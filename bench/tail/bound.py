"""What is possible at all: one first-come queue in front of all nodes, computed exactly.

No message takes any time here, and no node is ever idle while somebody waits. A balancer that
does not know how long a request will take, and does not change their order, cannot do better in
the mean where the nodes are alike.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def one_queue(
    arrival_s: NDArray[np.float64],
    work_s: NDArray[np.float64],
    speeds: Sequence[float],
    gap_s: float = 0.0,
) -> NDArray[np.float64]:
    """Latency of each request in seconds, in the order given.

    A request that finds several nodes idle goes to the fastest of them.

    Args:
        arrival_s: rising.
        work_s: how long a node of speed 1 works on each.
        speeds: one number per node.
        gap_s: for comparison, how long a node is busy beyond the work of each request.
    """
    busy: list[tuple[float, int]] = []  # when a node becomes free, its number
    idle = [(-speed, number) for number, speed in enumerate(speeds)]
    heapq.heapify(idle)
    latency = np.empty(len(arrival_s))
    for i, (arrival, work) in enumerate(zip(arrival_s.tolist(), work_s.tolist(), strict=True)):
        while busy and busy[0][0] <= arrival:
            number = heapq.heappop(busy)[1]
            heapq.heappush(idle, (-speeds[number], number))
        start = arrival
        if idle:
            number = heapq.heappop(idle)[1]
        else:
            start, number = heapq.heappop(busy)
        end = start + work / speeds[number]
        heapq.heappush(busy, (end + gap_s, number))
        latency[i] = end - arrival
    return latency
