"""What other hosts tell us: their frames become mirrors of their segments on this host."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping

from shmcoord.api import Segment
from shmcoord.bridge.arrivals import Arrivals
from shmcoord.bridge.frame import Frame, FrameError, Part, decode
from shmcoord.errors import ShmcoordError
from shmcoord.mirror import Mirror
from shmcoord.origin import host_id

__all__ = ["Peer", "Receiver"]

_log = logging.getLogger("shmcoord.bridge")

_SAY_AGAIN_S = 60.0
_SLOTS_MAX = 4096
_LOOK_EVERY_NS = 1_000_000_000


class _Kept:
    """One mirror, and the segment that it is in."""

    def __init__(self, name: str, host: int, part: Part, mode: int, suspect_after_s: float) -> None:
        # As many slots again, for the routers of this host.
        self.segment = Segment.open(
            name, slots=min(2 * part.slots, _SLOTS_MAX), leases=part.leases, mode=mode
        )
        try:
            self.mirror = Mirror(self.segment, host, suspect_after_s)
        except BaseException:
            self.segment.close()
            raise

    def close(self) -> None:
        if not self.segment.closed:
            self.mirror.leave()
            self.segment.close()


class Peer:
    """One other host, as it is known here.

    Attributes:
        arrivals: Which of its frames were taken.
        heard_ns: Our CLOCK_MONOTONIC when the last of them came; None: it was never heard.
        wrong: Frames that were refused.
    """

    def __init__(self, segments: Mapping[str, str], lag_most_ns: int) -> None:
        self.segments = segments
        self.arrivals = Arrivals(lag_most_ns)
        self.heard_ns: int | None = None
        self.wrong = 0
        self.mirrors: dict[str, _Kept] = {}


class Receiver:
    """Takes frames and keeps the mirrors of all other hosts.

    Args:
        host: Our name.
        others: For each other host the segments that it may speak of, and the name that the
            mirror of each has here.
        suspect_after_s: News older than this makes the nodes SUSPECT, in seconds.
        remove_after_s: A host unheard so long leaves its mirrors, if another is heard.
        mode: Permission bits of the mirrors.

    Not for several threads at once.
    """

    def __init__(
        self,
        host: str,
        others: Mapping[str, Mapping[str, str]],
        *,
        suspect_after_s: float,
        remove_after_s: float,
        mode: int = 0o600,
    ) -> None:
        self._host = host_id(host)
        self._suspect_after_s = suspect_after_s
        self._suspect_after_ns = int(suspect_after_s * 1e9)
        self._remove_after_ns = int(remove_after_s * 1e9)
        self._mode = mode
        self._said: dict[str, float] = {}
        self._look_at_ns = 0
        self.peers = {
            name: Peer(segments, self._suspect_after_ns) for name, segments in others.items()
        }

    def take(self, host: str, data: bytes, came_ns: int) -> bool:
        """Take one frame.

        Args:
            host: Who sent it, as the engine knows.
            data: The frame.
            came_ns: Our CLOCK_MONOTONIC when it came.

        Returns:
            Whether it was taken.
        """
        peer = self.peers.get(host)
        if peer is None:
            self._say(f"host {host!r} speaks and is not in the configuration")
            return False
        try:
            frame = decode(data)
            if frame.host != host:
                raise FrameError(f"it says that it is of {frame.host!r}")
        except FrameError as error:
            peer.wrong += 1
            self._say(f"a frame of {host} was refused: {error}")
            return False
        lag_ns = peer.arrivals.take(frame, came_ns)
        if lag_ns is None:
            return False
        if peer.heard_ns is None:
            _log.info("host %s is heard", host)
        elif came_ns - peer.heard_ns > self._suspect_after_ns:
            _log.info("host %s is heard again, after %.1f s", host, (came_ns - peer.heard_ns) / 1e9)
        peer.heard_ns = came_ns
        try:
            self._write(host, peer, frame, came_ns - lag_ns)
        except (ShmcoordError, ValueError) as error:
            peer.wrong += 1
            self._say(f"a frame of {host} could not be written: {error}")
            return False
        return True

    def _write(self, host: str, peer: Peer, frame: Frame, of_ns: int) -> None:
        """Write a frame into the mirrors; `of_ns`: the time that it is of, on our clock."""
        parts = {part.segment: part for part in frame.parts}
        for name, part in parts.items():
            if name not in peer.segments:
                self._say(f"host {host} speaks of segment {name}, which is not its own here")
                continue
            if part.members is None:
                continue
            kept = peer.mirrors.get(name) or self._open(host, peer, part)
            if kept is None:
                continue
            for member, error in kept.mirror.set_members(part.incarnation, part.members):
                self._say(f"node {member.node} of {host} cannot be shown: {error}")
        for name, kept in peer.mirrors.items():
            told = parts.get(name)
            if told is None and frame.full:
                kept.mirror.leave()
                continue
            if told is not None and told.incarnation != kept.mirror.incarnation:
                continue  # the full frame that says who is in it has not come yet
            age_ns = max(time.monotonic_ns() - of_ns, 0)
            kept.mirror.apply(b"" if told is None else told.entries, age_ns)

    def _open(self, host: str, peer: Peer, part: Part) -> _Kept | None:
        name = peer.segments[part.segment]
        try:
            kept = _Kept(name, self._host, part, self._mode, self._suspect_after_s)
        except (ShmcoordError, OSError) as error:
            self._say(f"segment {part.segment} of {host} cannot be mirrored: {error}")
            return None
        peer.mirrors[part.segment] = kept
        _log.info("segment %s of host %s is mirrored in %s", part.segment, host, name)
        return kept

    def hint(self, host: str, up: bool) -> None:
        """Take note of what the engine believes of a host; frames alone tell what is so."""
        peer = self.peers.get(host)
        if peer is None or up:
            return
        _log.info("host %s is said to be gone", host)
        for kept in peer.mirrors.values():
            if not kept.segment.closed:
                kept.mirror.suspect()

    def look_after(self, now_ns: int) -> None:
        """Do what time asks for, once a second; call it as often as you like.

        Hosts that are silent for long leave their mirrors, as long as others are heard: if nobody
        is, it is more likely that we hear nothing than that all are gone.
        """
        if now_ns < self._look_at_ns:
            return
        self._look_at_ns = now_ns + _LOOK_EVERY_NS
        heard = [
            peer
            for peer in self.peers.values()
            if peer.heard_ns is not None and now_ns - peer.heard_ns < self._suspect_after_ns
        ]
        for host, peer in self.peers.items():
            for segment, kept in list(peer.mirrors.items()):
                if kept.segment.is_stale():
                    _log.warning("mirror %s was unlinked: it is made anew", kept.segment.name)
                    kept.close()
                    del peer.mirrors[segment]
            silent_ns = 0 if peer.heard_ns is None else now_ns - peer.heard_ns
            if heard and peer not in heard and silent_ns > self._remove_after_ns and peer.mirrors:
                _log.warning("host %s is silent for %.0f s: removed", host, silent_ns / 1e9)
                for kept in peer.mirrors.values():
                    kept.mirror.leave()
                    kept.close()
                peer.mirrors.clear()

    def close(self) -> None:
        """Leave all mirrors."""
        for peer in self.peers.values():
            for kept in peer.mirrors.values():
                kept.close()
            peer.mirrors.clear()

    def _say(self, text: str) -> None:
        """Log a warning, the same one not again before a minute has passed."""
        now = time.monotonic()
        if now - self._said.get(text, -_SAY_AGAIN_S) < _SAY_AGAIN_S:
            return
        if len(self._said) > 1000:
            self._said.clear()
        self._said[text] = now
        _log.warning("%s", text)
