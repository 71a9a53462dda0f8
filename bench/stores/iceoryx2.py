"""iceoryx2's blackboard: one entry per node, key u64, value of 64 bytes."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bench.stores import Reading, UnavailableError, Write
from bench.stores.record import HELD, LAYOUT, NODES, QUEUE

try:
    import iceoryx2 as iox
except ImportError as error:  # pragma: no cover - depends on the machine
    raise UnavailableError(f"the package iceoryx2 does not import: {error}") from error

if not hasattr(iox, "BlackboardKey"):
    raise UnavailableError("this iceoryx2 has no blackboard in Python (0.8 or newer has)")


class Value(ctypes.Structure):
    """The record as iceoryx2 wants it declared."""

    _fields_ = (("words", ctypes.c_uint64 * (LAYOUT.size // 8)),)

    @staticmethod
    def type_name() -> str:
        """Names the type for both sides."""
        return "shmcoord.bench.Record"


def _prefix(place: Path) -> str:
    return f"{place.name}_"


def _service(place: Path) -> tuple[Any, Any]:
    iox.set_log_level(iox.LogLevel.Error)
    config = iox.config.default()
    config.global_cfg.prefix = iox.FileName.new(_prefix(place))
    config.global_cfg.root_path = iox.Path.new(str(place))
    node = (
        iox.NodeBuilder.new()
        .config(config)
        .signal_handling_mode(iox.SignalHandlingMode.Disabled)
        .create(iox.ServiceType.Ipc)
    )
    return node, node.service_builder(iox.ServiceName.new("nodes"))


def _key(i: int) -> ctypes.c_uint64:
    return ctypes.c_uint64(i)


@contextmanager
def writing(place: Path) -> Iterator[Write]:
    """Creates the blackboard."""
    node, builder = _service(place)
    creator = builder.blackboard_creator(ctypes.c_uint64)
    for i in range(len(NODES)):
        creator = creator.add(_key(i), Value())
    service = creator.create()
    writer = service.writer_builder().create()
    entries = [writer.entry(_key(i), Value) for i in range(len(NODES))]

    def write(i: int, data: bytes) -> None:
        entries[i].update_with_copy(Value.from_buffer_copy(data))

    try:
        yield write
    finally:
        for part in (*entries, writer, service):
            part.delete()
        del node
        for left in Path("/dev/shm").glob(f"{_prefix(place)}*"):
            left.unlink(missing_ok=True)


@contextmanager
def reading(place: Path) -> Iterator[Reading]:
    """Opens the blackboard.

    The value comes as bytes with its generation; unpacking one field of it is quicker than
    `decode_as`, which builds the whole ctypes structure.
    """
    node, builder = _service(place)
    service = builder.blackboard_opener(ctypes.c_uint64).open()
    reader = service.reader_builder().create()
    handles = [reader.entry(_key(i), Value) for i in range(len(NODES))]
    unpack = QUEUE.unpack_from

    def least() -> int:
        best, shortest = -1, 1 << 62
        for i, handle in enumerate(handles):
            (queue,) = unpack(handle.get().data)
            if queue < shortest:
                best, shortest = i, queue
        return best

    names = {"handle": handles[HELD], "unpack": unpack, "known": handles[HELD].get()}
    try:
        yield Reading("unpack(handle.get().data)[0]", names, least, "handle.is_up_to_date(known)")
    finally:
        names.clear()
        handles.clear()
        reader.delete()
        service.delete()
        del node
