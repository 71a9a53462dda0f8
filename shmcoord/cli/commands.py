"""The commands, their options and their exit codes."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from datetime import datetime
from typing import TypeVar

import click
from rich.text import Text

import shmcoord
from shmcoord.cli import as_json
from shmcoord.cli.answer import flow, now, since
from shmcoord.cli.asking import RING, Answer, Asker
from shmcoord.cli.bridge import bridge_command, bridge_keys_command
from shmcoord.cli.output import Output
from shmcoord.cli.reading import Observers, SegmentError, SegmentView, alive
from shmcoord.cli.tree import compact, tree
from shmcoord.cli.words import clean
from shmcoord.errors import ShmcoordError
from shmcoord.policy import POLICIES

__all__ = ["inspect_command", "shmcoord_command"]

_CONTEXT = {"help_option_names": ["-h", "--help"]}
_EXIT_CODES = """\b
Exit codes:
  0  all went well
  1  a segment is missing, corrupt or not ours, or a command was refused
  2  wrong usage
"""

_F = TypeVar("_F", bound=Callable[..., object])


def _version(command: _F) -> _F:
    return click.version_option(shmcoord.__version__, message="%(prog)s %(version)s")(command)


def _interval(
    context: click.Context, option: click.Parameter, seconds: float | None
) -> float | None:
    if seconds is None or 0.05 <= seconds <= 86400:  # false for NaN
        return seconds
    raise click.BadParameter(f"{seconds:g} is not between 0.05 and 86400")


@click.command("inspect", epilog=_EXIT_CODES, context_settings=_CONTEXT)
@click.argument("names", metavar="[SEGMENT]...", nargs=-1)
@click.option(
    "--watch",
    "every_s",
    type=float,
    metavar="SECONDS",
    callback=_interval,
    help="Show it again every SECONDS.",
)
@click.option("--json", "wants_json", is_flag=True, help="Print JSON; with --watch one per line.")
@_version
def inspect_command(names: tuple[str, ...], every_s: float | None, wants_json: bool) -> None:
    """Show the nodes of each SEGMENT (all if none is named) and how loaded they are.

    In a terminal --watch refreshes in place until Ctrl-C, one line per node if the window is too
    low for more; into a pipe it appends. Nothing is written to the segments.
    """
    output = Output()
    with Observers(names) as observers:
        views: Sequence[SegmentView | SegmentError] = _checked(observers.read)
        if every_s is None:
            if wants_json:
                output.write(as_json.dump(views, one_line=False))
            elif views:
                output.lines(tree(views, ascii_only=output.ascii_only))
            else:
                output.write("There are no segments.")
        else:
            views = _watch(observers, output, every_s, wants_json)
    if any(isinstance(view, SegmentError) for view in views):
        raise SystemExit(1)


def _watch(
    observers: Observers, output: Output, every_s: float, wants_json: bool
) -> Sequence[SegmentView | SegmentError]:
    """Show what is read until interrupted; return what was read last."""
    views: Sequence[SegmentView | SegmentError] = ()

    def shown(draw: Callable[..., list[Text]]) -> list[Text]:
        lines = draw(views, ascii_only=output.ascii_only)
        return lines or [Text("There are no segments.")]

    def full() -> list[Text]:
        nonlocal views
        views = observers.read()
        return shown(tree)

    try:
        if output.is_live and not wants_json:
            output.watch(every_s, full, lambda: shown(compact))
        while True:
            lines = full()
            if wants_json:
                output.write(as_json.dump(views, one_line=True))
            else:
                now = datetime.now().astimezone().isoformat(timespec="seconds")
                output.lines([Text(f"Time: {now}"), Text(), *lines, Text()])
            time.sleep(every_s)
    except KeyboardInterrupt:
        if output.is_live and not wants_json:
            output.lines(shown(tree))  # the last reading stays in view
        return views


@click.group("shmcoord", epilog=_EXIT_CODES, context_settings=_CONTEXT)
@_version
def shmcoord_command() -> None:
    """Look after the shared memory in which the processes of this host share their load."""


for _command in (inspect_command, bridge_command, bridge_keys_command):
    shmcoord_command.add_command(_command)


@shmcoord_command.command("explain", epilog=_EXIT_CODES)
@click.argument("group")
@click.argument("names", metavar="[SEGMENT]...", nargs=-1)
@click.option(
    "--policy",
    type=click.Choice(list(POLICIES)),
    default="least-loaded",
    show_default=True,
    help="By which the router decides.",
)
@click.option("--key", help="What the policy affinity goes by.")
@click.option(
    "--last",
    "count",
    type=click.IntRange(0, RING),
    default=5,
    show_default=True,
    metavar="COUNT",
    help=f"Decisions of each router to show, at most {RING}.",
)
@click.option("--follow", is_flag=True, help="Go on with each new decision, until Ctrl-C.")
@click.option("--json", "wants_json", is_flag=True, help="Print JSON; with --follow one per line.")
def explain_command(
    group: str,
    names: tuple[str, ...],
    policy: str,
    key: str | None,
    count: int,
    follow: bool,
    wants_json: bool,
) -> None:
    """Show whom a router would send a request for GROUP to now, why, and what routers did last.

    It looks into each SEGMENT (all if none is named) and reserves nothing. What a running router
    alone knows (which nodes it could not reach, whom it has ejected for an error rate) is not in
    the segment, and not in the answer.
    """
    output = Output()
    with _checked(lambda: Asker(group, names, policy=policy, key=key)) as asker:
        answer = asker.read()
        failed = bool(answer.errors)
        for unread in answer.errors:
            click.echo(f"{type(unread.error).__name__}: {clean(str(unread.error))}", err=True)
        if answer.decision is None or (not answer.decision.candidates and not follow):
            failed = True
            where = ", ".join(asker.names) or "any segment"
            click.echo(f"NoBackend: no node of group {clean(group)} is in {where}", err=True)
        if wants_json:
            output.write(as_json.dump_answer(answer, one_line=follow))
        elif answer.decision is not None:
            output.lines(_explained(answer, count, output.ascii_only))
        if follow and answer.decision is not None:
            _follow(asker, output, wants_json)
    if failed:
        raise SystemExit(1)


#: Between two looks for new decisions, seconds.
_LOOK_EVERY_S = 0.2


def _explained(answer: Answer, count: int, ascii_only: bool) -> list[Text]:
    lines = now(answer.decision, ascii_only=ascii_only) if answer.decision is not None else []
    kept: dict[tuple[str, int], int] = {}
    past = []
    for one in reversed(answer.past):
        kept[one.router, one.pid] = kept.get((one.router, one.pid), 0) + 1
        if kept[one.router, one.pid] <= count:
            past.append(one)
    if past:
        lines += [Text(), *since(past[::-1], ascii_only=ascii_only)]
    return lines


def _follow(asker: Asker, output: Output, wants_json: bool) -> None:
    """Show what is new, until interrupted."""
    if not wants_json:
        output.write("")
    try:
        while True:
            time.sleep(_LOOK_EVERY_S)
            answer = asker.read()
            if not answer.past and not answer.missed:
                continue
            if wants_json:
                output.write(as_json.dump_answer(answer, one_line=True))
            else:
                output.lines(list(flow(answer, ascii_only=output.ascii_only)))
    except KeyboardInterrupt:
        pass


@shmcoord_command.command("list")
def list_command() -> None:
    """Print the names of the segments that you can read, one per line."""
    names = shmcoord.segments()
    if names:
        Output().write("\n".join(names))


@shmcoord_command.command("reap", epilog=_EXIT_CODES)
@click.argument("names", metavar="[SEGMENT]...", nargs=-1)
def reap_command(names: tuple[str, ...]) -> None:
    """Give back the slots and leases that dead processes held in each SEGMENT (all if none)."""
    output = Output()

    def reap(name: str) -> None:
        shmcoord.Segment.attach(name).close()  # opening would create one that is missing
        with shmcoord.Segment.open(name) as segment:
            freed = segment.reap()
        output.write(f"{name}: {freed} slots and leases given back")

    _each(names or tuple(shmcoord.segments()), reap)


@shmcoord_command.command("unlink", epilog=_EXIT_CODES)
@click.argument("names", metavar="SEGMENT...", nargs=-1, required=True)
@click.option("--force", is_flag=True, help="Even if nodes are alive, or it is no segment of ours.")
def unlink_command(names: tuple[str, ...], force: bool) -> None:
    """Remove the name of each SEGMENT.

    Processes that are attached keep the memory, but nobody finds them in it any more; so it is
    refused while nodes are alive.
    """
    output = Output()

    def unlink(name: str) -> None:
        if not force:
            with Observers((name,)) as observers:
                [view] = observers.read()
            if isinstance(view, SegmentError):
                raise view.error
            if alive(view):
                nodes = ", ".join(status.node for status in alive(view))
                raise ShmcoordError(f"{name}: nodes are alive ({nodes}); use --force to unlink it")
        shmcoord.Segment.unlink(name)
        output.write(f"{name}: unlinked")

    _each(names, unlink)


_T = TypeVar("_T")


def _checked(action: Callable[[], _T]) -> _T:
    """Run an action; a wrong argument is wrong usage."""
    try:
        return action()
    except ValueError as error:
        raise click.UsageError(clean(str(error))) from None


def _each(names: Sequence[str], action: Callable[[str], None]) -> None:
    """Do something to each segment; exit with 1 at the end if it failed for one."""
    failed = False
    for name in dict.fromkeys(names):
        try:
            _checked(functools.partial(action, name))
        except ShmcoordError as error:
            click.echo(f"{type(error).__name__}: {clean(str(error))}", err=True)
            failed = True
    if failed:
        raise SystemExit(1)
