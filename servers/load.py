"""What a node knows of its own load, counted by itself and not read from shared memory."""

import contextlib
import time
from collections.abc import Iterator

import psutil

# Weight of the newest request in the smoothed latency.
_NEWEST = 1 / 8


class OwnLoad:
    """Counters of one node. Used from its event loop only."""

    def __init__(self) -> None:
        self._process = psutil.Process()
        self._process.cpu_percent()  # the first call only starts the measurement
        self._begun = time.monotonic()
        self.inflight = 0
        self.served = 0
        self.failed = 0
        self.latency_s = 0.0

    @contextlib.contextmanager
    def request(self) -> Iterator[None]:
        """Counts one request; an exception that leaves it makes it a failed one."""
        begun = time.monotonic()
        self.inflight += 1
        try:
            yield
        except BaseException:
            self.failed += 1
            raise
        else:
            self.served += 1
        finally:
            self.inflight -= 1
            took_s = time.monotonic() - begun
            first = self.served + self.failed == 1
            self.latency_s += (took_s - self.latency_s) * (1.0 if first else _NEWEST)

    @property
    def uptime_s(self) -> float:
        """Seconds since the node began."""
        return time.monotonic() - self._begun

    @property
    def memory_bytes(self) -> int:
        """Resident memory of this process."""
        return int(self._process.memory_info().rss)

    def cpu_percent(self) -> float:
        """Share of one core used since the last call."""
        return float(self._process.cpu_percent())
