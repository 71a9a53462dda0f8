"""Every execution graph of a few straight threads under RC11, seq_cst included.

The axioms are those of "Repairing Sequential Consistency in C/C++11" (Lahav, Vafeiadis, Kang, Hur,
Dreyer 2017): coherence, atomicity, the partial seq_cst order, no load buffering. Release sequences
are continued by read-modify-writes alone, as in C++20. All graphs are made and those that break an
axiom are dropped, so this is for programs of about eight events, without branches.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

Outcome = tuple[int, ...]


@dataclass(frozen=True)
class R:
    """A load; its value is part of the outcome."""

    place: str
    order: str = "relaxed"


@dataclass(frozen=True)
class W:
    """A store."""

    place: str
    value: int
    order: str = "relaxed"


@dataclass(frozen=True)
class U:
    """A compare-and-swap, relaxed where it fails; the value read is part of the outcome."""

    place: str
    expected: int
    desired: int
    order: str = "acq_rel"


@dataclass(frozen=True)
class F:
    """A fence."""

    order: str


Action = R | W | U | F
ACQUIRES = {"acquire", "acq_rel", "seq_cst"}
RELEASES = {"release", "acq_rel", "seq_cst"}


class Relation:
    """A binary relation over numbered events, as one bit row per event."""

    def __init__(self, size: int, pairs: Iterator[tuple[int, int]] | None = None) -> None:
        self.rows = [0] * size
        for a, b in pairs or ():
            self.rows[a] |= 1 << b

    def __or__(self, other: Relation) -> Relation:
        new = Relation(0)
        new.rows = [a | b for a, b in zip(self.rows, other.rows, strict=True)]
        return new

    def __matmul__(self, other: Relation) -> Relation:
        """Composition: first self, then other."""
        new = Relation(len(self.rows))
        for a, row in enumerate(self.rows):
            out = 0
            while row:
                low = row & -row
                out |= other.rows[low.bit_length() - 1]
                row ^= low
            new.rows[a] = out
        return new

    def maybe(self) -> Relation:
        """Reflexive closure."""
        new = Relation(0)
        new.rows = [row | 1 << a for a, row in enumerate(self.rows)]
        return new

    def plus(self) -> Relation:
        """Transitive closure."""
        new = Relation(0)
        new.rows = list(self.rows)
        for via in range(len(new.rows)):
            for a in range(len(new.rows)):
                if new.rows[a] >> via & 1:
                    new.rows[a] |= new.rows[via]
        return new

    def within(self, before: int, after: int) -> Relation:
        """Only the pairs from one set (as bits) to another."""
        new = Relation(0)
        new.rows = [row & after if before >> a & 1 else 0 for a, row in enumerate(self.rows)]
        return new

    def inverse(self) -> Relation:
        new = Relation(len(self.rows))
        for a, row in enumerate(self.rows):
            for b in range(len(self.rows)):
                if row >> b & 1:
                    new.rows[b] |= 1 << a
        return new

    def has_loop(self) -> bool:
        """Whether an event is related to itself."""
        return any(row >> a & 1 for a, row in enumerate(self.rows))


@dataclass(frozen=True)
class _Event:
    thread: int  # -1: the initial stores
    action: Action


def outcomes(*threads: list[Action]) -> tuple[set[Outcome], int]:
    """What the loads and CASes may read (in program order, thread by thread), and of how many
    consistent graphs. All places begin at 0."""
    places = sorted({a.place for thread in threads for a in thread if not isinstance(a, F)})
    events = [_Event(-1, W(place, 0)) for place in places]
    events += [_Event(t, a) for t, thread in enumerate(threads) for a in thread]
    size = len(events)
    reads = [i for i, e in enumerate(events) if isinstance(e.action, (R, U))]
    found: set[Outcome] = set()
    graphs = 0
    choices = [
        [
            j
            for j, e in enumerate(events)
            if j != i and isinstance(e.action, (W, U)) and e.action.place == events[i].action.place  # type: ignore[union-attr]
        ]
        for i in reads
    ]
    for sources in itertools.product(*choices):
        source = dict(zip(reads, sources, strict=True))
        values = _values(events, source)
        if values is None:
            continue
        writes: list[list[int]] = []
        for n, place in enumerate(places):
            stores = [
                i
                for i, e in enumerate(events)
                if i != n
                and (isinstance(e.action, W) or (isinstance(e.action, U) and _won(e, values[i])))
                and e.action.place == place
            ]
            writes.append(stores)
        stored = {i for stores in writes for i in stores} | set(range(len(places)))
        if any(j not in stored for j in sources):
            continue
        for order in itertools.product(*(itertools.permutations(stores) for stores in writes)):
            chains = [(n, *stores) for n, stores in enumerate(order)]
            if _consistent(events, source, values, chains, stored, size):
                graphs += 1
                found.add(tuple(values[i] for i in reads))
    return found, graphs


def _identity(events: int, size: int) -> Relation:
    return Relation(size, ((i, i) for i in range(size) if events >> i & 1))


def _won(event: _Event, value: int) -> bool:
    return isinstance(event.action, U) and event.action.expected == value


def _values(events: list[_Event], source: dict[int, int]) -> dict[int, int] | None:
    """What each event reads; a store's own value needs no reading here."""
    values = {}
    for i, j in source.items():
        action = events[j].action
        assert isinstance(action, (W, U))
        values[i] = action.value if isinstance(action, W) else action.desired
    return values


