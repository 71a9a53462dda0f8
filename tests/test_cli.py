"""The command line, run as users run it: in processes, piped, and in a pseudo-terminal."""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
import time
from importlib.resources import files
from pathlib import Path
from types import SimpleNamespace

import pytest

import shmcoord
from shmcoord import Health, Segment, State
from shmcoord.cli import as_json
from shmcoord.cli.reading import Observers, SegmentView
from shmcoord.cli.tree import compact, tree
from shmcoord.cli.words import age, clean, duration, size

RUN = "from shmcoord.cli import main; main()"
RUN_INSPECT = "from shmcoord.cli import inspect_main; inspect_main()"
SERVE = """
import sys, time
from shmcoord import Segment
segment = Segment.open(sys.argv[1], slots=8, leases=16)
a = segment.join("A", group="GREEN", endpoint="127.0.0.1:50050", capacity=4)
b = segment.join("B", group="GREEN", endpoint="127.0.0.1:50051", gauges=("kv_used",))
d = segment.join("D", group="PINK", endpoint="x" * 200)
for failed in (False, True):
    a.begin().end(failed=failed)
b.publish(kv_used=0.4)
b.waiting = 2
running = b.begin()
d.drain()
print("up", flush=True)
time.sleep(60)
"""


def run(*args, script=RUN, env=None, **options):
    return subprocess.run(
        [sys.executable, "-c", script, *args],
        capture_output=True,
        text=True,
        timeout=30,
        env={**os.environ, **(env or {})},
        **options,
    )


@pytest.fixture
def server(name):
    """A process with three nodes in the segment."""
    process = subprocess.Popen(
        [sys.executable, "-c", SERVE, name], stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout.readline() == "up\n"
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def fields(text, node):
    """What the tree says of one process."""
    lines = text[text.index(f"Process: {node}\n") :].splitlines()[1:]
    found = {}
    for line in lines:
        key, colon, value = line.lstrip("│ ").partition(": ")
        if not colon or key == "Process":
            break
        found[key] = value
    return found


# --- inspect


def test_inspect_prints_the_tree(name, server):
    result = run("inspect", name)
    assert result.returncode == 0
    assert result.stderr == ""
    lines = result.stdout.splitlines()
    assert lines[0].startswith(f"Segment: {name}")
    assert lines[1] == "Process count: 3/8"
    assert [line for line in lines if "Process: " in line] == [
        "├─ Process: A",
        "├─ Process: B",
        "└─ Process: D",
    ]
    a, b, d = (fields(result.stdout, node) for node in "ABD")
    assert a["State"] == "IDLE"
    assert a["Health"] == "ALIVE"
    assert a["Group"] == "GREEN"
    assert a["Endpoint"] == "127.0.0.1:50050"
    assert a["Queue size"] == "0 (0 waiting + 0 in flight, capacity 4)"
    assert re.fullmatch(r"[\d.]+ MB", a["Memory"])
    assert a["Requests processed"] == "2 (1 failed)"
    assert re.fullmatch(r"[\d.]+ (µs|ms|s)", a["Latency"])
    assert re.fullmatch(r"\d+\.\ds ago", a["Last update"])
    assert b["State"] == "BUSY"
    assert b["Queue size"].startswith("3 (2 waiting + 1 in flight")
    assert b["Gauge kv_used"] == "0.4"
    assert "Latency" not in b
    assert d["State"] == "DRAINING"
    assert d["Endpoint"] == "x" * 200, "cut or wrapped"


def test_inspect_shows_the_killed(name, server):
    server.kill()
    server.wait()
    result = run("inspect", name)
    assert result.returncode == 0
    assert "Process count: 3/8 (3 dead)" in result.stdout
    assert fields(result.stdout, "B")["Health"] == "DEAD"
    assert fields(result.stdout, "B")["Requests processed"] == "0"
    assert [
        n["health"]
        for n in json.loads(run("inspect", name, "--json").stdout)["segments"][0]["nodes"]
    ] == ["DEAD"] * 3


def test_inspect_without_names_shows_all(name, server):
    for result in (run("inspect"), run(script=RUN_INSPECT)):
        assert f"Segment: {name} " in result.stdout
    assert name in run("list").stdout.splitlines()


def test_inspect_writes_nothing(name, server):
    server.kill()
    server.wait()
    path = Path("/dev/shm", name)
    before = path.read_bytes()
    assert run("inspect", name).returncode == 0
    assert path.read_bytes() == before


def test_a_missing_segment_is_code_1_and_the_others_are_shown(name, server):
    missing = f"{name}_missing"
    result = run("inspect", missing, name)
    assert result.returncode == 1
    assert f"Segment: {missing}\nSegmentNotFound: no segment {missing}" in result.stdout
    assert "Process: A" in result.stdout


def test_a_corrupt_segment_is_code_1(name):
    Path("/dev/shm", name).write_bytes(b"something else" * 1000)
    Path("/dev/shm", name).chmod(0o600)
    result = run("inspect", name)
    assert result.returncode == 1
    assert "SegmentCorrupt" in result.stdout
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    "args",
    [
        ("inspect", "bad/name"),
        ("inspect", "--watch", "nan"),
        ("inspect", "--watch", "0"),
        ("inspect", "--watch", "x"),
        ("inspect", "--nothing"),
        ("unlink",),
        ("reap", "a b"),
        ("frobnicate",),
    ],
)
def test_wrong_usage_is_code_2(args):
    result = run(*args)
    assert result.returncode == 2
    assert "Usage:" in result.stderr
    assert "Traceback" not in result.stderr


