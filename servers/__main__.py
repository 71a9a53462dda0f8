"""`python -m servers`."""

import io
import os
import sys


def _main() -> None:
    # gRPC's own log lines are of no use to users; who wants them sets the variable.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    try:
        from servers.cli import main
    except ModuleNotFoundError as missing:
        if missing.name is None or missing.name.partition(".")[0] in ("servers", "shmcoord"):
            raise
        sys.exit(f"{missing.name} is missing: pip install 'shmcoord[cluster]'")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # lines of a table in a terminal that has none
            stream.reconfigure(errors="replace")
    try:
        main()
    except BrokenPipeError:  # nobody reads on (`| head`): what he wanted he has
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


if __name__ == "__main__":
    _main()
