"""A request whose method is not idempotent is executed once, whatever server and channel do."""

from __future__ import annotations

import asyncio
import contextvars
import itertools
import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import grpc
import grpc.aio
import pytest
from grpc_twice import (
    CHANNELS,
    HEALTH,
    SERVERS,
    SERVICE,
    TIMEOUT_S,
    Pair,
    method,
    unavailable,
)
from grpc_worlds import FULL

from shmcoord import Segment
from shmcoord.grpc._common import LEASE_LOST_KEY, NODE_KEY

Make = Callable[..., Pair]

channels = pytest.mark.parametrize("channel", CHANNELS)
servers = pytest.mark.parametrize("kind", SERVERS)
#: Where it is the channel alone that matters, and which server it is called on does not.
channels_with_a_server = pytest.mark.parametrize(
    ("kind", "channel"),
    itertools.product(SERVERS, CHANNELS) if FULL else [("threads", "sync"), ("aio", "aio")],
)
#: How a handler says what it has copied, and what it says of the lease.
SAID = (("set", None), ("abort", "1"), ("status", None))
BLOCKING = (False, True)


@pytest.fixture
def pair(new_name: Callable[[], str]) -> Iterator[Make]:
    """Makes two nodes, which end with the test."""
    pairs: list[Pair] = []

    def make(servers: str, behavior: Any = unavailable, **options: Any) -> Pair:
        pairs.append(Pair(new_name(), servers, behavior, **options))
        return pairs[-1]

    yield make
    for one in pairs:
        one.close()


@channels
@servers
def test_a_lease_that_comes_is_adopted_whatever_the_method(
    pair: Make, kind: str, channel: str
) -> None:
    nodes = pair(kind, exclude=[method("Do"), method("Ea")])
    names = [method(name, service) for name in ("Do", "Each") for service in (SERVICE, HEALTH)]
    assert nodes.call(channel, names) == ["UNAVAILABLE"] * 4
    assert len(nodes.executed) == 4


# --- interceptors of a user's around the channel to each node


class Changing(
    grpc.UnaryUnaryClientInterceptor,
    grpc.UnaryStreamClientInterceptor,
):
    """Sends what `change` makes of the metadata, `times` times if it fails with UNAVAILABLE.

    With `aside` each attempt is made in a thread of its own, as who hedges does.
    """

    def __init__(
        self,
        change: Callable[[tuple[Any, ...], int], tuple[Any, ...]],
        times: int = 1,
        aside: bool = False,
    ) -> None:
        self._change = change
        self._times = times
        self._aside = aside

    def _go(self, go_on: Any, details: Any, request: Any) -> Any:
        if not details.method.endswith(("Do", "Each")):
            return go_on(details, request)
        for attempt in range(self._times):
            metadata = self._change(tuple(details.metadata or ()), attempt)
            changed = Details(details.method, details.timeout, metadata, None, None, None)
            if self._aside:
                with ThreadPoolExecutor(1) as pool:
                    call = pool.submit(go_on, changed, request).result()
            else:
                call = go_on(changed, request)
            if call.code() is not grpc.StatusCode.UNAVAILABLE:
                break
        return call

    intercept_unary_unary = _go
    intercept_unary_stream = _go


class Details(NamedTuple):
    method: str
    timeout: Any
    metadata: Any
    credentials: Any
    wait_for_ready: Any
    compression: Any


class AioChanging(grpc.aio.UnaryUnaryClientInterceptor):
    """The same for calls of an event loop."""

    def __init__(
        self,
        change: Callable[[tuple[Any, ...], int], tuple[Any, ...]],
        times: int = 1,
        aside: bool = False,
    ) -> None:
        self._change = change
        self._times = times
        self._aside = aside

    async def intercept_unary_unary(self, go_on: Any, details: Any, request: Any) -> Any:
        if not _text(details.method).endswith("Do"):
            return await go_on(details, request)
        for attempt in range(self._times):
            metadata = grpc.aio.Metadata(*self._change(tuple(details.metadata or ()), attempt))
            changed = grpc.aio.ClientCallDetails(
                details.method, details.timeout, metadata, None, None
            )
            if self._aside:
                apart = contextvars.Context()
                call = await apart.run(asyncio.ensure_future, go_on(changed, request))
            else:
                call = await go_on(changed, request)
            if await call.code() is not grpc.StatusCode.UNAVAILABLE:
                break
        return call


class AioChangingStream(grpc.aio.UnaryStreamClientInterceptor):
    """The same for streams of responses; one attempt."""

    def __init__(self, change: Callable[[tuple[Any, ...], int], tuple[Any, ...]], *_: Any) -> None:
        self._change = change

    async def intercept_unary_stream(self, go_on: Any, details: Any, request: Any) -> Any:
        metadata = grpc.aio.Metadata(*self._change(tuple(details.metadata or ()), 0))
        return await go_on(
            grpc.aio.ClientCallDetails(details.method, details.timeout, metadata, None, None),
            request,
        )


