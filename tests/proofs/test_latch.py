"""The record latch and its relatives, proved over every execution of the C11 memory model.

x86, ThreadSanitizer and emulators are blind to most of what can be wrong here: the explorer is not.
Every proof has its controls: the same program with one order weakened must be found faulty.
Counts are printed: `pytest tests/proofs -s`.
"""

from __future__ import annotations

import itertools
import random
from typing import Any

import pytest
from explorer import (
    Cas,
    Check,
    Fence,
    Jump,
    Label,
    Load,
    Lock,
    Registers,
    Result,
    Step,
    Store,
    Thread,
    Unlock,
    explore,
)
from programs import ORDERS, RECORD, accesses_of, record_read, record_write, report
from rc11 import Action, F, R, U, W, outcomes

# --- the models are of this code ------------------------------------------------------------------


@pytest.mark.parametrize("function", ORDERS)
def test_the_core_has_the_orders_that_are_modelled(function: str) -> None:
    file, expected = ORDERS[function]
    assert accesses_of(function, file) == expected, (
        f"{function} in {file} has other accesses than the model: change the model with it"
    )


# --- the models are of C11 ------------------------------------------------------------------------


def _both(*threads: list[Action]) -> tuple[set[tuple[int, ...]], set[tuple[int, ...]]]:
    """What both models say that the loads and CASes (won or not) of a program may give."""
    actions = [a for thread in threads for a in thread if isinstance(a, (R, U))]
    by_axioms = {
        tuple(
            v if isinstance(a, R) else int(v == a.expected)
            for a, v in zip(actions, outcome, strict=True)
        )
        for outcome in outcomes(*threads)[0]
    }
    number = itertools.count()
    programs = []
    places = {a.place: 0 for thread in threads for a in thread if not isinstance(a, F)}
    for thread in threads:
        steps: list[Step | Label] = []
        for a in thread:
            if isinstance(a, R):
                steps.append(Load(f"{next(number):02}", a.place, a.order))
            elif isinstance(a, W):
                steps.append(Store(a.place, a.value, a.order))
            elif isinstance(a, U):
                steps.append(Cas(f"{next(number):02}", a.place, a.expected, a.desired, a.order))
            else:
                steps.append(Fence(a.order))
        programs.append(Thread(steps))
    result = explore(places, *programs)
    by_views = {tuple(int(v) for t in outcome for _, v in t) for outcome in result.outcomes}
    return by_axioms, by_views


_MESSAGE = {
    "relaxed": ("relaxed", "relaxed", True),
    "release-acquire": ("release", "acquire", False),
    "release only": ("release", "relaxed", True),
    "acquire only": ("relaxed", "acquire", True),
}


@pytest.mark.parametrize(("store", "load", "stale"), _MESSAGE.values(), ids=_MESSAGE)
def test_message_passing(store: str, load: str, stale: bool) -> None:
    axioms, views = _both([W("x", 1), W("y", 1, store)], [R("y", load), R("x")])
    assert axioms == views
    assert ((1, 0) in axioms) == stale


@pytest.mark.parametrize(
    ("fences", "stale"),
    [(("release", "acquire"), False), (("acquire", "acquire"), True), (("release",) * 2, True)],
)
def test_message_passing_by_fences(fences: tuple[str, str], stale: bool) -> None:
    axioms, views = _both([W("x", 1), F(fences[0]), W("y", 1)], [R("y"), F(fences[1]), R("x")])
    assert axioms == views
    assert ((1, 0) in axioms) == stale


