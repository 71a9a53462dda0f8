"""The aio channel: all four kinds of call, their arguments, and what the caller is told."""

from __future__ import annotations

import asyncio
import os
import threading

import grpc
import grpc.aio
import pytest
from google.rpc.error_details_pb2 import ErrorInfo
from grpc_aio_nodes import Node, Stub, held, nothing_held
from grpc_status import rpc_status

import shmcoord.grpc
from shmcoord import NoBackend, Router, Saturated
from shmcoord.grpc import served_by


@pytest.fixture
def open_channel(segment):
    def make(**options):
        return shmcoord.grpc.aio.channel(segment, group="GREEN", **options)

    return make


async def requests(*words):
    for word in words:
        yield word


# --- the four kinds


async def test_all_four_kinds(segment, open_channel):
    async with Node(segment), open_channel() as channel:
        stub = Stub(channel)
        for _ in range(2):  # waiting for the connection, then on it
            assert await stub.Say("hello") == "A: hello"
            assert [word async for word in stub.Count(" 2")] == ["A 0", "A 1"]
            assert await stub.Gather(requests("a", "b")) == "A: a+b"
            assert await stub.Gather(iter(["a", "b"])) == "A: a+b"
            assert [w async for w in stub.Chat(requests("a", "b"))] == ["A: a", "A: b"]
        await nothing_held(segment)


async def test_reading_and_writing(segment, open_channel):
    async with Node(segment), open_channel() as channel:
        stub = Stub(channel)
        for _ in range(2):
            call = stub.Count(" 2")
            assert [await call.read() for _ in range(3)] == ["A 0", "A 1", grpc.aio.EOF]
            assert await call.read() is grpc.aio.EOF
            call = stub.Gather()
            await call.write("a")
            await call.write("b")
            await call.done_writing()
            assert await call == "A: a+b"
            call = stub.Chat()
            for word in ("a", "b"):
                await call.write(word)
                assert await call.read() == f"A: {word}"
            await call.done_writing()
            assert await call.read() is grpc.aio.EOF
            assert await call.code() is grpc.StatusCode.OK
            with pytest.raises(asyncio.InvalidStateError):
                await call.write("late")
        await nothing_held(segment)


async def test_styles_are_not_mixed(segment, open_channel):
    async with Node(segment), open_channel() as channel:
        stub = Stub(channel)
        for _ in range(2):
            call = stub.Count(" 1")
            call.__aiter__()
            with pytest.raises(grpc.aio.UsageError):
                await call.read()
            call = stub.Chat(requests("a"))
            with pytest.raises(grpc.aio.UsageError):
                await call.write("b")
            with pytest.raises(grpc.aio.UsageError):
                await call.done_writing()
            await call.read()
            with pytest.raises(grpc.aio.UsageError):
                call.__aiter__()


async def test_a_second_reader_fails_alone(segment, open_channel):
    async with Node(segment) as node, open_channel() as channel:
        stub = Stub(channel)
        for _ in range(2):
            call = stub.Count("then hold 2")
            assert await call.__anext__() == "A 0"
            assert await call.__anext__() == "A 1"
            reading = asyncio.ensure_future(call.__anext__())
            await asyncio.sleep(0)
            with pytest.raises(RuntimeError, match="already running"):
                await call.__anext__()
            node.let_go.set()
            with pytest.raises(StopAsyncIteration):
                await reading
            assert await call.code() is grpc.StatusCode.OK
            node.let_go.clear()
        await nothing_held(segment)


