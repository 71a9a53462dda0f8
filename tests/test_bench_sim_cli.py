"""`python -m bench.sim`, as people call it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("Cython", reason="Cython is not installed (extra `test`)")
pytest.importorskip("setuptools", reason="setuptools is not installed (extra `test`)")
pytest.importorskip("click", reason="click is not installed (extra `cli`)")

from click.testing import CliRunner, Result

from bench.native import NotBuiltError
from bench.sim import engine, studies, sweep
from bench.sim.__main__ import main
from bench.sim.engine import Point


@pytest.fixture(scope="module", autouse=True)
def _built() -> None:
    try:
        engine.module()
    except NotBuiltError as reason:
        pytest.skip(str(reason))


def call(*words: str) -> Result:
    return CliRunner().invoke(main, words)


SHORT = ("--requests", "20000", "--warmup", "2000")


def test_one_point() -> None:
    words = "point --policy random --nodes 12 --routers 3 --load 0.5 --work exponential --age 0.1"
    done = call(*words.split(), *SHORT)
    assert done.exit_code == 0, done.output
    point = Point(
        policy="random",
        nodes=12,
        routers=3,
        load=0.5,
        work="exponential",
        age_s=0.1,
        requests=20_000,
        warmup=2_000,
    )
    assert f"{engine.simulate(point).p99_s.value * 1e3:,.2f} ms" in done.output
    done = call(*words.split(), *SHORT, "--json")
    assert json.loads(done.output) == json.loads(json.dumps(engine.simulate(point).as_json()))


def test_what_a_router_sees_and_where_requests_wait_can_be_said() -> None:
    done = call(
        "point",
        *SHORT,
        "--age",
        "inf",
        "--own",
        "--binding",
        "late",
        "--keys",
        "10",
        "--cache",
        "5",
    )
    assert done.exit_code == 0, done.output
    assert "waited" in done.output
    assert "in the cache" in done.output


@pytest.mark.parametrize(
    "words",
    [
        ("--policy", "none"),
        ("--load", "0"),
        ("--age", "inf"),
        ("--requests", "10"),
        ("--work", "x"),
    ],
)
def test_a_wrong_point_is_a_usage_error(words: tuple[str, ...]) -> None:
    done = call("point", *words)
    assert done.exit_code == 2
    assert "Usage" in done.output


def test_every_attribute_of_a_point_is_explained() -> None:
    text = call("point", "--help").output
    for word in ("--policy", "--phases", "--hit-factor", "--latency", "bimodal", "first-come"):
        assert word in text


def test_a_sweep_and_what_it_keeps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = (
        Point(policy=policy, requests=20_000, warmup=2_000) for policy in ("random", "round-robin")
    )
    monkeypatch.setattr(
        studies, "STUDIES", {"loads": lambda: iter([first]), "herd": lambda: iter([second])}
    )
    path = tmp_path / "out.json"
    options = ("--workers", "1", "--output", str(path))
    assert call("sweep", "--study", "loads", *options).exit_code == 0
    assert set(sweep.load(path).results) == {first}
    assert call("sweep", "--study", "herd", "--keep", *options).exit_code == 0
    assert set(sweep.load(path).results) == {first, second}
    monkeypatch.setattr(studies, "STUDIES", {"herd": lambda: iter([second])})
    done = call("sweep", "--keep", *options)
    assert done.exit_code == 0
    assert "1 points" in done.output
    assert set(sweep.load(path).results) == {second}
    assert call("sweep", "--study", "none", *options).exit_code == 2