def test_litmus_tests_with_known_results() -> None:
    # Coherence: two loads of one place never go back.
    axioms, views = _both([W("x", 1), W("x", 2)], [R("x"), R("x")])
    assert axioms == views
    assert (2, 1) not in axioms
    # Stores of two threads to two places may be ordered in opposite ways (2+2W, seen by loads).
    axioms, views = _both([W("x", 1), W("y", 2)], [W("y", 1), W("x", 2)], [R("x"), R("x")])
    assert axioms == views
    # Independent readers of independent writers may disagree without seq_cst, not with it.
    for order, disagree in (("acquire", True), ("seq_cst", False)):
        store = "release" if order == "acquire" else order
        found, _ = outcomes(
            [W("x", 1, store)],
            [W("y", 1, store)],
            [R("x", order), R("y", order)],
            [R("y", order), R("x", order)],
        )
        assert ((1, 0, 1, 0) in found) == disagree
    # A compare-and-swap continues a release sequence; another store does not.
    for middle, stale in ((U("y", 1, 2, "relaxed"), False), (W("y", 2), True)):
        axioms, views = _both(
            [W("x", 1), W("y", 1, "release")], [middle], [R("y", "acquire"), R("x")]
        )
        assert axioms == views
        assert any(o[-2:] == (2, 0) and o[0] != 0 for o in axioms) == stale
    # Two compare-and-swaps from one value: one wins.
    axioms, views = _both([U("x", 0, 1, "relaxed")], [U("x", 0, 2, "relaxed")])
    assert axioms == views == {(0, 1), (1, 0)}


def test_both_models_agree_on_random_programs() -> None:
    """The operational and the axiomatic model were written apart: each checks the other."""
    rng = random.Random(20240229)
    compared = graphs = 0
    while compared < 200:
        fresh = itertools.count(1)

        def action(fresh: Any = fresh) -> Action:
            place, kind = rng.choice("xy"), rng.random()
            if kind < 0.35:
                return R(place, rng.choice(["relaxed", "acquire"]))
            if kind < 0.70:
                return W(place, next(fresh), rng.choice(["relaxed", "release"]))
            if kind < 0.85:
                orders = ["relaxed", "acquire", "release", "acq_rel"]
                return U(place, rng.choice([0, 1, 2]), next(fresh) + 10, rng.choice(orders))
            return F(rng.choice(["acquire", "release", "acq_rel"]))

        threads = [[action() for _ in range(rng.choice([2, 3]))] for _ in range(rng.choice([2, 3]))]
        if sum(map(len, threads)) > 7:
            continue
        axioms, views = _both(*threads)
        assert axioms == views, threads
        compared += 1
        graphs += len(axioms)
    report(f"both models agree on {compared} random programs with {graphs} outcomes")


# --- the record latch -----------------------------------------------------------------------------


def _count(what: str, result: Result) -> None:
    report(f"{what}: {result.states} states, {result.executions} executions")


def _committed(r: Registers) -> str:
    """The record of sequence s has s in each word."""
    if r["w0"] == r["w1"] == r["s"]:
        return ""
    return f"torn: words {r['w0']}, {r['w1']} at sequence {r['s']}"


def _latch(
    writes: int = 3,
    tries: int = 2,
    *,
    mortal: bool = False,
    writer: dict[str, str] | None = None,
    reader: dict[str, str] | None = None,
) -> Result:
    steps = [step for _ in range(writes) for step in record_write(**(writer or {}))]
    return explore(
        RECORD,
        Thread(steps, mortal=mortal),
        Thread(record_read(_committed, tries=tries, **(reader or {}))),
    )


@pytest.mark.parametrize("mortal", [False, True], ids=["lives", "may die"])
def test_no_accepted_read_is_torn(mortal: bool) -> None:
    result = _latch(writes=4, tries=3, mortal=mortal)
    _count(f"latch, writer {'may die at any step' if mortal else 'lives'}", result)
    assert not result.violations
    assert result.executions > 1000


def test_two_readers() -> None:
    """Readers store nothing, so one stands for any number; two, to be sure."""
    result = explore(
        RECORD,
        Thread([*record_write(), *record_write()], mortal=True),
        Thread(record_read(_committed, tries=1)),
        Thread(record_read(_committed, tries=1)),
    )
    _count("latch, two readers", result)
    assert not result.violations


