"""The tail-latency benchmark: its bound, its traces, its figures, and one tiny run of it."""

from __future__ import annotations

import math
import shutil
import struct
import subprocess
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("hdrh", reason="hdrhistogram is not installed (extra `bench`)")

from bench.tail import llm, matrix, proxies, stats, store
from bench.tail.bars import bars
from bench.tail.bound import one_queue
from bench.tail.cell import Cell, measure, measure_streams
from bench.tail.router import Outcome
from bench.tail.summary import bound, decode, encode, histogram, merged, summarize
from bench.tail.systems import BOUND, MAIN, SYSTEMS
from bench.tail.trace import ARRIVALS, MEAN_WORK_S, NODES, SHAPES, arrival_rate, make_trace
from bench.tail.wire import orca_report

PATH = "/usr/sbin:/usr/local/sbin:/usr/bin:/usr/local/bin"


# --- the bound


def _erlang_c(servers: int, offered: float) -> float:
    """The part of the customers of M/M/c who must wait."""
    blocked = 1.0
    for k in range(1, servers + 1):
        blocked = offered * blocked / (k + offered * blocked)
    load = offered / servers
    return blocked / (1 - load * (1 - blocked))


def test_the_bound_waits_as_long_as_erlang_c_says() -> None:
    shape, load, seconds = SHAPES["exponential"], 0.85, 1200.0
    trace = make_trace(shape, "poisson", load, seconds, seed=7)
    waited = one_queue(trace.arrival_s, trace.work_s, shape.speeds) - trace.work_s
    offered = load * NODES
    expected = _erlang_c(NODES, offered) * MEAN_WORK_S / (NODES - offered)
    assert waited.mean() == pytest.approx(expected, rel=0.05)
    assert (waited > 1e-9).mean() == pytest.approx(_erlang_c(NODES, offered), rel=0.03)


def test_the_bound_of_one_node_waits_as_long_as_pollaczek_and_khinchine_say() -> None:
    rng = np.random.default_rng(3)
    load, work_s = 0.7, 0.01
    arrival_s = np.cumsum(rng.exponential(work_s / load, 400_000))
    waited = one_queue(arrival_s, np.full(len(arrival_s), work_s), (1.0,)) - work_s
    assert waited.mean() == pytest.approx(load * work_s / (2 * (1 - load)), rel=0.03)


def test_the_bound_by_hand() -> None:
    # Two nodes, the second at half speed. 0 goes to the fast one, 1 to the slow one, 2 waits for
    # the fast one until 1.0, 3 waits until 2.0 (both become free then; the first to free is taken).
    arrival_s = np.array([0.0, 0.1, 0.2, 5.0])
    work_s = np.array([1.0, 1.0, 1.0, 0.5])
    latency_s = one_queue(arrival_s, work_s, (1.0, 0.5))
    assert latency_s == pytest.approx([1.0, 2.0, 1.8, 0.5])
    assert one_queue(arrival_s, work_s, (1.0, 0.5), gap_s=0.3)[2] == pytest.approx(2.1)


# --- the traces


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("arrivals", ARRIVALS)
def test_a_seed_makes_the_same_trace_every_time(shape, arrivals) -> None:  # type: ignore[no-untyped-def]
    one, same = (make_trace(shape, arrivals, 0.7, 5.0, seed=4) for _ in range(2))
    other = make_trace(shape, arrivals, 0.7, 5.0, seed=5)
    assert np.array_equal(one.arrival_s, same.arrival_s)
    assert np.array_equal(one.work_s, same.work_s)
    assert np.array_equal(one.draw, same.draw)
    assert not np.array_equal(one.arrival_s[:50], other.arrival_s[:50])
    assert np.all(np.diff(one.arrival_s) >= 0)
    assert 0 <= one.arrival_s[0] <= one.arrival_s[-1] < 5.0


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("arrivals", ARRIVALS)
def test_traces_have_the_load_that_was_asked_for(shape, arrivals) -> None:  # type: ignore[no-untyped-def]
    trace = make_trace(shape, arrivals, 0.7, 1000.0, seed=1)
    assert len(trace.arrival_s) / 1000 == pytest.approx(arrival_rate(shape, 0.7), rel=0.03)
    assert trace.work_s.sum() / 1000 / sum(shape.speeds) == pytest.approx(0.7, rel=0.03)


