"""The figures of docs/hosts.md."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from typing import Any

from bench.children import ROOT

PAGE = ROOT / "docs" / "hosts.md"
_BEGIN, _END = "<!-- figures: made by python -m bench.bridge report -->", "<!-- end -->"


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms"


def _span(values: list[float]) -> str:
    return f"{_ms(statistics.median(values))} ({_ms(max(values))})"


def _rows(results: dict[str, Any]) -> Iterator[tuple[str, list[str]]]:
    worlds = results["worlds"]
    for p in ("p50", "p99", "p99.9"):
        yield f"age of what is seen of a remote node, {p}", [_ms(w["age_s"][p]) for w in worlds]
    cost = [world["cost"] for world in worlds]
    yield "CPU of the bridge, of one core", [f"{c['cpu_percent']:.1f} %" for c in cost]
    yield "frames taken per second", [f"{c['frames_in_per_s']:.0f}" for c in cost]
    yield "one frame", [f"{c['frame_bytes'] / 1e3:.1f} kB" for c in cost]
    yield "sent to all others, per second", [f"{c['bytes_out_per_s'] / 1e3:.0f} kB" for c in cost]
    yield "memory", [f"{c['memory_bytes'] / 1e6:.0f} MB" for c in cost]
    yield "threads", [f"{c['threads']:.0f}" for c in cost]
    for what, text in (
        ("killed", "other bridge killed (SIGKILL): its nodes are out after"),
        ("frozen", "other bridge frozen (SIGSTOP): out after"),
        ("cut", "link cut without a word: out after"),
        ("killed_back", "killed bridge started again: back, once it listens, after"),
        ("frozen_back", "thawed: back after"),
        ("cut_back", "link mended: back after"),
    ):
        yield text, [_span(world["losses"][what]) for world in worlds]
    for what, text in (("pick", "pick"), ("take", "acquire and release")):
        yield (
            f"{text} in the mirror, against the segment itself",
            [f"{world['routing'][what + '_ratio']:.2f} ×" for world in worlds],
        )


def table(results: dict[str, Any]) -> str:
    """Return the table as Markdown."""
    worlds = results["worlds"]
    head = ["", *(f"{world['hosts']} hosts" for world in worlds)]
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    lines += [f"| {text} | {' | '.join(cells)} |" for text, cells in _rows(results)]
    return "\n".join(lines)


def fill(results: dict[str, Any]) -> None:
    """Put the table between its marks."""
    text = PAGE.read_text(encoding="utf-8")
    before, _, rest = text.partition(_BEGIN)
    _, _, after = rest.partition(_END)
    machine = results["machine"]
    told = (
        f"{results['nodes']} nodes per host, a tick of {_ms(results['tick_s'])}, suspect after "
        f"{_ms(results['suspect_after_s'])}; {machine['cpu']}, {machine['cores']} cores for all "
        "hosts together. Times are medians, in brackets the worst."
    )
    PAGE.write_text(
        f"{before}{_BEGIN}\n\n{told}\n\n{table(results)}\n\n{_END}{after}", encoding="utf-8"
    )
