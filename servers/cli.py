"""The commands of `python -m servers`."""

import asyncio
import functools
import signal
import socket
import sys
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from servers import client, config, links, view
from servers.pb import shmcoord_cluster_pb2 as pb

if TYPE_CHECKING:
    from shmcoord.bridge.config import BridgeConfig

T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., Any])

_EXIT_CODES = """
\b
Exit codes: 0 all went well; 1 something failed at run time (nobody there, refused, too late,
a port taken, a node that died); 2 wrong usage or configuration.
"""

_PEM = click.Path(path_type=Path, dir_okay=False)


class Loader:
    """The cluster's file with its overrides, as options and for other processes."""

    def __init__(self, file: Path | None, base_port: int | None, suffix: str) -> None:
        self._file = file
        self._base_port = base_port
        self._suffix = suffix

    def load(self, *, base_port: int | None = None, suffix: str | None = None) -> config.Cluster:
        """Reads the cluster; the arguments replace what the command line said."""
        self._base_port = self._base_port if base_port is None else base_port
        self._suffix = self._suffix if suffix is None else suffix
        return config.load(self._file, base_port=self._base_port, segment_suffix=self._suffix)

    @property
    def overridden(self) -> bool:
        """Whether the user chose ports or segments."""
        return self._base_port is not None or bool(self._suffix)

    def arguments(self) -> list[str]:
        """Options that make another process read the same cluster."""
        found = [f"--segment-suffix={self._suffix}"]
        if self._file is not None:
            found.append(f"--config={self._file.resolve()}")
        if self._base_port is not None:
            found.append(f"--base-port={self._base_port}")
        return found


def cluster_options(command: F) -> F:
    """Adds the options that say which cluster is meant."""

    @functools.wraps(command)  # also takes over the options that stand below this one
    def with_loader(
        config_file: Path | None, base_port: int | None, segment_suffix: str, **others: Any
    ) -> Any:
        return command(Loader(config_file, base_port, segment_suffix), **others)

    for option in (
        click.option(
            "--segment-suffix",
            envvar=config.SEGMENT_SUFFIX_VARIABLE,
            default="",
            show_envvar=True,
            help="Appended to every segment's and socket's name, to run beside another cluster.",
        ),
        click.option(
            "--base-port",
            envvar=config.BASE_PORT_VARIABLE,
            type=click.IntRange(1, 65535),
            show_envvar=True,
            help="Moves all ports so that the lowest is this one.",
        ),
        click.option(
            "--config",
            "config_file",
            envvar=config.CONFIG_VARIABLE,
            type=click.Path(path_type=Path, dir_okay=False),
            show_envvar=True,
            help="The TOML file of the cluster; the default is the six nodes A to F.",
        ),
    ):
        with_loader = option(with_loader)
    return with_loader  # type: ignore[return-value]


@click.group(context_settings={"help_option_names": ["-h", "--help"]}, epilog=_EXIT_CODES)
def main() -> None:
    """The reference cluster of shmcoord: six gRPC nodes that route by live load."""


