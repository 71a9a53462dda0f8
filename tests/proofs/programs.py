"""The record latch, and what else of the core depends on memory order, as steps for the explorer.

Each function stands for one of the core, with the memory orders as arguments, so that a control
can weaken one of them. `ORDERS` has the calls as they stand in the core's source; a test compares.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path

from explorer import Check, Do, Fence, Jump, Label, Load, Registers, Step, Store

import shmcoord


def report(text: str) -> None:
    """Say a figure: `pytest tests/proofs -s`; and keep it where the fault harness keeps its own."""
    print(text)  # noqa: T201
    path = os.environ.get("SHMCOORD_FAULTS_JSON")
    if path:
        test = os.environ.get("PYTEST_CURRENT_TEST", "").removesuffix(" (call)")
        row = {"row": text, "proof": True, "words": [], "counts": {}, "test": test}
        with open(path, "a") as file:
            file.write(json.dumps(row) + "\n")


SOURCE = Path(shmcoord.get_include())

#: Function of the core -> file, and its accesses to shared memory in the order of the text.
ORDERS = {
    "record_write": (
        "status.pxd",
        ["load_relaxed", "fence_release", "store_relaxed", "store_release"],
    ),
    "record_read": (
        "status.pxd",
        ["load_acquire", "load_relaxed", "fence_acquire", "load_relaxed"],
    ),
    "meta_write": ("status.pyx", ["fence_release", "store_relaxed"]),
    "take_cell": ("lease.pxd", ["load_relaxed", "cas_seqcst"]),
    "is_open": ("lease.pxd", ["load_seqcst", "load_seqcst"]),
    "free_cell": ("lease.pxd", ["cas_seqcst", "add_seqcst"]),
    "notify_freed": ("cells.pxd", ["load_seqcst", "load_relaxed"]),
    "oldest_ticket": (
        "cells.pyx",
        ["load_relaxed", "load_relaxed", "load_seqcst", "load_relaxed", "load_relaxed"],
    ),
    "wake_longest": ("cells.pyx", ["load_acquire"]),
    "tell": ("cells.pyx", ["load_relaxed", "cas_seqcst", "load_relaxed"]),
    "note_decision": (
        "trace.pyx",
        ["store_relaxed", "fence_release", *["store_relaxed"] * 3, "store_release"],
    ),
    "slot_is_alive": ("cells.pxd", ["load_acquire"]),
    "owner_is_dead": ("cells.pxd", ["load_acquire"]),
    "sweep_row": ("cells.pyx", ["load_acquire"]),
    "set_state": ("node.pyx", ["load_relaxed", "cas_seqcst"]),
    "_refuse_mirror": ("node.pyx", ["load_seqcst"]),
    "_mark": ("mirror.pyx", ["store_release", "fence_seqcst"]),
    "owe": ("mirror.pyx", ["load_relaxed", "store_release", "fence_seqcst"]),
    "_has_room": ("lease.pyx", ["load_seqcst", "load_relaxed"]),
}

_CALL = re.compile(
    r"\b((?:load|store|cas|add|or|and|fence)_(?:relaxed|acquire|release|seqcst))(?:_u(?:32|64))?\("
)


def body_of(function: str, file: str) -> str:
    """The text of a function of the core, without its docstring and comments."""
    text = (SOURCE / file).read_text()
    found = re.search(
        rf"^( *)(?:cdef|def)\b[^\n]*\b{function}\((?:[^\n]*\n)+?(?=\1\S)", text, re.MULTILINE
    )
    if found is None:
        raise LookupError(f"{function} is not in {file}")
    # The signature may go over several lines; so up to the next line as far left as its first.
    rest = text[found.start() :].splitlines()
    indent = len(found.group(1))
    lines = [rest[0]]
    for line in rest[1:]:
        stripped = line.strip()
        if stripped and len(line) - len(line.lstrip()) <= indent and not stripped.startswith(")"):
            break
        lines.append(line)
    code = re.sub(r'""".*?"""', "", "\n".join(lines), flags=re.DOTALL)
    return re.sub(r"#[^\n]*", "", code)


def accesses_of(function: str, file: str) -> list[str]:
    """The accesses to shared memory in a function, in the order of its text."""
    return _CALL.findall(body_of(function, file))


WORDS = 2

#: seq, and two copies of two words each. Sequence 0 is committed, by the creation of the segment.
RECORD = {"seq": 0, "a0": 0, "a1": 0, "b0": 0, "b1": 0}


def _word(sequence: str, ahead: int, word: int) -> Callable[[Registers], str]:
    return lambda r: f"{'ab'[(r[sequence] + ahead) & 1]}{word}"


def record_write(
    value: Callable[[int], object] | None = None,
    *,
    words: int = WORDS,
    fence: str = "release",
    commit: str = "release",
) -> list[Step]:
    """`record_write`. Without `value`, each word is the sequence it is committed under."""

    def word_value(word: int) -> Callable[[Registers], object]:
        return lambda r: r["g"] + 1 if value is None else value(word)

    stores = [Store(_word("g", 1, word), word_value(word)) for word in range(words)]
    return [
        Load("g", "seq"),
        Fence(fence),
        *stores,
        Store("seq", lambda r: r["g"] + 1, commit),
    ]


def record_read(
    judge: Callable[[Registers], str],
    *,
    tries: int,
    first: str = "acquire",
    fence: str = "acquire",
    name: str = "",
    exhausted: str = "",
) -> list[Step | Label]:
    """`record_read` with so many tries; `judge` sees s, w0, w1 of a read that was accepted."""

    def clear(r: Registers) -> None:
        for register in ("s", "again", "w0", "w1"):
            r.pop(register, None)

    steps: list[Step | Label] = []
    for _ in range(tries):
        steps += [
            Load("s", "seq", first),
            *(Load(f"w{word}", _word("s", 0, word)) for word in range(WORDS)),
            Fence(fence),
            Load("again", "seq"),
            Jump(f"accept{name}", lambda r: r["again"] == r["s"]),
            Do(clear),
        ]
    return [
        *steps,
        Check(lambda _: exhausted),
        Jump(f"end{name}"),
        Label(f"accept{name}"),
        Check(judge),
        Do(clear),
        Label(f"end{name}"),
    ]
