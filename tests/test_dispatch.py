"""The dispatcher: leases are given back on every way out, and nothing is executed twice."""

from __future__ import annotations

import asyncio
import gc
import time

import pytest
from dispatch_fakes import FakeRouter, endpoint

from shmcoord.dispatch import AsyncDispatcher, Dispatcher, NoneReachable
from shmcoord.errors import LeaseLost, NoBackend, Saturated
from shmcoord.transport import AsyncTransport, ConnectionLost, Transport, Unreachable


class ScriptedTransport:
    """Per endpoint an answer or an error; records what was sent, and where."""

    def __init__(self, router, script):
        self.router = router
        self.script = script
        self.sent = []
        self.timeouts = []
        self.closed_streams = 0

    def send(self, endpoint, method, request, *, lease, timeout_s):
        assert lease in self.router.held, "sent without holding the lease"
        self.sent.append(endpoint)
        self.timeouts.append(timeout_s)
        outcome = self.script[endpoint]
        if callable(outcome):
            outcome = outcome(self.router.leases[lease])
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome

    def close(self):
        pass


class AsyncScriptedTransport(ScriptedTransport):
    async def send(self, endpoint, method, request, *, lease, timeout_s):
        outcome = super().send(endpoint, method, request, lease=lease, timeout_s=timeout_s)
        if isinstance(outcome, asyncio.Event):
            await outcome.wait()
        return outcome

    async def stream(self, endpoint, method, request, *, lease, timeout_s):
        outcome = super().send(endpoint, method, request, lease=lease, timeout_s=timeout_s)
        try:
            for item in outcome:
                await asyncio.sleep(0)
                if isinstance(item, asyncio.Event):
                    await item.wait()
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            self.closed_streams += 1

    async def close(self):
        pass


class Side:
    """Runs the same test against the threaded and the asyncio dispatcher."""

    def __init__(self, kind):
        self.kind = kind

    def make(self, nodes, script, **options):
        router = FakeRouter(list(nodes))
        named = {endpoint(node): outcome for node, outcome in script.items()}
        if self.kind == "async":
            transport = AsyncScriptedTransport(router, named)
            dispatcher = AsyncDispatcher(router, transport, **options)
        else:
            transport = ScriptedTransport(router, named)
            dispatcher = Dispatcher(router, transport, **options)
        return router, transport, dispatcher

    def call(self, dispatcher, timeout_s=None, cost=1):
        if self.kind == "sync":
            return dispatcher.call("GREEN", "m", "request", timeout_s, cost)

        async def run():
            if self.kind == "stream":
                answers = dispatcher.stream("GREEN", "m", "request", timeout_s, cost)
                [answer] = [answer async for answer in answers]
                return answer
            return await dispatcher.call("GREEN", "m", "request", timeout_s, cost)

        return asyncio.run(run())


class StreamSide(Side):
    """The same through `stream`, where a single answer is a stream of one."""

    def make(self, nodes, script, **options):
        def one(outcome):
            if isinstance(outcome, BaseException):
                return outcome
            if callable(outcome):
                return lambda lease: one(outcome(lease))
            return [outcome]

        self.kind = "async"
        made = super().make(nodes, {n: one(o) for n, o in script.items()}, **options)
        self.kind = "stream"
        return made


@pytest.fixture(params=["sync", "async", "stream"])
def side(request):
    return StreamSide("stream") if request.param == "stream" else Side(request.param)


def lost():
    return ConnectionLost("reset by peer")


def test_the_protocols_are_met_by_shape():
    assert isinstance(ScriptedTransport(None, {}), Transport)
    assert isinstance(AsyncScriptedTransport(None, {}), AsyncTransport)


def test_a_call_acquires_sends_and_releases(side):
    router, transport, dispatcher = side.make("AB", {"A": "answer"})
    assert side.call(dispatcher) == "answer"
    assert transport.sent == ["local:A"]
    assert router.held == []


def test_an_unreachable_node_is_marked_and_another_is_tried(side):
    router, transport, dispatcher = side.make("AB", {"A": Unreachable("refused"), "B": "answer"})
    assert side.call(dispatcher) == "answer"
    assert transport.sent == ["local:A", "local:B"]
    assert router.marked == ["A"]
    assert router.held == []


def test_a_refused_lease_goes_elsewhere(side):
    router, transport, dispatcher = side.make("AB", {"A": LeaseLost("reaped"), "B": "answer"})
    assert side.call(dispatcher) == "answer"
    assert transport.sent == ["local:A", "local:B"]
    assert router.held == []


