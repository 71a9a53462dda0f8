"""Measures bridges: `python -m bench.bridge run`, then `report` fills in docs/hosts.md.

Processes of this machine stand in for hosts. Two of them, h1 and h2, are whole: 64 nodes and a
bridge each; what is measured is what h1 sees of h2 and what its bridge costs. The others send the
frames of 64 nodes each, over links of their own (see `bench.bridge.stand_ins`).
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import Progress

from bench.bridge import document, measure
from bench.bridge.world import NODES, SUSPECT_AFTER_S, TICK_S, world
from bench.children import ROOT
from bench.machine import describe

RESULTS = ROOT / "bench" / "results" / "bridge.json"
HOSTS = (2, 8, 32)


def _one(count: int, seconds: float, times: int) -> dict[str, Any]:
    with world(count) as hosts:
        time.sleep(3.0)  # all links are there, and what the start has cost is over
        ages = np.array(measure.ages(hosts, seconds))
        found = {
            "hosts": count,
            "age_s": {
                "looks": len(ages),
                **{f"p{p}": float(np.percentile(ages, p)) for p in (50, 99, 99.9)},
            },
            "cost": measure.cost(hosts, seconds),
            "routing": measure.routing(hosts),
            "losses": measure.losses(hosts, times),
        }
        found["after"] = hosts.bridges["h1"].ask()["heard"][0]
    return found


def main() -> None:
    """Measure, or write down."""
    parser = argparse.ArgumentParser(prog="python -m bench.bridge", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="measure")
    run.add_argument("--hosts", nargs="+", type=int, default=list(HOSTS), metavar="N")
    run.add_argument("--seconds", type=float, default=20.0, metavar="S", help="of each measure")
    run.add_argument("--times", type=int, default=10, metavar="N", help="each kind of loss")
    commands.add_parser("report", help="fill in docs/hosts.md")
    options = parser.parse_args()
    console = Console()
    if options.command == "run":
        if min(options.hosts) < 2:
            sys.exit("it takes two hosts")
        results = {
            "machine": describe(),
            "nodes": NODES,
            "tick_s": TICK_S,
            "suspect_after_s": SUSPECT_AFTER_S,
            "worlds": [],
        }
        with Progress(console=console, transient=True) as progress:
            task = progress.add_task("hosts", total=len(options.hosts))
            for count in options.hosts:
                progress.update(task, description=f"{count} hosts")
                results["worlds"].append(_one(count, options.seconds, options.times))
                progress.advance(task)
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    results = json.loads(RESULTS.read_text(encoding="utf-8"))
    if options.command == "report":
        document.fill(results)
    console.print(document.table(results), markup=False)


if __name__ == "__main__":
    main()
