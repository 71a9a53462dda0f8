"""What `explain` prints: the candidates with their reasons, and the decisions of the routers."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from datetime import datetime

from rich.text import Text

from shmcoord.cli.asking import Answer, Missed
from shmcoord.cli.words import age, clean, duration
from shmcoord.decision import Candidate, Decision, PastDecision
from shmcoord.status import Health, State

__all__ = ["flow", "now", "since"]

_STATE_STYLES = {
    State.IDLE: "green",
    State.BUSY: "yellow",
    State.DRAINING: "magenta",
    State.SHUTDOWN: "red",
}
_HEALTH_STYLES = {Health.ALIVE: "green", Health.SUSPECT: "yellow", Health.DEAD: "bold red"}
_LINES = ("├─ ", "└─ ", "→")
_ASCII_LINES = ("|- ", "`- ", "->")


def now(decision: Decision, *, ascii_only: bool = False) -> list[Text]:
    """Who would be taken now, and every candidate with its reason."""
    title = Text("Group: ").append(clean(decision.group), "bold cyan")
    title.append(f"  ({clean(decision.policy)})", "dim")
    chosen = Text("Selected: ")
    if decision.chosen is None:
        chosen.append("nobody", "bold red")
    else:
        chosen.append(clean(decision.chosen.node), "bold")
        chosen.append(f"  {clean(decision.chosen.endpoint)}", "dim")
    lines = [title, chosen]
    if decision.panic:
        lines.append(Text("Too few are healthy: all that are not dead are used.", "bold red"))
    first, last, _ = _ASCII_LINES if ascii_only else _LINES
    ordered = sorted(decision.candidates, key=lambda one: (one.node, one.segment))
    with_segment = len({one.segment for one in ordered}) > 1
    rows = [_cells(one, with_segment) for one in ordered]
    widths = [max(len(cell.plain) for cell in column) for column in zip(*rows, strict=True)]
    for row in rows:
        line = Text().append(last if row is rows[-1] else first, "dim")
        for cell, width in zip(row, widths, strict=True):
            if width:
                line.append_text(cell).append(" " * (width - len(cell.plain) + 2))
        line.rstrip()
        lines.append(line)
    return lines


def _cells(one: Candidate, with_segment: bool) -> list[Text]:
    queue = f"queue {one.queue}/{one.capacity}"
    cells = [
        Text(clean(one.node), "bold"),
        Text(one.state.name, "dim" if one.health is Health.DEAD else _STATE_STYLES[one.state]),
        Text(one.health.name, _HEALTH_STYLES[one.health]),
        Text(queue),
        Text(f"score {one.score:.3g}"),
        Text(duration(one.latency_s) if one.latency_s else ""),
        Text(f"share {one.share:.0%}" if one.share < 1 else "", "dim"),
        Text(clean(one.passed_over)) if one.passed_over else _selected(one),
    ]
    if with_segment:
        cells.insert(1, Text(clean(one.segment), "dim"))
    return cells


def _selected(one: Candidate) -> Text:
    if one.queue < one.capacity:
        return Text("selected", "bold green")
    return Text("selected", "bold yellow").append(", looks full: acquire may have to wait", "dim")


def since(past: Sequence[PastDecision], *, ascii_only: bool = False) -> list[Text]:
    """The decisions, by router, each router's oldest first."""
    lines: list[Text] = []
    first, last, _ = _ASCII_LINES if ascii_only else _LINES
    for router, pid in sorted({(one.router, one.pid) for one in past}):
        ones = [one for one in past if (one.router, one.pid) == (router, pid)]
        if lines:
            lines.append(Text())
        lines.append(Text("Router: ").append(clean(router), "bold").append(f"  (pid {pid})", "dim"))
        width = max(len(age(one.age_s)) for one in ones)
        digits = max(len(str(one.number)) for one in ones)
        for one in ones:
            line = Text().append(last if one is ones[-1] else first, "dim")
            line.append(f"{one.number:>{digits}}  {age(one.age_s):>{width}}  ", "dim")
            lines.append(line.append_text(_what(one, ascii_only)))
    return lines


def flow(answer: Answer, *, ascii_only: bool = False) -> Iterable[Text]:
    """One line for each new decision, with its time, and one for each router that was too fast."""
    read_at = time.time()
    width = max((len(clean(one.router)) for one in answer.past), default=0)
    for one in answer.past:
        at = datetime.fromtimestamp(read_at - one.age_s).astimezone()
        line = Text(f"{at:%H:%M:%S}.{at.microsecond // 1000:03}  ", "dim")
        line.append(f"{clean(one.router):<{width}}  ", "bold")
        line.append(f"{one.number:>5}  ", "dim")
        yield line.append_text(_what(one, ascii_only))
    for gone in answer.missed:
        yield _gone(gone)


def _gone(gone: Missed) -> Text:
    what = "decision" if gone.count == 1 else "decisions"
    return Text(
        f"{clean(gone.router)}: {gone.count} {what} missed, made faster than they were read",
        "yellow",
    )


def _what(one: PastDecision, ascii_only: bool) -> Text:
    arrow = (_ASCII_LINES if ascii_only else _LINES)[2]
    text = Text(f"{arrow} ")
    if one.node:
        text.append(clean(one.node), "bold").append(f", queue {one.queue}")
    else:
        text.append(one.outcome.upper(), "bold red")
    text.append(f", of {one.candidates}", "dim")
    if one.waited_s:
        text.append(f", after {duration(one.waited_s)}")
    return text
