"""The gateway against fake nodes: what it asks for, forwards, adds up and reports."""

import asyncio
from collections.abc import AsyncIterator

import grpc
import grpc.aio
import pytest
from cluster_helpers import Teams

from servers import config
from servers.gateway import GatewayService
from servers.merging import SourceError, merged
from servers.pb import shmcoord_cluster_pb2 as pb
from servers.pb import shmcoord_cluster_pb2_grpc as pb_grpc
from servers.table import to_rows, to_table

NODES = {"GREEN": "B", "PINK": "D"}


class FakeParts:
    """Answers each team with the chunks given for it, or raises."""

    def __init__(self, **answers: object) -> None:
        self.answers = answers
        self.asked: dict[str, pb.PartRequest] = {}
        self.timeouts: list[float | None] = []
        self.closed: list[str] = []
        self.begun = asyncio.Event()

    async def answer(
        self, team: str, request: pb.PartRequest, timeout_s: float | None
    ) -> AsyncIterator[pb.PartChunk]:
        self.asked[team] = request
        self.timeouts.append(timeout_s)
        self.begun.set()
        answer = self.answers[team]
        try:
            if isinstance(answer, Exception):
                raise answer
            if answer == "hang":
                await asyncio.sleep(3600)
            rows = 0
            for batch in answer:  # type: ignore[attr-defined]
                rows += len(batch)
                yield pb.PartChunk(
                    node=NODES[team],
                    table=to_table(("word", "n"), ("VARCHAR", "BIGINT"), batch)
                    if not request.aggregate
                    else to_table(
                        ("group", "rows", "values", "sum"),
                        ("VARCHAR", "BIGINT", "BIGINT", "BIGINT"),
                        batch,
                    ),
                )
            yield pb.PartChunk(
                node=NODES[team],
                summary=pb.PartSummary(team=team, node=NODES[team], matched=rows, sent=rows),
            )
        finally:
            self.closed.append(team)


@pytest.fixture
async def gateway():
    """Serves a gateway over the fake parts; returns a stub for it."""
    servers, channels = [], []

    async def serve(parts: FakeParts) -> pb_grpc.GatewayStub:
        server = grpc.aio.server()
        pb_grpc.add_GatewayServicer_to_server(
            GatewayService(config.load(), Teams(parts.answer)), server
        )
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        servers.append(server)
        channels.append(grpc.aio.insecure_channel(f"127.0.0.1:{port}"))
        return pb_grpc.GatewayStub(channels[-1])

    yield serve
    for channel in channels:
        await channel.close()
    for server in servers:
        await server.stop(None)


async def gather(call) -> tuple[list[tuple], pb.QuerySummary]:
    rows: list[tuple] = []
    summary = None
    async for chunk in call:
        assert summary is None, "the summary is the last chunk"
        if chunk.HasField("summary"):
            summary = chunk.summary
        else:
            rows += [(chunk.rows.team, chunk.rows.node, *row) for row in to_rows(chunk.rows.table)]
    assert summary is not None
    return rows, summary


async def test_both_teams_are_asked_and_forwarded(gateway):
    parts = FakeParts(GREEN=[[("a", 1)], [("b", None)]], PINK=[[("c", 3)]])
    stub = await gateway(parts)
    rows, summary = await gather(stub.Query(pb.QueryRequest(words=["x", "y"])))
    assert sorted(rows) == [
        ("GREEN", "B", "a", 1),
        ("GREEN", "B", "b", None),
        ("PINK", "D", "c", 3),
    ]
    assert {name: list(part.words) for name, part in parts.asked.items()} == {
        "GREEN": ["x", "y"],
        "PINK": ["x", "y"],
    }
    assert [(part.team, part.node, part.matched) for part in summary.parts] == [
        ("GREEN", "B", 2),
        ("PINK", "D", 1),
    ]
    assert (summary.matched, summary.sent) == (3, 3)
    assert summary.seconds > 0


async def test_only_the_teams_named_are_asked(gateway):
    parts = FakeParts(PINK=[[("c", 3)]])
    stub = await gateway(parts)
    rows, _ = await gather(stub.Query(pb.QueryRequest(teams=["PINK", "PINK"])))
    assert rows == [("PINK", "D", "c", 3)]
    assert list(parts.asked) == ["PINK"]


@pytest.mark.parametrize("limit", [1, 2, 3, 4, 100])
async def test_the_limit_holds_over_all_teams(gateway, limit: int):
    parts = FakeParts(GREEN=[[("a", 1), ("b", 2)]], PINK=[[("c", 3)], [("d", 4)]])
    stub = await gateway(parts)
    rows, summary = await gather(stub.Query(pb.QueryRequest(limit=limit)))
    assert len(rows) == summary.sent == min(limit, 4)
    assert summary.matched == 4
    assert parts.asked["GREEN"].limit == limit


