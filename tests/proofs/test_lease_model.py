"""The lease protocol, model-checked with spin (lease.pml): every interleaving, every death.

Each control takes one protection out of the model and must violate the assertion named.
`SHMCOORD_FAULTS=full` adds the larger configurations (minutes, and up to 8 GB): all of them
exhaustive but the last, whose states are too many; of that as many as time allows are visited, in
a random order, each remembered by three bits (bitstate hashing).
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from programs import SOURCE, report

MODEL = Path(__file__).parent / "lease.pml"
FULL = os.environ.get("SHMCOORD_FAULTS", "") == "full"

pytestmark = [
    pytest.mark.skipif(
        shutil.which("spin") is None or shutil.which("gcc") is None,
        reason="spin or gcc is missing (Debian packages spin and gcc)",
    ),
    pytest.mark.timeout(3600 if FULL else 300),
]


def _define(**values: int) -> list[str]:
    return [f"-D{name}={value}" for name, value in values.items()]


#: Configurations that must hold.
HOLD = {
    "2 routers": _define(CELLS=1, ROUTERS=2, ATTEMPTS=1, KILLS=0),
    "a retry, a drain, a death": _define(CELLS=1, ROUTERS=1, ATTEMPTS=2, KILLS=1),
    "a router comes back": [
        *_define(CELLS=1, ROUTERS=1, ATTEMPTS=1, KILLS=1, ROUTER_LIVES=2),
        "-DNO_DRAIN",
    ],
    "a node comes back": [
        *_define(CELLS=1, ROUTERS=1, ATTEMPTS=1, KILLS=1, NODE_LIVES=2),
        "-DNO_DRAIN",
    ],
}
#: What `make faults` adds.
LARGE = {
    "2 cells": [*_define(CELLS=2, ROUTERS=1, ATTEMPTS=2, KILLS=1), "-DNO_DRAIN"],
    "the reaper dies": [
        *_define(CELLS=1, ROUTERS=1, ATTEMPTS=1, KILLS=2),
        "-DNO_DRAIN",
        "-DKILL_OBSERVER",
    ],
    "2 routers, a death": [*_define(CELLS=1, ROUTERS=2, ATTEMPTS=1, KILLS=1), "-DNO_DRAIN"],
    "2 routers, a death, a drain": _define(CELLS=1, ROUTERS=2, ATTEMPTS=1, KILLS=1),
    "2 cells, 1 of them for routers": _define(CELLS=2, CAPACITY=1, ROUTERS=2, ATTEMPTS=1, KILLS=0),
    "both come back, a death": [
        *_define(CELLS=1, ROUTERS=1, ATTEMPTS=1, KILLS=1, ROUTER_LIVES=2, NODE_LIVES=2),
        "-DNO_DRAIN",
    ],
}
#: More than 34 million states, whose number is not known: these are sampled.
SAMPLED = [
    *_define(CELLS=1, ROUTERS=1, ATTEMPTS=1, KILLS=2, ROUTER_LIVES=2, NODE_LIVES=2),
    "-DNO_DRAIN",
]
SAMPLE_MINUTES = 1

_ONE = _define(CELLS=1, ROUTERS=1, ATTEMPTS=2, KILLS=1)
_TWO = _define(CELLS=1, ROUTERS=2, ATTEMPTS=1, KILLS=1)
_NO_DEATH = _define(CELLS=1, ROUTERS=2, ATTEMPTS=1, KILLS=0)
#: Protection taken out -> what then fails first, and where to look for it.
CONTROLS = {
    "PLAIN_STORE_RESERVE": ({"CAPACITY"}, _NO_DEATH),
    "RESERVE_IN_TWO_STEPS": ({"LEAKED"}, _ONE),
    "NO_RECHECK": ({"DRAINED"}, _ONE),
    "PLAIN_STORE_FREE": ({"OWNER"}, _ONE),
    "RETRY_ANYWAY": ({"ONCE"}, _ONE),
    "ADOPT_WITHOUT_CAS": ({"ONCE", "CAPACITY"}, _ONE),
    "ADOPT_WITHOUT_LOOKING": ({"ONCE"}, _ONE),
    "ADOPT_KEEPS_OWNER": ({"CAPACITY"}, _TWO),
    "SWEEP_NOTHING": ({"SWEPT"}, _ONE),
    "SWEEP_WITHOUT_DEAD_CHECK": ({"OWNER"}, _ONE),
    "SWEEP_ON_LATE_BEAT": ({"OWNER"}, _ONE),
    "SWEEP_PLAIN_STORE": ({"OWNER"}, _TWO),
    "REAP_ON_LATE_BEAT": ({"OWNER"}, _ONE),
}


def _run(folder: Path, *command: str) -> str:
    done = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, timeout=3000, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


SMALL = 2000  # mebibytes


def _check(folder: Path, defines: list[str], mebibytes: int = SMALL) -> str:
    """Generate, compile and run the verifier; its output."""
    shutil.copy(MODEL, folder)
    _run(folder, "spin", "-a", *defines, MODEL.name)
    # Optimising takes longer than it saves, but for the large ones.
    large = mebibytes > SMALL
    flags = ["-DSAFETY", f"-DMEMLIM={mebibytes}", "-w", *(["-O2", "-DCOLLAPSE"] if large else [])]
    _run(folder, "gcc", *flags, "-o", "pan", "pan.c")
    return _run(folder, "./pan", "-m1000000" if large else "-m50000", "-w23")


@pytest.mark.parametrize(
    ("defines", "mebibytes"),
    [
        *(pytest.param(d, SMALL, id=name) for name, d in HOLD.items()),
        *(pytest.param(d, 8000, id=name) for name, d in LARGE.items() if FULL),
    ],
)
def test_the_protocol_holds(tmp_path: Path, defines: list[str], mebibytes: int) -> None:
    out = _check(tmp_path, defines, mebibytes)
    assert "errors: 0" in out, out
    # Nothing was left out: neither memory nor the depth of the search was short.
    assert "Search not completed" not in out, out
    assert "max search depth too small" not in out, out
    states = re.search(r"(\S+) states, stored", out)
    assert states is not None, out
    report(f"lease.pml {' '.join(defines)}: {float(states[1]):.0f} states, no error")


def _sample(folder: Path, defines: list[str], seed: int) -> str:
    """States in a random order, as many as there is time for; the verifier's output."""
    shutil.copy(MODEL, folder)
    _run(folder, "spin", "-a", *defines, MODEL.name)
    flags = ["-DSAFETY", "-DBITSTATE", "-DT_RAND", "-DP_RAND", "-O2", "-w"]
    _run(folder, "gcc", *flags, "-o", "pan", "pan.c")
    bounds = ("-m1000000", "-w32", "-k3", f"-Q{SAMPLE_MINUTES}")
    return _run(folder, "./pan", *bounds, f"-RS{seed}")


