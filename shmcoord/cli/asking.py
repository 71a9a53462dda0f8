"""What `explain` shows: what a router would do now, and what the routers did last."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType

import shmcoord
from shmcoord.cli.reading import SegmentError
from shmcoord.decision import Decision, PastDecision
from shmcoord.errors import ShmcoordError
from shmcoord.segment import segments

__all__ = ["RING", "Answer", "Asker", "Missed"]

#: Decisions of one router that the segment holds.
RING = 16


@dataclass(frozen=True)
class Missed:
    """Decisions of one router that were overwritten before anybody read them, of any group."""

    router: str
    pid: int
    count: int


@dataclass(frozen=True)
class Answer:
    """One reading.

    Attributes:
        decision: what a router that begins now would do; None if no segment could be read.
        past: decisions for the group that no reading before this one had, oldest first.
        missed: what came and went since the reading before.
        errors: segments that could not be read.
    """

    decision: Decision | None
    past: tuple[PastDecision, ...]
    missed: tuple[Missed, ...]
    errors: tuple[SegmentError, ...]


class _Ring:
    """Which decisions of one router were read already.

    A reading may find an entry in the middle just being written: it is there the next time, unless
    it has fallen out of the ring by then. Only what has is missed.
    """

    def __init__(self, newest: int) -> None:
        self._until = max(newest - RING, 0)  # up to here everything is accounted for
        self._read: set[int] = set()

    def is_of(self, newest: int) -> bool:
        """Whether a reading with this newest number goes on from here: numbers never go back."""
        return newest > self._until

    def note(self, numbers: Sequence[int]) -> tuple[set[int], int]:
        """Take in a reading; those that are new, and how many are gone unread."""
        new = {number for number in numbers if number > self._until} - self._read
        self._read |= new
        until = max(self._until, max(self._read, default=0) - RING)
        gone = {number for number in self._read if number <= until}
        missed = until - self._until - len(gone)
        self._until = until
        self._read -= gone
        return new, missed


class Asker:
    """A router that never acquires, and the segments' decisions.

    Args:
        group: what is asked for.
        names: segments; none: all that this user can read.
        policy: by which the router decides.
        key: for the policy `affinity`.

    Raises:
        ValueError: a name is no segment name, or the policy is none.
    """

    def __init__(
        self, group: str, names: Sequence[str], *, policy: str, key: str | None = None
    ) -> None:
        self._group = group
        self._key = key
        self._segments: list[shmcoord.Segment] = []
        self._rings: dict[tuple[str, str, int], _Ring] = {}
        self._router: shmcoord.Router | None = None
        self.errors: list[SegmentError] = []
        for name in dict.fromkeys(names or segments()):
            try:
                shmcoord.Segment.attach(name).close()  # opening would create one that is missing
                self._segments.append(shmcoord.Segment.open(name))
            except ShmcoordError as error:
                if names:  # what is listed may have gone meanwhile, or be somebody else's
                    self.errors.append(SegmentError(name, error))
        if self._segments:
            self._router = shmcoord.Router(*self._segments, policy=policy)

    @property
    def names(self) -> list[str]:
        """The segments that are asked."""
        return [segment.name for segment in self._segments]

    def read(self) -> Answer:
        """Ask once."""
        errors = list(self.errors)
        past: list[PastDecision] = []
        missed: list[Missed] = []
        for segment in self._segments:
            try:
                self._read(segment, past, missed)
            except ShmcoordError as error:
                errors.append(SegmentError(segment.name, error))
        past.sort(key=lambda one: -one.age_s)
        decision = None
        if self._router is not None:
            decision = self._router.explain(self._group, key=self._key)
        return Answer(decision, tuple(past), tuple(missed), tuple(errors))

    def _read(
        self, segment: shmcoord.Segment, past: list[PastDecision], missed: list[Missed]
    ) -> None:
        # Of all groups: numbers count them together. A group that has no node any more has no name
        # there, hence the second reading, which is the earlier one so that the first has it all.
        ours = {(one.router, one.number) for one in segment.decisions(self._group)}
        by_router: dict[tuple[str, str, int], list[PastDecision]] = {}
        for one in segment.decisions():
            by_router.setdefault((segment.name, one.router, one.pid), []).append(one)
        for at in [at for at in self._rings if at[0] == segment.name and at not in by_router]:
            del self._rings[at]  # it has left
        for at, ones in by_router.items():
            newest = max(one.number for one in ones)
            ring = self._rings.get(at)
            if ring is None or not ring.is_of(newest):
                ring = self._rings[at] = _Ring(newest)
            new, lost = ring.note([one.number for one in ones])
            past += [
                one
                for one in ones
                if one.number in new
                and (one.group == self._group or (one.router, one.number) in ours)
            ]
            if lost:
                missed.append(Missed(at[1], at[2], lost))

    def close(self) -> None:
        """Let go of everything."""
        if self._router is not None:
            self._router.close()
        for segment in self._segments:
            segment.close()

    def __enter__(self) -> Asker:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