async def test_calls_are_what_the_public_interface_says(segment, open_channel):
    kinds = {
        "Say": (grpc.aio.UnaryUnaryMultiCallable, grpc.aio.UnaryUnaryCall),
        "Count": (grpc.aio.UnaryStreamMultiCallable, grpc.aio.UnaryStreamCall),
        "Gather": (grpc.aio.StreamUnaryMultiCallable, grpc.aio.StreamUnaryCall),
        "Chat": (grpc.aio.StreamStreamMultiCallable, grpc.aio.StreamStreamCall),
    }
    async with Node(segment) as node, open_channel() as channel:
        assert isinstance(channel, grpc.aio.Channel)
        stub = Stub(channel, _registered_method=True)
        for name, (method, kind) in kinds.items():
            assert isinstance(getattr(stub, name), method)
            for warm in (False, True):  # with a wait for the connection, and without
                if not warm:
                    await channel.close()
                    channel = open_channel()
                    stub = Stub(channel, _registered_method=True)
                argument = {"Say": "x", "Count": " 1"}.get(name) or requests("x")
                call = getattr(stub, name)(argument, timeout=9.0)
                assert isinstance(call, kind)
                assert not call.done()
                assert not call.cancelled()
                assert 8.0 < call.time_remaining() <= 9.0
                told = []
                call.add_done_callback(told.append)
                await call.wait_for_connection()
                assert type(await call.initial_metadata()) is grpc.aio.Metadata
                if hasattr(call, "__aiter__"):
                    assert [word async for word in call]
                else:
                    assert await call
                assert await call.code() is grpc.StatusCode.OK
                assert await call.details() == ""
                assert (await call.trailing_metadata())["shmcoord-node"] == "A"
                assert await call.debug_error_string() is not None
                assert call.done()
                assert told == [call]
                call.add_done_callback(told.append)
                assert told == [call, call]
                assert not call.cancel()
                assert "A" in repr(call)
        assert node.done == {"Say": 2, "Count": 2, "Gather": 2, "Chat": 2}
        await channel.close()


# --- arguments


@pytest.mark.parametrize("make", [tuple, list, lambda pairs: grpc.aio.Metadata(*pairs)])
async def test_metadata_travels_without_what_is_for_the_router(segment, open_channel, make):
    pairs = [
        ("mine", "1"),
        ("mine-bin", b"\0"),
        ("shmcoord-cost", "3"),
        ("shmcoord-key", "user 7"),
        ("shmcoord-lease", "of another call"),
    ]
    async with Node(segment) as node, open_channel(policy="affinity") as channel:
        stub = Stub(channel)
        for _ in range(2):
            call = stub.Say("hold", metadata=make(pairs))
            await node.arrived.wait()
            assert segment.status("A").queue == 3
            node.let_go.set()
            assert await call == "A: hold"
            sent = node.metadata[-1]
            assert (sent["mine"], sent["mine-bin"]) == ("1", b"\0")
            assert sent["shmcoord-lease"] != "of another call"
            assert not {"shmcoord-cost", "shmcoord-key"} & set(sent)
            node.arrived.clear()
            node.let_go.clear()
        with pytest.raises(ValueError, match="many"):
            stub.Say("x", metadata=(("shmcoord-cost", "many"),))
        with pytest.raises(ValueError, match="cost"):
            stub.Say("x", metadata=(("shmcoord-cost", "0"),))
        assert await stub.Say("x") == "A: x"
        await nothing_held(segment)


async def test_the_key_chooses_the_node(segment, open_channel):
    async with Node(segment, "A"), Node(segment, "B"), open_channel(policy="affinity") as channel:
        stub = Stub(channel)
        chosen = {}
        for index in range(40):
            key = f"user {index % 10}"
            await stub.Say("x", metadata=(("shmcoord-key", key),))
            chosen.setdefault(key, set()).add(served_by.get())
        assert all(len(nodes) == 1 for nodes in chosen.values())
        assert set.union(*chosen.values()) == {"A", "B"}


async def test_the_deadline(segment, open_channel):
    async with Node(segment), open_channel() as channel:
        stub = Stub(channel)
        for _ in range(2):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stub.Say("hold", timeout=0.1)
            assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                async for _ in stub.Count("then hold 1", timeout=0.1):
                    pass
            assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        await nothing_held(segment)


class Watching(grpc.aio.UnaryUnaryClientInterceptor):
    """Keeps the details of each call."""

    def __init__(self):
        self.seen = []

    async def intercept_unary_unary(self, continuation, details, request):
        self.seen.append(details)
        return await continuation(details, request)


