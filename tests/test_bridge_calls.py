"""Calls from one host to the nodes of another: gRPC and HTTP plug-ins on a mirror."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest

pytest.importorskip("msgspec", reason="the extra `bridge` is not installed")
pytest.importorskip("grpc", reason="grpcio is not installed (extra `test`)")

import grpc
from bridge_helpers import World, until, world

import shmcoord.grpc
from shmcoord import Router

METHOD = "/test.Echo/Say"


def serve(
    hosts: World, node: str, handler: Callable[[bytes, grpc.ServicerContext], bytes]
) -> grpc.Server:
    """A server on h2."""
    server = shmcoord.grpc.server(2, node=node, segment=hosts.segment("h2"), group="G")
    server.add_generic_rpc_handlers(
        (
            grpc.method_handlers_generic_handler(
                "test.Echo", {"Say": grpc.unary_unary_rpc_method_handler(handler)}
            ),
        )
    )
    server.add_insecure_port("127.0.0.1:0")
    server.start()
    return server


def test_a_call_is_adopted_on_the_other_host(name: str) -> None:
    entered, go_on = threading.Event(), threading.Event()

    def slow(request: bytes, context: grpc.ServicerContext) -> bytes:
        entered.set()
        assert go_on.wait(10.0)
        return request

    with world(name, "h1", "h2") as hosts:
        server = serve(hosts, "C", slow)
        try:
            until(lambda: hosts.alive("h1", "h2") == {"C"}, "C is shown")
            with shmcoord.grpc.channel(
                hosts.segment("h1"), hosts.mirror("h1", "h2"), group="G"
            ) as channel:
                call = channel.unary_unary(METHOD).future(b"x", timeout=10.0)
                assert entered.wait(10.0)
                # One request, counted once on either side.
                assert hosts.segments["h2"].status("C").inflight == 1
                until(lambda: hosts.seen("h1", "h2")["C"][1] == 1, "it is counted")
                go_on.set()
                assert call.result() == b"x"
                assert dict(call.trailing_metadata())["shmcoord-node"] == "C"
            until(lambda: hosts.segments["h2"].status("C").inflight == 0, "it has ended")
            assert hosts.segments["h2"].status("C").served == 1
        finally:
            server.stop(None).wait()


def test_what_failed_on_another_host_is_not_sent_twice(name: str) -> None:
    """On one host a free lease proves that a request was not begun; across hosts nothing does."""
    done: list[str] = []

    def failing(node: str) -> Callable[[bytes, grpc.ServicerContext], bytes]:
        def handle(request: bytes, context: grpc.ServicerContext) -> bytes:
            done.append(node)
            context.abort(grpc.StatusCode.UNAVAILABLE, "as if the connection was lost")
            return b""

        return handle

    with world(name, "h1", "h2") as hosts:
        servers = [serve(hosts, node, failing(node)) for node in ("C", "D")]
        try:
            until(lambda: hosts.alive("h1", "h2") == {"C", "D"}, "both are shown")
            with shmcoord.grpc.channel(hosts.mirror("h1", "h2"), group="G", adopts=True) as channel:
                say = channel.unary_unary(METHOD)
                for _ in range(5):
                    with pytest.raises(grpc.RpcError) as caught:
                        say(b"x", timeout=10.0)
                    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
            assert len(done) == 5
        finally:
            for server in servers:
                server.stop(None).wait()


def test_a_node_that_drains_before_the_news_sends_us_elsewhere(name: str) -> None:
    with world(name, "h1", "h2", tick_s=0.1, suspect_after_s=5.0) as hosts:
        servers = {node: serve(hosts, node, lambda request, _: request) for node in ("C", "D")}
        try:
            until(lambda: hosts.alive("h1", "h2") == {"C", "D"}, "both are shown")
            with (
                Router(hosts.mirror("h1", "h2")) as router,
                shmcoord.grpc.channel(router=router, group="G") as channel,
            ):
                say = channel.unary_unary(METHOD)
                assert say(b"x", timeout=10.0) == b"x"
                hosts.net.freeze("h2")  # from here on the news stay away
                servers["C"].node.drain()
                for _ in range(20):
                    assert say(b"x", timeout=10.0) == b"x"
                assert hosts.segments["h2"].status("C").served < 20
        finally:
            for server in servers.values():
                server.stop(None).wait()


def test_the_end_of_a_server_breaks_no_call_of_another_host(name: str) -> None:
    """No lease of theirs is in its memory: it must not think that nothing is on its way."""
    errors: list[grpc.RpcError] = []
    served = 0
    enough = threading.Event()

    with world(name, "h1", "h2") as hosts:
        servers = {node: serve(hosts, node, lambda request, _: request) for node in "CD"}
        try:
            until(lambda: hosts.alive("h1", "h2") == {"C", "D"}, "both are shown")
            with shmcoord.grpc.channel(hosts.mirror("h1", "h2"), group="G") as channel:
                say = channel.unary_unary(METHOD)

                def call() -> None:
                    nonlocal served
                    while not enough.is_set():
                        try:
                            say(b"x", timeout=10.0)
                            served += 1
                        except grpc.RpcError as error:
                            errors.append(error)

                callers = [threading.Thread(target=call) for _ in range(4)]
                for caller in callers:
                    caller.start()
                # One after the other goes and comes again.
                for turn in range(6):
                    node = "CD"[turn % 2]
                    until(lambda: hosts.alive("h1", "h2") == {"C", "D"}, "both are shown")
                    before = served
                    until(lambda: served > before + 20, "they are used")  # noqa: B023
                    servers[node].stop(10.0).wait()
                    servers[node] = serve(hosts, node, lambda request, _: request)
                enough.set()
                for caller in callers:
                    caller.join()
        finally:
            enough.set()
            for server in servers.values():
                server.stop(None).wait()
    assert errors == []


@pytest.mark.parametrize("remote", [False, True])
def test_a_server_waits_only_for_hosts_that_have_called(name: str, remote: bool) -> None:
    """The shortest of some ends: a loaded machine makes any of them longer."""
    took = []
    with world(name, "h1", "h2") as hosts:
        for _ in range(5):
            server = serve(hosts, "C", lambda request, _: request)
            until(lambda: hosts.alive("h1", "h2") == {"C"}, "it is shown")
            segment = hosts.mirror("h1", "h2") if remote else hosts.segments["h2"].name
            with shmcoord.grpc.channel(segment, group="G") as channel:
                assert channel.unary_unary(METHOD)(b"x", timeout=10.0) == b"x"
                began = time.monotonic()
                server.stop(10.0).wait()
                took.append(time.monotonic() - began)
            until(lambda: hosts.alive("h1", "h2") == set(), "it is gone")
            if took[-1] < 0.2:
                break
    assert (min(took) >= 0.2) == remote