def test_help_documents_the_exit_codes():
    for args in (("--help",), ("inspect", "--help"), ("reap", "--help"), ("unlink", "--help")):
        result = run(*args)
        assert result.returncode == 0
        assert re.search(r"Exit codes:\n\s+0 .*\n\s+1 .*\n\s+2 ", result.stdout)


def test_the_version():
    assert run("--version").stdout == f"shmcoord {shmcoord.__version__}\n"
    assert run("--version", script=RUN_INSPECT).stdout == f"inspect_shm {shmcoord.__version__}\n"


def test_without_rich_it_says_what_to_install():
    hide = "import sys; sys.modules['rich'] = None; " + RUN
    result = run("inspect", script=hide.replace("= None", "= None; sys.modules['click'] = None"))
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1
    assert "pip install shmcoord[cli]" in result.stderr


def test_a_reader_that_goes_away_is_no_error(name, server):
    command = f'{sys.executable} -c "{RUN}" inspect --watch 0.05 {name}'
    shell = f"set -o pipefail; {command} | head -1"
    result = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, timeout=30)
    assert result.stdout.startswith("Time: ")
    assert result.stderr == ""
    assert result.returncode == 0


def test_an_ascii_pipe_gets_ascii(name, server):
    result = run("inspect", name, env={"PYTHONIOENCODING": "ascii"})
    assert result.returncode == 0
    assert result.stdout.isascii()
    assert "|- Process: A" in result.stdout


# --- watch


def interrupted(process):
    process.send_signal(signal.SIGINT)
    return process.wait(20)


def test_watch_appends_when_piped(name, server):
    args = [sys.executable, "-c", RUN, "inspect", "--watch", "0.05", name]
    with subprocess.Popen(args, stdout=subprocess.PIPE, text=True) as process:
        seen = 0
        for line in process.stdout:
            seen += line.startswith("Time: ")
            if seen == 3:
                break
        assert interrupted(process) == 0


def test_watch_json_is_one_document_per_line(name, server):
    args = [sys.executable, "-c", RUN, "inspect", "--json", "--watch", "0.05", name]
    with subprocess.Popen(args, stdout=subprocess.PIPE, text=True) as process:
        documents = [json.loads(process.stdout.readline()) for _ in range(3)]
        assert interrupted(process) == 0
    times = [document["read_at"] for document in documents]
    assert times == sorted(set(times))


class Terminal:
    """A pseudo-terminal with the command running in it."""

    def __init__(self, *args, rows=60, columns=90):
        self.master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
        env = {**os.environ, "TERM": "xterm-256color"}
        for variable in ("NO_COLOR", "FORCE_COLOR", "COLUMNS", "LINES"):
            env.pop(variable, None)
        self.process = subprocess.Popen(
            [sys.executable, "-c", RUN, *args], stdin=slave, stdout=slave, stderr=slave, env=env
        )
        os.close(slave)
        self.text = ""

    def read(self, until=None, timeout_s=20.0):
        """Read until a pattern is seen, or to the end."""
        ends = time.monotonic() + timeout_s
        while until is None or not re.search(until, self.text):
            assert time.monotonic() < ends, self.text
            try:
                data = os.read(self.master, 65536)
            except OSError:  # the other end is closed
                break
            self.text += data.decode()
        return self.text

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()
        os.close(self.master)