@pytest.mark.skipif(not FULL, reason="full counts only: minutes")
@pytest.mark.parametrize("seed", [7, 11])
def test_the_protocol_holds_where_both_die_and_come_back(tmp_path: Path, seed: int) -> None:
    out = _sample(tmp_path, SAMPLED, seed)
    assert "errors: 0" in out, out
    assert "max search depth too small" not in out, out
    states = re.search(r"(\S+) states, stored", out)
    assert states is not None, out
    assert float(states[1]) > 1e6, out
    report(
        f"lease.pml {' '.join(SAMPLED)}, seed {seed}: {float(states[1]):.0f} states by bitstate "
        f"hashing in {SAMPLE_MINUTES} minute, a part of all, no error"
    )


@pytest.mark.skipif(not FULL, reason="full counts only: minutes")
@pytest.mark.parametrize("control", ["SWEEP_NOTHING", "REAP_ON_LATE_BEAT", "PLAIN_STORE_FREE"])
def test_a_sample_finds_what_is_taken_out(tmp_path: Path, control: str) -> None:
    out = _sample(tmp_path, [f"-D{control}", *SAMPLED], 7)
    assert "errors: 1" in out, out
    report(f"lease.pml -D{control} by bitstate hashing: an assertion violated, as it must be")


@pytest.fixture(scope="module")
def controls(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, str]]:
    """Output and trail of every control; most of the time goes into compiling."""

    def run(control: str) -> tuple[str, str]:
        folder = tmp_path_factory.mktemp(control)
        defines = [f"-D{control}", *CONTROLS[control][1]]
        out = _check(folder, defines)
        trail = subprocess.run(
            ["spin", *defines, "-k", f"{MODEL.name}.trail", MODEL.name],
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        return out, trail.stdout + trail.stderr

    with ThreadPoolExecutor(2) as pool:
        return dict(zip(CONTROLS, pool.map(run, CONTROLS), strict=True))


@pytest.mark.parametrize("control", CONTROLS)
def test_control(controls: dict[str, tuple[str, str]], control: str) -> None:
    out, trail = controls[control]
    assert "errors: 1" in out, out
    # The trail ends at the assertion; its name stands behind it.
    at = re.search(rf"{MODEL.name}:(\d+), Error: assertion violated", trail)
    assert at is not None, trail
    lines = MODEL.read_text().splitlines()
    named = re.search(r"/\* ([A-Z]+) \*/", " ".join(lines[int(at[1]) - 1 : int(at[1]) + 2]))
    assert named is not None, lines[int(at[1]) - 1]
    assert named[1] in CONTROLS[control][0]
    report(f"lease.pml -D{control}: {named[1]} violated, as it must be")


def test_every_step_of_the_model_is_one_of_the_core() -> None:
    steps = set(re.findall(r"\bstep ([a-z]+\.[a-z]+)", MODEL.read_text()))
    core = "".join(path.read_text() for path in SOURCE.glob("*.p[yx][xd]"))
    assert len(steps) > 15
    assert steps <= set(re.findall(r'\bstep\(b"([a-z.]+)"\)', core))