@main.command()
@click.option("--server", default="localhost:50050", show_default=True, help="The gateway.")
@click.option("--query", "text", default="", help="Words; a row matches if it has all of them.")
@click.option("--team", "teams", multiple=True, help="Ask only this team; may be repeated.")
@click.option(
    "--limit",
    type=click.IntRange(0),
    default=20,
    show_default=True,
    help="Most rows to get, 0 for all.",
)
@click.option("--aggregate", is_flag=True, help="Count and mean by group instead of rows.")
@click.option(
    "--count", type=click.IntRange(1), default=1, show_default=True, help="How many times to ask."
)
@click.option(
    "--concurrency",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    help="How many of them at once.",
)
@click.option(
    "--timeout",
    "timeout_s",
    type=click.FloatRange(0, min_open=True),
    default=30.0,
    show_default=True,
    help="Seconds for one query.",
)
@click.option(
    "--retry",
    "retry_s",
    type=click.FloatRange(0),
    default=0.0,
    help="Seconds in which a query that found somebody ended (UNAVAILABLE) is sent again.",
)
@click.option("--ca", type=_PEM, help="Use TLS, and trust the certificates of this PEM file.")
@click.option("--cert", type=_PEM, help="Our certificate, for a cluster that wants one.")
@click.option("--key", type=_PEM, help="The key of --cert.")
@click.option("--server-name", help="The name in the certificate of --server, if not its address.")
def query(
    server: str,
    text: str,
    teams: tuple[str, ...],
    limit: int,
    aggregate: bool,
    count: int,
    concurrency: int,
    timeout_s: float,
    retry_s: float,
    ca: Path | None,
    cert: Path | None,
    key: Path | None,
    server_name: str | None,
) -> None:
    """Asks the gateway for rows, or for the aggregate."""
    if (cert is None) != (key is None) or (ca is None and (cert or server_name)):
        raise click.UsageError("--cert and --key belong together, and with --server-name to --ca")
    try:
        ways = links.PLAIN if ca is None else links.client_links(ca, cert, key, server_name)
    except config.ConfigError as error:
        _fail(str(error), 2)
    request = pb.QueryRequest(words=text.split(), teams=teams, limit=limit, aggregate=aggregate)
    console, errors = Console(), Console(stderr=True)
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=errors,
        transient=True,
        disable=count == 1 or not errors.is_terminal,
    ) as progress:
        task = progress.add_task("queries", total=count)
        report = _run(
            client.ask_many(
                server,
                request,
                count=count,
                concurrency=concurrency,
                timeout_s=timeout_s,
                retry_s=retry_s,
                links=ways,
                on_done=lambda: progress.advance(task),
            )
        )
    if report.first is not None:
        view.show_rows(console, report.first)
        view.show_summary(console, report.first, aggregate)
    view.show_report(console, report)
    view.show_errors(errors, report)
    if report.errors and not report.answered and report.unavailable:
        click.echo(
            f"Is the cluster running at {server}? `python -m servers up` starts it.", err=True
        )
    sys.exit(1 if report.errors else 0)


@main.command()
@cluster_options
@click.option("--host", help="Only the nodes of this host, and its bridge; by default our name.")
def up(loader: Loader, host: str | None) -> None:
    """Starts the nodes and shows their logs; Ctrl-C stops them.

    Where the configuration has several machines (hosts with a bridge), it starts the nodes of one
    of them and its bridge; the others are started there.
    """
    from servers.up import run_up

    cluster = _loaded(loader)
    host = _host(cluster, host)
    if host is not None:
        _checked_bridge(cluster, host)
    sys.exit(_run(run_up(cluster, loader.arguments(), Console(), host)))


@main.command()
@cluster_options
@click.argument("host")
@click.option("--die-with", type=int, hidden=True, help="End when this parent process ends.")
def bridge(loader: Loader, host: str, die_with: int | None) -> None:
    """Runs the bridge of a host; `up` does that where the configuration has several machines."""
    import shmcoord
    from servers import log
    from servers.node import die_with as bind_to
    from shmcoord.bridge.service import BridgeService

    config = _checked_bridge(_loaded(loader), host)
    log.to_stderr("bridge", also="shmcoord.bridge")
    try:
        if die_with is not None:
            bind_to(die_with)
        service = BridgeService(config)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: service.stop())
        service.run()
    except (shmcoord.ShmcoordError, OSError) as error:
        _fail(f"[bridge] Error: {error}")


@main.command()
@cluster_options
@click.argument("name")
@click.option("--die-with", type=int, hidden=True, help="End when this parent process ends.")
def node(loader: Loader, name: str, die_with: int | None) -> None:
    """Runs one node; Ctrl-C or SIGTERM drains and stops it."""
    import shmcoord
    from servers import log
    from servers.data import DataError
    from servers.node import NodeError, run
    from servers.node import die_with as bind_to

    cluster = _loaded(loader)
    if name not in cluster.nodes:
        raise click.UsageError(f"no node {name!r}; nodes are {', '.join(cluster.nodes)}")
    log.to_stderr(name)
    try:
        if die_with is not None:
            bind_to(die_with)
        asyncio.run(run(cluster, name))
    except config.ConfigError as error:
        _fail(f"[{name}] {error}", 2)
    except (NodeError, DataError, shmcoord.ShmcoordError, OSError) as error:
        _fail(f"[{name}] Error: {error}")