def test_readings_of_one_reader_never_go_back() -> None:
    def first(r: Registers) -> str:
        r["seen"] = r["s"]
        return _committed(r)

    def second(r: Registers) -> str:
        if r.get("seen", 0) > r["s"]:
            return f"sequence {r['seen']} and then {r['s']}"
        return _committed(r)

    result = explore(
        RECORD,
        Thread([*record_write(), *record_write(), *record_write()], mortal=True),
        Thread(
            [
                *record_read(first, tries=1, name="1"),
                *record_read(second, tries=1, name="2"),
            ]
        ),
    )
    _count("latch, one reader twice", result)
    assert not result.violations


_WEAKER: dict[str, dict[str, Any]] = {
    "writer without its release fence": {"writer": {"fence": "none"}},
    "writer with an acquire fence": {"writer": {"fence": "acquire"}},
    "writer commits relaxed": {"writer": {"commit": "relaxed"}},
    "reader without its acquire fence": {"reader": {"fence": "none"}},
    "reader with a release fence": {"reader": {"fence": "release"}},
    "reader's first look relaxed": {"reader": {"first": "relaxed"}},
}


@pytest.mark.parametrize("mortal", [False, True], ids=["lives", "may die"])
@pytest.mark.parametrize("weaker", _WEAKER.values(), ids=_WEAKER)
def test_control_each_order_is_needed(weaker: dict[str, Any], mortal: bool) -> None:
    result = _latch(mortal=mortal, **weaker)
    assert any("torn" in violation for violation in result.violations)


@pytest.mark.parametrize("writes", [0, 1, 2, 3])
@pytest.mark.parametrize("mortal", [False, True], ids=["lives", "may die"])
def test_a_try_fails_only_for_a_commit(writes: int, mortal: bool) -> None:
    """So many commits during a read, and one try more, are enough: the retries are bounded."""
    steps = [step for _ in range(writes) for step in record_write()]

    def reader(tries: int) -> Thread:
        return Thread(record_read(_committed, tries=tries, exhausted="tries are used up"))

    result = explore(RECORD, Thread(steps, mortal=mortal), reader(writes + 1))
    _count(f"{writes} writes, {writes + 1} tries", result)
    assert not result.violations
    if writes and not mortal:
        assert explore(RECORD, Thread(steps), reader(writes)).violations == {"tries are used up"}


def _odd_even_write(sequence: int) -> list[Step]:
    """What the latch replaces: the sequence is odd while the one copy is being written."""
    return [
        Store("seq", sequence + 1),
        Fence("release"),
        Store("a0", sequence + 2),
        Store("a1", sequence + 2),
        Store("seq", sequence + 2, "release"),
    ]


def _odd_even_read() -> list[Step | Label]:
    return [
        Load("s", "seq", "acquire"),
        Load("w0", "a0"),
        Load("w1", "a1"),
        Fence("acquire"),
        Load("again", "seq"),
        Jump("accept", lambda r: r["s"] == r["again"] and r["s"] % 2 == 0),
        Check(lambda _: "unreadable"),
        Jump("end"),
        Label("accept"),
        Check(_committed),
        Label("end"),
    ]


@pytest.mark.parametrize("latch", [True, False], ids=["two-copy latch", "control: odd-even lock"])
def test_after_a_death_at_any_step_the_first_try_succeeds(latch: bool) -> None:
    """The reader comes when the writer's lock is free: it has never begun, ended, or died."""
    if latch:
        write = [*record_write(), *record_write()]
        read = record_read(_committed, tries=1, exhausted="unreadable")
    else:
        write = [*_odd_even_write(0), *_odd_even_write(2)]
        read = _odd_even_read()
    result = explore(
        {**RECORD, "lock": 0},
        Thread([Lock("lock"), *write, Unlock("lock")], mortal=True),
        Thread([Lock("lock"), *read]),
    )
    assert result.violations == (set() if latch else {"unreadable"})


# --- a new owner ----------------------------------------------------------------------------------


