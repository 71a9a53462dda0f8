"""The table of docs/reliability.md, made of the figures that a run of the harness has written.

    python tests/faults/fault_table.py docs/faults.jsonl docs/reliability.md

`make faults` does that at its end. Each line of the first file is JSON: a machine with which a run
began, a row (`row`, `words`, `counts`, `control`, `test`), a test that failed, or how long a test
took in seconds. Where a row was written more than once, the last one counts. What stands between
the two markers of the second file is replaced; without a second file the table is printed.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

BEGIN, END = "<!-- faults: begin -->", "<!-- faults: end -->"
Row = dict[str, Any]

#: Rows of the table: what they are called there, and how the names of their rows begin. A row that
#: belongs nowhere stands at the end under its own name.
TITLES: list[tuple[str, tuple[str, ...]]] = [
    ("torn reads: writer idle, in bursts, flat out; two reader processes", ("torn reads",)),
    ("SIGKILL inside a record write", ("SIGKILL inside a record write", "SIGKILL at step write")),
    (
        "SIGKILL behind each step of claim, reserve, adopt, free, sweep, reap, leave",
        ("SIGKILL at each step of", "SIGKILL at steps"),
    ),
    ("SIGKILL behind each step of creation", ("SIGKILL at step create", "a creator killed")),
    ("a releaser dies before it wakes the waiter", ("waiting while a releaser",)),
    ("first come, first served among processes", ("order of 5", "6 processes at one")),
    (
        "routers that die while they wait or are told",
        ("killed while it waits", "killed at ", "releaser killed"),
    ),
    ("a router that is stopped while it waits", ("stopped while it waits",)),
    ("callers that cancel while they wait", ("cancelled while told", "storm of cancellations")),
    ("nonsense in the wake word of a router that waits", ("nonsense in the wake word",)),
    ("nonsense in the retry budget", ("nonsense in the retry budget",)),
    ("SIGKILL of routers and nodes at random under load", ("SIGKILL of routers",)),
    ("64 processes create the same segment at once", ("64 processes",)),
    ("SIGSTOP past the time-outs, SIGCONT", ("SIGSTOP and SIGCONT", "SIGSTOP, control")),
    ("SIGSTOP inside a write", ("SIGSTOP at step", "SIGSTOP inside a write")),
    ("fork with live handles", ("fork with live handles",)),
    ("the parent killed, the child uses its copies", ("parent killed",)),
    ("exec", ("exec of",)),
    ("multiprocessing, spawn and forkserver", ("multiprocessing",)),
    ("8 threads on one node and one router", ("8 threads",)),
    ("the load word, 8 threads without the GIL", ("load word under 8 threads",)),
    ("a signal handler publishes inside a publish", ("signal handler inside a publish",)),
    ("a signal handler joins inside a join", ("signal handler that joins",)),
    ("PID and time namespaces (+100,000 s)", ("namespaces", "time namespace")),
    ("the same pid and thread id again", ("pid reuse",)),
    ("wall clock set back and forth", ("wall clock",)),
    ("host reboot (old boot id)", ("host reboot",)),
    ("unlinked and made anew while attached", ("unlinked and made anew",)),
    ("truncation by somebody who may write", ("truncation",)),
    ("holes punched", ("holes punched", "a hole over")),
    ("full memory file system", ("full tmpfs",)),
    (
        "header fields × {0, ±1, max, random}",
        ("header ", "random headers", "ready word", "in the making"),
    ),
    ("layouts before and after, other byte order, 32-bit", ("layout:", "32-bit build")),
    ("random bytes in every table while in use", ("random bytes",)),
    ("coverage-guided fuzzing", ("coverage-guided", "fuzzing, control")),
    ("symlink, FIFO, directory, foreign uid, 0666, bad names", ("no file of ours", "FIFO")),
    ("slots run out", ("slots exhausted",)),
    ("leases run out", ("leases exhausted",)),
    ("descriptors run out", ("descriptors exhausted",)),
    ("threads run out", ("threads exhausted", "limits, control")),
    (
        "forged, doubled, stale tokens",
        ("forged, doubled", "tokens of earlier owners", "stale tokens"),
    ),
    ("cluster: kill -9 of nodes under load", ("kill -9 of nodes", "cluster, control: a lease")),
    ("cluster: requests of a dead node", ("requests of a dead node",)),
    ("cluster: kill -9 of the gateway under load", ("kill -9 of the gateway",)),
    ("cluster: SIGSTOP of a node under load", ("SIGSTOP of a node under load",)),
    ("cluster: rolling restart under load", ("rolling restart",)),
    ("cluster: servers that end under clients", ("a gateway that ends", "a server that ends")),
    ("cluster: cancelled requests", ("cancelled requests",)),
    ("cluster: streams at once", ("streams at once", "many streams")),
    ("cluster: oversize messages and headers", ("oversize messages",)),
    ("cluster: requests without a lease", ("requests without a lease",)),
    (
        "cluster: clients that read slowly or never",
        ("clients that never read", "a client that reads slowly"),
    ),
    ("cluster: deadline over two hops", ("deadline over two hops",)),
    ("cluster: floods of pings", ("floods of pings",)),
    ("cluster: TLS, mutual TLS, Unix sockets", ("TLS", "mutual TLS")),
    ("gRPC plug-ins: calls that end in every way", ("gRPC calls",)),
]
#: What is not the count of a row, though it comes first and is a number.
NO_COUNT = {"readers", "seconds", "fields", "capacity", "deadlocks", "others_harmed", "run_at_once"}
NO_COUNT |= {"GOAWAY_too_many_pings_read_by", "kinds"}
#: What is not added up where several rows stand together: the largest of them counts.
MOST = re.compile(r"most|in_a_row|within|after|slowest|late|grown|_ms$|_s$|readers|seed")


def read(lines: Iterable[str]) -> tuple[list[Row], list[Row]]:
    """Rows, each the last of its name, and everything else that was written."""
    rows: dict[str, Row] = {}
    others = []
    for line in lines:
        entry = json.loads(line)
        if "row" in entry:
            rows.pop(entry["row"], None)
            rows[entry["row"]] = entry
        else:
            others.append(entry)
    return list(rows.values()), others


def forget(path: Path, tests: set[str]) -> None:
    """Drops from a file of figures what was written of some tests, which are to be run again."""
    if path.exists():
        kept = [
            line
            for line in path.read_text().splitlines()
            if not {"test", "failed", "of"} & (entry := json.loads(line)).keys()
            or not {entry.get(key) for key in ("test", "failed", "of")} & tests
        ]
        path.write_text("".join(f"{line}\n" for line in kept))


def number_in(value: object) -> float | None:
    """The number that a figure begins with."""
    found = re.match(r"[+-]?[\d.]+", str(value))
    try:
        return float(found[0]) if found else None
    except ValueError:
        return None


def together(rows: list[Row]) -> tuple[list[str], dict[str, object]]:
    """Words and figures of several rows, added up."""
    words: list[str] = []
    figures: dict[str, object] = {}
    for row in rows:
        words += [word for word in row["words"] if word not in words]
        for key, value in row["counts"].items():
            old = figures.get(key)
            if old is None:
                figures[key] = value
            elif isinstance(old, int) and isinstance(value, int) and not MOST.search(key):
                figures[key] = old + value
            elif isinstance(value, list) or (number_in(value) or 0) > (number_in(old) or 0):
                figures[key] = value
    return words, figures


def shown(key: str, value: object) -> str:
    """One figure in words."""
    if isinstance(value, list):
        value = "; ".join(map(str, value))
    text = f"{value:,}" if isinstance(value, int) else str(value)
    return f"{key.replace('_', ' ')} {text}"


def cell(texts: Iterable[str]) -> str:
    return ", ".join(texts).replace("|", "/").replace("\n", " ")


def line_of(title: str, rows: list[Row]) -> str:
    """One line of the table: title, count, result, control."""
    plain = [row for row in rows if not row["control"]]
    controls = [row for row in rows if row["control"]]
    words, figures = together(plain)
    figures.pop("seed", None)
    own = {key: value for key, value in figures.items() if key.startswith("control")}
    figures = {key: value for key, value in figures.items() if key not in own}
    numbers = [key for key, value in figures.items() if isinstance(value, int)]
    first = next((key for key in numbers if key not in NO_COUNT), None)
    count = shown(first, figures.pop(first)) if first else ""
    if len(plain) > 1:
        count = cell([*filter(None, [count]), f"{len(plain)} kinds"])
    found = [shown(key.removeprefix("control_"), value) for key, value in own.items()]
    for row in controls:
        _, _, kind = row["row"].partition("control")
        said = [*row["words"], *(shown(key, value) for key, value in row["counts"].items())]
        found.append(f"{kind.strip(' :,') or 'without'}: {cell(said)}")
    if not all(row.get("full", True) for row in plain):
        title += " (reduced counts)"
    result = [*words, *(shown(key, value) for key, value in figures.items())]
    return f"| {cell([title])} | {count} | {cell(result)} | {'; '.join(found)} |"


def render(rows: list[Row], others: list[Row]) -> str:
    """The table in Markdown, with the machine and what failed."""
    left = list(rows)
    lines = []
    for title, beginnings in TITLES:
        mine = [row for row in left if row["row"].startswith(beginnings)]
        left = [row for row in left if row not in mine]
        if mine:
            lines.append(line_of(title, mine))
    lines += [line_of(row["row"], [row]) for row in left if not row.get("proof")]
    machines = [entry for entry in others if "machine" in entry]
    head = []
    for machine in dict.fromkeys(entry["machine"] for entry in machines):
        mine = [entry for entry in machines if entry["machine"] == machine]
        kinds = dict.fromkeys("full" if entry["full"] else "reduced" for entry in mine)
        days = sorted({entry["when"] for entry in mine})
        head.append(f"at {' and '.join(kinds)} counts on {machine}, {days[-1]}")
    seconds = sum(entry["seconds"] for entry in others if "seconds" in entry)
    if head:
        head = [f"Measured {'; '.join(head)}; {seconds / 60:.0f} minutes in all."]
    failed = [entry["failed"] for entry in others if "failed" in entry]
    text = [*head, ""]
    text += [f"**Failed:** {', '.join(failed)}", ""] if failed else []
    text += ["| fault | count | result | negative control |", "|---|---|---|---|", *lines]
    proofs = [row["row"] for row in rows if row.get("proof")]
    text += ["", "What the proofs said:", "", "```text", *proofs, "```"] if proofs else []
    return "\n".join(text).strip() + "\n"


def main(arguments: list[str]) -> int:
    rows, others = read(Path(arguments[0]).read_text().splitlines())
    table = render(rows, others)
    if len(arguments) == 1:
        print(table)  # noqa: T201
        return 0
    document = Path(arguments[1])
    before, begin, rest = document.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        print(f"{document} has not the two markers", file=sys.stderr)  # noqa: T201
        return 1
    document.write_text(f"{before}{BEGIN}\n{table}{END}{after}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
