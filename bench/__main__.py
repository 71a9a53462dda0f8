"""Runs all benchmarks: `python -m bench [--check] [-k EXPRESSION]`.

Exit code 0, also if a bar is missed; with --check 1 if a bar is missed or could not be measured.
2 and above: the benchmarks themselves failed.
"""

from __future__ import annotations

import argparse
import sys

import pytest

from bench.children import ROOT
from bench.plugin import Collector
from bench.report import missed


def main() -> int:
    """Runs pytest on this folder and judges the rows."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--check", action="store_true", help="exit 1 if a bar is missed")
    parser.add_argument("-k", metavar="EXPRESSION", default="", help="only these (as in pytest)")
    parser.add_argument("--rounds", type=int, help="rounds of each row (default: 200)")
    options = parser.parse_args()
    arguments = [
        str(ROOT / "bench"),
        "--benchmark-only",
        "--benchmark-quiet",
        "--quiet",
        "--no-header",
        "--tb=short",
    ]
    if options.k:
        arguments += ["-k", options.k]
    if options.rounds:
        arguments += ["--bench-rounds", str(options.rounds)]
    collector = Collector()
    code = int(pytest.main(arguments, plugins=[collector]))
    if code:
        return code + 1
    return int(options.check and bool(missed(collector.rows)))


if __name__ == "__main__":
    sys.exit(main())
