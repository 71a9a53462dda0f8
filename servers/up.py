"""`python -m servers up`: all nodes in one terminal."""

import asyncio
import os
import signal
import sys
from collections.abc import Sequence

from rich.console import Console
from rich.text import Text

from servers import view
from servers.config import Cluster
from servers.supervisor import NodeDiedError, Supervisor, unlink_segments


class _Screen:
    """What `up` says. Once nobody reads it any more, it is silent, and the cluster goes on."""

    def __init__(self, cluster: Cluster, console: Console) -> None:
        self._console = console
        self._styles = view.node_styles(cluster)

    def say(self, message: str, style: str = "bold") -> None:
        try:
            self._console.print(Text(message, style=style), soft_wrap=True)
        except (OSError, SystemExit):  # the latter is rich's answer to a broken pipe
            self._be_silent()

    def log(self, name: str, line: str) -> None:
        try:
            view.show_log(self._console, line, self._styles.get(name, "white"))
        except (OSError, SystemExit):  # the latter is rich's answer to a broken pipe
            self._be_silent()

    @staticmethod
    def _be_silent() -> None:
        # Also for what Python itself flushes at the end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


async def run_up(
    cluster: Cluster, arguments: Sequence[str], console: Console, host: str | None = None
) -> int:
    """Runs the cluster until a signal, or until nobody is left; returns the exit code.

    With a host, the nodes of that host and its bridge.
    """
    screen = _Screen(cluster, console)
    asked = asyncio.Event()
    supervisor = Supervisor(cluster, arguments, screen.log, host)

    def on_signal() -> None:
        if asked.is_set():
            supervisor.hurry()
        asked.set()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        loop.add_signal_handler(number, on_signal)
    async with supervisor:
        failed = await _watch(cluster, supervisor, asked, screen, cluster.nodes_of(host))
        codes = await supervisor.stop()
    for name in unlink_segments(cluster, host if cluster.has_bridges else None):
        screen.say(f"The segment {name} stays: somebody else is in it.", "yellow")
    screen.say("All nodes have ended.")
    return int(failed or any(codes.values()))


async def _watch(
    cluster: Cluster,
    supervisor: Supervisor,
    asked: asyncio.Event,
    screen: _Screen,
    nodes: Sequence[str],
) -> bool:
    """Waits until the cluster is to be stopped; whether a node has failed."""
    stop = asyncio.create_task(asked.wait())
    ready = asyncio.create_task(supervisor.ready())
    dead: set[str] = set()
    try:
        await asyncio.wait([ready, stop], return_when=asyncio.FIRST_COMPLETED)
        if ready.done():
            ready.result()
            gateway = f"the gateway is {cluster.endpoint(cluster.leader)}"
            here = gateway if cluster.leader in nodes else f"nodes {', '.join(nodes)}"
            screen.say(f"Ready: {here}. Ctrl-C stops.")
        while not asked.is_set():
            death = asyncio.create_task(supervisor.died(dead))
            await asyncio.wait([death, stop], return_when=asyncio.FIRST_COMPLETED)
            if asked.is_set():
                death.cancel()
                break
            error = death.result()
            dead.add(error.name)
            if len(dead) == len(nodes):
                screen.say(f"Error: {error}; nobody is left.", "bold red")
                return True
            screen.say(
                f"Error: {error}; the others go on. `python -m servers node {error.name}` "
                "starts it again.",
                "bold red",
            )
        screen.say("Stopping: running requests may finish; once more ends them.")
    except (NodeDiedError, TimeoutError) as error:
        screen.say(f"Error: {error}; stopping the others.", "bold red")
        return True
    finally:
        for task in (ready, stop):
            task.cancel()
    return bool(dead)
