"""`python -m servers`."""

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
    main()


if __name__ == "__main__":
    _main()