def _text(name: str | bytes) -> str:
    """A method's name: grpc.aio gives interceptors either."""
    return name if isinstance(name, str) else name.decode()


def drop(metadata: tuple[Any, ...], attempt: int) -> tuple[Any, ...]:
    return (("x", "y"),)


def copy(metadata: tuple[Any, ...], attempt: int) -> tuple[Any, ...]:
    return tuple((str(key), "".join(value)) for key, value in metadata)


def drop_later(metadata: tuple[Any, ...], attempt: int) -> tuple[Any, ...]:
    return (("x", "y"),) if attempt else metadata


@pytest.mark.parametrize("aside", [False, True], ids=["", "aside"])
@channels_with_a_server
def test_what_goes_out_without_the_lease_is_not_sent_elsewhere(
    pair: Make, kind: str, channel: str, aside: bool
) -> None:
    nodes = pair(kind)
    if channel == "aio":
        given = [AioChanging(drop, 1, aside), AioChangingStream(drop)]
    else:
        given = [Changing(drop, 1, aside)]
    names = [method("Do"), method("Each")]
    for blocking in BLOCKING[: 2 if channel == "sync" else 1]:
        nodes.executed.clear()
        codes = nodes.call(channel, names, interceptors=given, adopts=True, blocking=blocking)
        assert codes == ["UNAVAILABLE"] * 2
        assert len(nodes.executed) == 2, blocking


@pytest.mark.parametrize("change", [copy, drop_later])
@pytest.mark.parametrize("aside", [False, True], ids=["", "aside"])
@channels_with_a_server
def test_attempts_of_an_interceptor_stay_on_one_node(
    pair: Make, kind: str, channel: str, change: Any, aside: bool
) -> None:
    nodes = pair(kind)
    given = (AioChanging if channel == "aio" else Changing)(change, 2, aside)
    codes = nodes.call(channel, [method("Do")], interceptors=[given], adopts=True)
    assert codes == ["UNAVAILABLE"]
    assert len(nodes.executed) == 2
    assert len(set(nodes.executed)) == 1
    assert nodes.tokens[0] is not None
    assert nodes.tokens[1] is None


@pytest.mark.parametrize("change", [copy, drop_later])
@pytest.mark.parametrize(
    ("kind", "channel"),
    itertools.product(["plug", "aio plug"], CHANNELS)
    if FULL
    else [("plug", "sync"), ("aio plug", "aio")],
)
def test_a_second_attempt_counts_though_the_first_was_not_begun(
    pair: Make, kind: str, channel: str, change: Any
) -> None:
    """The lease was not adopted: the first attempt has failed before, the second has none."""
    failing = AioFailing() if kind.startswith("aio") else Failing()
    nodes = pair(kind, outside=[failing])
    given = (AioChanging if channel == "aio" else Changing)(change, 2)
    for blocking in BLOCKING[: 2 if channel == "sync" else 1]:
        nodes.executed.clear()
        failing.left = 1
        codes = nodes.call(
            channel, [method("Do")], interceptors=[given], adopts=True, blocking=blocking
        )
        assert codes == ["UNAVAILABLE"]
        assert len(nodes.executed) == 1, blocking


class Failing(grpc.ServerInterceptor):
    """Outside of the plug's: so many calls fail before their lease is adopted."""

    left = 0

    def intercept_service(self, go_on: Any, details: Any) -> Any:
        if not self.left or not details.method.endswith("Do"):
            return go_on(details)
        self.left -= 1
        return grpc.unary_unary_rpc_method_handler(
            lambda request, context: context.abort(grpc.StatusCode.UNAVAILABLE, "not begun")
        )


class AioFailing(grpc.aio.ServerInterceptor):
    """The same on an event loop."""

    left = 0

    async def intercept_service(self, go_on: Any, details: Any) -> Any:
        if not self.left or not details.method.endswith("Do"):
            return await go_on(details)
        self.left -= 1

        async def fail(request: Any, context: Any) -> None:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "not begun")

        return grpc.unary_unary_rpc_method_handler(fail)


# --- what a handler says


def forwarding(value: str | None, how: str) -> Callable[[Pair, Any], Any]:
    """A gateway that copies a refusal; `value` None: the very lease of the request."""

    def behave(nodes: Pair, context: Any) -> Any:
        token = nodes.tokens[-1]
        copied = (
            (LEASE_LOST_KEY, token if value is None else value),
            (NODE_KEY, "Z"),
            ("mine", "kept"),
        )
        code = grpc.StatusCode.FAILED_PRECONDITION
        if how == "set":
            context.set_trailing_metadata(copied)
            context.set_code(code)
            return b""
        if how == "abort":
            context.set_trailing_metadata(copied)
            return context.abort(code, "copied")
        return context.abort_with_status(Status(code, "copied", copied))

    return behave