def test_a_terminal_gets_colours_and_no_cut(name, server):
    with Terminal("inspect", name, columns=60) as terminal:
        text = terminal.read()
        assert terminal.process.wait() == 0
    assert "\x1b[32mIDLE" in text
    assert "\x1b[33mBUSY" in text
    assert "x" * 200 in text


def test_watch_refreshes_in_place_and_leaves_the_last_reading(name, server):
    with Terminal("inspect", "--watch", "0.1", name) as terminal:
        terminal.read("Process: D")
        server.kill()
        server.wait()
        terminal.read("3 dead")
        terminal.process.send_signal(signal.SIGINT)
        text = terminal.read()
        assert terminal.process.wait() == 0
    assert "\x1b[?1049h" in text, "the alternate screen"
    rest = text.rpartition("\x1b[?1049l")[2]
    assert "3 dead" in rest
    assert "Traceback" not in text


def test_watch_shortens_in_a_low_window(name, server):
    with Terminal("inspect", "--watch", "0.1", name, rows=8) as terminal:
        text = terminal.read("D .*DRAINING")
        assert "Process: A" not in text
    with Terminal("inspect", "--watch", "0.1", name, rows=4) as terminal:
        terminal.read("2 more lines")


# --- json


def schema():
    return json.loads((files("shmcoord.cli") / "inspect.schema.json").read_text())


def check(value, rule, root):
    """Validate by the part of JSON Schema that ours uses; everything else is an error here."""
    kinds = {"object": dict, "array": list, "string": str, "null": type(None)}
    for key, wanted in rule.items():
        if key == "$ref":
            check(value, root["$defs"][wanted.removeprefix("#/$defs/")], root)
        elif key == "oneOf":
            fits = 0
            for choice in wanted:
                with contextlib.suppress(AssertionError):
                    check(value, choice, root)
                    fits += 1
            assert fits == 1, (value, wanted)
        elif key == "type":
            wanted = [wanted] if isinstance(wanted, str) else wanted
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            assert any(
                (kind == "number" and number)
                or (kind == "integer" and number and isinstance(value, int))
                or (kind in kinds and isinstance(value, kinds[kind]))
                for kind in wanted
            ), (value, wanted)
        elif key == "required":
            assert set(wanted) <= set(value), set(wanted) - set(value)
        elif key == "properties":
            for name in set(wanted) & set(value):
                check(value[name], wanted[name], root)
        elif key == "additionalProperties":
            for name in set(value) - set(rule.get("properties", {})):
                assert wanted, f"{name} is not described"
                check(value[name], wanted, root)
        elif key == "items":
            for item in value:
                check(item, wanted, root)
        elif key == "enum":
            assert value in wanted
        elif key == "const":
            assert value == wanted
        elif key == "minimum":
            assert value >= wanted
        else:
            assert key in ("$schema", "$defs", "title", "description"), f"{key} is not checked"


def test_json_follows_its_schema(name, server):
    result = run("inspect", "--json", name, f"{name}_missing")
    assert result.returncode == 1
    assert result.stdout.isascii()
    document = json.loads(result.stdout)
    check(document, schema(), schema())
    [segment, missing] = document["segments"]
    assert missing["error"]["kind"] == "SegmentNotFound"
    assert segment["used"] == 3
    assert segment["slots"] == 8
    a, b, d = segment["nodes"]
    assert (a["served"], a["failed"]) == (2, 1)
    assert (b["queue"], b["waiting"], b["inflight"]) == (3, 2, 1)
    assert b["gauges"] == {"kv_used": 0.4}
    assert d["state"] == "DRAINING"
    assert a["pid"] == server.pid


def test_json_follows_its_schema_for_a_validator(name, server):
    jsonschema = pytest.importorskip("jsonschema")
    jsonschema.Draft202012Validator.check_schema(schema())
    document = json.loads(run("inspect", "--json", name, f"{name}_missing").stdout)
    jsonschema.Draft202012Validator(schema()).validate(document)


def test_json_has_every_field_of_a_status():
    from shmcoord.status import FIELDS

    node = schema()["$defs"]["node"]
    assert set(node["properties"]) == set(node["required"]) == set(FIELDS)


