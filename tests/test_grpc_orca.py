"""Load reports of the gRPC servers, read from the wire by a decoder of their own."""

from __future__ import annotations

import json
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import grpc
import grpc.aio
import pytest
from grpc_helpers import Method, path, service
from helpers import wait_until

import shmcoord.grpc
from shmcoord import Segment
from shmcoord.grpc._orca import LoadReport, LoadReporter, ReportRequest, interval_of

STREAM = "/xds.service.orca.v3.OpenRcaService/StreamCoreMetrics"

#: Fields of xds.data.orca.v3.OrcaLoadReport: number and name.
DOUBLES = {
    1: "cpu_utilization",
    2: "mem_utilization",
    6: "rps_fractional",
    7: "eps",
    9: "application_utilization",
}
NAMED_METRICS = 8


def decoded(data: bytes) -> dict[str, Any]:
    """A report, decoded by hand as the encoding of protocol buffers says."""
    found: dict[str, Any] = dict.fromkeys(DOUBLES.values(), 0.0)
    found["named_metrics"] = {}
    at = 0
    while at < len(data):
        number, kind = data[at] >> 3, data[at] & 7
        at += 1
        if kind == 1:
            (found[DOUBLES[number]],) = struct.unpack_from("<d", data, at)
            at += 8
        else:
            assert (number, kind) == (NAMED_METRICS, 2)
            size = data[at]
            entry = data[at + 1 : at + 1 + size]
            at += 1 + size
            assert entry[0] == 1 << 3 | 2
            key = entry[2 : 2 + entry[1]].decode()
            rest = entry[2 + entry[1] :]
            assert not rest or rest[0] == 2 << 3 | 1
            found["named_metrics"][key] = struct.unpack("<d", rest[1:])[0] if rest else 0.0
    return found


def test_the_messages_are_those_of_the_protocol() -> None:
    report = LoadReport(
        application_utilization=0.5, rps_fractional=8.0, eps=1.0, named_metrics={"kv": 0.25}
    )
    assert LoadReport.DESCRIPTOR.full_name == "xds.data.orca.v3.OrcaLoadReport"
    assert ReportRequest.DESCRIPTOR.full_name == "xds.service.orca.v3.OrcaLoadReportRequest"
    found = decoded(report.SerializeToString())
    assert found["application_utilization"] == 0.5
    assert found["rps_fractional"] == 8.0
    assert found["eps"] == 1.0
    assert found["named_metrics"] == {"kv": 0.25}
    # report_interval (field 1, a message): seconds (field 1) and nanoseconds (field 2).
    assert interval_of(ReportRequest.FromString(b"\x0a\x02\x08\x03")) == 3.0
    assert interval_of(ReportRequest.FromString(b"\x0a\x02\x10\x01")) == 0.1
    assert interval_of(ReportRequest()) == 1.0
    request = ReportRequest()
    request.report_interval.seconds = 315_576_000_000  # the longest Duration that there is
    assert interval_of(request) < threading.TIMEOUT_MAX


class Tap:
    """A proxy for one connection that keeps what the server has sent."""

    def __init__(self, port: int) -> None:
        self.sent = b""
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._server = socket.create_connection(("127.0.0.1", port))
        self._threads = [threading.Thread(target=self._serve)]
        self._threads[0].start()

    def _serve(self) -> None:
        client, _ = self._listener.accept()
        there = threading.Thread(target=self._pump, args=(client, self._server, False))
        there.start()
        self._pump(self._server, client, True)
        there.join()
        client.close()
        self._server.close()
        self._listener.close()

    def _pump(self, source: socket.socket, target: socket.socket, keep: bool) -> None:
        try:
            while data := source.recv(65536):
                if keep:
                    self.sent += data
                target.sendall(data)
            target.shutdown(socket.SHUT_WR)
        except OSError:
            pass

    def close(self) -> None:
        self._threads[0].join(10)
        assert not self._threads[0].is_alive()


def on_the_wire(sent: bytes) -> bytes:
    """The first report in what a server has sent. (gRPC's own clients do not show it to users.)

    gRPC's sides agree on metadata that is raw: a zero byte, then the value. HPACK sends the key and
    the value as literals, each with its length before it in 7 bits.
    """
    key = b"endpoint-load-metrics-bin"
    at = sent.index(key) + len(key)
    size = sent[at]
    assert size < 127
    value = sent[at + 1 : at + 1 + size]
    assert value[0] == 0
    return value[1:]


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def started(
    stack: ExitStack, segment: Segment, node: str = "B", workers: int = 2, **more: Any
) -> Any:
    methods = more.pop("methods")
    server = shmcoord.grpc.server(workers, node=node, segment=segment.name, group="GREEN", **more)
    server.add_generic_rpc_handlers((service(**methods),))
    server.add_insecure_port("127.0.0.1:0")
    server.start()
    stack.callback(server.stop, None)
    return server


def channel_to(stack: ExitStack, server: Any) -> grpc.Channel:
    return stack.enter_context(grpc.insecure_channel(server.endpoint))


def echo(request: bytes, context: Any) -> bytes:
    return request


def test_every_answer_carries_a_report(stack: ExitStack, segment: Segment) -> None:
    server = started(stack, segment, methods={"Echo": Method(echo)}, gauges=("kv",), capacity=4)
    server.node.publish(kv=0.75)
    tap = Tap(int(server.endpoint.rpartition(":")[2]))
    with grpc.insecure_channel(f"127.0.0.1:{tap.port}") as channel:
        assert channel.unary_unary(path("Echo"))(b"x") == b"x"
    tap.close()
    found = decoded(on_the_wire(tap.sent))
    assert found["application_utilization"] == 0.25  # this very call, of four
    assert found["named_metrics"] == {"kv": 0.75}


