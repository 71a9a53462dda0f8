"""The way from a sweep to docs/policies.md: nothing is shown that was not simulated."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("Cython", reason="Cython is not installed (extra `test`)")
pytest.importorskip("setuptools", reason="setuptools is not installed (extra `test`)")

from bench.native import NotBuiltError
from bench.sim import claims, engine, page, studies, sweep
from bench.sim.crossing import crossing, first_crossing
from bench.sim.engine import Point
from bench.sim.sweep import NotSimulatedError, Sweep


@pytest.fixture(scope="module", autouse=True)
def _built() -> None:
    try:
        engine.module()
    except NotBuiltError as reason:
        pytest.skip(str(reason))


@pytest.mark.parametrize(
    ("ratios", "age"),
    [
        ([0.5, 0.9, 0.99], None),
        ([2.0, 3.0, 4.0], 0.01),
        ([0.5, 2.0, 4.0], 0.1 / math.sqrt(10)),
        ([0.5, 0.25, 4.0], 0.1 * math.sqrt(10)),
        ([0.5, 1.0, 4.0], 0.1),
        # Not the first time that it is above 1, but the age from which on it stays there.
        ([2.0, 0.5, 2.0], 0.1 * math.sqrt(10)),
        ([0.5, 2.0, 0.5], None),
    ],
)
def test_the_age_of_a_crossing(ratios: list[float], age: float | None) -> None:
    assert first_crossing([0.01, 0.1, 1.0], ratios) == (age and pytest.approx(age))


def result_of(point: Point, factor: float = 1.0) -> dict[str, object]:
    short = replace(point, requests=6_000, warmup=1_000, nodes=min(point.nodes, 24))
    data = engine.simulate(short).as_json()
    for key in ("mean_s", "p50_s", "p99_s"):
        data[key]["value"] *= factor
    return data


@pytest.fixture(scope="module")
def quick() -> Sweep:
    """All points, with too few requests to believe, and of at most 24 nodes."""
    results = {point: result_of(point) for point in studies.points()}
    machine = {
        "packages": {"shmcoord": "0"},
        "commit": "none",
        "python": "CPython",
        "cores": 1,
        "cpu": "a machine",
        "kernel": "Linux",
    }
    return Sweep(results, machine, "2000-01-01T00:00:00Z", 1.0)


def test_a_sweep_is_read_as_it_was_written(quick: Sweep, tmp_path: Path) -> None:
    quick.save(tmp_path / "results" / "sweep.json")
    again = sweep.load(tmp_path / "results" / "sweep.json")
    assert again == quick
    assert any(point.age_s == math.inf for point in again.results)


def test_a_sweep_in_processes_is_the_same_as_here() -> None:
    points = [Point(policy=p, requests=20_000, warmup=2_000) for p in ("random", "round-robin")]
    done = sweep.run(points, workers=2)
    assert done.results == {point: engine.simulate(point).as_json() for point in points}
    kept = sweep.run([*points, Point(requests=20_000, warmup=2_000)], workers=1, kept=done)
    assert set(done.results) < set(kept.results)


def test_what_was_not_simulated_is_not_shown(quick: Sweep) -> None:
    point = studies.herd_point("least-loaded", 2.0, "same")
    less = replace(quick, results={p: r for p, r in quick.results.items() if p != point})
    assert page.herd(quick)
    with pytest.raises(NotSimulatedError):
        page.herd(less)


@pytest.mark.parametrize("name", page.BLOCKS)
def test_every_block_is_written_from_the_sweep(quick: Sweep, name: str) -> None:
    text = page.BLOCKS[name](quick)
    twice = {
        point: {
            **result,
            **{
                key: {**result[key], "value": result[key]["value"] * (2 + point.age_s % 1)}
                for key in ("mean_s", "p50_s", "p99_s", "p999_s")
            },
        }
        for point, result in quick.results.items()
    }
    changed = page.BLOCKS[name](replace(quick, results=twice, seconds=1e4))
    # Where it is about ratios of one age, they stay.
    assert text != changed or name in ("works", "crossings", "crossings-by-load")
    rows = [line.count("|") for line in text.splitlines() if line.startswith("|")]
    assert len(set(rows)) <= 1


def test_the_page_has_every_block_filled_and_once(quick: Sweep) -> None:
    text = page.PATH.read_text(encoding="utf-8")
    once = page.filled(text, quick)
    assert "2000-01-01" in once
    assert page.filled(once, quick) == once
    assert page.herd(quick) in once
    for wrong in (text.replace("<!-- sim:herd -->", ""), text.replace("sim:herd", "sim:hard")):
        with pytest.raises(page.MarkerError):
            page.filled(wrong, quick)


def test_the_pages_figures_are_of_one_sweep_and_its_plots_are_there() -> None:
    text = page.PATH.read_text(encoding="utf-8")
    for name in page.BLOCKS:
        block = text.partition(f"<!-- sim:{name} -->")[2].partition("<!-- /sim:")[0]
        assert len(block) > 100, f"{name} is empty: run `make bench-sim`"
    shown = [part.partition(")")[0] for part in text.split("](img/")[1:]]
    assert shown
    for name in shown:
        for suffix in (".svg", ".png"):
            assert (page.PATH.parent / "img" / name).with_suffix(suffix).is_file()


def test_a_claim_that_is_wrong_stops_the_page(quick: Sweep, tmp_path: Path) -> None:
    """The negative control: least-loaded and random change places."""
    names = {"least-loaded": "random", "random": "least-loaded"}
    turned = {}
    for point in quick.results:
        if point.binding != "early" or not 0.0 <= point.age_s < math.inf:
            turned[point] = quick.results[point]
            continue
        other = replace(point, policy=names.get(point.policy, point.policy))
        turned[point] = quick.results.get(other, quick.results[point])
    copy = tmp_path / "page.md"
    copy.write_text("untouched")
    with pytest.raises(claims.ClaimError, match="least_loaded_is_best_live"):
        page.fill(replace(quick, results=turned), copy)
    assert copy.read_text() == "untouched"


def test_the_crossing_of_two_policies_is_of_their_own_results(quick: Sweep) -> None:
    points = {
        studies.at_age(policy, age): age
        for policy in ("least-loaded", "random")
        for age in studies.AGES
    }
    made = dict(quick.results)
    for point in points:
        slow = point.policy == "least-loaded" and point.age_s > 0.07
        made[point] = {**made[point], "p99_s": {"value": 2.0 if slow else 0.5, "error": 0.0}}
    made[studies.at_age("random", 0.1)]["p99_s"]["value"] = 1.0
    found = crossing(replace(quick, results=made), "least-loaded", "random")
    assert found == pytest.approx(math.sqrt(0.05 * 0.1), rel=0.01)


def test_all_plots_are_drawn(quick: Sweep, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed (extra `bench`)")
    from bench.sim import plots

    monkeypatch.setattr(plots, "FOLDER", tmp_path)
    first = {path.name: path.read_bytes() for path in plots.draw(quick)}
    assert len(first) == 2 * len(plots.PLOTS)
    second = {path.name: path.read_bytes() for path in plots.draw(quick)}
    assert {n: b for n, b in first.items() if n.endswith(".svg")} == {
        n: b for n, b in second.items() if n.endswith(".svg")
    }
