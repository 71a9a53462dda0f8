"""What this host tells the others: frames of its segments."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import secrets
import time
from collections.abc import Iterable

from shmcoord.api import Segment
from shmcoord.bridge.endpoints import is_loopback_address
from shmcoord.bridge.frame import Frame, Part, encode
from shmcoord.errors import SegmentNotFound, ShmcoordError
from shmcoord.origin import Member, Origin

__all__ = ["Sender", "clock_id"]

_log = logging.getLogger("shmcoord.bridge")


def clock_id() -> int:
    """Return a number that identifies this process's CLOCK_MONOTONIC: of its boot and namespace."""
    with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
        text = file.read().strip()
    with contextlib.suppress(OSError):  # before Linux 5.6 there is only one
        text += f" {os.stat('/proc/self/ns/time').st_ino}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")


class Sender:
    """Reads the segments of this host and makes frames of them.

    A segment that does not exist yet, or is made anew, is looked for with each full frame.

    Args:
        host: Our name.
        segments: Their names.
        warns_of_local: Whether to warn of endpoints that other hosts cannot reach.
    """

    def __init__(self, host: str, segments: Iterable[str], *, warns_of_local: bool = True) -> None:
        self._host = host
        self._origins: dict[str, tuple[Segment, Origin] | None] = dict.fromkeys(segments)
        self._session = secrets.randbits(64)
        self._clock = clock_id()
        self._sequence = 0
        self._mark: tuple[int, ...] | None = None
        self._warns_of_local = warns_of_local
        self._told: set[tuple[str, str]] = set()  # what was warned of

    def moved(self) -> bool:
        """Tell whether the others should hear at once: who is there, or takes work, has changed."""
        return self._marks() != self._mark

    def _marks(self) -> tuple[int, ...]:
        return tuple(found[1].mark() for found in self._origins.values() if found is not None)

    def frame(self, *, full: bool) -> bytes:
        """Return the next frame; `full`: with all that there is to say."""
        if full:
            self._look_for_segments()
            # Before the members are read: one who comes meanwhile is told of again.
            self._mark = self._marks()
        sent_ns = time.monotonic_ns()
        parts = []
        for name, found in self._origins.items():
            if found is None:
                continue
            segment, origin = found
            members = self._members(name, origin) if full else None
            entries = origin.entries(full)
            if full or entries:
                parts.append(
                    Part(name, origin.incarnation, segment.slots, segment.leases, members, entries)
                )
        self._sequence += 1
        return encode(
            Frame(self._host, self._session, self._clock, self._sequence, sent_ns, full, parts)
        )

    def _members(self, name: str, origin: Origin) -> list[Member]:
        members = origin.members()
        if self._warns_of_local:
            for member in members:
                if _is_local(member.endpoint) and (name, member.endpoint) not in self._told:
                    self._told.add((name, member.endpoint))
                    _log.warning(
                        "%s: node %s has the endpoint %s, which other hosts cannot reach; join it "
                        "with an address of this host",
                        *(name, member.node, member.endpoint),
                    )
        return members

    def _look_for_segments(self) -> None:
        for name, found in self._origins.items():
            if found is not None:
                if not found[0].is_stale():
                    continue
                found[0].close()
                self._origins[name] = None
                _log.info("segment %s is gone, or made anew", name)
            try:
                segment = Segment.attach(name)
            except SegmentNotFound:
                continue
            except ShmcoordError as error:
                if (name, str(error)) not in self._told:
                    self._told.add((name, str(error)))
                    _log.error("segment %s cannot be told of: %s", name, error)
                continue
            self._origins[name] = (segment, Origin(segment))
            _log.info("segment %s is told of", name)

    def close(self) -> None:
        """Let go of the segments."""
        for found in self._origins.values():
            if found is not None:
                found[0].close()
        self._origins = {}


def _is_local(endpoint: str) -> bool:
    """Whether an endpoint can be reached from its own host alone."""
    return endpoint.startswith("unix:") or is_loopback_address(endpoint.rpartition(":")[0])