async def test_partial_groups_are_added_up(gateway):
    parts = FakeParts(
        GREEN=[[("a", 3, 2, 10), ("b", 1, 0, None)], [(None, 1, 1, 5)]],
        PINK=[[("a", 2, 1, 2), ("c", 1, 1, -4)]],
    )
    stub = await gateway(parts)
    rows, summary = await gather(stub.Query(pb.QueryRequest(aggregate=True)))
    assert [row[2:] for row in rows] == [
        ("a", 5, 4.0),
        ("b", 1, None),
        ("c", 1, -4.0),
        (None, 1, 5.0),
    ]
    assert summary.sent == 4


def ended(code: grpc.StatusCode) -> grpc.aio.AioRpcError:
    """How a part ends that a node, or the channel, did not carry out."""
    return grpc.aio.AioRpcError(code, grpc.aio.Metadata(), grpc.aio.Metadata(), "because")


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ended(grpc.StatusCode.RESOURCE_EXHAUSTED), grpc.StatusCode.RESOURCE_EXHAUSTED),
        (ended(grpc.StatusCode.DEADLINE_EXCEEDED), grpc.StatusCode.DEADLINE_EXCEEDED),
        (ended(grpc.StatusCode.CANCELLED), grpc.StatusCode.UNAVAILABLE),
        (RuntimeError("bug"), grpc.StatusCode.INTERNAL),
    ],
)
async def test_a_part_that_fails_ends_the_query_and_the_other_part(gateway, error, code):
    parts = FakeParts(GREEN=error, PINK="hang")
    stub = await gateway(parts)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await gather(stub.Query(pb.QueryRequest()))
    assert caught.value.code() is code
    assert caught.value.details().startswith("team GREEN: ")
    assert sorted(parts.closed) == ["GREEN", "PINK"]


@pytest.mark.parametrize(
    ("request_", "code", "says"),
    [
        (pb.QueryRequest(teams=["BLUE"]), grpc.StatusCode.INVALID_ARGUMENT, "no team BLUE"),
        (pb.QueryRequest(words=["x"] * 65), grpc.StatusCode.INVALID_ARGUMENT, "64 words"),
    ],
)
async def test_what_cannot_be_asked_is_refused(gateway, request_, code, says: str):
    parts = FakeParts()
    stub = await gateway(parts)
    with pytest.raises(grpc.aio.AioRpcError, match=says) as caught:
        await gather(stub.Query(request_))
    assert caught.value.code() is code
    assert not parts.asked


async def test_a_client_that_cancels_ends_the_parts(gateway):
    parts = FakeParts(GREEN="hang", PINK="hang")
    stub = await gateway(parts)
    call = stub.Query(pb.QueryRequest())
    reading = asyncio.ensure_future(gather(call))
    await parts.begun.wait()
    reading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reading
    async with asyncio.timeout(5) if hasattr(asyncio, "timeout") else _NoTimeout():
        while len(parts.closed) < 2:
            await asyncio.sleep(0.01)


class _NoTimeout:
    async def __aenter__(self) -> None: ...

    async def __aexit__(self, *_: object) -> None: ...


async def test_the_deadline_is_passed_on(gateway):
    parts = FakeParts(GREEN=[], PINK=[])
    stub = await gateway(parts)
    await gather(stub.Query(pb.QueryRequest(), timeout=10))
    assert all(timeout is not None and 9 < timeout < 10 for timeout in parts.timeouts)
    parts.timeouts.clear()
    await gather(stub.Query(pb.QueryRequest()))
    assert parts.timeouts == [30.0, 30.0]  # the configuration's


async def count(to: int, made: list[int]) -> AsyncIterator[int]:
    for number in range(to):
        made.append(number)
        yield number


async def test_merging_gives_all_items_in_each_source_s_order():
    made: list[int] = []
    async with merged({"a": count(50, made), "b": count(30, made)}) as items:
        found = [item async for item in items]
    assert [number for key, number in found if key == "a"] == list(range(50))
    assert [number for key, number in found if key == "b"] == list(range(30))


async def test_a_slow_reader_slows_the_sources_down():
    made: list[int] = []
    async with merged({"a": count(1000, made)}, ahead=4) as items:
        async for _ in items:
            await asyncio.sleep(0.01)
            assert len(made) <= 1 + 4 + 1 + 1
            break


async def test_a_source_that_fails_is_named():
    async def broken() -> AsyncIterator[int]:
        yield 1
        raise RuntimeError("no")

    async def read() -> None:
        async with merged({"bad": broken()}) as items:
            async for _ in items:
                pass

    with pytest.raises(SourceError) as caught:
        await read()
    assert caught.value.key == "bad"
    assert isinstance(caught.value.__cause__, RuntimeError)