def test_bursts_come_in_bursts() -> None:
    def dispersion(arrivals: str) -> float:
        trace = make_trace(SHAPES["bimodal"], arrivals, 0.7, 500.0, seed=2)
        counts = np.bincount((trace.arrival_s / 0.1).astype(int))
        return float(counts.var() / counts.mean())

    assert dispersion("poisson") == pytest.approx(1.0, abs=0.15)
    assert dispersion("bursty") > 3


def test_every_request_arrives_at_one_router() -> None:
    trace = make_trace(SHAPES["bimodal"], "poisson", 0.85, 3.0, seed=1)
    for routers in (1, 2, 6, 12):
        parts = [trace.of_router(number, routers) for number in range(routers)]
        assert sorted(np.concatenate(parts).tolist()) == list(range(len(trace.arrival_s)))


def test_all_systems_get_the_same_traces_in_an_order_that_changes() -> None:
    for part in matrix.standard():
        orders: dict[int, list[str]] = {}
        systems: dict[tuple[object, ...], set[str]] = {}
        for _, cell in matrix.in_order([part], seeds=5):
            orders.setdefault(cell.seed, []).append(f"{cell.system} {cell.load} {cell.shape}")
            setting = (cell.shape, cell.arrivals, cell.load, cell.routers, cell.in_flight)
            systems.setdefault((*setting, cell.seed), set()).add(cell.system)
        assert len({tuple(order) for order in orders.values()}) > 1
        assert len({tuple(sorted(order)) for order in orders.values()}) == 1
        assert min(len(names) for names in systems.values()) >= 3


def test_streams_are_the_same_every_time_and_cost_what_they_may_hold() -> None:
    one, same, other = (llm.make_streams(0.6, 50.0, seed) for seed in (1, 1, 2))
    assert np.array_equal(one.prompt, same.prompt)
    assert np.array_equal(one.arrival_s, same.arrival_s)
    assert not np.array_equal(one.prompt[:20], other.prompt[:20])
    assert len(one.arrival_s) / 50 == pytest.approx(0.6 * llm.FULL_RATE, rel=0.1)
    assert np.all(one.answer <= one.limit)
    assert np.all(one.limit < 2 * one.answer)
    assert one.cost(0) == math.ceil((one.prompt[0] + one.limit[0]) / 16)
    # What the nodes can just serve, as the docstring says it.
    held = one.answer * (one.prompt + one.answer / 2) * llm.STEP_PER_TOKEN_S
    needed_s = (held + one.prompt * llm.PREFILL_PER_TOKEN_S).mean()
    assert NODES / needed_s == pytest.approx(llm.FULL_RATE, rel=0.15)


# --- figures


def test_histograms_of_processes_merge_to_the_histogram_of_all() -> None:
    rng = np.random.default_rng(1)
    latency_s = rng.lognormal(-5, 1.2, 20_000)
    parts = [histogram(part.tolist()) for part in np.split(latency_s, 4)]
    whole = decode(encode(merged(parts)))
    assert whole.get_total_count() == len(latency_s)
    ordered = np.sort(latency_s)
    for percentile in (50.0, 90.0, 99.0, 99.9):
        rank = round(percentile / 100 * len(ordered)) - 1
        found = whole.get_value_at_percentile(percentile) / 1e6
        assert ordered[rank - 1] * 0.998 <= found <= ordered[rank + 1] * 1.002


def test_ratios_are_of_pairs() -> None:
    reference = [100.0, 200.0, 400.0, 50.0, 80.0]
    found = stats.ratio([value * 0.5 for value in reference], reference)
    assert (found.value, found.low, found.high) == pytest.approx((0.5, 0.5, 0.5))
    with pytest.raises(ValueError, match="not in pairs"):
        stats.ratio([1.0], [1.0, 2.0])
    with pytest.raises(ValueError, match="not in pairs"):
        stats.ratio([], [])


