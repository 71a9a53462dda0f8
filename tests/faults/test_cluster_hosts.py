"""The reference cluster on two and three hosts, whose links, bridges and machines fail.

Hosts are namespaces with a network and a /dev/shm of their own, or, where the machine allows none
or SHMCOORD_HOSTS=loopback asks for it, bridges on ports of loopback. Links have mutual TLS.

What is promised to queries of a team that has nodes on the gateway's host: from `NOTICED_S` after
a fault on, none fails. A team that lives only on a host that is cut off: its queries end no later
than at their deadline, and at once (UNAVAILABLE) after `remove_after_s`, if another host is heard.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from cluster_helpers import matching
from hosts_helpers import Client, Hosts, hosts, why_no_namespaces

# Seconds. `suspect_after_s` is 0.25; the rest is the machine's, which has other work.
NOTICED_S = 1.5
# From the end of a fault until all nodes are routed to again: links are tried anew each 0.5 s.
BACK_S = 10.0
REMOVE_AFTER_S = 3.0

WHY = "SHMCOORD_HOSTS=loopback" if os.environ.get("SHMCOORD_HOSTS") == "loopback" else ""
WHY = WHY or why_no_namespaces()
links = pytest.mark.skipif(bool(WHY), reason=f"hosts on loopback have no cable: {WHY}")

REMOTE, ALL = set("CEF"), set("ABCDEF")
ROWS = len(matching(["code0001"]))


def say(figures: str) -> None:
    """What was measured: shown by `pytest -s`, and of a test that fails."""
    sys.stdout.write(f"{figures}\n")


def started(
    folder: Path, nodes: dict[str, str], bridge: tuple[str, ...] = ()
) -> Iterator[tuple[Hosts, Client]]:
    say(f"hosts are {f'on loopback: {WHY}' if WHY else 'namespaces'}")
    with hosts(folder, nodes, namespaces=not WHY, bridge=bridge) as made:
        yield made, made.client("host1")
        pids = [pid for host in nodes for pid in made.pids(host).values()]
    assert len(pids) == len(ALL) + len(nodes)
    assert not [pid for pid in pids if Path(f"/proc/{pid}").exists()]
    assert not list(Path("/dev/shm").glob(f"{made.unique}*"))
    assert set(made.codes().values()) == {0}


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Hosts, Client]]:
    yield from started(tmp_path_factory.mktemp("two"), {"host1": "ABD", "host2": "CEF"})


@pytest.fixture
def pair(two: tuple[Hosts, Client]) -> tuple[Hosts, Client]:
    back(two[1])
    return two


@pytest.fixture
def three(tmp_path: Path) -> Iterator[tuple[Hosts, Client]]:
    nodes = {"host1": "AB", "host2": "C", "host3": "DEF"}
    yield from started(tmp_path, nodes, (f"remove_after_s = {REMOVE_AFTER_S}",))


def back(client: Client, nodes: set[str] = ALL) -> float:
    return client.until(
        lambda seen: {node for node in nodes if seen.get(node) == "ALIVE"} == nodes,
        "all are alive",
        BACK_S,
    )


def gone(client: Client, nodes: set[str] = REMOTE) -> float:
    return client.until(
        lambda seen: not any(seen.get(node) == "ALIVE" for node in nodes),
        "none of them is alive",
        NOTICED_S,
    )


def all_answer(client: Client, count: int = 20, **options: object) -> set[str]:
    found = client.queries(count=count, concurrency=2, timeout_s=5.0, **options)
    assert (found["answered"], found["errors"]) == (count, {}), found
    return set(found["served"])


def test_the_rows_are_those_of_one_host(pair: tuple[Hosts, Client]):
    found = pair[1].queries(count=40, concurrency=4)
    assert (found["answered"], found["rows"], found["errors"]) == (40, ROWS, {})
    assert ROWS > 0


def test_pink_goes_where_the_load_is_less(pair: tuple[Hosts, Client]):
    """D is here, E and F are there; the control is the same without load."""
    client = pair[1]
    served = {}
    for name, held in {"none": {}, "here": {"host1": 2}, "both": {"host1": 2, "host2": 6}}.items():
        for host, count in held.items():
            client.ask(do="hold", team="PINK", count=count, host=host)
        try:
            found = client.queries(count=30, teams=["PINK"])
        finally:
            client.ask(do="let_go")
        assert found["errors"] == {}
        served[name] = found["served"]
    say(f"PINK served, by where the load was: {served}")
    assert served["none"].get("D", 0) >= 25  # one's own host is preferred
    assert "D" not in served["here"]
    # Two on D as before, and three on each of E and F: now D has less.
    assert set(served["both"]) == {"D"}


@pytest.mark.parametrize("host", ["host1", "host2"])
def test_a_killed_bridge_costs_no_query(pair: tuple[Hosts, Client], host: str, count):
    made, client = pair
    for _ in range(count(1, 10)):
        before = made.pids(host)
        os.kill(before["bridge"], signal.SIGKILL)
        noticed_s = gone(client)
        assert all_answer(client) <= ALL
        back_s = back(client)
        after = made.pids(host)
        say(f"bridge of {host} killed: noticed in {noticed_s:.3f} s, back in {back_s:.2f} s")
        assert after.pop("bridge") != before.pop("bridge")
        assert after == before  # no node was touched


@pytest.mark.parametrize("host", ["host1", "host2"])
def test_a_frozen_bridge_costs_no_query(pair: tuple[Hosts, Client], host: str, count):
    made, client = pair
    for _ in range(count(1, 10)):
        made.signal(host, "bridge", signal.SIGSTOP)
        try:
            noticed_s = gone(client)
            served = all_answer(client)
        finally:
            made.signal(host, "bridge", signal.SIGCONT)
        back_s = back(client)
        say(f"bridge of {host} frozen: noticed in {noticed_s:.3f} s, back in {back_s:.2f} s")
        assert served == set("ABD")


@links
@pytest.mark.parametrize("silent", [False, True])
def test_a_cut_link_costs_no_query_once_it_is_noticed(
    pair: tuple[Hosts, Client], silent: bool, count
):
    made, client = pair
    for _ in range(count(1, 10)):
        made.cut("host2", silent=silent)
        try:
            noticed_s = gone(client)
            served = all_answer(client)
        finally:
            made.heal("host2")
        back_s = back(client)
        say(f"link cut, {silent=}: noticed in {noticed_s:.3f} s, back in {back_s:.2f} s")
        assert served == set("ABD")
        assert all_answer(client, 5) <= ALL


def test_a_host_comes_back_after_a_crash(pair: tuple[Hosts, Client], count):
    made, client = pair
    for _ in range(count(1, 5)):
        made.crash("host2")
        noticed_s = gone(client)
        assert all_answer(client) == set("ABD")
        made.up("host2")
        back_s = back(client)
        say(f"host crashed: noticed in {noticed_s:.3f} s, back {back_s:.2f} s after Ready")
        assert client.queries(count=4)["rows"] == ROWS


@links
def test_a_team_of_a_host_that_is_cut_off(three: tuple[Hosts, Client]):
    """PINK lives on host3 alone; host2 is heard, so that host3 can be removed."""
    made, client = three
    back(client)
    assert all_answer(client, 5, teams=["PINK"]) <= set("DEF")  # the control
    made.cut("host3", silent=True)
    begun = time.monotonic()
    try:
        noticed_s = gone(client, set("DEF"))
        assert all_answer(client, teams=["GREEN"]) <= set("ABC")
        early = client.queries(teams=["PINK"], timeout_s=1.0)
        client.until(lambda seen: not set("DEF") & set(seen), "host3 is removed")
        removed_s = time.monotonic() - begun
        late = client.queries(teams=["PINK"], timeout_s=5.0)
    finally:
        made.heal("host3")
    back_s = back(client)
    found = client.queries(count=5, teams=["PINK"], timeout_s=5.0)
    say(f"only host of PINK cut off: noticed in {noticed_s:.3f} s; before it is removed {early};")
    say(f"removed after {removed_s:.2f} s, then {late}; back in {back_s:.2f} s, then {found}")
    assert early["answered"] == 0
    assert early["slowest_s"] < 1.5
    assert late["errors"] == {"UNAVAILABLE": 1}
    assert late["slowest_s"] < 1.0
    assert found["answered"] == 5
