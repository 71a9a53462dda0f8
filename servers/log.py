"""Log lines that say which node they come from."""

import logging
import sys


def to_stderr(node: str, level: str = "INFO") -> None:
    """Writes the servers' logs to standard error as `[A] message`; of others the warnings."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter(f"[{node}] %(message)s"))
    logger = logging.getLogger("servers")
    logger.setLevel(level)
    logger.handlers[:] = [handler]
    logger.propagate = False
    logging.basicConfig(format=f"[{node}] %(levelname)s %(name)s: %(message)s", level="WARNING")
    # A supervisor that is gone no longer reads; that is no reason to print about printing.
    logging.raiseExceptions = False
