"""A bridge that answers questions: `python -m bench.bridge.runner`, the first line its settings.

The settings are the JSON of what `shmcoord.bridge.config.parse` takes. Each further line asks for
the counters, as one line of JSON. The end of the input ends it.
"""

from __future__ import annotations

import json
import sys

from shmcoord.bridge.config import parse
from shmcoord.bridge.service import BridgeService


def main() -> None:
    """Run until nobody asks any more."""
    with BridgeService(parse(json.loads(sys.stdin.readline()), source="benchmark")) as service:
        print("{}", flush=True)
        for _ in sys.stdin:
            heard = [one._asdict() for one in service.heard()]
            print(json.dumps({"sent": dict(service.sent), "heard": heard}), flush=True)


if __name__ == "__main__":
    main()
