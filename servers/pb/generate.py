"""Makes the Python code of the cluster's proto: `python -m servers.pb.generate`."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PROTO = "servers/pb/shmcoord_cluster.proto"


def generate(target: Path = ROOT) -> int:
    """Writes servers/pb/*_pb2*.py below `target`; returns protoc's exit code.

    The folder proto/ is mapped to servers/pb/, so that the generated modules import each other
    by their full name.
    """
    try:
        from grpc_tools import protoc  # type: ignore[import-untyped]
    except ImportError:
        print("the generator is missing: pip install grpcio-tools", file=sys.stderr)
        return 2
    return int(
        protoc.main(
            [
                "protoc",
                f"-Iservers/pb={ROOT / 'proto'}",
                f"--python_out={target}",
                f"--pyi_out={target}",
                f"--grpc_python_out={target}",
                PROTO,
            ]
        )
    )


if __name__ == "__main__":
    sys.exit(generate())