def _owned(owner: int, sequences: range) -> list[Step]:
    """So many writes of one owner: the words are (owner, number of the write)."""
    return [
        step
        for number in sequences
        for step in record_write(lambda _, number=number: (owner, number))  # type: ignore[misc]
    ]


def _one_write(r: Registers) -> str:
    return "" if r["w0"] == r["w1"] else f"torn: {r['w0']} beside {r['w1']}"


_OWNED_RECORD = {**dict.fromkeys(RECORD, (0, 0)), "seq": 0}


def _takeover(*, locked: bool = True, synchronises: bool = True, hunt: bool = False) -> Result:
    def owner(number: int) -> Thread:
        work = _owned(number, range(1, 3))
        if not locked:
            return Thread(work, mortal=True)
        # To readers a dead writer is one that is slow for ever: only who hands over need die.
        return Thread([Lock("lock", synchronises), *work, Unlock("lock")], mortal=number == 1)

    return explore(
        {**_OWNED_RECORD, "lock": 0},
        owner(1),
        owner(2),
        Thread(record_read(_one_write, tries=2)),
        hunt=hunt,
    )


def test_a_new_owner_after_the_death_of_the_old_one() -> None:
    """The owner lock is what hands over: the kernel frees it when the old owner has ended."""
    result = _takeover()
    _count("latch, two owners in any order, one may die at any step", result)
    assert not result.violations


def test_control_takeover_on_a_late_heartbeat() -> None:
    """Nobody looks at the lock: the old owner was only slow, and goes on writing."""
    assert any("torn" in v for v in _takeover(locked=False, hunt=True).violations)


def test_control_takeover_without_synchronisation() -> None:
    """The lock excludes, but its new holder may not see what the old one stored."""
    assert any("torn" in v for v in _takeover(synchronises=False, hunt=True).violations)


def _claim_and_publish(owner: int, copies: int) -> list[Step]:
    """`_occupy` writes whole records, `publish_record` afterwards only the words in use."""
    claim = [step for _ in range(copies) for step in record_write(lambda _: (owner, 0))]
    return [*claim, *record_write(lambda _: (owner, 1), words=1)]


def _one_owner(r: Registers) -> str:
    return "" if r["w0"][0] == r["w1"][0] else f"torn: {r['w0']} beside {r['w1']}"


@pytest.mark.parametrize("copies", [2, 1])
def test_a_prefix_may_be_published_once_both_copies_are_the_owners(copies: int) -> None:
    result = explore(
        {**_OWNED_RECORD, "lock": 0},
        Thread([Lock("lock"), *_claim_and_publish(1, copies), Unlock("lock")], mortal=True),
        Thread([Lock("lock"), *_claim_and_publish(2, copies), Unlock("lock")]),
        Thread(record_read(_one_owner, tries=1)),
    )
    _count(f"{copies} whole writes at the claim, then a prefix", result)
    assert bool(result.violations) == (copies == 1)


def _meta(*, generation: str = "release", fence: str = "release", live: str = "acquire") -> Result:
    """`_occupy` and `read_info`: generation, live bit, two words of the meta entry."""

    def claim(number: int) -> list[Step]:
        return [
            Lock("lock"),
            Store("live", 0, "release"),  # _clear_slot
            Load("g", "generation"),
            Store("generation", lambda r: r["g"] + 1, generation),
            Fence(fence),
            Store("m0", number),
            Store("m1", number),
            Store("live", 1, "release"),
            Unlock("lock"),
        ]

    reader = [
        Load("g", "generation", "acquire"),
        Load("live", "live", live),
        Jump("end", lambda r: r["live"] == 0),
        Load("m0", "m0"),
        Load("m1", "m1"),
        Fence("acquire"),
        Load("again", "generation"),
        Jump("end", lambda r: r["again"] != r["g"]),
        Check(lambda r: "" if r["m0"] == r["m1"] else f"torn: {r['m0']} beside {r['m1']}"),
        Label("end"),
    ]
    memory = {"generation": 0, "live": 0, "m0": 0, "m1": 0, "lock": 0}
    return explore(
        memory, Thread(claim(1), mortal=True), Thread(claim(2), mortal=True), Thread(reader)
    )