def _consistent(
    events: list[_Event],
    source: dict[int, int],
    values: dict[int, int],
    chains: list[tuple[int, ...]],
    stored: set[int],
    size: int,
) -> bool:
    pairs = itertools.combinations(range(size), 2)
    sb = Relation(
        size,
        (
            (a, b)
            for a, b in pairs
            if events[b].thread >= 0 and events[a].thread in (-1, events[b].thread)
        ),
    )
    rf = Relation(size, ((j, i) for i, j in source.items()))
    mo = Relation(size, (pair for chain in chains for pair in itertools.combinations(chain, 2)))
    rmws = {i for i in source if i in stored}
    place_of = [getattr(e.action, "place", None) for e in events]
    order_of = [
        "relaxed" if isinstance(e.action, U) and i not in stored else getattr(e.action, "order")  # noqa: B009
        for i, e in enumerate(events)
    ]

    # fr: from a load to the stores behind the one that it reads
    fr = rf.inverse() @ mo
    # atomicity: a read-modify-write comes behind what it reads, and nothing in between
    for i in rmws:
        if not fr.rows[i] >> i & 1 or (fr @ mo).rows[i] >> i & 1:
            return False
        fr.rows[i] &= ~(1 << i)

    def bits(test: object) -> int:
        return sum(1 << i for i in range(size) if test(i))  # type: ignore[operator]

    all_ = (1 << size) - 1
    fence = bits(lambda i: isinstance(events[i].action, F))
    writes = bits(lambda i: i in stored)
    loads = bits(lambda i: i in source)
    release = bits(lambda i: order_of[i] in RELEASES)
    acquire = bits(lambda i: order_of[i] in ACQUIRES)
    sc = bits(lambda i: order_of[i] == "seq_cst")
    rmw_bits = bits(lambda i: i in rmws)

    # synchronises-with
    sequence = rf.within(all_, rmw_bits).plus().maybe().within(writes, writes)
    start = _identity(release & writes, size)
    start |= sb.within(fence & release, writes)
    end = _identity(acquire & loads, size)
    end |= sb.within(loads, fence & acquire)
    sw = start @ sequence @ rf @ end
    hb = (sb | sw).plus()
    if hb.has_loop():
        return False
    eco = (rf | mo | fr).plus()
    if (hb @ eco).has_loop() or eco.has_loop():
        return False
    if (sb | rf).plus().has_loop():
        return False

    # the partial seq_cst order
    same = Relation(
        size,
        (
            (a, b)
            for a in range(size)
            for b in range(size)
            if place_of[a] is not None and place_of[a] == place_of[b]
        ),
    )
    sb_other, hb_same = Relation(size), Relation(size)
    sb_other.rows = [a & ~b for a, b in zip(sb.rows, same.rows, strict=True)]
    hb_same.rows = [a & b for a, b in zip(hb.rows, same.rows, strict=True)]
    scb = sb | (sb_other @ hb @ sb_other) | hb_same | mo | fr
    sc_event = _identity(sc, size)
    hb_maybe = hb.maybe()
    head = sc_event | hb_maybe.within(sc & fence, all_)
    tail = sc_event | hb_maybe.within(all_, sc & fence)
    psc = (head @ scb @ tail) | (hb | (hb @ eco @ hb)).within(sc & fence, sc & fence)
    return not psc.plus().has_loop()
