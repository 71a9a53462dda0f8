"""The tree that `inspect` prints: segments, their processes, and what each says of itself."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence

from rich.text import Text

from shmcoord.cli.reading import SegmentError, SegmentView, alive
from shmcoord.cli.words import age, clean, duration, size
from shmcoord.status import Health, State, Status

__all__ = ["compact", "tree"]

_STATE_STYLES = {
    State.IDLE: "green",
    State.BUSY: "yellow",
    State.DRAINING: "magenta",
    State.SHUTDOWN: "red",
}
_HEALTH_STYLES = {Health.ALIVE: "green", Health.SUSPECT: "yellow", Health.DEAD: "bold red"}

# What leads a process, its fields, and both for the last process of a segment.
_LINES = ("├─ ", "│  ", "└─ ", "   ")
_ASCII_LINES = ("|- ", "|  ", "`- ", "   ")


def tree(views: Sequence[SegmentView | SegmentError], *, ascii_only: bool = False) -> list[Text]:
    """Return the whole tree, one `Text` per line, without line ends."""
    lines: list[Text] = []
    first, below, last, after = _ASCII_LINES if ascii_only else _LINES
    for view in views:
        if lines:
            lines.append(Text())
        lines += _head(view)
        if isinstance(view, SegmentError):
            continue
        for status in view.nodes:
            final = status is view.nodes[-1]
            lines.append(Text(below.rstrip(), "dim") if status is not view.nodes[0] else Text())
            process = Text().append(last if final else first, "dim")
            lines.append(process.append(f"Process: {clean(status.node)}", "bold"))
            for name, value in _fields(status):
                line = Text().append(after if final else below, "dim")
                lines.append(line.append(f"{name}: ").append_text(value))
    return lines


def compact(views: Sequence[SegmentView | SegmentError], *, ascii_only: bool = False) -> list[Text]:
    """Return one line per process, for windows that the tree does not fit into."""
    lines: list[Text] = []
    first, _, last, _ = _ASCII_LINES if ascii_only else _LINES
    for view in views:
        if lines:
            lines.append(Text())
        lines += _head(view)
        if isinstance(view, SegmentError):
            continue
        width = max((len(clean(status.node)) for status in view.nodes), default=0)
        for status in view.nodes:
            line = Text().append(last if status is view.nodes[-1] else first, "dim")
            line.append(f"{clean(status.node):<{width}}  ", "bold")
            line.append(f"{status.state.name:<8}  ", _state_style(status))
            line.append(f"{status.health.name:<7}  ", _HEALTH_STYLES[status.health])
            line.append(
                f"queue {status.queue:>4}  {size(status.memory_bytes):>7}  "
                f"{status.served:>8} done  {age(status.heartbeat_age_s)}"
            )
            lines.append(line)
    return lines


def _head(view: SegmentView | SegmentError) -> Iterable[Text]:
    title = Text("Segment: ").append(clean(view.name), "bold cyan")
    if isinstance(view, SegmentError):
        yield title
        yield Text(f"{type(view.error).__name__}: {clean(str(view.error))}", "red")
        return
    made = age(max(0.0, time.time() - view.created_at))
    what = "mirror of another host's, " if view.is_mirror else ""
    yield title.append(f"  ({what}{size(view.size_bytes)}, created {made})", "dim")
    count = Text(f"Process count: {len(view.nodes)}/{view.slots}")
    dead = len(view.nodes) - len(alive(view))
    if dead:
        count.append(f" ({dead} dead)", "bold red")
    yield count


def _fields(status: Status) -> Iterable[tuple[str, Text]]:
    yield "State", Text(status.state.name, _state_style(status))
    yield "Health", Text(status.health.name, _HEALTH_STYLES[status.health])
    yield "Group", Text(clean(status.group))
    yield "Endpoint", Text(clean(status.endpoint))
    queue = Text(str(status.queue))
    parts = f" ({status.waiting} waiting + {status.inflight} in flight, capacity {status.capacity})"
    yield "Queue size", queue.append(parts, "dim")
    yield "Memory", Text(size(status.memory_bytes))
    processed = Text(str(status.served))
    if status.failed:
        processed.append(f" ({status.failed} failed)", "red")
    yield "Requests processed", processed
    if status.served:
        yield "Latency", Text(duration(status.latency_s))
    for name, value in status.gauges.items():
        yield f"Gauge {clean(name)}", Text(f"{value:g}")
    yield "Last update", Text(age(status.heartbeat_age_s))


def _state_style(status: Status) -> str:
    return "dim" if status.health is Health.DEAD else _STATE_STYLES[status.state]
