"""The aio channel: a lease ends with its call, however that ends."""

from __future__ import annotations

import asyncio
import gc
import random
import threading
import time
import weakref
from collections import Counter

import grpc
import grpc.aio
import pytest
from grpc_aio_nodes import Node, Stub, held, nothing_held

import shmcoord.grpc


@pytest.fixture
def open_channel(segment):
    def make(**options):
        return shmcoord.grpc.aio.channel(segment, group="GREEN", **options)

    return make


async def requests(*words):
    for word in words:
        yield word


async def forever():
    yield "a"
    await asyncio.Event().wait()


@pytest.fixture
def no_gc():
    """What is given back here is given back by the last reference."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.parametrize("how", ["never read", "half iterated", "half read", "chat", "gather"])
async def test_a_dropped_stream_gives_its_lease_back(segment, open_channel, no_gc, how):
    async with Node(segment) as node, open_channel() as channel:
        stub = Stub(channel)
        await stub.Say("x")
        if how == "gather":
            call = stub.Gather()
            await call.write("a")
        elif how == "chat":
            call = stub.Chat(forever())
            async for word in call:
                assert word == "A: a"
                break
        else:
            call = stub.Count("then hold 3")
            if how == "half iterated":
                async for _ in call:
                    break
            elif how == "half read":
                await call.read()
        while sum(node.done.values()) < 2:
            await asyncio.sleep(0.005)
        assert held(segment) == 1
        told = []
        call.add_done_callback(told.append)
        gone = weakref.ref(call)
        del call
        await nothing_held(segment)  # so the handler has ended, too
        if how not in ("chat", "gather"):  # those see their requests end
            assert node.cancelled.is_set()
        assert len(told) == 1
        told.clear()
        assert gone() is None
        assert all(link.calls == 0 for link in channel._routes.links._open)
        assert channel._routes.active == 0


async def test_a_stream_is_dropped_by_the_collector_in_another_thread(segment, open_channel):
    async with Node(segment) as node, open_channel() as channel:
        stub = Stub(channel)
        await stub.Say("x")
        call = stub.Count("then hold 1")
        await call.read()
        cycle = [call]
        cycle.append(cycle)
        del call, cycle
        thread = threading.Thread(target=gc.collect)
        thread.start()
        thread.join()
        await nothing_held(segment)
        await asyncio.wait_for(node.cancelled.wait(), 5)
        assert channel._routes.active == 0


@pytest.mark.parametrize("kind", ["Say", "Gather", "Gather by writing"])
async def test_a_call_with_one_response_runs_alone(segment, open_channel, kind):
    """As with grpcio: it runs to its end whether or not somebody awaits or holds it."""
    async with Node(segment) as node, open_channel() as channel:
        stub = Stub(channel)
        for _ in range(2):
            told = []

            def tell(call, told=told):
                told.append(call.done())

            if kind == "Say":
                stub.Say("x").add_done_callback(tell)
            elif kind == "Gather":
                call = stub.Gather(requests("a", "b"))
                call.add_done_callback(tell)
                del call
            else:
                call = stub.Gather()
                call.add_done_callback(tell)
                await call.write("a")
                await call.done_writing()
                del call
            gc.collect()
            while not told:
                await asyncio.sleep(0.005)
            assert told == [True]
        assert sum(node.done.values()) == 2
        await nothing_held(segment)


@pytest.mark.parametrize("warm", [False, True], ids=["connecting", "connected"])
@pytest.mark.parametrize("kind", ["Say", "Count", "Gather", "Chat"])
async def test_cancelling(segment, open_channel, kind, warm):
    """As with grpcio: the call is cancelled, and whoever awaits gets a CancelledError."""
    async with Node(segment) as node, open_channel() as channel:
        stub = Stub(channel)
        if warm:
            await stub.Say("x")
            node.arrived.clear()
        say = {
            "Say": lambda: stub.Say("hold"),
            "Count": lambda: stub.Count("hold 1"),
            "Gather": lambda: stub.Gather(forever()),
            "Chat": lambda: stub.Chat(forever(), metadata=(("words", "hold"),)),
        }[kind]

        async def result(call):
            return await (call if hasattr(call, "__await__") else call.read())

        for way in ("call", "task", "at once", "task at once"):
            call = say()
            told = []
            call.add_done_callback(told.append)
            task = asyncio.ensure_future(result(call))
            if "at once" not in way:
                await node.arrived.wait()
                node.arrived.clear()
            elif way == "task at once":
                await asyncio.sleep(0)
            (task if "task" in way else call).cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert call.cancelled()
            assert call.done()
            assert await call.code() is grpc.StatusCode.CANCELLED
            assert told == [call]
            assert not call.cancel()
            await nothing_held(segment)
        assert channel._routes.active == 0


async def test_a_task_that_asks_for_the_code_does_not_cancel(segment, open_channel):
    async with Node(segment, capacity=1) as node, open_channel() as channel:
        stub = Stub(channel)
        calls = [stub.Say("hold"), stub.Say("x")]  # one under way, one waiting
        await node.arrived.wait()
        for call in calls:
            for question in (call.code, call.details, call.initial_metadata):
                task = asyncio.ensure_future(question())
                await asyncio.sleep(0.01)
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
        node.let_go.set()
        assert [await call for call in calls] == ["A: hold", "A: x"]


async def test_many_may_await_one_call(segment, open_channel):
    async with Node(segment) as node, open_channel() as channel:
        stub = Stub(channel)
        for _ in range(2):
            call = stub.Say("hold")

            async def wait(call=call):
                return await call

            tasks = [asyncio.ensure_future(wait()) for _ in range(3)]
            await node.arrived.wait()
            node.let_go.set()
            assert await asyncio.gather(*tasks) == ["A: hold"] * 3
            assert await call == "A: hold"
            node.let_go.clear()
            node.arrived.clear()


async def test_a_done_callback_that_fails_is_told_to_the_loop(segment, open_channel):
    problems = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, problem: problems.append(problem))
    async with Node(segment), open_channel() as channel:
        call = Stub(channel).Say("x")
        told = []
        call.add_done_callback(lambda call: 1 / 0)
        call.add_done_callback(told.append)
        assert await call == "A: x"
        assert told == [call]
        assert isinstance(problems[0]["exception"], ZeroDivisionError)
        await nothing_held(segment)


def test_a_loop_that_ends_gives_all_back(segment):
    """`asyncio.run` cancels what is left over, and nobody has closed the channel."""

    async def main():
        node = await Node(segment, capacity=2).start()
        stub = Stub(channel)
        tasks = [asyncio.ensure_future(wait(stub.Say("hold"))) for _ in range(4)]
        while node.done["Say"] < 2:
            await asyncio.sleep(0.005)
        await asyncio.sleep(0.05)
        assert len(channel._routes.waiting) == 2
        asyncio.get_running_loop().call_soon(asyncio.ensure_future, node.stop())
        tasks[0].cancel()
        node.node.leave()
        await node.server.stop(None)
        return tasks

    async def wait(call):
        return await call

    channel = shmcoord.grpc.aio.channel(segment, group="GREEN")
    tasks = asyncio.run(main())
    assert all(task.done() for task in tasks)
    assert channel._routes.active == 0
    segment.reap()
    assert held(segment) == 0


async def test_nothing_is_held_after_calls_of_all_kinds_and_ends(segment, open_channel):
    """Thousands of calls with random cancellations, deadlines, failures and dropped streams."""
    rng = random.Random(7)
    count = 2000
    ends = Counter()
    async with (
        Node(segment, "A", capacity=6) as a,
        Node(segment, "B", capacity=6) as b,
        open_channel(max_wait_s=2.0) as channel,
    ):
        stub = Stub(channel)

        async def source(number):
            for index in range(number):
                yield str(index)
                if rng.random() < 0.2:
                    await asyncio.sleep(0.001)
                if rng.random() < 0.05:
                    raise OSError("the caller's iterator fails")

        def begin():
            words = rng.choice(
                ["x", "x", "x", "fail INTERNAL", "fail UNAVAILABLE", "lose", "hold", "hold before"]
            )
            kind = rng.choice(["Say", "Count", "Gather", "Chat"])
            options = {"metadata": (("words", words),)}
            if words.startswith("hold") or rng.random() < 0.3:
                options["timeout"] = rng.choice([0.0, 0.001, 0.005, 0.02])
            if rng.random() < 0.2:
                options["wait_for_ready"] = True
            if kind == "Say":
                return stub.Say(words, **options)
            if kind == "Count":
                return stub.Count(f"{words} {rng.randrange(4)}", **options)
            argument = source(rng.randrange(4)) if rng.random() < 0.7 else None
            return getattr(stub, kind)(argument, **options)

        async def use(call):
            if hasattr(call, "write") and not call._iterates:
                for _ in range(rng.randrange(3)):
                    await call.write("w")
                if rng.random() < 0.7:
                    await call.done_writing()
                else:  # the node waits for more
                    return "dropped"
            if not hasattr(call, "read"):
                await call
            elif rng.random() < 0.5:
                async for _ in call:
                    if rng.random() < 0.2:
                        return "dropped"
            else:
                while await call.read() is not grpc.aio.EOF:
                    if rng.random() < 0.2:
                        return "dropped"
            return "ended"

        async def one():
            chance = rng.random()
            call = begin()
            if chance < 0.1:
                return "never awaited"
            task = asyncio.ensure_future(asyncio.wait_for(use(call), 5.0))
            if chance < 0.3:
                await asyncio.sleep(rng.choice([0, 0, 0.001, 0.005]))
                # A write of grpcio that waits for the metadata to be sent never ends if its call is
                # cancelled by another task.
                writes = hasattr(call, "write") and not call._iterates
                (task if chance < 0.2 or writes else call).cancel()
            del call
            return await task

        async def client():
            for _ in range(count // 20):
                try:
                    ends[await one()] += 1
                except asyncio.CancelledError:
                    ends["cancelled"] += 1
                except (grpc.RpcError, grpc.aio.InternalError, asyncio.InvalidStateError) as error:
                    code = error.code().name if isinstance(error, grpc.RpcError) else "invalid"
                    ends[code] += 1

        await asyncio.gather(*(client() for _ in range(20)))
        gc.collect()
        await nothing_held(segment)
        ended_s = time.monotonic() + 5.0
        while channel._routes.active and time.monotonic() < ended_s:
            await asyncio.sleep(0.005)  # the last of them have ended, and are just being told
        assert channel._routes.active == 0
        assert not channel._routes.waiting
        while any(link.calls for link in channel._routes.links._open):
            assert time.monotonic() < ended_s
            await asyncio.sleep(0.005)
        assert sum(ends.values()) == count
        wanted = {"ended", "dropped", "cancelled", "never awaited", "INTERNAL", "DEADLINE_EXCEEDED"}
        assert wanted <= set(ends), ends
        served = {status.node: status.served for status in segment.snapshot()}
        assert served == {"A": a.done.total(), "B": b.done.total()}