def test_each_node_is_tried_once_and_the_error_says_what_was_tried(side):
    script = {node: Unreachable(f"{node} refused") for node in "ABC"}
    router, transport, dispatcher = side.make("ABC", script)
    with pytest.raises(NoneReachable, match=r"A at local:A \(A refused\).*C at local:C") as caught:
        side.call(dispatcher)
    assert transport.sent == ["local:A", "local:B", "local:C"]
    assert [attempt.node for attempt in caught.value.tried] == ["A", "B", "C"]
    assert isinstance(caught.value, NoBackend)
    assert router.held == []


def test_nobody_left_after_a_try_names_the_try(side):
    router, _, dispatcher = side.make("A", {"A": Unreachable("refused")})
    gone = router.nodes
    router.mark_unreachable = lambda backend: gone.clear()
    with pytest.raises(NoneReachable, match=r"no node; tried: A at local:A \(refused\)"):
        side.call(dispatcher)
    assert router.held == []


@pytest.mark.parametrize("adopts", [False, True])
def test_any_other_error_passes_and_is_not_sent_again(side, adopts):
    router, transport, dispatcher = side.make(
        "AB", {"A": RuntimeError("in the handler")}, adopts=adopts
    )
    with pytest.raises(RuntimeError, match="in the handler"):
        side.call(dispatcher)
    assert transport.sent == ["local:A"]
    assert router.marked == []
    assert router.held == []


def test_a_lost_connection_passes_when_nodes_do_not_adopt(side):
    router, transport, dispatcher = side.make("AB", {"A": lost()})
    with pytest.raises(ConnectionLost):
        side.call(dispatcher)
    assert transport.sent == ["local:A"]
    assert router.held == []


def test_a_lost_connection_before_adoption_goes_elsewhere(side):
    router, transport, dispatcher = side.make("AB", {"A": lost(), "B": "answer"}, adopts=True)
    assert side.call(dispatcher) == "answer"
    assert transport.sent == ["local:A", "local:B"]
    assert router.marked == ["A"]
    assert router.held == []


def test_a_lost_connection_after_adoption_passes(side):
    def adopted(lease):
        lease.adopted = True
        return lost()

    router, transport, dispatcher = side.make("AB", {"A": adopted, "B": "twice"}, adopts=True)
    with pytest.raises(ConnectionLost):
        side.call(dispatcher)
    assert transport.sent == ["local:A"]
    assert router.held == []


def test_no_backend_and_saturated_pass_as_they_are(side):
    router, _, dispatcher = side.make("", {})
    with pytest.raises(NoBackend) as caught:
        side.call(dispatcher)
    assert type(caught.value) is NoBackend
    router.saturated = True
    with pytest.raises(Saturated):
        side.call(dispatcher, timeout_s=0.5)
    assert 0.4 < router.waits[-1] <= 0.5


def test_saturated_after_a_try_names_the_try(side):
    router, _, dispatcher = side.make("AB", {"A": Unreachable("refused")})
    router.mark_unreachable = lambda backend: setattr(router, "saturated", True)
    with pytest.raises(Saturated, match="tried: A"):
        side.call(dispatcher, timeout_s=1.0)


def test_the_budget_covers_all_attempts(side):
    def slow(lease):
        time.sleep(0.1)
        return Unreachable("refused late")

    router, transport, dispatcher = side.make("AB", {"A": slow, "B": "answer"})
    assert side.call(dispatcher, timeout_s=5.0) == "answer"
    assert 4.9 < router.waits[0] <= 5.0
    assert 4.7 < router.waits[1] <= 4.9
    assert 4.7 < transport.timeouts[1] <= 4.9


def test_a_spent_budget_is_a_timeout_that_names_the_tries(side):
    def slow(lease):
        time.sleep(0.1)
        return Unreachable("refused late")

    router, transport, dispatcher = side.make("AB", {"A": slow, "B": "answer"})
    with pytest.raises(TimeoutError, match="tried: A"):
        side.call(dispatcher, timeout_s=0.05)
    assert transport.sent == ["local:A"]
    assert router.held == []


def test_no_budget_at_all_is_a_timeout_and_not_a_number_is_an_error(side):
    router, transport, dispatcher = side.make("A", {"A": "answer"})
    for timeout_s in (0.0, -1.0):
        with pytest.raises(TimeoutError):
            side.call(dispatcher, timeout_s=timeout_s)
    with pytest.raises(ValueError, match="timeout_s"):
        side.call(dispatcher, timeout_s=float("nan"))
    assert transport.sent == []
    assert router.held == []


