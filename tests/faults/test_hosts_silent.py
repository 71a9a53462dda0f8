"""A host whose packets vanish while its link stays up: nobody is told, only news stops.

It needs namespaces. What is promised: `NOTICED_S` after the cut, no query of a team with nodes on
the gateway's host fails. A query of a team that lives on that host alone ends no later than at its
deadline, and, after `remove_after_s`, at once as UNAVAILABLE, if another host is heard.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest
from hosts_helpers import Client, hosts, why_no_namespaces

pytestmark = pytest.mark.skipif(
    bool(why_no_namespaces()), reason=f"hosts cannot be namespaces here: {why_no_namespaces()}"
)

# Seconds. `suspect_after_s` is 0.25; the rest is the machine's, which has other work.
NOTICED_S = 1.5
BACK_S = 10.0
REMOVE_AFTER_S = 3.0
CUT_OFF = set("DEF")


def alive(client: Client) -> float:
    return client.until(
        lambda seen: [seen.get(node) for node in "ABCDEF"] == ["ALIVE"] * 6, "all alive", BACK_S
    )


def all_answer(client: Client, *teams: str) -> set[str]:
    found = client.queries(count=20, concurrency=2, timeout_s=5.0, teams=teams)
    assert (found["answered"], found["errors"]) == (20, {}), found
    return set(found["served"])


def test_a_team_of_a_host_whose_packets_vanish(tmp_path: Path) -> None:
    """PINK lives on host3 alone; host2 is heard, so that host3 can be removed."""
    nodes = {"host1": "AB", "host2": "C", "host3": "DEF"}
    remove = f"remove_after_s = {REMOVE_AFTER_S}"
    with hosts(tmp_path, nodes, namespaces=True, bridge=(remove,)) as made:
        client = made.client("host1")
        alive(client)
        assert all_answer(client, "PINK") <= CUT_OFF  # the control
        made.swallow("host3", swallows=True)
        begun = time.monotonic()
        try:
            noticed_s = client.until(
                lambda seen: {seen.get(node) for node in CUT_OFF} == {"SUSPECT"},
                "host3 is suspect",
                NOTICED_S,
            )
            assert all_answer(client, "GREEN") <= set("ABC")
            early = client.queries(teams=["PINK"], timeout_s=1.0)
            client.until(lambda seen: not CUT_OFF & set(seen), "host3 is removed")
            removed_s = time.monotonic() - begun
            late = client.queries(teams=["PINK"], timeout_s=5.0)
        finally:
            made.swallow("host3", swallows=False)
        back_s = alive(client)
        found = client.queries(count=5, teams=["PINK"], timeout_s=5.0)
        sys.stdout.write(
            f"noticed in {noticed_s:.3f} s; until it is removed {early}\n"
            f"removed after {removed_s:.2f} s, then {late}\n"
            f"back in {back_s:.2f} s, then {found}\n"
        )
        assert early["answered"] == 0
        assert early["slowest_s"] < 1.5
        assert late["errors"] == {"UNAVAILABLE": 1}
        assert late["slowest_s"] < 1.0
        assert found["answered"] == 5
    assert set(made.codes().values()) == {0}
