"""Where text goes: a terminal with colours, or a pipe, plain and complete."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import NoReturn

from rich.console import Console
from rich.live import Live
from rich.text import Text

__all__ = ["Output"]


class Output:
    """Standard output, as far as the commands use it."""

    def __init__(self) -> None:
        for stream in (sys.stdout, sys.stderr):
            reconfigure = getattr(stream, "reconfigure", None)
            if reconfigure is not None:  # names of any script, on terminals that know only one
                reconfigure(errors="backslashreplace")
        self._console = Console(highlight=False, markup=False, emoji=False)
        self.ascii_only = not (self._console.encoding or "").lower().startswith("utf")
        self.is_live = sys.stdout.isatty() and not self._console.is_dumb_terminal

    def write(self, text: str) -> None:
        """Write text as it is, with a line end."""
        try:
            sys.stdout.write(text + "\n")
            sys.stdout.flush()
        except BrokenPipeError:
            _reader_gone()

    def lines(self, lines: Sequence[Text]) -> None:
        """Write lines: coloured on a terminal, never cut or wrapped by us."""
        if not self._console.is_terminal:
            self.write("\n".join(line.plain.rstrip() for line in lines))
            return
        with self._console.capture() as captured:
            for line in lines:
                self._console.print(line, soft_wrap=True)
        self.write(captured.get().rstrip("\n"))

    def watch(
        self,
        every_s: float,
        full: Callable[[], Sequence[Text]],
        compact: Callable[[], Sequence[Text]],
    ) -> NoReturn:
        """Show lines again and again in the same place, until interrupted.

        Args:
            every_s: Time between two showings, in seconds.
            full: Reads anew and returns the lines.
            compact: Returns a shorter form of what was read last, for a window that is too low.
        """
        with Live(console=self._console, auto_refresh=False, screen=True) as live:
            while True:
                lines = full()
                height = self._console.height
                if len(lines) > height:
                    lines = compact()
                if len(lines) > height:
                    more = len(lines) - height + 1
                    lines = [*lines[: height - 1], Text(f"... {more} more lines", "dim")]
                block = Text("\n").join(lines)
                block.no_wrap, block.overflow = True, "ellipsis"
                live.update(block, refresh=True)
                time.sleep(every_s)


def _reader_gone() -> NoReturn:
    """End quietly: whoever read our output has seen enough."""
    # What is still buffered must not be written at exit, which would complain.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(0)
