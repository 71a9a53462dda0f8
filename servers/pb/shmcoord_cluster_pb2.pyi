from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class NodeState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    NODE_STATE_UNSPECIFIED: _ClassVar[NodeState]
    NODE_STATE_IDLE: _ClassVar[NodeState]
    NODE_STATE_BUSY: _ClassVar[NodeState]
    NODE_STATE_DRAINING: _ClassVar[NodeState]
    NODE_STATE_SHUTDOWN: _ClassVar[NodeState]
NODE_STATE_UNSPECIFIED: NodeState
NODE_STATE_IDLE: NodeState
NODE_STATE_BUSY: NodeState
NODE_STATE_DRAINING: NodeState
NODE_STATE_SHUTDOWN: NodeState

class QueryRequest(_message.Message):
    __slots__ = ("words", "teams", "limit", "aggregate")
    WORDS_FIELD_NUMBER: _ClassVar[int]
    TEAMS_FIELD_NUMBER: _ClassVar[int]
    LIMIT_FIELD_NUMBER: _ClassVar[int]
    AGGREGATE_FIELD_NUMBER: _ClassVar[int]
    words: _containers.RepeatedScalarFieldContainer[str]
    teams: _containers.RepeatedScalarFieldContainer[str]
    limit: int
    aggregate: bool
    def __init__(self, words: _Optional[_Iterable[str]] = ..., teams: _Optional[_Iterable[str]] = ..., limit: _Optional[int] = ..., aggregate: _Optional[bool] = ...) -> None: ...

class QueryChunk(_message.Message):
    __slots__ = ("rows", "summary")
    ROWS_FIELD_NUMBER: _ClassVar[int]
    SUMMARY_FIELD_NUMBER: _ClassVar[int]
    rows: ServedTable
    summary: QuerySummary
    def __init__(self, rows: _Optional[_Union[ServedTable, _Mapping]] = ..., summary: _Optional[_Union[QuerySummary, _Mapping]] = ...) -> None: ...

class ServedTable(_message.Message):
    __slots__ = ("team", "node", "table")
    TEAM_FIELD_NUMBER: _ClassVar[int]
    NODE_FIELD_NUMBER: _ClassVar[int]
    TABLE_FIELD_NUMBER: _ClassVar[int]
    team: str
    node: str
    table: Table
    def __init__(self, team: _Optional[str] = ..., node: _Optional[str] = ..., table: _Optional[_Union[Table, _Mapping]] = ...) -> None: ...

class QuerySummary(_message.Message):
    __slots__ = ("parts", "matched", "sent", "seconds")
    PARTS_FIELD_NUMBER: _ClassVar[int]
    MATCHED_FIELD_NUMBER: _ClassVar[int]
    SENT_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    parts: _containers.RepeatedCompositeFieldContainer[PartSummary]
    matched: int
    sent: int
    seconds: float
    def __init__(self, parts: _Optional[_Iterable[_Union[PartSummary, _Mapping]]] = ..., matched: _Optional[int] = ..., sent: _Optional[int] = ..., seconds: _Optional[float] = ...) -> None: ...

class PartRequest(_message.Message):
    __slots__ = ("words", "limit", "aggregate")
    WORDS_FIELD_NUMBER: _ClassVar[int]
    LIMIT_FIELD_NUMBER: _ClassVar[int]
    AGGREGATE_FIELD_NUMBER: _ClassVar[int]
    words: _containers.RepeatedScalarFieldContainer[str]
    limit: int
    aggregate: bool
    def __init__(self, words: _Optional[_Iterable[str]] = ..., limit: _Optional[int] = ..., aggregate: _Optional[bool] = ...) -> None: ...

class PartChunk(_message.Message):
    __slots__ = ("node", "table", "summary")
    NODE_FIELD_NUMBER: _ClassVar[int]
    TABLE_FIELD_NUMBER: _ClassVar[int]
    SUMMARY_FIELD_NUMBER: _ClassVar[int]
    node: str
    table: Table
    summary: PartSummary
    def __init__(self, node: _Optional[str] = ..., table: _Optional[_Union[Table, _Mapping]] = ..., summary: _Optional[_Union[PartSummary, _Mapping]] = ...) -> None: ...

class PartSummary(_message.Message):
    __slots__ = ("team", "node", "matched", "sent", "seconds")
    TEAM_FIELD_NUMBER: _ClassVar[int]
    NODE_FIELD_NUMBER: _ClassVar[int]
    MATCHED_FIELD_NUMBER: _ClassVar[int]
    SENT_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    team: str
    node: str
    matched: int
    sent: int
    seconds: float
    def __init__(self, team: _Optional[str] = ..., node: _Optional[str] = ..., matched: _Optional[int] = ..., sent: _Optional[int] = ..., seconds: _Optional[float] = ...) -> None: ...