def test_what_a_claim_writes_is_read_whole_or_not_at_all() -> None:
    result = _meta()
    _count("meta entry, two claims, either may die at any step", result)
    assert not result.violations


@pytest.mark.parametrize("weaker", [{"fence": "none"}, {"live": "relaxed"}], ids=str)
def test_control_meta(weaker: dict[str, str]) -> None:
    assert any("torn" in v for v in _meta(**weaker).violations)


# --- lease cells ----------------------------------------------------------------------------------


def _sweep(cell_load: str, cas: str = "acq_rel") -> Result:
    """`_occupy` and `reserve` of a new owner of a slot against `sweep_row` of anybody.

    The former owner (generation 1) is dead, its word marked; cells: 0 free, else the generation.
    """
    owner: list[Step | Label] = [
        Store("generation", 2, "release"),
        Store("death", 1, "release"),
        Cas("won", "cell", 0, 2, cas),
    ]

    def verdict(r: Registers) -> str:
        dead = r["generation"] != r["cell"] or r["death"] != 1
        return "a living owner's cell is swept" if r["cell"] == 2 and dead else ""

    sweeper: list[Step | Label] = [
        Load("cell", "cell", cell_load),
        Load("generation", "generation", "acquire"),
        Load("death", "death", "acquire"),
        Check(verdict),
    ]
    return explore({"generation": 1, "death": 2, "cell": 0}, Thread(owner), Thread(sweeper))


def test_a_sweep_that_sees_a_cell_sees_its_owner_alive() -> None:
    result = _sweep("acquire")
    _count("sweep against a new owner", result)
    assert not result.violations


@pytest.mark.parametrize("orders", [("relaxed", "acq_rel"), ("acquire", "relaxed")], ids=str)
def test_control_a_sweep_with_weaker_orders(orders: tuple[str, str]) -> None:
    assert _sweep(*orders).violations


# --- pairs that need seq_cst ----------------------------------------------------------------------


def _drain(state: str, cells: str, cell: str, look: str) -> tuple[bool, int]:
    """Whether a drain may miss the lease of a router that misses the drain."""
    found, graphs = outcomes(
        [U("load", 0, 1, state), R("cell", cells)],  # set_state; Node.inflight
        [U("cell", 0, 7, cell), R("load", look)],  # take_cell; is_open
    )
    return (0, 0, 0, 0) in found, graphs


def test_a_drain_and_a_reservation_cannot_miss_each_other() -> None:
    missed, graphs = _drain("seq_cst", "seq_cst", "seq_cst", "seq_cst")
    report(f"drain against reserve: {graphs} graphs")
    assert not missed


@pytest.mark.parametrize("weak", range(4))
def test_control_drain(weak: int) -> None:
    """Each of the four accesses has to be seq_cst."""
    orders = ["seq_cst"] * 4
    orders[weak] = "acq_rel" if weak in (0, 2) else "acquire"
    assert _drain(*orders)[0]


def _wake(release: list[Action], wait: list[Action]) -> tuple[bool, int]:
    """Whether a release may see nobody waiting while the waiter sees the cell taken.

    The cell is 0 while taken here and 1 when freed: all places begin at 0.
    """
    found, graphs = outcomes(release, wait)
    loads = [a for thread in (release, wait) for a in thread if isinstance(a, (R, U))]
    waiters = next(i for i, a in enumerate(loads) if isinstance(a, R) and a.place == "waiters")
    cell = next(i for i, a in enumerate(loads) if isinstance(a, R) and a.place == "cell")
    return any(o[waiters] == 0 and o[cell] == 0 for o in found), graphs


_FREE: list[Action] = [U("cell", 0, 1, "seq_cst"), R("waiters", "seq_cst")]


