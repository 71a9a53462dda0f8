"""The table of docs/reliability.md: made of a run's figures, never typed."""

from __future__ import annotations

import json
from pathlib import Path

import fault_table
import pytest

HERE = Path(__file__).parent
DOCUMENT = HERE.parent.parent / "docs" / "reliability.md"
FIGURES = DOCUMENT.with_name("faults.jsonl")


def row(name: str, *words: str, **counts: object) -> str:
    entry = {"row": name, "words": words, "counts": counts, "control": "control" in name}
    return json.dumps(entry)


LINES = [
    json.dumps({"machine": "a machine", "full": True, "when": "2025-01-01"}),
    row("SIGKILL at each step of join", kills=5, well=5),
    row("SIGKILL at each step of join", kills=12, well=12),
    row("SIGKILL at each step of leave", kills=3000, well=3000),
    row("SIGKILL at steps, control ownerless_lease", "found"),
    row("deadline over two hops", rounds=2, node_ended_after="+7 ms"),
    row("a thing | of its own", "held", moves=7),
    json.dumps({"failed": "test_x"}),
    json.dumps({"seconds": 120, "of": "test_x"}),
    json.dumps({"seconds": 60, "of": "test_y"}),
    json.dumps({"row": "so many states", "proof": True, "words": [], "counts": {}}),
]


def test_rows_of_a_title_stand_together_and_the_last_run_of_each_counts():
    table = fault_table.render(*fault_table.read(LINES))
    assert table.startswith("Measured at full counts on a machine, 2025-01-01; 3 minutes in all.")
    assert "| kills 3,012, 2 kinds | well 3,012 | ownerless_lease: found |" in table
    assert "| cluster: deadline over two hops | rounds 2 | node ended after +7 ms |" in table
    assert "**Failed:** test_x" in table
    assert "```text\nso many states\n```" in table
    reduced = json.dumps({**json.loads(LINES[5]), "full": False})
    other = fault_table.render(*fault_table.read([*LINES, reduced]))
    assert "| cluster: deadline over two hops (reduced counts) | rounds 2 |" in other
    lines = [line for line in table.splitlines() if line.startswith("|")]
    assert {line.count("|") for line in lines} == {5}


def test_only_what_is_between_the_markers_is_replaced(tmp_path: Path):
    figures, document = tmp_path / "figures", tmp_path / "document"
    figures.write_text("\n".join(LINES))
    document.write_text(f"before\n{fault_table.BEGIN}\nold\n{fault_table.END}\nafter\n")
    assert fault_table.main([str(figures), str(document)]) == 0
    text = document.read_text()
    assert text.startswith(f"before\n{fault_table.BEGIN}\nMeasured at")
    assert text.endswith(f"{fault_table.END}\nafter\n")
    assert "old" not in text
    document.write_text("no markers")
    assert fault_table.main([str(figures), str(document)]) == 1
    assert document.read_text() == "no markers"


def test_a_run_replaces_what_was_written_of_its_own_tests(tmp_path: Path):
    figures = tmp_path / "figures"
    fault_table.forget(figures, {"test_x"})  # nothing was written yet
    lines = [json.dumps({"row": name, "test": f"test_{name}"}) for name in "xy"]
    figures.write_text("\n".join([*LINES, *lines]))
    fault_table.forget(figures, {"test_x"})
    kept = figures.read_text().splitlines()
    assert set(LINES) - set(kept) == {LINES[7], LINES[8]}  # it had failed, and taken two minutes
    assert lines[0] not in kept
    assert lines[1] in kept


def test_every_title_has_rows_in_the_harness():
    sources = "".join(path.read_text() for path in HERE.glob("test_*.py"))
    for title, beginnings in fault_table.TITLES:
        assert any(beginning in sources for beginning in beginnings), title


def test_the_document_has_the_figures_of_the_last_run():
    assert fault_table.BEGIN in DOCUMENT.read_text()
    if not FIGURES.exists():
        pytest.skip("no run at full counts has written docs/faults.jsonl yet")
    table = fault_table.render(*fault_table.read(FIGURES.read_text().splitlines()))
    assert f"{fault_table.BEGIN}\n{table}{fault_table.END}" in DOCUMENT.read_text()
