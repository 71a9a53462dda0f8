"""`python -m servers up`: all nodes in one terminal."""

import asyncio
import signal
from collections.abc import Sequence

from rich.console import Console
from rich.text import Text

from servers import view
from servers.config import Cluster
from servers.supervisor import NodeDiedError, Supervisor, unlink_segments


async def run_up(cluster: Cluster, arguments: Sequence[str], console: Console) -> int:
    """Runs the cluster until a signal or until a node dies; returns the exit code."""
    styles = view.node_styles(cluster)
    asked = asyncio.Event()
    failed = 0

    def say(message: str, style: str = "bold") -> None:
        console.print(Text(message, style=style), soft_wrap=True)

    supervisor = Supervisor(
        cluster, arguments, lambda name, line: view.show_log(console, line, styles[name])
    )

    def on_signal() -> None:
        if asked.is_set():
            supervisor.hurry()
        asked.set()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        loop.add_signal_handler(number, on_signal)
    async with supervisor:
        ready = asyncio.create_task(supervisor.ready())
        stop = asyncio.create_task(asked.wait())
        await asyncio.wait([ready, stop], return_when=asyncio.FIRST_COMPLETED)
        try:
            if ready.done():
                ready.result()
                say(f"Ready: the gateway is {cluster.endpoint(cluster.leader)}. Ctrl-C stops.")
                death = asyncio.create_task(supervisor.died())
                await asyncio.wait([death, stop], return_when=asyncio.FIRST_COMPLETED)
                if death.done() and not asked.is_set():
                    raise NodeDiedError(death.result())
        except (NodeDiedError, TimeoutError) as error:
            say(f"Error: {error}; stopping the others.", "bold red")
            failed = 1
        else:
            say("Stopping: running requests may finish; once more ends them.")
        codes = await supervisor.stop()
        for task in (ready, stop):
            task.cancel()
    failed = failed or int(any(codes.values()))
    for name in unlink_segments(cluster):
        say(f"The segment {name} stays: somebody else is in it.", "yellow")
    say("All nodes have ended.")
    return failed