def test_a_release_and_a_waiter_cannot_miss_each_other() -> None:
    """With a seq_cst last look at the cell, or a seq_cst fence before a relaxed one."""
    count = U("waiters", 0, 1, "seq_cst")
    ticket = R("release_word", "seq_cst")
    missed, graphs = _wake(_FREE, [count, ticket, R("cell", "seq_cst")])
    report(f"release against waiter: {graphs} graphs")
    assert not missed
    assert not _wake(_FREE, [count, ticket, F("seq_cst"), R("cell")])[0]


def test_control_wake() -> None:
    count = U("waiters", 0, 1, "seq_cst")
    assert _wake(_FREE, [U("waiters", 0, 1), R("cell", "seq_cst")])[0]
    assert _wake([_FREE[0], R("waiters", "acquire")], [count, R("cell", "seq_cst")])[0]
    assert _wake([U("cell", 0, 1), _FREE[1]], [count, R("cell", "seq_cst")])[0]
    # A ticket taken with seq_cst does not by itself order the relaxed look behind it in C11. (It
    # does on aarch64, where it is an LDAR, and on x86, where counting is a full barrier.)
    assert _wake(_FREE, [count, R("release_word", "seq_cst"), R("cell")])[0]


def _either_looks(first: list[Action], second: list[Action]) -> tuple[bool, int]:
    """Whether both may miss what the other has stored: their last loads are both 0."""
    found, graphs = outcomes(first, second)
    loads = sum(isinstance(action, (R, U)) for action in first)
    return any(o[loads - 1] == 0 and o[-1] == 0 for o in found), graphs


_BITMAP, _MIRROR = U("bitmap", 0, 1, "seq_cst"), R("mirror", "seq_cst")
#: `_occupy`, then `_refuse_mirror` of `join_node`.
_JOIN: list[Action] = [_BITMAP, _MIRROR]
#: `_mark`, then `read_info` of `Mirror`.
_MARK: list[Action] = [W("mirror", 1, "release"), F("seq_cst"), R("bitmap", "acquire")]


def test_a_join_and_a_bridge_cannot_miss_each_other() -> None:
    """A node of this host in a mirror would be told of as another host's."""
    missed, graphs = _either_looks(_JOIN, _MARK)
    report(f"join against mirror: {graphs} graphs")
    assert not missed


def test_control_join() -> None:
    assert _either_looks(_JOIN, [_MARK[0], _MARK[2]])[0], "no fence"
    assert _either_looks(_JOIN, [_MARK[0], F("acq_rel"), _MARK[2]])[0]
    assert _either_looks([_BITMAP, R("mirror", "acquire")], _MARK)[0]
    # To look before the claim alone misses a bridge that comes in between.
    found, _ = outcomes([_MIRROR, _BITMAP], _MARK)
    assert any(o[0] == 0 and o[-1] == 0 for o in found)


_COUNT: list[Action] = [U("waiters", 0, 1, "seq_cst"), R("release_word", "seq_cst")]
#: `owe` (1 stands for "nothing is owed any more"), then `notify_all`.
_OWE: list[Action] = [W("owed", 1, "release"), F("seq_cst"), R("waiters", "seq_cst")]


def test_a_place_owed_no_more_and_a_waiter_cannot_miss_each_other() -> None:
    """Who waits says so before he looks, in `_has_room`, what is owed."""
    missed, graphs = _either_looks([*_COUNT, R("owed", "seq_cst")], _OWE)
    report(f"owed against waiter: {graphs} graphs")
    assert not missed


def test_control_owed() -> None:
    assert _either_looks([*_COUNT, R("owed", "seq_cst")], [_OWE[0], _OWE[2]])[0], "no fence"
    assert _either_looks([*_COUNT, R("owed", "acquire")], _OWE)[0]
    assert _either_looks([U("waiters", 0, 1), R("owed", "seq_cst")], _OWE)[0]
