"""Which cells are measured, and in which order."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from bench.tail import llm
from bench.tail.cell import Cell
from bench.tail.systems import MAIN, SYSTEMS

IN_FLIGHT = 16
SEEDS = 5
_OVERLOAD = 1.2


@dataclass(frozen=True)
class Part:
    """Cells that are measured together: each seed's in one row, in an order drawn anew.

    Attributes:
        name: for people.
        cells: of one seed.
    """

    name: str
    cells: tuple[Cell, ...]


def _cells(
    systems: Iterable[str],
    seconds: float,
    *,
    shapes: Sequence[str] = ("bimodal",),
    arrivals: Sequence[str] = ("poisson",),
    loads: Sequence[float] = (0.85,),
    routers: Sequence[int] = (6,),
    in_flight: int = 0,
) -> tuple[Cell, ...]:
    return tuple(
        Cell(
            system,
            shape=shape,
            arrivals=arrival,
            load=load,
            routers=count,
            seconds=seconds,
            in_flight=in_flight,
        )
        for shape in shapes
        for arrival in arrivals
        for load in loads
        for count in routers
        for system in systems
    )


def _streams(seconds: float, load: float) -> tuple[Cell, ...]:
    return tuple(
        Cell(system, shape=llm.SHAPE, load=load, seconds=seconds, warmup_s=5.0)
        for system in llm.WAYS
    )


_BEST = ("haproxy", "haproxy-maxconn1", MAIN)
_UNLIMITED = "shmcoord-least-loaded"


def standard(main_s: float = 12.0, other_s: float = 5.0) -> tuple[Part, ...]:
    """The standard matrix, by how long a cell of its main part, and of the others, is measured."""
    return (
        Part("main", _cells(SYSTEMS, main_s, loads=(0.7, 0.85))),
        Part(
            "closed",
            _cells(("round-robin", "nginx", *_BEST, _UNLIMITED), other_s / 2, in_flight=IN_FLIGHT),
        ),
        Part(
            "overload",
            _cells(("round-robin", "nginx", *_BEST, _UNLIMITED), other_s, loads=(_OVERLOAD,)),
        ),
        Part(
            "loads",
            _cells(("round-robin", *_BEST, _UNLIMITED), other_s, loads=(0.5, 0.95)),
        ),
        Part(
            "shapes",
            (
                *_cells(("round-robin", *_BEST), other_s, shapes=("exponential", "deterministic")),
                *_cells(("weighted-round-robin", *_BEST), other_s, shapes=("half-speed",)),
                *_cells(("round-robin", *_BEST), other_s, arrivals=("bursty",), loads=(0.7,)),
            ),
        ),
        Part(
            "routers",
            _cells(("least-known", "haproxy-maxconn1", MAIN), other_s, routers=(1, 2, 12)),
        ),
        Part("llm", _streams(main_s, 0.6)),
    )


def chosen(
    systems: Sequence[str],
    shapes: Sequence[str],
    arrivals: Sequence[str],
    loads: Sequence[float],
    routers: Sequence[int],
    seconds: float,
) -> tuple[Part, ...]:
    """What somebody asked for: everything with everything."""
    cells = _cells(systems, seconds, shapes=shapes, arrivals=arrivals, loads=loads, routers=routers)
    return (Part("chosen", cells),)


def in_order(parts: Iterable[Part], seeds: int) -> Iterator[tuple[str, Cell]]:
    """All cells with their part's name; within a seed the order is drawn, the same every time."""
    for part in parts:
        for seed in range(1, seeds + 1):
            cells = list(part.cells)
            random.Random(f"{part.name} {seed}").shuffle(cells)
            for cell in cells:
                yield part.name, Cell(**{**cell.__dict__, "seed": seed})