def test_without_budget_the_transport_gets_none(side):
    _, transport, dispatcher = side.make("A", {"A": "answer"})
    side.call(dispatcher)
    assert transport.timeouts == [None]


def test_on_decision_sees_every_decision(side):
    seen = []
    _, _, dispatcher = side.make(
        "AB",
        {"A": Unreachable("refused"), "B": "answer"},
        on_decision=lambda decision, lease: seen.append((decision.chosen, lease.node)),
    )
    side.call(dispatcher)
    assert seen == [("A", "A"), ("B", "B")]


def test_an_error_in_on_decision_releases(side):
    def on_decision(decision, lease):
        raise LookupError("in the log")

    router, transport, dispatcher = side.make("A", {"A": "answer"}, on_decision=on_decision)
    with pytest.raises(LookupError):
        side.call(dispatcher)
    assert transport.sent == []
    assert router.held == []


def test_an_interrupt_releases():
    router, _, dispatcher = Side("sync").make("A", {"A": KeyboardInterrupt()})
    with pytest.raises(KeyboardInterrupt):
        dispatcher.call("GREEN", "m", "request")
    assert router.held == []


async def test_cancelling_a_call_releases_and_cancels():
    router, transport, dispatcher = Side("async").make("A", {"A": asyncio.Event()})
    task = asyncio.ensure_future(dispatcher.call("GREEN", "m", "request"))
    while not transport.sent:
        await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert router.held == []


# --- streams


def stream_of(*items, nodes="AB", **options):
    router, transport, dispatcher = Side("async").make(nodes, {"A": items, "B": ["b"]}, **options)
    return router, transport, dispatcher.stream("GREEN", "m", "request")


async def test_a_stream_holds_its_lease_until_it_ends():
    router, transport, stream = stream_of(1, 2)
    assert router.held == []
    assert stream.node is None
    assert await anext(stream) == 1
    assert router.held
    assert stream.node == "A"
    assert await anext(stream) == 2
    assert router.held
    with pytest.raises(StopAsyncIteration):
        await anext(stream)
    assert router.held == []
    assert stream.node is None
    with pytest.raises(StopAsyncIteration):
        await anext(stream)
    assert transport.closed_streams == 1


async def test_an_empty_stream_is_an_answer():
    router, transport, stream = stream_of()
    assert [item async for item in stream] == []
    assert transport.sent == ["local:A"]
    assert router.held == []


@pytest.mark.parametrize("error", [Unreachable("x"), LeaseLost("x"), ConnectionLost("x")])
async def test_after_the_first_response_nothing_goes_elsewhere(error):
    router, transport, stream = stream_of(1, error, adopts=True)
    assert await anext(stream) == 1
    with pytest.raises(type(error)):
        await anext(stream)
    assert transport.sent == ["local:A"]
    assert router.held == []


async def test_closing_a_stream_closes_the_transports_and_releases():
    router, transport, stream = stream_of(1, 2)
    async with stream:
        assert await anext(stream) == 1
    assert transport.closed_streams == 1
    assert router.held == []
    await stream.aclose()
    with pytest.raises(StopAsyncIteration):
        await anext(stream)


async def test_a_stream_never_read_takes_nothing():
    router, transport, stream = stream_of(1)
    await stream.aclose()
    assert transport.sent == []
    assert router.leases == {}


async def test_cancelling_a_reader_ends_the_stream():
    router, transport, stream = stream_of(1, asyncio.Event())
    assert await anext(stream) == 1

    async def read():
        await anext(stream)

    reader = asyncio.ensure_future(read())
    for _ in range(5):
        await asyncio.sleep(0)
    with pytest.raises(RuntimeError, match="two tasks"):
        await anext(stream)
    with pytest.raises(RuntimeError, match="reads"):
        await stream.aclose()
    assert router.held
    reader.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reader
    assert router.held == []
    assert transport.closed_streams == 1


async def test_a_forgotten_stream_releases_at_once():
    router, transport, stream = stream_of(1, 2)
    gc.disable()
    try:
        assert await anext(stream) == 1
        assert router.held
        del stream
        assert router.held == []
    finally:
        gc.enable()
    for _ in range(5):
        await asyncio.sleep(0)
    assert transport.closed_streams == 1


async def test_leaving_a_loop_early_releases():
    router, _, dispatcher = Side("async").make("A", {"A": [1, 2, 3]})
    async for item in dispatcher.stream("GREEN", "m", "request"):
        assert item == 1
        break
    gc.collect()
    assert router.held == []
