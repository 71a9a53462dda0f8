"""Frames as bytes, and which of them are taken."""

from __future__ import annotations

import contextlib
import random

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("msgspec", reason="the extra `bridge` is not installed")

from shmcoord.bridge.arrivals import Arrivals
from shmcoord.bridge.frame import BYTES_MAX, VERSION, Frame, FrameError, Part, decode, encode
from shmcoord.origin import Member

MS = 1_000_000
S = 1_000_000_000


def frame(
    sequence: int = 1, sent_ns: int = 0, *, session: int = 7, clock: int = 3, host: str = "h"
) -> Frame:
    return Frame(host, session, clock, sequence, sent_ns, False, [])


def test_a_frame_comes_back_as_it_was() -> None:
    member = Member(3, 4, "B", "GREEN", "10.0.0.1:50051", 4, 2.0, ["kv"], 0.5)
    sent = Frame(
        "host1",
        2**64 - 1,
        1,
        2,
        3,
        True,
        [Part("shm_host1", 2**63, 64, 128, [member], b"12345678"), Part("x", 1, 1, 1, None, b"")],
    )
    assert decode(encode(sent)) == sent


@given(st.binary(max_size=200))
def test_no_bytes_do_harm(data: bytes) -> None:
    for head in (b"", bytes((0x53, VERSION))):
        with contextlib.suppress(FrameError):
            assert isinstance(decode(head + data), Frame)


