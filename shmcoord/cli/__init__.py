"""The command line: look at segments, give back what the dead held, remove names.

It needs click and rich, which are in the extra `cli`; the library itself does not.
"""

import sys
from collections.abc import Callable

__all__ = ["inspect_main", "main"]


def main() -> None:
    """Run `shmcoord`."""

    def command() -> None:
        from shmcoord.cli.commands import shmcoord_command

        shmcoord_command(prog_name="shmcoord")

    _run(command)


def inspect_main() -> None:
    """Run `inspect_shm`, another name of `shmcoord inspect`."""

    def command() -> None:
        from shmcoord.cli.commands import inspect_command

        inspect_command(prog_name="inspect_shm")

    _run(command)


def _run(command: Callable[[], None]) -> None:
    try:
        command()
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in ("click", "rich"):
            raise
        sys.stderr.write(
            f"the command line needs {error.name}, which is missing: pip install shmcoord[cli]\n"
        )
        sys.exit(2)
