"""Calls that end in every way there is, through both channels, for the leak test.

Every operation returns how it ended; the handlers count what they began.
"""

from __future__ import annotations

import asyncio
import inspect
import random
import threading
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from types import ModuleType
from typing import Any

import grpc
import grpc.aio

PATIENCE_S = 60.0
#: Deadlines, in seconds: most suffice, some do only now and then.
DEADLINES = (PATIENCE_S, PATIENCE_S, PATIENCE_S, 0.05, 0.01, 0.003, 0.0005)
#: More features in one place than fit into the buffers of gRPC.
MANY = 6000


class Tally:
    """What handlers began and ended, for each node; safe between threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.began: Counter[str] = Counter()

    def begin(self, node: str) -> None:
        with self._lock:
            self.began[node] += 1


def counted(base: type, node: str, tally: Tally) -> type:
    """A servicer for threads whose handlers count."""

    def counting(name: str) -> Callable[..., Any]:
        def handle(self: Any, request: Any, context: Any) -> Any:
            tally.begin(node)
            return getattr(base, name)(self, request, context)

        return handle

    return type(base.__name__, (base,), {name: counting(name) for name in _methods(base)})


def aio_counted(base: type, node: str, tally: Tally) -> type:
    """The same for event loops: each handler stays of its kind."""

    def counting(name: str) -> Callable[..., Any]:
        async def answer(self: Any, request: Any, context: Any) -> Any:
            tally.begin(node)
            return await getattr(base, name)(self, request, context)

        async def stream(self: Any, request: Any, context: Any) -> AsyncIterator[Any]:
            tally.begin(node)
            async for response in getattr(base, name)(self, request, context):
                yield response

        def plain(self: Any, request: Any, context: Any) -> Any:
            tally.begin(node)
            return getattr(base, name)(self, request, context)

        if inspect.isasyncgenfunction(getattr(base, name)):
            return stream
        return answer if inspect.iscoroutinefunction(getattr(base, name)) else plain

    return type(base.__name__, (base,), {name: counting(name) for name in _methods(base)})


def _methods(base: type) -> list[str]:
    return [name for name in dir(base) if name[0] != "_" and callable(getattr(base, name))]


class _Requests:
    """What clients of either kind ask for."""

    def __init__(self, services: ModuleType, channel: Any, seed: int) -> None:
        self.greeter = services.helloworld_pb2_grpc.GreeterStub(channel)
        self.guide = services.route_guide_pb2_grpc.RouteGuideStub(channel)
        self.services = services
        self.random = random.Random(seed)
        self.note = services.route_guide_pb2.RouteNote
        self.point = services.FEATURES[0].location

    def name(self) -> Any:
        """Of one who is greeted; mostly soon."""
        name = self.random.choice(("you", "you", "you", "sleep 0.002", "sleep 0.02"))
        return self.services.helloworld_pb2.HelloRequest(name=name)

    def named(self, name: str) -> Any:
        return self.services.helloworld_pb2.HelloRequest(name=name)

    def options(self) -> dict[str, Any]:
        given: dict[str, Any] = {"timeout": self.random.choice(DEADLINES)}
        if self.random.random() < 0.2:
            given["wait_for_ready"] = True
        if self.random.random() < 0.2:
            given["metadata"] = (("x-number", "7"), ("shmcoord-key", "seven"))
        return given

    def pause_s(self) -> float:
        return self.random.choice((0.0, 0.0, 0.0005, 0.002, 0.01))

    def few(self) -> Any:
        return self.services.everywhere()

    def many(self) -> Any:
        return self.services.route_guide_pb2.Rectangle()  # around point 0, 0

    def notes(self) -> list[Any]:
        return [self.note(location=self.point, message=str(n)) for n in range(4)]

    def chat(self, slow: str = "sleep 0.01") -> list[Any]:
        return [*self.notes(), self.note(location=self.point, message=slow)]


def features(services: ModuleType) -> list[Any]:
    """The usual ones, and many at point 0, 0."""
    return [*services.FEATURES, *(services.place(f"many {n}", 0, 0) for n in range(MANY))]


class Bug(Exception):
    """Of the client."""


class Threads(_Requests):
    """Operations of a client with threads."""

    def operations(self) -> list[Callable[[], object]]:
        names = [name for name in dir(self) if name.startswith("do_")]
        return [getattr(self, name) for name in names]

    def run(self, calls: int, seen: Counter[str]) -> None:
        operations = self.operations()
        for _ in range(calls):
            operation = self.random.choice(operations)
            try:
                operation()
                ended = "OK"
            except grpc.RpcError as error:
                ended = error.code().name
            except grpc.FutureCancelledError:
                ended = "CANCELLED"
            except Bug:
                ended = "client's exception"
            seen[f"{operation.__name__.removeprefix('do_')}: {ended}"] += 1

    def do_block(self) -> None:
        self.greeter.SayHello(self.name(), **self.options())

    def do_with_call(self) -> None:
        self.greeter.SayHello.with_call(self.name(), **self.options())

    def do_future(self) -> None:
        self.greeter.SayHello.future(self.name(), **self.options()).result()

    def do_future_cancelled(self) -> None:
        future = self.greeter.SayHello.future(self.name(), **self.options())
        self._wait(future)
        future.cancel()
        future.result()

    def do_future_dropped(self) -> None:
        self._wait(self.greeter.SayHello.future(self.name(), **self.options()))

    def do_read(self) -> None:
        for _ in self.guide.ListFeatures(self.few(), **self.options()):
            pass

    def do_read_many_and_cancel(self) -> None:
        call = self.guide.ListFeatures(self.many(), **self.options())
        for _ in range(self.random.randrange(4)):
            next(call)
        call.cancel()

    def do_read_many_and_drop(self) -> None:
        call = self.guide.ListFeatures(self.many(), **self.options())
        for _ in range(self.random.randrange(4)):
            next(call)

    def do_read_and_raise(self) -> None:
        for _ in self.guide.ListFeatures(self.many(), **self.options()):
            raise Bug

    def do_route(self) -> None:
        self.guide.RecordRoute(iter([self.point] * 5), **self.options())

    def do_route_that_raises(self) -> None:
        self.guide.RecordRoute(self._raising(), **self.options())

    def do_route_cancelled(self) -> None:
        future = self.guide.RecordRoute.future(iter([self.point] * 5), **self.options())
        self._wait(future)
        future.cancel()
        future.result()

    def do_chat(self) -> None:
        for _ in self.guide.RouteChat(iter(self.chat()), **self.options()):
            pass

    def do_chat_and_drop(self) -> None:
        call = self.guide.RouteChat(iter(self.chat("sleep 5")), **self.options())
        for _ in range(self.random.randrange(4)):
            next(call)

    def do_chat_and_cancel(self) -> None:
        call = self.guide.RouteChat(iter(self.chat("sleep 5")), **self.options())
        self._wait(call)
        call.cancel()
        for _ in call:
            pass

    def do_bug(self) -> None:
        self.greeter.SayHello(self.named("bug"), **self.options())

    def do_abort(self) -> None:
        self.greeter.SayHello(self.named(""), **self.options())

    def do_bug_in_chat(self) -> None:
        for _ in self.guide.RouteChat(iter(self.chat("bug")), **self.options()):
            pass

    def do_no_such_method(self) -> None:
        self.greeter.SayHelloAgain(self.named("you"), **self.options())

    def do_not_serializable(self) -> None:
        self.greeter.SayHello(object(), **self.options())

    def _raising(self) -> Iterator[Any]:
        yield self.point
        raise Bug

    def _wait(self, call: Any) -> None:
        """Some time, or until it is over."""
        ended = threading.Event()
        if call.add_callback(ended.set):
            ended.wait(self.pause_s())


class Tasks(_Requests):
    """Operations of a client on an event loop."""

    async def run(self, calls: int, seen: Counter[str]) -> None:
        names = [name for name in dir(self) if name.startswith("do_")]
        operations = [getattr(self, name) for name in names]
        for _ in range(calls):
            operation = self.random.choice(operations)
            try:
                await operation()
                ended = "OK"
            except grpc.aio.AioRpcError as error:
                ended = error.code().name
            except asyncio.CancelledError:
                ended = "CANCELLED"
            except asyncio.TimeoutError:
                ended = "task cancelled"
            except Bug:
                ended = "client's exception"
            except (grpc.aio.InternalError, asyncio.InvalidStateError):  # to a call that has ended
                ended = "write failed"
            seen[f"aio {operation.__name__.removeprefix('do_')}: {ended}"] += 1

    async def do_call(self) -> None:
        await self.greeter.SayHello(self.name(), **self.options())

    async def do_call_cancelled(self) -> None:
        call = self.greeter.SayHello(self.name(), **self.options())
        await asyncio.sleep(self.pause_s())
        call.cancel()
        await call

    async def do_task_cancelled(self) -> None:
        await asyncio.wait_for(
            self._awaited(self.greeter.SayHello(self.name(), **self.options())), self.pause_s()
        )

    async def do_call_dropped(self) -> None:
        self.greeter.SayHello(self.name(), **self.options())
        await asyncio.sleep(self.pause_s())

    async def do_read(self) -> None:
        async for _ in self.guide.ListFeatures(self.few(), **self.options()):
            pass

    async def do_read_many_and_cancel(self) -> None:
        call = self.guide.ListFeatures(self.many(), **self.options())
        for _ in range(self.random.randrange(4)):
            await call.read()
        call.cancel()

    async def do_read_many_and_drop(self) -> None:
        call = self.guide.ListFeatures(self.many(), **self.options())
        for _ in range(self.random.randrange(4)):
            await call.read()

    async def do_iterate_and_drop(self) -> None:
        async for _ in self.guide.ListFeatures(self.many(), **self.options()):
            break

    async def do_read_and_raise(self) -> None:
        async for _ in self.guide.ListFeatures(self.many(), **self.options()):
            raise Bug

    async def do_reading_task_cancelled(self) -> None:
        async def read_all() -> None:
            async for _ in self.guide.RouteChat(iter(self.chat("sleep 5")), **self.options()):
                pass

        await asyncio.wait_for(read_all(), self.pause_s())

    async def do_route(self) -> None:
        await self.guide.RecordRoute(iter([self.point] * 5), **self.options())

    async def do_route_written(self) -> None:
        call = self.guide.RecordRoute(**self.options())
        for _ in range(3):
            await call.write(self.point)
        await call.done_writing()
        await call

    async def do_route_half_written_and_dropped(self) -> None:
        call = self.guide.RecordRoute(**self.options())
        await call.write(self.point)

    async def do_route_that_raises(self) -> None:
        await self.guide.RecordRoute(self._raising(), **self.options())

    async def do_chat(self) -> None:
        async for _ in self.guide.RouteChat(iter(self.chat()), **self.options()):
            pass

    async def do_chat_and_cancel(self) -> None:
        call = self.guide.RouteChat(iter(self.chat("sleep 5")), **self.options())
        await asyncio.sleep(self.pause_s())
        call.cancel()
        await call.read()

    async def do_chat_written_and_dropped(self) -> None:
        call = self.guide.RouteChat(**self.options())
        for note in self.notes()[:2]:
            await call.write(note)
        await call.read()

    async def do_bug(self) -> None:
        await self.greeter.SayHello(self.named("bug"), **self.options())

    async def do_abort(self) -> None:
        await self.greeter.SayHello(self.named(""), **self.options())

    async def do_bug_in_chat(self) -> None:
        async for _ in self.guide.RouteChat(iter(self.chat("bug")), **self.options()):
            pass

    async def do_no_such_method(self) -> None:
        await self.greeter.SayHelloAgain(self.named("you"), **self.options())

    async def _awaited(self, call: Any) -> Any:
        return await call

    async def _raising(self) -> AsyncIterator[Any]:
        yield self.point
        raise Bug


def by_threads(
    services: ModuleType, channel: grpc.Channel, calls: int, threads: int, seed: int
) -> Counter[str]:
    """Run so many calls from so many threads; how they ended."""
    tallies: list[Counter[str]] = [Counter() for _ in range(threads)]
    failed: list[BaseException] = []

    def work(number: int) -> None:
        try:
            Threads(services, channel, seed + number).run(calls // threads, tallies[number])
        except BaseException as error:  # noqa: BLE001
            failed.append(error)

    workers = [threading.Thread(target=work, args=(number,)) for number in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    if failed:
        raise failed[0]
    return sum(tallies, Counter())


async def by_tasks(
    services: ModuleType, channel: grpc.aio.Channel, calls: int, tasks: int, seed: int
) -> Counter[str]:
    """Run so many calls from so many tasks; how they ended."""
    tallies: list[Counter[str]] = [Counter() for _ in range(tasks)]
    work: list[Coroutine[Any, Any, None]] = [
        Tasks(services, channel, seed + number).run(calls // tasks, tallies[number])
        for number in range(tasks)
    ]
    await asyncio.gather(*work)
    return sum(tallies, Counter())
