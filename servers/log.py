"""Log lines that say which node they come from."""

import logging
import sys


def to_stderr(node: str, level: str = "INFO", also: str = "servers") -> None:
    """Writes the servers' logs to standard error as `[A] message`; of others the warnings.

    `also`: the logger of another package whose messages are the servers' own.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter(f"[{node}] %(message)s"))
    for name in {"servers", also}:
        logger = logging.getLogger(name)
        logger.setLevel(level)
        logger.handlers[:] = [handler]
        logger.propagate = False
    logging.basicConfig(format=f"[{node}] %(levelname)s %(name)s: %(message)s", level="WARNING")
    # A supervisor that is gone no longer reads; that is no reason to print about printing.
    logging.raiseExceptions = False
