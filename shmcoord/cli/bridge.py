"""`shmcoord bridge` and `shmcoord bridge-keys`: what hosts need to know of each other's load."""

from __future__ import annotations

import logging
import signal
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import click

from shmcoord.cli.output import Output
from shmcoord.cli.words import clean
from shmcoord.errors import ShmcoordError

if TYPE_CHECKING:
    from shmcoord.bridge.config import BridgeConfig
    from shmcoord.bridge.service import Heard

__all__ = ["bridge_command", "bridge_keys_command"]

_T = TypeVar("_T")
_NEEDED = ("cryptography", "msgspec", "tomli", "zenoh")


@click.command("bridge")
@click.option(
    "--config",
    "file",
    type=click.Path(path_type=Path, dir_okay=False),
    default=Path("bridge.toml"),
    show_default=True,
    help="The hosts, and how they reach each other.",
)
@click.option("--host", help="Which of them this is; by default `host` of the file, or our name.")
@click.option("--check", "only_checks", is_flag=True, help="Only say whether the file is right.")
@click.option("-v", "--verbose", is_flag=True, help="Log also what the engine and the nodes do.")
def bridge_command(file: Path, host: str | None, only_checks: bool, verbose: bool) -> None:
    """Tell the other hosts of the nodes of this one, and mirror theirs here.

    One process per host. It publishes the segments that the configuration gives to this host, and
    keeps a mirror of each segment of the others in this host's shared memory, which routers open
    like any segment. It runs until SIGTERM or Ctrl-C.
    """
    config = _run(lambda: _load(file, host))
    if only_checks:
        others = ", ".join(config.others) or "nobody"
        Output().write(f"{file}: right; {config.host} tells {others} of {_list(config)}")
        return
    _log_to_stderr(config.host, verbose)
    _run(lambda: _serve(config))


@click.command("bridge-keys")
@click.argument("hosts", metavar="HOST[=ADDRESS,...]...", nargs=-1, required=True)
@click.option(
    "--directory",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("bridge-keys"),
    show_default=True,
    help="Where the files go; a CA that is there already is used again.",
)
@click.option("--days", type=click.IntRange(1), default=825, show_default=True, help="Valid.")
def bridge_keys_command(hosts: tuple[str, ...], directory: Path, days: int) -> None:
    """Make a CA, and for each HOST a certificate and a key for mutual TLS between bridges.

    A certificate is good for the host's name and the ADDRESSes. Give each host `ca.pem` and its own
    two files; `ca.key` stays where it was made.
    """
    addresses: dict[str, list[str]] = {}
    for text in hosts:
        name, _, rest = text.partition("=")
        addresses[name] = [address for address in rest.split(",") if address]

    def make() -> list[Path]:
        from shmcoord.bridge.keys import generate

        return generate(directory, addresses, days=days)

    Output().write("\n".join(str(path) for path in _run(make)))


def _load(file: Path, host: str | None) -> BridgeConfig:
    from shmcoord.bridge.config import load
    from shmcoord.bridge.service import check

    config = load(file, host=host)
    check(config)
    return config


def _serve(config: BridgeConfig) -> None:
    from shmcoord.bridge.service import BridgeService

    service = BridgeService(config)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: service.stop())
    service.run()
    for heard in service.heard():
        logging.getLogger("shmcoord.bridge").info("%s", _summary(heard))


def _summary(heard: Heard) -> str:
    dropped = ", ".join(f"{count} {why}" for why, count in heard.dropped.items() if count)
    return f"host {heard.host}: {heard.taken} frames" + (f"; dropped: {dropped}" if dropped else "")


def _list(config: BridgeConfig) -> str:
    return ", ".join(config.own.segments) or "nothing"


def _log_to_stderr(host: str, verbose: bool) -> None:
    logging.basicConfig(
        format=f"%(asctime)s [{host}] %(levelname)s %(message)s",
        level=logging.DEBUG if verbose else logging.WARNING,
    )
    if not verbose:
        logging.getLogger("shmcoord.bridge").setLevel(logging.INFO)


def _run(action: Callable[[], _T]) -> _T:
    """Do something; what is wrong with the configuration or the machine is told in one line."""
    try:
        return action()
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in _NEEDED:
            raise
        raise click.ClickException(
            f"the bridge needs {error.name}, which is missing: pip install shmcoord[bridge]"
        ) from None
    except (ShmcoordError, OSError) as error:
        raise click.ClickException(f"{type(error).__name__}: {clean(str(error))}") from None