class Status(NamedTuple):
    code: Any
    details: str
    trailing_metadata: Any


@pytest.mark.parametrize(
    ("kind", "channel", "how", "value"),
    [
        (kind, channel, *said)
        for server, kind in enumerate(SERVERS)
        for number, said in enumerate(SAID)
        # Each server and each way meets either channel.
        for channel in (CHANNELS if FULL else CHANNELS[(server + number) % 2 :][:1])
    ],
)
def test_a_handler_cannot_say_that_nothing_was_done(
    pair: Make, kind: str, channel: str, value: str | None, how: str
) -> None:
    nodes = pair(kind, forwarding(value, how))
    names = [method("Do"), method("Each")]
    assert nodes.call(channel, names, blocking=True) == ["FAILED_PRECONDITION"] * 2
    assert len(nodes.executed) == 2
    with grpc.insecure_channel(nodes.endpoints["A"]) as plain:
        call = plain.unary_unary(names[0]).future(b"x", timeout=TIMEOUT_S)
        assert call.code() is grpc.StatusCode.FAILED_PRECONDITION
        found = call.trailing_metadata()
    assert ("mine", "kept") in [tuple(pair) for pair in found]
    assert [value for key, value in found if key.startswith("shmcoord-")] == ["A"]


@channels
@pytest.mark.parametrize("code", [grpc.StatusCode.FAILED_PRECONDITION, grpc.StatusCode.UNAVAILABLE])
def test_what_a_foreign_server_copies_proves_nothing(
    new_name: Callable[[], str], channel: str, code: grpc.StatusCode
) -> None:
    """A server without us, which adopts nothing, and says what another hop said."""
    executed = []

    def echo(request: bytes, context: Any) -> bytes:
        context.set_trailing_metadata(((NODE_KEY, "Z"),))
        return request

    def do(request: bytes, context: Any) -> bytes:
        executed.append(request)
        context.set_trailing_metadata(((LEASE_LOST_KEY, "1-2-3-4-5-6"), (NODE_KEY, "Z")))
        context.abort(code, "copied")
        return b""

    name = new_name()
    server = grpc.server(ThreadPoolExecutor(2))
    handlers = {
        "Do": grpc.unary_unary_rpc_method_handler(do),
        "Ok": grpc.unary_unary_rpc_method_handler(echo),
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
    endpoint = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    nodes = Pair(name, None, unavailable)
    try:
        with (
            Segment.open(name) as segment,
            segment.join("A", group="GREEN", endpoint=endpoint),
            segment.join("B", group="GREEN", endpoint=endpoint),
        ):
            assert nodes.call(channel, [method("Do")]) == [code.name]
    finally:
        nodes.close()
        server.stop(None).wait(10)
    assert len(executed) == 1


@channels
@servers
def test_a_refusal_of_ours_leads_to_the_other_node(pair: Make, kind: str, channel: str) -> None:
    nodes = pair(kind, lambda nodes, context: b"done")
    refused = []

    def lose(decision: Any, lease: Any) -> None:
        if not refused and lease.node == "A":
            refused.append(lease.token)
            nodes.nodes["A"].adopt(lease.token).end()  # as if it had come before

    names = [method("Do")] * 4
    codes = nodes.call(channel, names, on_decision=lose, blocking=True)
    assert codes == ["OK"] * 4
    assert refused
    assert len(nodes.executed) == 4


@channels_with_a_server
def test_retries_of_grpc_itself_are_served(pair: Make, kind: str, channel: str) -> None:
    """By a service config, with the lease of the first attempt: they stay on the node."""

    def fail_once(nodes: Pair, context: Any) -> Any:
        if len(nodes.executed) < 2:
            return context.abort(grpc.StatusCode.UNAVAILABLE, "once")
        return b"done"

    policy = {
        "maxAttempts": 2,
        "initialBackoff": "0.01s",
        "maxBackoff": "0.01s",
        "backoffMultiplier": 1,
        "retryableStatusCodes": ["UNAVAILABLE"],
    }
    config = json.dumps({"methodConfig": [{"name": [{}], "retryPolicy": policy}]})
    nodes = pair(kind, fail_once)
    codes = nodes.call(channel, [method("Do")], options=[("grpc.service_config", config)])
    assert codes == ["OK"]
    assert len(nodes.executed) == 2
    assert len(set(nodes.executed)) == 1