@main.command()
@cluster_options
@click.option(
    "--timeout",
    "timeout_s",
    type=click.FloatRange(0, min_open=True),
    default=2.0,
    show_default=True,
    help="Seconds for each node.",
)
def status(loader: Loader, timeout_s: float) -> None:
    """Asks every node for its status by RPC.

    The exit code is 1 if one does not answer.
    """
    cluster = _loaded(loader)

    async def one(name: str) -> pb.NodeStatus | str:
        try:
            return await client.node_status(cluster.endpoint(name), timeout_s, ways)
        except client.QueryError as error:
            return error.code.name

    async def every() -> list[pb.NodeStatus | str]:
        return await asyncio.gather(*(one(name) for name in cluster.nodes))

    ways = _links(cluster)
    statuses = dict(zip(cluster.nodes, _run(every()), strict=True))
    view.show_status(Console(), cluster, statuses)
    sys.exit(1 if any(isinstance(status, str) for status in statuses.values()) else 0)


@main.command()
@cluster_options
@click.argument("name")
@click.option(
    "--secret",
    envvar="SHMCOORD_CLUSTER_SECRET",
    prompt=True,
    hide_input=True,
    show_envvar=True,
    help="The shutdown_secret of the configuration.",
)
@click.option(
    "--timeout",
    "timeout_s",
    type=click.FloatRange(0, min_open=True),
    default=5.0,
    show_default=True,
    help="Seconds for the call.",
)
def shutdown(loader: Loader, name: str, secret: str, timeout_s: float) -> None:
    """Ends a node by RPC, if the configuration has a secret.

    The node drains first: running requests may finish.
    """
    cluster = _loaded(loader)
    if name not in cluster.nodes:
        raise click.UsageError(f"no node {name!r}; nodes are {', '.join(cluster.nodes)}")
    try:
        _run(client.shut_down(cluster.endpoint(name), secret, timeout_s, _links(cluster)))
    except client.QueryError as error:
        _fail(str(error))


@main.command()
@cluster_options
def demo(loader: Loader) -> None:
    """Shows the whole at work on real data, and stops it.

    Checks at the end that no process and no segment is left.
    """
    from servers.demo import run_demo

    sys.exit(_run(run_demo(loader, Console())))


def _host(cluster: config.Cluster, chosen: str | None) -> str | None:
    """Which host of the cluster this is; None: all of them."""
    if chosen is not None and chosen not in cluster.hosts:
        raise click.UsageError(f"no host {chosen!r}; hosts are {', '.join(cluster.hosts)}")
    if not cluster.has_bridges:
        return chosen
    if chosen is None:
        chosen = socket.gethostname().partition(".")[0]
        if chosen not in cluster.hosts:
            raise click.UsageError(
                f"the cluster has several machines: say which this is, --host "
                f"{' or --host '.join(cluster.hosts)}"
            )
    return chosen


def _checked_bridge(cluster: config.Cluster, host: str) -> "BridgeConfig":
    if not cluster.has_bridges or host not in cluster.hosts:
        raise click.UsageError(f"host {host!r} has no bridge in the configuration")
    try:
        return cluster.bridge_config(host)
    except config.ConfigError as error:
        _fail(str(error), 2)


def _loaded(loader: Loader) -> config.Cluster:
    try:
        return loader.load()
    except config.ConfigError as error:
        _fail(str(error), 2)


def _links(cluster: config.Cluster) -> links.Links:
    try:
        return links.links_of(cluster)
    except config.ConfigError as error:
        _fail(str(error), 2)


def _run(work: Coroutine[Any, Any, T]) -> T:
    """Runs an event loop; Ctrl-C is no error that needs a traceback."""
    try:
        return asyncio.run(work)
    except KeyboardInterrupt:
        _fail("Interrupted.", 130)
    except config.ConfigError as error:
        _fail(str(error), 2)


def _fail(message: str, code: int = 1) -> NoReturn:
    click.echo(message, err=True)
    sys.exit(code)
