"""The commands as a user runs them, without a cluster behind them."""

import io
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from servers import view
from servers.client import Answer, Report
from servers.pb import shmcoord_cluster_pb2 as pb

ROOT = Path(__file__).resolve().parents[1]


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "servers", *arguments],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.fixture
def closed_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_help_lists_the_commands_and_the_exit_codes():
    result = run("--help")
    assert result.returncode == 0
    for word in ("query", "up", "node", "status", "demo", "shutdown", "Exit codes"):
        assert word in result.stdout


def test_no_gateway_is_two_lines_and_exit_code_1(closed_port: int):
    result = run("query", "--server", f"127.0.0.1:{closed_port}", "--query", "x", "--timeout", "5")
    assert result.returncode == 1
    assert "UNAVAILABLE" in result.stderr
    assert "Traceback" not in result.stderr
    assert "python -m servers up" in result.stderr
    assert len(result.stderr.splitlines()) == 2


@pytest.mark.parametrize(
    "arguments",
    [
        ("query", "--count", "0"),
        ("query", "--timeout", "0"),
        ("query", "--nonsense"),
        ("node",),
        ("node", "Z"),
        ("up", "--base-port", "65535"),
        ("up", "--config", "/no/such/file.toml"),
    ],
)
def test_wrong_usage_is_exit_code_2(arguments: tuple[str, ...]):
    result = run(*arguments)
    assert result.returncode == 2
    assert result.stderr
    assert "Traceback" not in result.stderr


def test_overrides_come_from_the_environment_too():
    result = run("node", "A", SHMCOORD_CLUSTER_BASE_PORT="65534")
    assert result.returncode == 2
    assert "nodes.F.port" in result.stderr


def console(width: int, *, terminal: bool) -> Console:
    return Console(width=width, force_terminal=terminal, color_system=None, file=io.StringIO())


ANSWER = Answer(
    names=["first", "second", "third"],
    rows=[(1, "x" * 30, None), (2, "\x1b[31mred", 0.5)],
    summary=pb.QuerySummary(
        matched=10, sent=2, parts=[pb.PartSummary(team="GREEN", node="B", matched=10, sent=2)]
    ),
)


def test_a_narrow_terminal_says_which_columns_it_leaves_out():
    narrow = console(30, terminal=True)
    view.show_rows(narrow, ANSWER)
    text = narrow.file.getvalue()
    assert "2 more columns: second, third" in " ".join(text.split())


def test_a_pipe_gets_every_column_whole():
    pipe = console(30, terminal=False)
    view.show_rows(pipe, ANSWER)
    text = pipe.file.getvalue()
    assert "x" * 30 in text
    assert "third" in text
    assert "…" not in text


def test_text_cannot_steer_the_terminal():
    pipe = console(80, terminal=False)
    view.show_rows(pipe, ANSWER)
    assert "\x1b" not in pipe.file.getvalue()


def test_the_summary_says_who_served():
    pipe = console(80, terminal=False)
    view.show_summary(pipe, ANSWER, aggregate=False)
    text = pipe.file.getvalue()
    assert "10 rows match, 2 shown" in text
    assert "GREEN by B" in text


def test_the_report_has_the_percentiles():
    report = Report()
    for milliseconds in range(1, 101):
        report.add(ANSWER, milliseconds / 1e3)
    assert report.latency_s(50) == pytest.approx(0.050, rel=0.01)
    assert report.latency_s(90) == pytest.approx(0.090, rel=0.01)
    assert report.latency_s(99) == pytest.approx(0.099, rel=0.01)
    assert report.served == {("GREEN", "B"): 100}