def test_reports_follow_the_load(segment: Segment) -> None:
    with segment.join("B", group="GREEN", endpoint="local", capacity=4) as node:
        reporter = LoadReporter(segment, node, window_s=0.05)
        idle = decoded(reporter.serialized())
        assert idle["application_utilization"] == idle["rps_fractional"] == idle["eps"] == 0.0
        first, second = node.begin(), node.begin()
        node.waiting = 4
        # A report is kept for a moment, so that it costs nothing per call, and not for long.
        wait_until(lambda: decoded(reporter.serialized())["application_utilization"] == 1.5)
        first.end()
        second.end(failed=True)
        node.waiting = 0
        wait_until(lambda: decoded(reporter.serialized())["rps_fractional"] > 0)
        found = decoded(reporter.serialized())
        assert found["eps"] == pytest.approx(found["rps_fractional"] / 2)
        node.refresh()
        wait_until(lambda: 0 < decoded(reporter.serialized())["mem_utilization"] < 1)
        # Rates are of the last windows only.
        wait_until(lambda: decoded(reporter.serialized())["rps_fractional"] == 0.0)


def test_rates_are_per_second(segment: Segment) -> None:
    with segment.join("B", group="GREEN", endpoint="local", capacity=4) as node:
        reporter = LoadReporter(segment, node, window_s=0.2)
        began = time.monotonic()
        count = 0
        rates = []
        while (passed_s := time.monotonic() - began) < 0.6:
            while count < passed_s * 500:
                node.begin().end()
                count += 1
            time.sleep(0.005)
            if passed_s > 0.3:
                rates.append(decoded(reporter.report().SerializeToString())["rps_fractional"])
        rates.sort()
        assert rates[len(rates) // 2] == pytest.approx(500, rel=0.2)


def test_reports_out_of_band(stack: ExitStack, segment: Segment) -> None:
    """They occupy no worker, are not counted, and end with the client and with the server."""
    gate = threading.Event()
    entered = threading.Event()

    def wait(request: bytes, context: Any) -> bytes:
        entered.set()
        gate.wait(20)
        return request

    server = started(stack, segment, workers=1, methods={"Wait": Method(wait)})
    channel = channel_to(stack, server)
    request = b"\x0a\x05\x10\x80\xc2\xd7\x2f"  # every 100 ms
    streams = [channel.unary_stream(STREAM)(request) for _ in range(3)]
    for stream in streams:
        assert decoded(next(stream))["application_utilization"] == 0.0
    call = channel.unary_unary(path("Wait")).future(b"")
    assert entered.wait(10)
    began = time.monotonic()
    assert [decoded(next(streams[0]))["application_utilization"] for _ in range(3)][-1] == 1.0
    assert 0.15 < time.monotonic() - began < 5
    assert (server.node.inflight, server.node.waiting) == (1, 0)
    gate.set()
    call.result(10)
    reports = [t for t in threading.enumerate() if t.name == "shmcoord-reports"]
    assert len(reports) == 3
    streams[0].cancel()
    wait_until(lambda: sum(t.is_alive() for t in reports) == 2)
    server.stop(None)
    for stream in streams[1:]:
        with pytest.raises(grpc.RpcError) as caught:
            list(stream)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    wait_until(lambda: not any(t.is_alive() for t in reports))


async def test_reports_out_of_band_from_an_event_loop(segment: Segment) -> None:
    server = shmcoord.grpc.aio.server(
        node="B", segment=segment.name, group="GREEN", capacity=2, gauges=("kv",)
    )
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    server.node.publish(kv=2.0)
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        stream = channel.unary_stream(STREAM)(b"")
        found = decoded(await stream.read())
        assert found["application_utilization"] == 0.0
        assert found["named_metrics"] == {"kv": 2.0}
        request = server.node.begin()
        assert decoded(await stream.read())["application_utilization"] == 0.5
        request.end()
        assert server.node.served == 1
        stream.cancel()
    await server.stop(None)


# --- Python's own weighted_round_robin

CONFIG = {
    "loadBalancingConfig": [
        {
            "weighted_round_robin": {
                "blackoutPeriod": "0.01s",
                "weightUpdatePeriod": "0.1s",
                "enableOobLoadReport": False,
            }
        }
    ]
}


@pytest.mark.parametrize("busy", [0, 6])
def test_weighted_round_robin_follows_the_reports(
    stack: ExitStack, segment: Segment, busy: int
) -> None:
    """The node that reports more utilization gets clearly fewer calls; with equal reports, half."""
    counts = {"A": 0, "B": 0}

    def answer(name: str) -> Callable[[bytes, Any], bytes]:
        def handler(request: bytes, context: Any) -> bytes:
            return name.encode()

        return handler

    servers = [
        started(stack, segment, name, methods={"Who": Method(answer(name))}, capacity=8)
        for name in counts
    ]
    # Work of its own, of which gRPC knows only by the reports.
    held = [servers[1].node.begin() for _ in range(busy)]
    target = "ipv4:" + ",".join(server.endpoint for server in servers)
    options = [("grpc.service_config", json.dumps(CONFIG)), ("grpc.enable_retries", 0)]
    channel = stack.enter_context(grpc.insecure_channel(target, options))
    call = channel.unary_unary(path("Who"))

    def calls(seconds: float) -> dict[str, int]:
        found = {"A": 0, "B": 0}
        ends = time.monotonic() + seconds
        while time.monotonic() < ends:
            found[call(b"").decode()] += 1
            time.sleep(0.001)
        return found

    calls(0.8)
    found = calls(0.8)
    for request in held:
        request.end()
    share = found["B"] / (found["A"] + found["B"])
    if busy:
        assert share < 0.3, found
    else:
        assert 0.4 < share < 0.6, found
