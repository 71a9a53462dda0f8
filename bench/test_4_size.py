"""What shmcoord takes: a segment's bytes, the time and the memory of an import."""

from __future__ import annotations

import os
import statistics

from bench.fresh import Start, import_times, memory
from bench.nodes import segment_of
from bench.paired import Loop
from bench.plugin import Rows
from bench.report import Bar, Row

IMPORT = "import shmcoord\n"
BARE = "pass\n"


def test_segment_size(rows: Rows) -> None:
    """A segment as `Segment.open(name)` makes it: 64 slots, 128 leases each."""

    def create(n: int) -> None:
        for _ in range(n):
            with segment_of([]):
                pass

    rows.time(Row("segment_create", "size", "create, unlink a segment"), Loop(create), part=0.1)
    with segment_of([]) as segment:
        size = os.stat(f"/dev/shm/{segment.name}")
        row = Row("segment_64", "size", "segment of 64 slots", bar=Bar("value", 512), unit="KiB")
        row.value = size.st_size / 1024
        row.details["allocated_kib"] = size.st_blocks / 2
        rows.add(row)


def test_import(rows: Rows) -> None:
    """A process that imports shmcoord and ends, less one that does nothing; in turn."""
    process = Row("process_import", "size", 'python -c "import shmcoord"')
    process.reference = 'python -c "pass"'
    measured = rows.time(process, Start(IMPORT), Start(BARE), part=0.15, batch_s=0.001)
    assert measured.reference_s is not None

    row = Row("import_ms", "size", "import shmcoord: time", unit="ms", bar=Bar("value", 40))
    row.value = (measured.median_s - measured.reference_s) * 1000
    row.reference = "bare interpreter taken off"
    row.details["slowest_ms"] = dict(import_times("shmcoord"))
    rows.add(row)

    pairs = [(memory(IMPORT), memory(BARE)) for _ in range(7)]
    row = Row("import_mib", "size", "import shmcoord: memory", unit="MiB", bar=Bar("value", 4))
    row.value = statistics.median(a.rss_mib - b.rss_mib for a, b in pairs)
    row.reference = "bare interpreter taken off"
    row.details["pss_mib"] = statistics.median(a.pss_mib - b.pss_mib for a, b in pairs)
    rows.add(row)