async def test_compression_is_passed_on(segment, open_channel):
    watching = Watching()
    async with Node(segment), open_channel(interceptors=[watching]) as channel:
        await Stub(channel).Say("x", compression=grpc.Compression.Gzip)
        assert ("grpc-internal-encoding-request", "gzip") in tuple(watching.seen[0].metadata)


async def test_call_credentials_over_tls(segment, open_channel, tmp_path):
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    maker = await asyncio.create_subprocess_exec(
        *("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"),
        *("-keyout", str(key), "-out", str(certificate), "-subj", "/CN=localhost"),
        *("-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"),
        stderr=asyncio.subprocess.DEVNULL,
    )
    assert await maker.wait() == 0
    server = grpc.ssl_server_credentials([(key.read_bytes(), certificate.read_bytes())])
    client = grpc.ssl_channel_credentials(certificate.read_bytes())
    async with (
        Node(segment, credentials=server) as node,
        open_channel(credentials=client) as channel,
    ):
        token = grpc.access_token_call_credentials("secret")
        assert await Stub(channel).Say("x", credentials=token) == "A: x"
        assert node.metadata[-1]["authorization"] == "Bearer secret"


async def test_over_a_unix_socket(segment, open_channel, tmp_path):
    path = f"unix:{tmp_path}/node"
    async with Node(segment, address=path), open_channel() as channel:
        assert await Stub(channel).Say("x") == "A: x"


async def test_wrong_arguments(segment):
    make = shmcoord.grpc.aio.channel
    with pytest.raises(TypeError, match="either"):
        make(group="GREEN")
    with Router(segment) as router, pytest.raises(TypeError, match="either"):
        make(segment, group="GREEN", router=router)
    with pytest.raises(ValueError, match="negative"):
        make(segment, group="GREEN", max_wait_s=-1.0)
    with pytest.raises(TypeError, match="several methods"):
        make(segment, group="GREEN", idempotent="/x/Y")


# --- what the caller is told


async def test_the_context_names_the_node(segment, open_channel):
    async with Node(segment, "A", capacity=1) as node, open_channel() as channel:
        stub = Stub(channel)
        assert served_by.get() is None
        await stub.Say("x")  # it waited for the connection
        assert served_by.get() == "A"
        node.arrived.clear()
        on_a = stub.Say("hold")
        await node.arrived.wait()
        async with Node(segment, "B", capacity=1) as other:
            on_b = stub.Say("hold")  # waits for the connection to B
            assert served_by.get() == "A"
            await other.arrived.wait()
            waiting = stub.Count(" 1")  # waits for capacity
            other.let_go.set()
            await on_b
            assert served_by.get() == "B"
            served_by.set(None)
            async for _ in waiting:
                assert served_by.get() == "B"
            served_by.set(None)
            stub.Say("x")
            assert served_by.get() == "B", "told by the stub where a node is free"
            node.let_go.set()
            await on_a


async def test_nobody_is_there(segment, open_channel):
    async with open_channel() as channel:
        stub = Stub(channel)
        calls = [stub.Say("x"), stub.Count(" 1"), stub.Gather(requests("x")), stub.Chat()]
        for call in calls:
            assert call.done()
            told = []
            call.add_done_callback(told.append)
            assert told == [call]
            assert await call.code() is grpc.StatusCode.UNAVAILABLE
            assert "no node of group 'GREEN'" in await call.details()
            assert not call.cancelled()
            assert not call.cancel()
            assert len(await call.initial_metadata()) == 0
            status = await rpc_status.aio.from_call(call)
            info = ErrorInfo()
            assert status.details[0].Unpack(info)
            assert (info.reason, info.domain) == ("NO_BACKEND", "shmcoord")
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await calls[0]
        assert isinstance(caught.value.__cause__, NoBackend)
        assert rpc_status.from_call(caught.value).message == caught.value.details()
        with pytest.raises(grpc.aio.AioRpcError):
            [_ async for _ in calls[1]]
        for attempt in (calls[3].read(), calls[3].write("x"), calls[2].wait_for_connection()):
            with pytest.raises(grpc.aio.AioRpcError):
                await attempt


