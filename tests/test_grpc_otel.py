"""OpenTelemetry's instrumentation of gRPC works through the plug-ins as it does without them."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

CASE = Path(__file__).parent / "grpc_otel_case.py"
METHODS = {
    "/helloworld.Greeter/SayHello": 2,
    "/routeguide.RouteGuide/RecordRoute": 1,
    "/routeguide.RouteGuide/ListFeatures": 1,
    "/routeguide.RouteGuide/RouteChat": 1,
}


@pytest.mark.parametrize("server", ["sync", "aio"])
@pytest.mark.parametrize("client", ["sync", "aio"])
def test_spans_are_as_with_plain_grpc(
    example_services: ModuleType,
    new_name: Callable[[], str],
    tmp_path: Path,
    client: str,
    server: str,
):
    pytest.importorskip("opentelemetry.instrumentation.grpc", reason="OpenTelemetry is missing")
    done = subprocess.run(
        [sys.executable, str(CASE), client, server, new_name(), str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    plain, routed = found["plain"], found["shmcoord"]
    assert routed["said"] == plain["said"]
    assert routed["said"]["error"] == "StatusCode.INVALID_ARGUMENT"
    assert len(routed["said"]["RouteChat"]) == 3
    assert routed["held"] == ""
    assert found["counted"] == sum(METHODS.values())

    def short(spans: list[dict]) -> Counter:
        # Attributes that tell ports and processes differ from run to run; their keys do not.
        return Counter(
            (
                *(span["name"], span["kind"], span["status"]),
                *sorted(key for key in span["attributes"] if not key.startswith("shmcoord.")),
            )
            for span in spans
        )

    assert short(routed["spans"]) == short(plain["spans"])
    servers = [span for span in routed["spans"] if span["kind"] == "SERVER"]
    clients = {span["id"]: span for span in routed["spans"] if span["kind"] == "CLIENT"}
    assert Counter(span["name"] for span in servers) == METHODS
    assert Counter(span["name"] for span in clients.values()) == METHODS
    for span in servers:
        assert span["attributes"]["shmcoord.node"] == "B"
        assert span["attributes"]["shmcoord.group"] == "GREEN"
        # The caller's context went along in the metadata of the call.
        assert clients[span["parent"]]["trace"] == span["trace"]
        assert clients[span["parent"]]["name"] == span["name"]
    assert not any("shmcoord.node" in span["attributes"] for span in plain["spans"])