@given(st.data())
def test_a_damaged_frame_is_a_frame_or_refused(data: st.DataObject) -> None:
    member = Member(3, 4, "B", "GREEN", "e", 4, 2.0, [], 0.5)
    raw = bytearray(encode(Frame("h", 1, 1, 1, 1, True, [Part("s", 1, 1, 1, [member], b"")])))
    raw[data.draw(st.integers(2, len(raw) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(FrameError):
        assert isinstance(decode(bytes(raw)), Frame)


@pytest.mark.parametrize(
    ("raw", "why"),
    [
        (b"", "not a frame"),
        (b"GET / HTTP/1.1", "not a frame"),
        (bytes((0x53, VERSION + 1)) + b"\x90", f"version {VERSION + 1}"),
        (bytes((0x53, VERSION)) + b"\x90", "not a frame"),
        (encode(frame())[:-1], "not a frame"),
        (encode(frame()) + b"\x00", "not a frame"),
        (bytes(BYTES_MAX + 1), "the most is"),
    ],
)
def test_what_is_no_frame_is_refused(raw: bytes, why: str) -> None:
    with pytest.raises(FrameError, match=why):
        decode(raw)


@pytest.mark.parametrize(
    "part",
    [
        ["", 1, 1, 1, None, b""],
        ["s" * 65, 1, 1, 1, None, b""],
        ["s", -1, 1, 1, None, b""],
        ["s", 1, 0, 1, None, b""],
        ["s", 1, 4097, 1, None, b""],
        ["s", 1, 1, 1025, None, b""],
        ["s", 1, 1, 1, [[1, 2]], b""],
        ["s", 1, 1, 1, None, "text"],
        ["s", 1, 1, 1, None, b"", "more"],
    ],
)
def test_fields_are_bounded(part: list[object]) -> None:
    raw = bytes((0x53, VERSION)) + msgspec.msgpack.encode(["h", 1, 1, 1, 1, False, [part]])
    with pytest.raises(FrameError):
        decode(raw)


def test_how_much_longer_than_the_fastest() -> None:
    arrivals = Arrivals(100 * MS)
    offset = 5 * S
    assert arrivals.take(frame(1, 0), offset + 3 * MS) == 0
    assert arrivals.take(frame(2, 50 * MS), offset + 55 * MS) == 2 * MS
    # A faster one: what is thought of the way is corrected, also for those that follow.
    assert arrivals.take(frame(3, 100 * MS), offset + 101 * MS) == 0
    assert arrivals.take(frame(4, 150 * MS), offset + 153 * MS) == 2 * MS
    assert arrivals.taken == 4


def test_clocks_that_differ_by_years_in_either_direction() -> None:
    for offset in (-(10**17), 10**17):
        arrivals = Arrivals(100 * MS)
        for i in range(1, 20):
            way = MS if i % 2 else 4 * MS
            lag = arrivals.take(frame(i, 10**17 + i * 50 * MS), offset + 10**17 + i * 50 * MS + way)
            assert lag == (0 if i % 2 else 3 * MS)


def test_what_repeats_or_was_overtaken_is_dropped() -> None:
    arrivals = Arrivals(100 * MS)
    assert arrivals.take(frame(5, 0), S) == 0
    assert arrivals.take(frame(5, 0), S) is None
    assert arrivals.take(frame(3, 0), S) is None
    assert arrivals.take(frame(6, MS), S + MS) == 0
    assert arrivals.dropped["repeated"] == 1
    assert arrivals.dropped["overtaken"] == 1


def test_a_burst_after_a_thaw_is_old_news_but_its_end() -> None:
    arrivals = Arrivals(250 * MS)
    for i in range(1, 11):
        assert arrivals.take(frame(i, i * 50 * MS), i * 50 * MS + MS) == 0
    # 10 s of frames come at once.
    thaw = 11 * 50 * MS + 10 * S
    taken = [
        i for i in range(11, 212) if arrivals.take(frame(i, i * 50 * MS), thaw + MS) is not None
    ]
    assert taken == [206, 207, 208, 209, 210, 211]
    assert arrivals.dropped["late"] == 195


def test_a_new_run_begins_anew_and_the_old_one_is_over() -> None:
    arrivals = Arrivals(250 * MS)
    assert arrivals.take(frame(1000, 0, session=1), S) == 0
    assert arrivals.take(frame(1, MS, session=2), S + MS) == 0
    assert arrivals.take(frame(1001, 2 * MS, session=1), S + 2 * MS) is None
    assert arrivals.take(frame(2, 3 * MS, session=2), S + 3 * MS) == 0
    assert arrivals.dropped["of a former run"] == 1


def test_a_restarted_bridge_is_measured_by_the_same_clock() -> None:
    arrivals = Arrivals(250 * MS)
    assert arrivals.take(frame(1, 0, session=1), MS) == 0
    # The first frame of the new run was long on its way, and that is known.
    assert arrivals.take(frame(1, S, session=2), S + 401 * MS) is None
    assert arrivals.take(frame(2, 2 * S, session=2), 2 * S + 3 * MS) == 2 * MS


def test_another_boot_has_another_clock() -> None:
    arrivals = Arrivals(250 * MS)
    assert arrivals.take(frame(1, 900 * S, session=1, clock=1), S) == 0
    assert arrivals.take(frame(1, 2 * S, session=2, clock=2), 60 * S) == 0


def test_clocks_that_drift_apart() -> None:
    """One part in 10^4 for an hour would be 360 ms; what is remembered is half a minute or so."""
    source = random.Random(1)
    for drift in (1 + 1e-4, 1 - 1e-4):
        arrivals = Arrivals(250 * MS)
        worst = 0
        for i in range(1, 72_000):
            sent = i * 50 * MS
            way = MS if i % 7 == 0 else source.randrange(MS, 5 * MS)
            lag = arrivals.take(frame(i, sent), int(sent * drift) + way)
            assert lag is not None
            worst = max(worst, lag)
        assert worst < 12 * MS


def test_after_a_long_silence_the_offset_is_measured_anew() -> None:
    arrivals = Arrivals(250 * MS)
    assert arrivals.take(frame(1, 0), 0) == 0
    # Two hours later the clocks are 720 ms apart: no reason to take nothing for ever.
    assert arrivals.take(frame(2, 7200 * S), 7200 * S + 720 * MS) == 0
