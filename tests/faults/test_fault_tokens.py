"""Forged, doubled and stale lease tokens: each one is refused and counted."""

from __future__ import annotations

import random

import pytest
from helpers import Raw

from shmcoord import LeaseLost, Router, Segment

HEX = "0123456789abcdef"


def forge(true, rng):
    """A token that differs from a true one."""
    parts = true.split("-")
    while True:
        kind = rng.randrange(5)
        if kind == 0:  # one digit of one part
            at = rng.randrange(len(true))
            forged = true[:at] + rng.choice(HEX + "-") + true[at + 1 :]
        elif kind == 1:  # one bit of one number
            at = rng.randrange(6)
            number = int(parts[at], 16) ^ (1 << rng.randrange(64))
            forged = "-".join([*parts[:at], f"{number:x}", *parts[at + 1 :]])
        elif kind == 2:  # a random cell value in the right place
            forged = "-".join([*parts[:5], f"{rng.getrandbits(64):x}"])
        elif kind == 3:  # cut, or with something behind
            forged = true[: rng.randrange(len(true))] + "0" * rng.randrange(3)
        else:
            forged = "".join(chr(rng.randrange(1, 0x300)) for _ in range(rng.randrange(60)))
        try:  # other digits for the same numbers are the same token
            same = [int(part, 16) for part in forged.split("-")] == [
                int(part, 16) for part in parts
            ]
        except ValueError:
            same = False
        if not same:
            return forged


def refused(node, token):
    """Whether the node refuses it, and counts that."""
    before = node.refused
    try:
        request = node.adopt(token)
    except LeaseLost:
        return node.refused == before + 1
    request.end()
    return False


def test_forged_doubled_and_stale_tokens(segment, name, count, report):
    rounds = count(4_000, 250_000)
    seed = random.randrange(2**32)
    rng = random.Random(seed)
    raw = Raw(name)
    made = {"forged": 0, "doubled": 0, "ended": 0, "released": 0}
    with (
        segment.join("B", group="G", endpoint="e", interval_s=3600) as node,
        Router(name) as router,
    ):
        for number in range(rounds):
            lease = router.acquire("G")
            others = router.acquire("G")  # what a stale token must not touch
            for _ in range(2):
                assert refused(node, forge(lease.token, rng)), f"seed {seed}, round {number}"
                made["forged"] += 1
            if number & 1:
                request = node.adopt(lease.token)
                assert refused(node, lease.token)
                made["doubled"] += 1
                request.end()
                made["ended"] += 1
            else:
                assert lease.release() is True
                made["released"] += 1
            fresh = router.acquire("G")  # the same cell
            assert refused(node, lease.token)
            assert fresh.release() is True
            assert others.release() is True
        assert node.refused == made["forged"] + made["doubled"] + rounds
        assert node.served == made["ended"]
        assert raw.taken() == 0
        report("forged, doubled, stale tokens", refused=node.refused, seed=seed, **made)


def test_tokens_across_claims(new_name, count, report):
    """Of an earlier owner of the slot, of another node, of a segment that was made anew."""
    rounds, stale = count(100, 3000), 0
    name = new_name()
    for _ in range(rounds):
        with Segment.open(name, slots=3, leases=2) as segment, Router(segment) as router:
            with segment.join("B", group="G", endpoint="e", interval_s=3600):
                first = router.acquire("G").token
            with segment.join("B", group="G", endpoint="e", interval_s=3600) as second:
                lease = router.acquire("G")
                assert refused(second, first)
            with segment.join("C", group="H", endpoint="e", interval_s=3600) as other:
                assert refused(other, lease.token)
        Segment.unlink(name)
        with (
            Segment.open(name, slots=3, leases=2) as segment,
            Router(segment) as router,
            segment.join("B", group="G", endpoint="e", interval_s=3600) as anew,
        ):
            held = router.acquire("G")
            assert refused(anew, first)
            assert refused(anew, lease.token)
            with anew.adopt(held.token):
                pass
        Segment.unlink(name)
        stale += 4
    report("tokens of earlier owners and segments", refused=stale)


def test_comparing_the_state_alone_is_found(segment, native, report):
    """The control: who looks only whether the cell is reserved takes stale tokens for true ones."""
    with segment.join("B", group="G", endpoint="e", interval_s=3600) as node:
        with Router(segment) as router:
            taken = 0
            for _ in range(100):
                lease = router.acquire("G")
                index = int(lease.token.split("-")[4], 16)
                lease.release()
                with router.acquire("G"):
                    taken += native.adopt_by_state(node, index)
        with pytest.raises(LeaseLost):
            node.adopt(lease.token)
    report("stale tokens, control", taken_for_true=taken)
    assert taken == 100
