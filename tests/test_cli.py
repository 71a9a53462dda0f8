"""The command line, run as users run it: in processes, piped, and in a pseudo-terminal."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import math
import os
import pty
import random
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
from shmcoord.cli.asking import _Ring
from shmcoord.cli.reading import Observers, SegmentView
from shmcoord.cli.tree import compact, tree
from shmcoord.cli.words import age, clean, duration, size
from shmcoord.decision import Candidate, PastDecision
from shmcoord.mirror import Mirror
from shmcoord.origin import Origin

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
    for args in (
        ("--help",),
        ("inspect", "--help"),
        ("explain", "--help"),
        ("reap", "--help"),
        ("unlink", "--help"),
    ):
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
    assert segment["mirror"] is False
    a, b, d = segment["nodes"]
    assert (a["served"], a["failed"]) == (2, 1)
    assert (b["queue"], b["waiting"], b["inflight"]) == (3, 2, 1)
    assert b["gauges"] == {"kv_used": 0.4}
    assert d["state"] == "DRAINING"
    assert a["pid"] == server.pid


def test_a_mirror_is_called_one(name, new_name, server):
    """Its nodes are another host's, and its pids the bridge's."""
    with Segment.attach(name) as there, Segment.open(new_name(), slots=8, leases=8) as here:
        assert not here.is_mirror
        origin, mirror = Origin(there), Mirror(here, 7, 5.0)
        mirror.set_members(origin.incarnation, origin.members())
        mirror.apply(origin.entries(full=True), 0)
        shown = run("inspect", name, here.name).stdout.split("Segment: ")
        assert "mirror" not in shown[1]
        assert shown[2].startswith(f"{here.name}  (mirror of another host's, ")
        document = json.loads(run("inspect", "--json", name, here.name).stdout)
        check(document, schema(), schema())
        assert [one["mirror"] for one in document["segments"]] == [False, True]
        real, seen = (
            {node["node"]: (node["queue"], node["state"], node["gauges"]) for node in one["nodes"]}
            for one in document["segments"]
        )
        assert seen == real
        assert {node["pid"] for node in document["segments"][1]["nodes"]} == {os.getpid()}
        mirror.leave()
        assert here.is_mirror, "until it is unlinked"


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
    for one in (schema(), explain_schema()):
        for part in (one, *one["$defs"].values()):
            assert set(part["properties"]) <= words


# --- explain


ROUTE = """
import sys, time
from shmcoord import Router, Saturated
router = Router(sys.argv[1])
for line in sys.stdin:
    for _ in range(int(line)):
        try:
            with router.acquire("GREEN"):
                pass
        except Saturated:
            pass
    print("done", flush=True)