def test_json_has_no_numbers_that_json_has_not():
    text = as_json.dump([view(status(gauges={"g": math.nan}, latency_s=math.inf))], one_line=True)
    [node] = json.loads(text)["segments"][0]["nodes"]
    assert node["gauges"] == {"g": None}
    assert node["latency_s"] is None
    assert "\n" not in text


def test_the_document_names_every_field():
    document = Path(__file__).parent.parent / "docs" / "inspect-json.md"
    words = set(re.findall(r"`(\w+)`", document.read_text()))
    definitions = schema()["$defs"]
    for part in (schema(), *definitions.values()):
        assert set(part["properties"]) <= words


# --- reap and unlink


def test_reap_gives_back_what_the_killed_held(name, server):
    assert run("reap", name).stdout == f"{name}: 0 slots and leases given back\n"
    server.kill()
    server.wait()
    result = run("reap", name)
    assert result.returncode == 0
    assert re.fullmatch(rf"{name}: [1-9]\d* slots and leases given back\n", result.stdout)
    assert "Process count: 0/8" in run("inspect", name).stdout


def test_reap_makes_no_segment(name):
    result = run("reap", name)
    assert result.returncode == 1
    assert result.stderr == f"SegmentNotFound: no segment {name}\n"
    assert not Path("/dev/shm", name).exists()


def test_unlink_refuses_while_nodes_are_alive(name, server):
    result = run("unlink", name)
    assert result.returncode == 1
    assert "A, B, D" in result.stderr
    assert "--force" in result.stderr
    assert Path("/dev/shm", name).exists()
    assert run("unlink", "--force", name).returncode == 0
    assert not Path("/dev/shm", name).exists()


def test_unlink_removes_the_segment_of_the_dead(name, server):
    server.kill()
    server.wait()
    result = run("unlink", name)
    assert result.returncode == 0
    assert result.stdout == f"{name}: unlinked\n"
    assert run("unlink", name).returncode == 1


def test_unlink_leaves_what_is_no_segment_alone(name):
    path = Path("/dev/shm", name)
    path.write_bytes(b"of another program")
    path.chmod(0o600)
    assert run("unlink", name).returncode == 1
    assert path.exists()
    assert run("unlink", "--force", name).returncode == 0
    assert not path.exists()


# --- parts


def status(**changed):
    values = {
        "node": "A", "group": "GREEN", "endpoint": "e", "state": State.IDLE,
        "health": Health.ALIVE, "queue": 0, "waiting": 0, "inflight": 0, "capacity": 4,
        "weight": 1.0, "memory_bytes": 45_000_000, "cpu_percent": 0.0, "served": 1, "failed": 0,
        "latency_s": 0.0012, "gauges": {}, "pid": 1, "uptime_s": 1.0, "heartbeat_age_s": 1.2,
    }  # fmt: skip
    return SimpleNamespace(**{**values, **changed})


def view(*nodes):
    return SegmentView("s", 8, 16, 1000, 0.0, nodes)


def test_nothing_that_a_terminal_obeys_gets_through():
    evil = "a\x1b[31m\x9b2J\r\nb\u202e\x00"
    node = status(node=evil, group=evil, endpoint=evil, gauges={evil: 1.0})
    for lines in (tree([view(node)]), compact([view(node)])):
        assert all(line.plain.isprintable() for line in lines)
    assert clean(evil) == r"a\x1b[31m\x9b2J\r\nb\u202e\x00"


def test_observers_follow_a_segment_that_is_made_anew(name):
    with Observers((name,)) as observers:
        assert not isinstance(observers.read()[0], SegmentView)
        with Segment.open(name, slots=2, leases=2):
            assert observers.read()[0].slots == 2
        Segment.unlink(name)
        with Segment.open(name, slots=4, leases=2):
            assert observers.read()[0].slots == 4


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (45e6, "45 MB"), (999.9e6, "1.0 GB")],
)
def test_sizes(count, text):
    assert size(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.0, "0 µs"), (12e-6, "12 µs"), (0.00123, "1.23 ms"), (0.9996, "1 s"), (2.5, "2.5 s")],
)
def test_durations(seconds, text):
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (-1.0, "0.0s ago"),
        (1.24, "1.2s ago"),
        (99.96, "1m 40s ago"),
        (3599.9, "1h 0m ago"),
        (90000, "1d 1h ago"),
    ],
)
def test_ages(seconds, text):
    assert age(seconds) == text