def test_the_interval_holds_the_mean_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(5)
    held = 0
    for _ in range(100):
        found = stats.mean(rng.normal(10.0, 2.0, 20).tolist())
        held += found.low <= 10.0 <= found.high
    assert 85 <= held <= 100  # bootstrap of few values is a little narrow


def test_orca_report_is_what_protobuf_would_write() -> None:
    report = orca_report(rps=87.5, utilization=0.5)
    assert report == b"\x31" + struct.pack("<d", 87.5) + b"\x49" + struct.pack("<d", 0.5)


def _line(system: str, seed: int, p50: float, p99: float, load: float = 0.85) -> dict[str, object]:
    cell = Cell(system, load=load, seed=seed)
    return store.line(cell, {"latency_ms": {"p50": p50, "p99": p99}})


def test_bars_say_no_where_the_limit_is_passed() -> None:
    lines = []
    for seed in (1, 2, 3):
        lines.append(_line(MAIN, seed, p50=8.0, p99=150.0))
        lines.append(_line(BOUND, seed, p50=7.0, p99=149.0))
        lines.append(_line("haproxy-maxconn1", seed, p50=8.0, p99=149.0))
    found = {
        (bar.what, bar.against, bar.setting): bar.reached for bar in bars(store.Results(lines))
    }
    assert found["p99", BOUND, "85 % load"] is True
    assert found["p99", "haproxy-maxconn1", "85 % load"] is False  # 1.007 is not at most 1
    assert found["median", "haproxy-maxconn1", "85 % load"] is False  # equal is not lower
    assert found["p99", "nginx", "85 % load"] is None
    assert found["p99", BOUND, "70 % load"] is None