async def test_all_are_full(segment, open_channel):
    async with Node(segment, capacity=1) as node, open_channel() as channel:
        stub = Stub(channel)
        first = stub.Say("hold")
        await node.arrived.wait()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.Say("x", timeout=0.1)
        error = caught.value
        assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert isinstance(error.__cause__, Saturated)
        assert isinstance(error.trailing_metadata(), grpc.aio.Metadata)
        info = ErrorInfo()
        assert rpc_status.from_call(error).details[0].Unpack(info)
        assert info.metadata["node.A"].startswith("BUSY, queue 1 of 1")
        assert node.seen["Say"] == 1
        node.let_go.set()
        assert await first == "A: hold"


async def test_errors_of_the_handler_come_as_they_are(segment, open_channel):
    async with Node(segment) as node, open_channel() as channel:
        stub = Stub(channel)
        for code in ("INVALID_ARGUMENT", "UNAVAILABLE"):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stub.Say(f"fail {code}")
            assert caught.value.code() is grpc.StatusCode[code]
            assert caught.value.details() == f"said {code}"
            assert caught.value.trailing_metadata()["shmcoord-node"] == "A"
        assert node.done["Say"] == 2, "neither was sent again"
        await nothing_held(segment)


async def test_a_call_that_grpcio_refuses_to_make_holds_nothing(segment, open_channel):
    async with Node(segment) as node, open_channel() as channel:
        stub = Stub(channel)
        for _ in range(2):
            with pytest.raises(Exception, match="execute_batch"):
                await stub.Say("x", metadata=(("Not Allowed", "x"),), timeout=5.0)
            assert held(segment) == 0
        assert not node.seen


# --- the loop


def test_one_channel_per_loop(segment, open_channel):
    channel = open_channel()
    stub = Stub(channel)
    first, second = asyncio.new_event_loop(), asyncio.new_event_loop()

    async def begin():
        node = await Node(segment).start()
        assert await stub.Say("x") == "A: x"
        return node

    async def call():
        await stub.Say("x")

    node = first.run_until_complete(begin())
    with pytest.raises(RuntimeError, match="another event loop"):
        second.run_until_complete(call())

    async def in_a_thread():
        errors = []

        def work():
            try:
                stub.Say("x")
            except RuntimeError as error:
                errors.append(str(error))

        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        return errors

    [error] = first.run_until_complete(in_a_thread())
    assert "another thread" in error
    # As with grpcio, the stub may be called between two runs of the loop.
    asyncio.set_event_loop(first)
    try:
        assert first.run_until_complete(stub.Say("y")) == "A: y"
    finally:
        asyncio.set_event_loop(None)
    first.run_until_complete(channel.close())
    first.run_until_complete(node.stop())
    first.close()
    second.close()


def test_a_channel_made_before_its_loop(segment):
    async def main():
        async with Node(segment):
            result = await stub.Say("x")
            await channel.close()
            return result

    channel = shmcoord.grpc.aio.channel(segment, group="GREEN")
    stub = Stub(channel)
    assert asyncio.run(main()) == "A: x"


async def test_a_router_that_is_the_callers_stays_open(segment):
    with Router(segment) as router:
        async with Node(segment):
            channel = shmcoord.grpc.aio.channel(group="GREEN", router=router)
            assert await Stub(channel).Say("x") == "A: x"
            await channel.close()
            assert not router.closed
            router.pick("GREEN")
            channel = shmcoord.grpc.aio.channel(group="GREEN", router=router)
            assert await Stub(channel).Say("x") == "A: x"
            router.close()
            with pytest.raises(ValueError, match="closed"):
                Stub(channel).Say("x")
            await channel.close()


async def test_a_name_of_a_segment_will_do(segment):
    async with Node(segment), shmcoord.grpc.aio.channel(segment.name, group="GREEN") as channel:
        assert await Stub(channel).Say("x") == "A: x"
    assert os.path.exists(f"/dev/shm/{segment.name}")
