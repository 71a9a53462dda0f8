"""Which frames of one host are taken, and how old is what they say.

Clocks of two hosts have nothing to do with each other, so an age cannot be read off. But the
difference between the time at which a frame came (our clock) and the time at which it was sent
(theirs) is the offset of the clocks plus the time on the way; the least of it seen lately belongs
to the fastest frame, and what another frame has above that is how much longer it was on its way.
The same idea as the clock filter of NTP (RFC 5905, section 10): the sample with the least delay is
the one to believe.
"""

from __future__ import annotations

from collections import deque

from shmcoord.bridge.frame import Frame

__all__ = ["Arrivals"]

# Two clocks of quartz drift apart by up to 1e-4: 3 ms in this time.
_WINDOW_NS = 30_000_000_000
_SESSIONS_KEPT = 64


class Arrivals:
    """The frames of one host, in the order in which they come.

    Args:
        lag_most_ns: A frame that was so much longer on its way than the fastest is old news.
    """

    def __init__(self, lag_most_ns: int) -> None:
        self._lag_most_ns = lag_most_ns
        self._session: int | None = None
        self._over: deque[int] = deque(maxlen=_SESSIONS_KEPT)
        self._sequence = 0
        self._clock: int | None = None
        self._offset_ns = 0  # the least of this window
        self._offset_before_ns: int | None = None  # of the window before
        self._window_ends_ns = 0
        self.taken = 0
        self.dropped = {"repeated": 0, "overtaken": 0, "of a former run": 0, "late": 0}

    def take(self, frame: Frame, now_ns: int) -> int | None:
        """Tell how much longer than the fastest frame this one was on its way, in nanoseconds.

        Args:
            frame: What came.
            now_ns: Our CLOCK_MONOTONIC when it came.

        Returns:
            None if it is to be dropped: it repeats a frame, was overtaken by a later one, comes
            from a run of the bridge that was followed by another, or was too long on its way.
        """
        if frame.session != self._session:
            if frame.session in self._over:
                self.dropped["of a former run"] += 1
                return None
            if self._session is not None:
                self._over.append(self._session)
            self._session = frame.session
            self._sequence = 0
        if frame.sequence <= self._sequence:
            self.dropped["repeated" if frame.sequence == self._sequence else "overtaken"] += 1
            return None
        self._sequence = frame.sequence
        lag_ns = self._lag_ns(frame, now_ns)
        if lag_ns > self._lag_most_ns:
            self.dropped["late"] += 1
            return None
        self.taken += 1
        return lag_ns

    def _lag_ns(self, frame: Frame, now_ns: int) -> int:
        offset_ns = now_ns - frame.sent_ns
        if frame.clock != self._clock:
            self._clock = frame.clock
            self._offset_ns = offset_ns
            self._offset_before_ns = None
            self._window_ends_ns = now_ns + _WINDOW_NS
        elif now_ns >= self._window_ends_ns:
            heard_lately = now_ns < self._window_ends_ns + _WINDOW_NS
            self._offset_before_ns = self._offset_ns if heard_lately else None
            self._offset_ns = offset_ns
            self._window_ends_ns = now_ns + _WINDOW_NS
        else:
            self._offset_ns = min(self._offset_ns, offset_ns)
        best_ns = self._offset_ns
        if self._offset_before_ns is not None:
            best_ns = min(best_ns, self._offset_before_ns)
        return offset_ns - best_ns
