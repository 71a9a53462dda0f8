"""The transports inside one process behave as a network would."""

from __future__ import annotations

import asyncio
import time

import pytest

from shmcoord.transport import AsyncTransport, Transport, Unreachable
from shmcoord.transport.local import AsyncLocalTransport, LocalTransport


def send(handlers, method="m", endpoint="local:A", timeout_s=None):
    with LocalTransport(handlers) as transport:
        return transport.send(endpoint, method, "request", lease="token", timeout_s=timeout_s)


async def asend(handlers, method="m", endpoint="local:A", timeout_s=None):
    async with AsyncLocalTransport(handlers) as transport:
        return await transport.send(endpoint, method, "request", lease="token", timeout_s=timeout_s)


async def astream(handlers, method="m", endpoint="local:A", timeout_s=None):
    async with AsyncLocalTransport(handlers) as transport:
        stream = transport.stream(endpoint, method, "request", lease="token", timeout_s=timeout_s)
        return [response async for response in stream]


def both(handlers, **options):
    """Send by both transports, which must agree."""
    response = send(handlers, **options)
    assert asyncio.run(asend(handlers, **options)) == response
    return response


def test_they_follow_the_protocols():
    assert isinstance(LocalTransport({}), Transport)
    assert isinstance(AsyncLocalTransport({}), AsyncTransport)


def test_a_handler_gets_the_request():
    assert both({"local:A": {"m": str.upper}}) == "REQUEST"


def test_a_handler_that_asks_for_the_lease_gets_it():
    assert both({"local:A": {"m": lambda request, lease: (request, lease)}}) == (
        "request",
        "token",
    )


def test_a_builtin_without_signature_gets_the_request():
    assert both({"local:A": {"m": type}}) is str


@pytest.mark.parametrize("run", [send, lambda h: asyncio.run(asend(h))])
def test_nobody_at_the_endpoint_is_unreachable(run):
    with pytest.raises(Unreachable, match="local:A"):
        run({"local:B": {"m": len}})


@pytest.mark.parametrize("run", [send, lambda h: asyncio.run(asend(h))])
def test_an_unknown_method_is_a_wrong_argument(run):
    with pytest.raises(ValueError, match="it has: len, upper"):
        run({"local:A": {"upper": str.upper, "len": len}})


def test_the_handlers_are_read_live():
    handlers = {}
    with LocalTransport(handlers) as transport:
        handlers["local:A"] = {"m": len}
        assert transport.send("local:A", "m", "abc", lease="token", timeout_s=None) == 3


def test_a_late_answer_is_a_timeout():
    with pytest.raises(TimeoutError):
        send({"local:A": {"m": lambda request: time.sleep(0.05)}}, timeout_s=0.01)


def test_a_closed_transport_refuses():
    transport = LocalTransport({"local:A": {"m": len}})
    transport.close()
    with pytest.raises(RuntimeError, match="closed"):
        transport.send("local:A", "m", "abc", lease="token", timeout_s=None)


async def test_coroutines_are_awaited_within_the_timeout():
    stopped = []

    async def slow(request):
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            stopped.append(request)
            raise

    async def quick(request):
        await asyncio.sleep(0)
        return request

    handlers = {"local:A": {"slow": slow, "m": quick}}
    assert await asend(handlers, timeout_s=5.0) == "request"
    assert await asend(handlers) == "request"
    with pytest.raises(TimeoutError):
        await asend(handlers, "slow", timeout_s=0.01)
    assert stopped == ["request"]


async def test_a_handlers_own_timeout_is_left_as_it_is():
    async def fails(request):
        raise TimeoutError("of the disk")

    with pytest.raises(TimeoutError, match="of the disk"):
        await asend({"local:A": {"m": fails}}, timeout_s=5.0)


async def test_streams():
    ended = []

    async def count(request, lease):
        try:
            for number in range(3):
                yield number, lease
        finally:
            ended.append(True)

    handlers = {"local:A": {"count": count, "letters": iter}}
    assert await astream(handlers, "count") == [(0, "token"), (1, "token"), (2, "token")]
    assert await astream(handlers, "count", timeout_s=5.0) == [(n, "token") for n in range(3)]
    assert await astream(handlers, "letters") == list("request")
    assert ended == [True, True]
    with pytest.raises(Unreachable):
        await astream(handlers, endpoint="local:B")


async def test_a_late_stream_is_a_timeout_and_is_closed():
    ended = []

    async def stuck(request):
        try:
            yield 1
            await asyncio.sleep(60)
        finally:
            ended.append(True)

    with pytest.raises(TimeoutError):
        await astream({"local:A": {"m": stuck}}, timeout_s=0.02)
    assert ended == [True]


async def test_closing_a_stream_closes_the_handler():
    ended = []

    async def endless(request):
        try:
            while True:
                yield 1
        finally:
            ended.append(True)

    transport = AsyncLocalTransport({"local:A": {"m": endless}})
    stream = transport.stream("local:A", "m", None, lease="token", timeout_s=None)
    assert await anext(stream) == 1
    await stream.aclose()
    assert ended == [True]


def test_a_handler_may_be_replaced_by_one_that_asks_for_the_lease():
    handlers = {"local:A": {"m": len}}
    with LocalTransport(handlers) as transport:
        assert transport.send("local:A", "m", "abc", lease="token", timeout_s=None) == 3
        handlers["local:A"]["m"] = lambda request, lease: lease
        assert transport.send("local:A", "m", "abc", lease="token", timeout_s=None) == "token"
