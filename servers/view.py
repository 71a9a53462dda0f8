"""What the commands print: tables that fit a terminal, and are complete when piped."""

from collections.abc import Mapping, Sequence

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from servers.client import Answer, Report
from servers.config import Cluster
from servers.pb import shmcoord_cluster_pb2 as pb
from servers.table import Value

_NODE_COLOURS = ("cyan", "green", "yellow", "magenta", "blue", "red")
# What stands between two columns of rows, and what a column of another table takes beside its
# text.
_GAP = "  "
_PADDING = 3


def node_styles(cluster: Cluster) -> dict[str, str]:
    """A colour for each node."""
    return {
        name: _NODE_COLOURS[index % len(_NODE_COLOURS)] for index, name in enumerate(cluster.nodes)
    }


def show_log(console: Console, line: str, style: str) -> None:
    """One line of a node's log, its `[A]` in the node's colour."""
    prefix, bracket, message = _printable(line).partition("]")
    text = Text(prefix + bracket, style=f"bold {style}") + Text(message)
    if "Load-aware routing selected" in message:
        text.stylize("bold", len(prefix + bracket))
    console.print(text, soft_wrap=True, highlight=False)


def show_rows(console: Console, answer: Answer) -> None:
    """The rows of an answer: as many columns as a terminal has room for, all in a pipe."""
    if not answer.rows:
        return
    cells = [[_text(value) for value in row] for row in answer.rows]
    widths = [
        max(len(name), *map(len, column))
        for name, column in zip(answer.names, zip(*cells, strict=True), strict=True)
    ]
    shown = _fitting(widths, console.width) if console.is_terminal else len(widths)
    right = [all(map(_is_number, column)) for column in zip(*answer.rows, strict=True)][:shown]
    names = [_printable(name) for name in answer.names]

    def line(texts: Sequence[str]) -> str:
        # Written without rich, which takes a millisecond for a row.
        padded = zip(texts, widths, right, strict=False)
        return _GAP.join(
            text.rjust(width) if number else text.ljust(width) for text, width, number in padded
        ).rstrip()

    console.print(Text(line(names), style="bold"), soft_wrap=True)
    console.print("─" * (sum(widths[:shown]) + len(_GAP) * (shown - 1)), soft_wrap=True)
    console.file.writelines(f"{line(row)}\n" for row in cells)
    if shown < len(widths):
        hidden = ", ".join(names[shown:])
        console.print(Text(f"{len(widths) - shown} more columns: {hidden}", style="dim"))


def show_summary(console: Console, answer: Answer, aggregate: bool) -> None:
    """How many rows matched, and who served each part."""
    summary = answer.summary
    served = " · ".join(
        f"{part.team} by {part.node}: {part.matched:,} in {part.seconds * 1e3:.0f} ms"
        for part in summary.parts
    )
    rows = f"{summary.matched:,} rows match"
    if aggregate:
        rows += f", in {summary.sent:,} groups"
    elif summary.sent < summary.matched:
        rows += f", {summary.sent:,} shown"
    if answer.rows:
        console.print()
    console.print(Text(f"{rows}  ({served})"), soft_wrap=True)


def show_report(console: Console, report: Report) -> None:
    """Who served, and how long the answers took."""
    table = _table(title="Served by")
    table.add_column("team")
    table.add_column("node")
    table.add_column("parts", justify="right")
    for (team, node), parts in sorted(report.served.items()):
        table.add_row(team, node, f"{parts:,}")
    if report.served:
        console.print()
        _print_whole(console, table, 40)
        console.print()
    if report.answered:
        latencies = "  ".join(
            f"p{percentile} {report.latency_s(percentile) * 1e3:.1f} ms"
            for percentile in (50, 90, 99)
        )
        console.print(
            Text(
                f"{report.answered:,} answered in {report.seconds:.2f} s"
                f"  ({report.answered / max(report.seconds, 1e-9):,.0f}/s)   latency  {latencies}"
                + (f"   {report.asked_again:,} sent again" if report.asked_again else "")
            ),
            soft_wrap=True,
        )


def show_errors(console: Console, report: Report) -> None:
    """What failed, each message once, with how often."""
    for message, times in report.errors.most_common():
        often = f"{times:,} × " if times > 1 else ""
        console.print(Text(f"{often}{_printable(message)}", style="red"), soft_wrap=True)


def show_status(
    console: Console, cluster: Cluster, statuses: Mapping[str, pb.NodeStatus | str]
) -> None:
    """A line for each node: its status, or why it gave none.

    A terminal that is too narrow gets fewer columns, a pipe gets all.
    """
    lines = [_status_line(cluster, name, status) for name, status in statuses.items()]
    widths = {
        column: max(len(column), *(len(line.get(column, "")) for line in lines)) + _PADDING
        for column in _STATUS_COLUMNS
    }
    hideable = list(_HIDDEN_FIRST) if console.is_terminal else []
    while hideable and sum(widths.values()) > console.width:
        del widths[hideable.pop(0)]
    table = _table()
    for column in widths:
        table.add_column(
            column, justify="right" if column in _STATUS_NUMBERS else "left", no_wrap=True
        )
    styles = node_styles(cluster)
    for line in lines:
        cells = [Text(line.get(column, "")) for column in widths]
        cells[0].stylize(f"bold {styles[line['node']]}")
        state = cells[list(widths).index("state")]
        state.stylize({"IDLE": "green", "BUSY": "yellow"}.get(state.plain, "red"))
        table.add_row(*cells)
    _print_whole(console, table, sum(widths.values()))


_STATUS_NUMBERS = ("queue", "served", "failed", "latency", "memory", "rows", "pid", "uptime")
_STATUS_COLUMNS = ("node", "role", "team", "segment", "endpoint", "state", *_STATUS_NUMBERS)
_HIDDEN_FIRST = ("rows", "uptime", "role", "pid", "endpoint", "segment", "failed", "latency")


def _status_line(cluster: Cluster, name: str, status: pb.NodeStatus | str) -> dict[str, str]:
    settings = cluster.nodes[name]
    line = {
        "node": name,
        "role": settings.role,
        "team": settings.team,
        "segment": cluster.segment(name),
        "endpoint": cluster.endpoint(name),
    }
    if isinstance(status, str):
        return {**line, "state": _printable(status)}
    return {
        **line,
        "state": pb.NodeState.Name(status.state).removeprefix("NODE_STATE_"),
        "queue": f"{status.inflight}/{status.capacity}",
        "served": f"{status.served:,}",
        "failed": f"{status.failed:,}",
        "latency": f"{status.latency_s * 1e3:.1f} ms",
        "memory": f"{status.memory_bytes / 1e6:.0f} MB",
        "rows": f"{status.rows:,}",
        "pid": str(status.pid),
        "uptime": f"{status.uptime_s:.0f} s",
    }


def _table(title: str | None = None) -> Table:
    return Table(
        title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False
    )


def _print_whole(console: Console, table: Table, width: int) -> None:
    """Prints a table; into a pipe it goes with its full width."""
    usual = console.width
    if not console.is_terminal:
        console.width = max(width, usual)
    console.print(table)
    console.width = usual


def _fitting(widths: Sequence[int], room: int) -> int:
    """How many columns of these widths a line has room for, at least one."""
    used = -len(_GAP)
    for count, width in enumerate(widths):
        used += width + len(_GAP)
        if used > room:
            return max(count, 1)
    return len(widths)


def _is_number(value: Value) -> bool:
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))


def _text(value: Value) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return f"{value:.3f}"
    return _printable(str(value))


def _printable(text: str) -> str:
    """Text without characters that steer a terminal."""
    return "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in text)
