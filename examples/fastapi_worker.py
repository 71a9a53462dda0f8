"""Workers: `python examples/fastapi_worker.py 9101 9102 9103` serves on each port.

Each is a process of its own, and a node of group WEB. Ctrl-C or SIGTERM ends them all.
"""

import asyncio
import multiprocessing
import os
import signal
import socket
import sys

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import StreamingResponse

import shmcoord.http

api = FastAPI()


@api.get("/work")
async def work(request: Request, seconds: float = 0.02) -> dict[str, str]:
    """Take some time."""
    await asyncio.sleep(seconds)
    return {"node": request.scope["shmcoord.node"].name, "pid": str(os.getpid())}


@api.post("/echo")
async def echo(request: Request) -> StreamingResponse:
    """Give the body back, piece by piece."""
    return StreamingResponse(request.stream(), media_type="application/octet-stream")


@api.get("/health")
async def health() -> str:
    """Say that the process answers; not counted as load."""
    return "ok"


class Server(uvicorn.Server):
    """Tells the routers that it stops before it stops, and not when it has."""

    def __init__(self, config: uvicorn.Config, app: shmcoord.http.Middleware) -> None:
        super().__init__(config)
        self.app = app

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Drain, then do as any server."""
        self.app.drain()
        await super().shutdown(sockets)


def serve(port: int) -> None:
    """Serve on one port until told to stop."""
    app = shmcoord.http.Middleware(
        api,
        node=f"web-{port}",
        segment="shm_example",
        group="WEB",
        endpoint=f"127.0.0.1:{port}",
        capacity=4,
        interval_s=0.5,
    )
    Server(uvicorn.Config(app, port=port, log_level="warning"), app).run()


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit("usage: fastapi_worker.py PORT...")
    # Not forked: a process that starts from nothing shares no handle with its parent.
    start = multiprocessing.get_context("spawn").Process
    workers = [start(target=serve, args=(int(port),)) for port in sys.argv[1:]]

    def stop(*_: object) -> None:
        """End the workers, and so this process."""
        for worker in workers:
            worker.terminate()

    for worker in workers:
        worker.start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal tells the workers too
    signal.signal(signal.SIGTERM, stop)
    for worker in workers:
        worker.join()