class Table(_message.Message):
    __slots__ = ("rows", "columns")
    ROWS_FIELD_NUMBER: _ClassVar[int]
    COLUMNS_FIELD_NUMBER: _ClassVar[int]
    rows: int
    columns: _containers.RepeatedCompositeFieldContainer[Column]
    def __init__(self, rows: _Optional[int] = ..., columns: _Optional[_Iterable[_Union[Column, _Mapping]]] = ...) -> None: ...

class Column(_message.Message):
    __slots__ = ("name", "int64s", "doubles", "strings", "bools", "valid")
    NAME_FIELD_NUMBER: _ClassVar[int]
    INT64S_FIELD_NUMBER: _ClassVar[int]
    DOUBLES_FIELD_NUMBER: _ClassVar[int]
    STRINGS_FIELD_NUMBER: _ClassVar[int]
    BOOLS_FIELD_NUMBER: _ClassVar[int]
    VALID_FIELD_NUMBER: _ClassVar[int]
    name: str
    int64s: Int64Values
    doubles: DoubleValues
    strings: StringValues
    bools: BoolValues
    valid: _containers.RepeatedScalarFieldContainer[bool]
    def __init__(self, name: _Optional[str] = ..., int64s: _Optional[_Union[Int64Values, _Mapping]] = ..., doubles: _Optional[_Union[DoubleValues, _Mapping]] = ..., strings: _Optional[_Union[StringValues, _Mapping]] = ..., bools: _Optional[_Union[BoolValues, _Mapping]] = ..., valid: _Optional[_Iterable[bool]] = ...) -> None: ...

class Int64Values(_message.Message):
    __slots__ = ("values",)
    VALUES_FIELD_NUMBER: _ClassVar[int]
    values: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, values: _Optional[_Iterable[int]] = ...) -> None: ...

class DoubleValues(_message.Message):
    __slots__ = ("values",)
    VALUES_FIELD_NUMBER: _ClassVar[int]
    values: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, values: _Optional[_Iterable[float]] = ...) -> None: ...

class StringValues(_message.Message):
    __slots__ = ("values",)
    VALUES_FIELD_NUMBER: _ClassVar[int]
    values: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, values: _Optional[_Iterable[str]] = ...) -> None: ...

class BoolValues(_message.Message):
    __slots__ = ("values",)
    VALUES_FIELD_NUMBER: _ClassVar[int]
    values: _containers.RepeatedScalarFieldContainer[bool]
    def __init__(self, values: _Optional[_Iterable[bool]] = ...) -> None: ...

class GetStatusRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class NodeStatus(_message.Message):
    __slots__ = ("node", "team", "role", "endpoint", "segment", "state", "inflight", "capacity", "served", "failed", "latency_s", "memory_bytes", "cpu_percent", "uptime_s", "pid", "rows")
    NODE_FIELD_NUMBER: _ClassVar[int]
    TEAM_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    ENDPOINT_FIELD_NUMBER: _ClassVar[int]
    SEGMENT_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    INFLIGHT_FIELD_NUMBER: _ClassVar[int]
    CAPACITY_FIELD_NUMBER: _ClassVar[int]
    SERVED_FIELD_NUMBER: _ClassVar[int]
    FAILED_FIELD_NUMBER: _ClassVar[int]
    LATENCY_S_FIELD_NUMBER: _ClassVar[int]
    MEMORY_BYTES_FIELD_NUMBER: _ClassVar[int]
    CPU_PERCENT_FIELD_NUMBER: _ClassVar[int]
    UPTIME_S_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    node: str
    team: str
    role: str
    endpoint: str
    segment: str
    state: NodeState
    inflight: int
    capacity: int
    served: int
    failed: int
    latency_s: float
    memory_bytes: int
    cpu_percent: float
    uptime_s: float
    pid: int
    rows: int
    def __init__(self, node: _Optional[str] = ..., team: _Optional[str] = ..., role: _Optional[str] = ..., endpoint: _Optional[str] = ..., segment: _Optional[str] = ..., state: _Optional[_Union[NodeState, str]] = ..., inflight: _Optional[int] = ..., capacity: _Optional[int] = ..., served: _Optional[int] = ..., failed: _Optional[int] = ..., latency_s: _Optional[float] = ..., memory_bytes: _Optional[int] = ..., cpu_percent: _Optional[float] = ..., uptime_s: _Optional[float] = ..., pid: _Optional[int] = ..., rows: _Optional[int] = ...) -> None: ...

class ShutdownRequest(_message.Message):
    __slots__ = ("secret",)
    SECRET_FIELD_NUMBER: _ClassVar[int]
    secret: str
    def __init__(self, secret: _Optional[str] = ...) -> None: ...

class ShutdownReply(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...
