"""Frames: what one host tells all others at once, as bytes.

A frame is two bytes (`MARK`, `VERSION`) and a MessagePack array. A *full* frame names every node of
every segment; the frames between carry only the entries that changed since (see
`shmcoord.origin.Origin.entries`), so that one that is lost costs nothing but time. Times are the
sender's monotonic clock: no wall clock is ever compared.
"""

from __future__ import annotations

from typing import Annotated

import msgspec

from shmcoord.errors import ShmcoordError
from shmcoord.origin import Member

__all__ = ["VERSION", "Frame", "FrameError", "Part", "decode", "encode"]

MARK = 0x53
VERSION = 1
#: More than 4,096 nodes can have to say; whoever sends more is refused unread.
BYTES_MAX = 16 << 20

# MessagePack has no larger integers than 64 bits.
_Word = Annotated[int, msgspec.Meta(ge=0)]
_Name = Annotated[str, msgspec.Meta(min_length=1, max_length=64)]


class FrameError(ShmcoordError):
    """The bytes are no frame that this version reads."""


class Part(msgspec.Struct, array_like=True, frozen=True, forbid_unknown_fields=True):
    """What a frame says of one segment.

    Attributes:
        segment: Its name on the host that sends.
        incarnation: Random number of the segment; another one is another segment.
        slots: Participants that it has room for.
        leases: Lease cells per slot.
        members: All living nodes in a full frame, else None.
        entries: See `shmcoord/_entry.pxd`.
    """

    segment: _Name
    incarnation: _Word
    slots: Annotated[int, msgspec.Meta(ge=1, le=4096)]
    leases: Annotated[int, msgspec.Meta(ge=1, le=1024)]
    members: list[Member] | None
    entries: bytes


class Frame(msgspec.Struct, array_like=True, frozen=True, forbid_unknown_fields=True):
    """What one host says at one moment.

    Attributes:
        host: Who says it.
        session: Random number of the bridge's run.
        clock: Identifies the clock of `sent_ns`: another boot has another one.
        sequence: 1, 2, ... within the session.
        sent_ns: The sender's CLOCK_MONOTONIC when it read its segments.
        full: Whether all nodes of all segments are in it.
        parts: One per segment; in a full frame a segment that is missing has no nodes.
    """

    host: _Name
    session: _Word
    clock: _Word
    sequence: _Word
    sent_ns: _Word
    full: bool
    parts: list[Part]


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Frame)


def encode(frame: Frame) -> bytes:
    """Return the bytes of a frame."""
    return bytes((MARK, VERSION)) + _encoder.encode(frame)


def decode(data: bytes) -> Frame:
    """Return the frame that the bytes are.

    Raises:
        FrameError: They are none, or one of another version.
    """
    if len(data) > BYTES_MAX:
        raise FrameError(f"a frame of {len(data)} bytes; the most is {BYTES_MAX}")
    if len(data) < 3 or data[0] != MARK:
        raise FrameError("not a frame of shmcoord")
    if data[1] != VERSION:
        raise FrameError(
            f"a frame of version {data[1]}, this bridge reads {VERSION}: run the same version of "
            "shmcoord on both hosts"
        )
    try:
        return _decoder.decode(memoryview(data)[2:])
    except (msgspec.DecodeError, ValueError) as error:  # ValidationError is a DecodeError
        raise FrameError(f"not a frame: {error}") from None