"""


class Routing:
    """A process with a router that acquires as often as it is told."""

    def __init__(self, name):
        self.process = subprocess.Popen(
            [sys.executable, "-c", ROUTE, name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def acquire(self, count):
        self.process.stdin.write(f"{count}\n")
        self.process.stdin.flush()
        assert self.process.stdout.readline() == "done\n"

    def close(self):
        self.process.stdin.close()
        self.process.wait(20)
        self.process.stdout.close()


@pytest.fixture
def routing(name, server):
    routing = Routing(name)
    yield routing
    routing.close()


def test_explain_shows_every_candidate_and_the_last_decisions(name, server, routing):
    routing.acquire(7)
    result = run("explain", "GREEN", name)
    assert (result.returncode, result.stderr) == (0, "")
    lines = result.stdout.splitlines()
    assert lines[:2] == ["Group: GREEN  (least-loaded)", "Selected: A  127.0.0.1:50050"]
    # B has more cells than A has capacity, so load is not relative to it.
    assert re.fullmatch(r"├─ A  IDLE  ALIVE  queue 0/4 +score 0 +\S+ .s  selected", lines[2])
    assert re.fullmatch(r"└─ B  BUSY  ALIVE  queue 3/16 +score 3 +higher score", lines[3])
    assert lines[4] == ""
    assert re.fullmatch(
        rf"Router: router-{routing.process.pid}-1  \(pid {routing.process.pid}\)", lines[5]
    )
    shown = [
        re.fullmatch(r"(├|└)─ +(\d+) +\S+ ago  → A, queue 0, of 2", line) for line in lines[6:]
    ]
    assert [int(match[2]) for match in shown] == [3, 4, 5, 6, 7]
    none = run("explain", "GREEN", name, "--last", "0").stdout
    assert none.splitlines() == lines[:4]


def test_explain_obeys_policy_and_key(name, server):
    takes = {
        key: run("explain", "GREEN", name, "--policy", "affinity", "--key", key).stdout
        for key in ("one", "two", "three", "four", "five")
    }
    assert all("Group: GREEN  (affinity)" in text for text in takes.values())
    with Segment.open(name) as segment, shmcoord.Router(segment, policy="affinity") as router:
        for key, text in takes.items():
            assert f"Selected: {router.pick('GREEN', key=key).node} " in text
    assert run("explain", "GREEN", name, "--policy", "best").returncode == 2


def test_explain_writes_nothing_that_others_see(name, server):
    """It takes no slot, moves no load word, and wakes nobody."""
    server.send_signal(signal.SIGSTOP)  # or its beat writes
    path = Path("/dev/shm", name)
    before = path.read_bytes()
    try:
        assert run("explain", "GREEN", name).returncode == 0
        assert path.read_bytes() == before
    finally:
        server.send_signal(signal.SIGCONT)


def test_explain_without_names_asks_all(name, server):
    result = run("explain", "GREEN", "--json")
    segments = {one["segment"] for one in json.loads(result.stdout)["decision"]["candidates"]}
    assert name in segments


def test_explain_makes_no_segment_and_says_who_is_missing(name, server):
    missing = f"{name}_missing"
    result = run("explain", "GREEN", missing)
    assert result.returncode == 1
    assert f"SegmentNotFound: no segment {missing}" in result.stderr
    assert not Path("/dev/shm", missing).exists()
    result = run("explain", "GREEN", missing, name)
    assert result.returncode == 1
    assert "Selected: A" in result.stdout
    result = run("explain", "BLUE", name)
    assert result.returncode == 1
    assert result.stderr == f"NoBackend: no node of group BLUE is in {name}\n"
    result = run("explain", "PINK", name)  # there is one: the answer is that it is draining
    assert result.returncode == 0
    assert "Selected: nobody" in result.stdout
    assert result.stdout.endswith("draining\n")
    assert run("explain", "GREEN", "bad/name").returncode == 2


def test_explain_in_ascii(name, server, routing):
    routing.acquire(1)
    result = run("explain", "GREEN", name, env={"PYTHONIOENCODING": "ascii"})
    assert result.stdout.isascii()
    assert "|- A  IDLE" in result.stdout
    assert "-> A, queue 0" in result.stdout


def test_explain_follows_and_says_what_it_missed(name, server, routing):
    args = [sys.executable, "-c", RUN, "explain", "--follow", "GREEN", name]
    routing.acquire(1)
    with subprocess.Popen(args, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as one:
        while not one.stdout.readline().startswith("└─ 1 "):
            pass
        assert one.stdout.readline() == "\n"
        routing.acquire(2)
        router = f"router-{routing.process.pid}-1"
        for number in (2, 3):
            assert re.fullmatch(
                rf"\d\d:\d\d:\d\d\.\d\d\d  {router} +{number}  → A, queue 0, of 2\n",
                one.stdout.readline(),
            )
        routing.acquire(2000)
        numbers, missed = [3], 0
        while numbers[-1] < 2003:
            line = one.stdout.readline()
            if line.startswith(router):
                missed += int(re.fullmatch(rf"{router}: (\d+) decisions? missed, .*\n", line)[1])
            else:
                numbers.append(int(re.search(r" (\d+)  →", line)[1]))
        assert numbers == sorted(set(numbers))
        assert len(numbers) > 16
        line = one.stdout.readline()  # the one about those before, printed behind them
        missed += int(re.search(r": (\d+) decisions? missed", line)[1])
        assert len(numbers) - 1 + missed == 2000, "each is either shown or counted as missed"
        assert interrupted(one) == 0
        assert one.stderr.read() == ""


def test_explain_follows_in_a_terminal(name, server, routing):
    with Terminal("explain", "GREEN", name, "--follow") as terminal:
        terminal.read("higher score")
        routing.acquire(1)
        terminal.read("1 .*→ .*A.*, queue 0")
        terminal.process.send_signal(signal.SIGINT)
        text = terminal.read()
        assert terminal.process.wait() == 0
    assert "\x1b[1;32mselected" in text
    assert "Traceback" not in text
    assert "Aborted" not in text


def test_the_ring_accounts_for_every_decision():
    """A model router, a reader that misses the entries that are just being written."""
    chance = random.Random(3)
    newest, read, missed = 5, [], 0
    ring = _Ring(newest)
    for _ in range(400):
        newest += chance.choice([0, 1, 3, 20, 100])
        whole = range(max(newest - 15, 1), newest + 1)
        seen = [n for n in whole if chance.random() > 0.1 or n == newest]
        new, gone = ring.note(seen)
        read += sorted(new)
        missed += gone
    new, gone = ring.note(range(newest - 15, newest + 1))
    read += sorted(new)
    missed += gone
    assert len(read) == len(set(read))
    assert len(read) + missed == newest
    assert missed > 100


def explain_schema():
    return json.loads((files("shmcoord.cli") / "explain.schema.json").read_text())


def test_json_of_explain_follows_its_schema(name, server, routing):
    routing.acquire(3)
    result = run("explain", "--json", "GREEN", name, f"{name}_missing")
    assert result.returncode == 1
    assert result.stdout.isascii()
    document = json.loads(result.stdout)
    check(document, explain_schema(), explain_schema())
    assert document["decision"]["node"] == "A"
    assert [one["passed_over"] for one in document["decision"]["candidates"]] == [
        None,
        "higher score",
    ]
    assert [one["number"] for one in document["decisions"]] == [1, 2, 3]
    assert {one["pid"] for one in document["decisions"]} == {routing.process.pid}
    assert document["unreadable"][0]["error"]["kind"] == "SegmentNotFound"
    nothing = json.loads(run("explain", "--json", "GREEN", f"{name}_missing").stdout)
    check(nothing, explain_schema(), explain_schema())
    assert nothing["decision"] is None


def test_json_of_explain_follows_its_schema_for_a_validator(name, server, routing):
    jsonschema = pytest.importorskip("jsonschema")
    jsonschema.Draft202012Validator.check_schema(explain_schema())
    validator = jsonschema.Draft202012Validator(explain_schema())
    args = [sys.executable, "-c", RUN, "explain", "--follow", "--json", "GREEN", name]
    with subprocess.Popen(args, stdout=subprocess.PIPE, text=True) as process:
        validator.validate(json.loads(process.stdout.readline()))
        routing.acquire(100)
        document = json.loads(process.stdout.readline())
        validator.validate(document)
        assert document["decisions"]
        assert interrupted(process) == 0


def test_json_of_explain_has_every_field():
    past = set(explain_schema()["$defs"]["past"]["properties"])
    assert past == {field.name for field in dataclasses.fields(PastDecision)} - {"group"}
    candidate = set(explain_schema()["$defs"]["candidate"]["properties"])
    assert candidate == {field.name for field in dataclasses.fields(Candidate)} - {"group"}


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
