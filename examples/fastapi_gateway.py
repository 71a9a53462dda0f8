"""A gateway: `python examples/fastapi_gateway.py 9100` sends what it gets to the workers.

Try `curl -i localhost:9100/work`. Where all workers are busy for two seconds the answer is 503.
"""

import contextlib
import sys
from collections.abc import AsyncIterator

import httpx
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

import shmcoord.http

# Of one connection only, and so not passed on (RFC 9110, section 7.6.1).
HOP_BY_HOP = {
    *("connection", "keep-alive", "proxy-authenticate", "proxy-authorization", "te", "trailer"),
    *("transfer-encoding", "upgrade"),
}
PORT = int(sys.argv[1]) if len(sys.argv) > 1 else 9100


@contextlib.asynccontextmanager
async def lifespan(api: FastAPI) -> AsyncIterator[None]:
    """Hold one client for all requests."""
    transport = shmcoord.http.AsyncTransport("shm_example", group="WEB")
    timeout = httpx.Timeout(30.0, pool=2.0)  # pool: how long a request waits for a free worker
    async with httpx.AsyncClient(transport=transport, timeout=timeout) as client:
        api.state.client = client
        yield


api = FastAPI(lifespan=lifespan, openapi_url=None)
api.add_middleware(  # so that `inspect` shows it; and it makes a 503 of Saturated and NoBackend
    shmcoord.http.Middleware,
    node=f"gateway-{PORT}",
    segment="shm_example",
    group="GATEWAY",
    endpoint=f"127.0.0.1:{PORT}",
)


class Forwarded(StreamingResponse):
    """A worker's answer, which is closed however the client's connection ends."""

    def __init__(self, answer: httpx.Response) -> None:
        super().__init__(answer.aiter_raw(), answer.status_code)
        self.answer = answer
        self.raw_headers = [
            (name.lower(), value)
            for name, value in answer.headers.raw
            if name.decode().lower() not in HOP_BY_HOP
        ]
        self.headers["x-served-by"] = answer.extensions["shmcoord_node"]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it on; an answer that stayed open would hold its connection."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self.answer.aclose()


@api.api_route("/{path:path}", methods=["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE"])
async def forward(request: Request, path: str) -> Forwarded:
    """Send a request to the least loaded worker, and its answer back as it comes."""
    client: httpx.AsyncClient = request.app.state.client
    headers = [
        (name, value)
        for name, value in request.headers.items()
        if name not in HOP_BY_HOP and not name.startswith("shmcoord-")
    ]
    target: bytes = request.scope["raw_path"]
    if request.url.query:
        target += b"?" + request.scope["query_string"]
    outgoing = client.build_request(
        request.method,
        httpx.URL("http://web").copy_with(raw_path=target),
        headers=headers,
        # Read whole, so that it can be sent again; `request.stream()` is for large ones.
        content=await request.body(),
    )
    return Forwarded(await client.send(outgoing, stream=True))


if __name__ == "__main__":
    # The workers' answers have these headers already.
    uvicorn.run(api, port=PORT, log_level="warning", date_header=False, server_header=False)