def test_results_are_kept_line_by_line(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    store.append(path, store.head({"cpu": "some"}, ["HAProxy 2"]))
    store.append(path, _line(MAIN, 1, 1.0, 2.0))
    heads, lines = store.read(path)
    results = store.Results(lines)
    assert heads[0]["machine"] == {"cpu": "some"}
    assert results.has(Cell(MAIN, load=0.85, seed=1))
    assert not results.has(Cell(MAIN, load=0.85, seed=2))
    assert not results.has(Cell(MAIN, load=0.85, seed=1, seconds=1.0))


def _made_up(system: str, load: float, routers: int, seed: int) -> dict[str, object]:
    """A whole line, of latencies that nobody has measured."""
    cell = Cell(system, load=load, routers=routers, seed=seed)
    if system == BOUND:
        return store.line(cell, bound(cell))
    rng = np.random.default_rng([seed, len(system), routers])
    latency_s = 0.005 + rng.exponential(0.02 / (1 - load), 3000)
    p50, p90, p99, p999 = np.percentile(latency_s * 1e3, [50, 90, 99, 99.9])
    return store.line(
        cell,
        {
            "requests": 3000,
            "answered": 3000,
            "refused": 0,
            "latency_ms": {
                "mean": latency_s.mean() * 1e3,
                "p50": p50,
                "p90": p90,
                "p99": p99,
                "p99.9": p999,
            },
            "histogram": encode(histogram(latency_s.tolist())),
            "goodput": 250.0,
            "idle_gap_ms": {"p50": 0.4},
            "cpu_us": {"routers": 500.0, "nodes": 300.0, "proxy": 0.0},
            "machine_busy": 0.4,
        },
    )


def test_the_document_has_every_figure_and_table(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed (extra `bench`)")
    from bench.tail import document

    systems = (BOUND, MAIN, "haproxy-maxconn1", "round-robin")
    lines = [
        _made_up(system, load, routers, seed)
        for load, routers in ((0.5, 6), (0.7, 6), (0.85, 6), (0.95, 6), (0.85, 1), (0.85, 12))
        for system in systems
        for seed in (1, 2)
    ]
    machine = {
        "cpu": "a CPU",
        "cores": 2,
        "kernel": "Linux",
        "python": "CPython",
        "packages": {"grpcio": "1"},
        "commit": "abc",
        "load_average": [0.0],
    }
    page = document.write(
        store.Results(lines), [store.head(machine, ["nginx 1", "haproxy 2"])], tmp_path
    )
    text = page.read_text()
    assert text.count("\n### ") == 6
    assert "a CPU, 2 cores" in text
    names = {path.name for path in (tmp_path / "img").iterdir()}
    expected = (
        "distribution-70",
        "distribution-85",
        "ranking-70",
        "ranking-85",
        "loads",
        "routers",
    )
    assert names == {f"tail-{name}.{kind}" for name in expected for kind in ("png", "svg")}
    for name in expected:
        assert f"img/tail-{name}.svg" in text


def test_labels_are_moved_apart_and_no_further() -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed (extra `bench`)")
    from bench.tail.plots import spread

    assert spread([5.0, 1.0, 9.0], 2.0) == [5.0, 1.0, 9.0]
    assert spread([1.0, 1.0], 2.0) == [0.0, 2.0]
    placed = spread([3.0, 3.1, 3.2, 10.0], 1.0)
    assert placed[:3] == pytest.approx([2.1, 3.1, 4.1])
    assert placed[3] == 10.0


# --- the proxies


def _find(program: str) -> str:
    path = shutil.which(program, path=PATH)
    if path is None:
        pytest.skip(f"{program} is not installed")
    return path


@pytest.mark.parametrize("maxconn", [None, 1])
def test_haproxy_takes_its_configuration(tmp_path: Path, maxconn: int | None) -> None:
    config = tmp_path / "config"
    config.write_text(proxies.haproxy_config(18080, [18081, 18082], 30, 0.35, maxconn))
    command = [_find("haproxy"), "-c", "-f", str(config)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "WARNING" not in done.stdout + done.stderr


def test_nginx_takes_its_configuration(tmp_path: Path) -> None:
    config = tmp_path / "config"
    config.write_text(proxies.nginx_config(tmp_path, 18080, [18081, 18082], 30))
    command = [_find("nginx"), "-t", "-p", str(tmp_path), "-c", str(config)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "warn" not in done.stderr


# --- a tiny run


@pytest.mark.parametrize("system", ["round-robin", MAIN])
def test_a_cell_from_start_to_end(system: str) -> None:
    cell = Cell(system, load=0.4, routers=2, warmup_s=0.3, seconds=1.0)
    measured = measure(cell)
    figures = summarize(cell, measured)
    least = bound(cell)
    assert figures["requests"] == least["requests"] > 100
    assert figures["answered"] == figures["requests"]
    records = np.concatenate(measured.records)
    assert np.all(records["outcome"] == Outcome.ANSWERED)
    assert np.all(records["done_ns"] > records["ended_ns"])
    assert np.all(records["begun_ns"] > records["sent_ns"])
    # What was worked on is the trace: no more and no less.
    trace = make_trace(SHAPES["bimodal"], "poisson", 0.4, 1.3, cell.seed)
    worked_s = (records["ended_ns"] - records["begun_ns"]) / 1e9
    assert np.all(worked_s >= trace.work_s[records["index"]] - 1e-6)
    # Nobody is faster than possible.
    assert figures["latency_ms"]["mean"] > least["latency_ms"]["mean"]
    # A node works on one request at a time.
    for node in range(NODES):
        mine = np.sort(records[records["node"] == node], order="begun_ns")
        assert np.all(mine["begun_ns"][1:] >= mine["ended_ns"][:-1])
    assert math.isfinite(figures["cpu_us"]["nodes"])


def test_a_cell_of_streams_from_start_to_end() -> None:
    cell = Cell("llm-least-cost", llm.SHAPE, load=0.2, routers=2, warmup_s=0.2, seconds=0.8)
    measured = measure_streams(cell)
    records = np.concatenate(measured.records)
    figures = llm.summarize(records, measured.cpu, measured.busy)
    assert figures["answered"] == figures["requests"] > 3
    streams = llm.make_streams(0.2, 1.0, cell.seed)
    assert np.array_equal(records["tokens"], streams.answer[records["index"]])
    took_s = (records["done_ns"] - records["due_ns"]) / 1e9
    assert np.all(took_s >= llm.STEP_S * streams.answer[records["index"]])
    assert np.all(records["first_ns"] <= records["done_ns"])


def test_every_policy_is_a_system() -> None:
    import shmcoord

    assert {f"{MAIN}-{name}" for name in shmcoord.POLICIES} < set(SYSTEMS)
