"""Load reports in ORCA's form: what Envoy and `weighted_round_robin` of every gRPC understand.

The messages are `xds.data.orca.v3.OrcaLoadReport` and `xds.service.orca.v3.OrcaLoadReportRequest`
(https://github.com/cncf/xds). They are described here, field by field, in a pool of their own:
generated code would bind users to one version of protobuf, and would meet theirs in the default
pool.

Names and units as https://github.com/grpc/proposal/blob/master/A51-custom-backend-metrics.md and
A58-client-side-weighted-round-robin-lb-policy.md say: utilizations are fractions of what there is,
rates are per second. `weighted_round_robin` gives a server the weight

    rps_fractional / (application_utilization + eps / rps_fractional * penalty)
"""

from __future__ import annotations

import contextlib
import os
import time
from typing import TYPE_CHECKING, Any, NamedTuple

from google.protobuf import descriptor_pb2, descriptor_pool, duration_pb2, message_factory

from shmcoord.errors import ShmcoordError

if TYPE_CHECKING:
    from shmcoord.api import Segment
    from shmcoord.node import Node

__all__ = ["LoadReport", "LoadReporter", "ReportRequest", "interval_of"]

_Field = descriptor_pb2.FieldDescriptorProto
# The shortest interval at which the out-of-band service reports, in seconds.
SHORTEST_INTERVAL_S = 0.1
# And the longest: a Duration may be longer than threads can wait.
LONGEST_INTERVAL_S = 86400.0
# One that asks for none gets this.
_USUAL_INTERVAL_S = 1.0


def _field(
    message: descriptor_pb2.DescriptorProto,
    name: str,
    number: int,
    kind: _Field.Type.ValueType,
    *,
    repeated: bool = False,
    of: str = "",
) -> None:
    label = _Field.LABEL_REPEATED if repeated else _Field.LABEL_OPTIONAL
    field = message.field.add(name=name, number=number, type=kind, label=label)
    if of:
        field.type_name = of


def _map_field(message: descriptor_pb2.DescriptorProto, name: str, number: int) -> None:
    """A field of type map<string, double>: as protoc does it, a repeated entry message."""
    entry_name = "".join(part.capitalize() for part in name.split("_")) + "Entry"
    entry = message.nested_type.add(name=entry_name)
    entry.options.map_entry = True
    _field(entry, "key", 1, _Field.TYPE_STRING)
    _field(entry, "value", 2, _Field.TYPE_DOUBLE)
    of = f".xds.data.orca.v3.OrcaLoadReport.{entry_name}"
    _field(message, name, number, _Field.TYPE_MESSAGE, repeated=True, of=of)


def _messages() -> tuple[Any, Any]:
    report_file = descriptor_pb2.FileDescriptorProto(
        name="xds/data/orca/v3/orca_load_report.proto",
        package="xds.data.orca.v3",
        syntax="proto3",
    )
    report = report_file.message_type.add(name="OrcaLoadReport")
    _field(report, "cpu_utilization", 1, _Field.TYPE_DOUBLE)
    _field(report, "mem_utilization", 2, _Field.TYPE_DOUBLE)
    _field(report, "rps", 3, _Field.TYPE_UINT64)
    _map_field(report, "request_cost", 4)
    _map_field(report, "utilization", 5)
    _field(report, "rps_fractional", 6, _Field.TYPE_DOUBLE)
    _field(report, "eps", 7, _Field.TYPE_DOUBLE)
    _map_field(report, "named_metrics", 8)
    _field(report, "application_utilization", 9, _Field.TYPE_DOUBLE)

    service_file = descriptor_pb2.FileDescriptorProto(
        name="xds/service/orca/v3/orca.proto",
        package="xds.service.orca.v3",
        syntax="proto3",
        dependency=["google/protobuf/duration.proto"],
    )
    request = service_file.message_type.add(name="OrcaLoadReportRequest")
    duration = ".google.protobuf.Duration"
    _field(request, "report_interval", 1, _Field.TYPE_MESSAGE, of=duration)
    _field(request, "request_cost_names", 2, _Field.TYPE_STRING, repeated=True)

    pool = descriptor_pool.DescriptorPool()
    pool.AddSerializedFile(duration_pb2.DESCRIPTOR.serialized_pb)
    for file in (report_file, service_file):
        pool.AddSerializedFile(file.SerializeToString())
    return (
        message_factory.GetMessageClass(
            pool.FindMessageTypeByName("xds.data.orca.v3.OrcaLoadReport")
        ),
        message_factory.GetMessageClass(
            pool.FindMessageTypeByName("xds.service.orca.v3.OrcaLoadReportRequest")
        ),
    )


LoadReport, ReportRequest = _messages()


def interval_of(request: Any) -> float:
    """Return how often a `ReportRequest` wants a report, in seconds; 0.1 to 86400."""
    asked = request.report_interval
    interval_s: float = asked.seconds + asked.nanos / 1e9
    if interval_s <= 0:
        return _USUAL_INTERVAL_S
    return min(max(interval_s, SHORTEST_INTERVAL_S), LONGEST_INTERVAL_S)


class _Mark(NamedTuple):
    at: float
    served: int
    failed: int


class LoadReporter:
    """The load reports of one node; each is kept for a few milliseconds.

    Args:
        segment: Where the node is.
        node: Whose load is reported.
        keep_s: For how long a report is given out, in seconds.
        window_s: Rates are over the last one to two such windows, in seconds.
    """

    def __init__(
        self, segment: Segment, node: Node, *, keep_s: float = 0.005, window_s: float = 1.0
    ) -> None:
        self._segment = segment
        self._node = node
        self._keep_s = keep_s
        self._window_s = window_s
        self._kept = b""
        self._kept_until = float("-inf")
        # The last two marks, the older one first; replaced as a pair, so that threads may race.
        mark = _Mark(time.monotonic(), node.served, node.failed)
        self._marks = (mark, mark)
        # Kept once: they do not change while a process runs.
        self._cpus = len(os.sched_getaffinity(0))
        self._memory_bytes = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")

    def serialized(self) -> bytes:
        """Return the report of this moment as bytes; at most `keep_s` old."""
        now = time.monotonic()
        if now >= self._kept_until:
            with contextlib.suppress(ShmcoordError, ValueError):  # it has left: the last one stands
                self._kept = self.report().SerializeToString()
            self._kept_until = now + self._keep_s
        return self._kept

    def report(self) -> Any:
        """Return the report of this moment, a `LoadReport`.

        Raises:
            ShmcoordError, ValueError: The node has left, or the segment is closed.
        """
        status = self._segment.status(self._node.name)
        rps, eps = self._rates()
        return LoadReport(
            application_utilization=status.queue / status.capacity,
            rps_fractional=rps,
            eps=eps,
            cpu_utilization=status.cpu_percent / 100.0 / self._cpus,
            mem_utilization=min(1.0, status.memory_bytes / self._memory_bytes),
            named_metrics=status.gauges,
        )

    def _rates(self) -> tuple[float, float]:
        now = _Mark(time.monotonic(), self._node.served, self._node.failed)
        older, newer = self._marks
        if now.at - newer.at >= self._window_s:
            self._marks = (newer, now)
            older = newer
        # At the beginning there is no window yet: a rate over a moment would say nothing.
        passed_s = max(now.at - older.at, self._window_s / 10)
        return (now.served - older.served) / passed_s, (now.failed - older.failed) / passed_s
