"""Every execution of a few small threads under the C11 memory model, by views.

An operational model: a location is a list of messages (stores) in modification order, and each
thread has a view, the oldest message of each location that it may still read. A load picks any
message that its view allows, a store goes anywhere behind its view. A release store, or a relaxed
one behind a release fence, carries the view of its thread; an acquire load, or an acquire fence
behind a relaxed one, takes it over. This is the "promising" semantics (Kang, Hur, Lahav,
Vafeiadis, Dreyer 2017) without its promises.

Covered: relaxed, acquire, release, acq_rel accesses, compare-and-swap, acquire and release fences,
release sequences as C++20 has them (continued by read-modify-writes alone), stores that another
core sees in any order that coherence allows, a thread that dies at any step, and a lock that its
death hands over.

Not covered: seq_cst (see rc11.py), non-atomic accesses, and executions in which a load reads from a
store that depends on it ("load buffering", what promises are for). These last need at least two
threads that load first what the other stores later. Where only one thread at a time stores, as in
the record, there are none, so nothing is missing.

A program is a list of steps; see the classes below. Places and values may be functions of the
thread's registers (a dict).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

Registers = dict[str, Any]
Value = int | tuple[int, ...] | Callable[[Registers], Any]
Place = str | Callable[[Registers], str]
View = tuple[int, ...]

ACQUIRES = {"acquire", "acq_rel"}
RELEASES = {"release", "acq_rel"}


@dataclass(frozen=True)
class Load:
    """`register = load(place)`."""

    register: str
    place: Place
    order: str = "relaxed"


@dataclass(frozen=True)
class Store:
    """`store(place, value)`."""

    place: Place
    value: Value
    order: str = "relaxed"


@dataclass(frozen=True)
class Cas:
    """`register = cas(place, expected, desired)`, strong; relaxed where it fails."""

    register: str
    place: Place
    expected: Value
    desired: Value
    order: str = "acq_rel"


@dataclass(frozen=True)
class Fence:
    """`fence(order)`; the order "none" does nothing."""

    order: str


@dataclass(frozen=True)
class Lock:
    """Waits for a lock and takes it; the death of its holder frees it.

    With `synchronises` False it is taken with relaxed order (a fault, for the controls).
    """

    place: str
    synchronises: bool = True


@dataclass(frozen=True)
class Unlock:
    """Frees a lock."""

    place: str


@dataclass(frozen=True)
class Do:
    """Changes registers; local."""

    run: Callable[[Registers], None]


@dataclass(frozen=True)
class Jump:
    """Goes on at a step's index if the condition holds (a label: see `assemble`)."""

    target: Any
    condition: Callable[[Registers], bool] = lambda _: True


@dataclass(frozen=True)
class Label:
    """A name for the step behind it."""

    name: str


@dataclass(frozen=True)
class Check:
    """A property: a text describes the violation, an empty one says that all is well."""

    run: Callable[[Registers], str]


Step = Load | Store | Cas | Fence | Lock | Unlock | Do | Jump | Check


def assemble(steps: Iterable[Step | Label]) -> tuple[Step, ...]:
    """Replace the labels of jumps by indices."""
    plain: list[Step] = []
    labels: dict[str, int] = {}
    for step in steps:
        if isinstance(step, Label):
            labels[step.name] = len(plain)
        else:
            plain.append(step)
    return tuple(
        Jump(labels[step.target], step.condition) if isinstance(step, Jump) else step
        for step in plain
    )


@dataclass(frozen=True)
class Thread:
    """A program, and whether it may die before any of its steps."""

    steps: Sequence[Step | Label]
    mortal: bool = False


@dataclass
class Result:
    """What was found.

    Attributes:
        violations: the texts of the checks that failed.
        executions: maximal interleavings with all choices of loads, stores and deaths.
        states: different states among them.
        outcomes: final registers of all threads, of every execution.
    """

    violations: set[str] = field(default_factory=set)
    executions: int = 0
    states: int = 0
    outcomes: set[tuple[tuple[tuple[str, Any], ...], ...]] = field(default_factory=set)


class _Message:
    """A store: value, the view that it carries, whether a CAS hangs on the one before it."""

    __slots__ = ("key", "tied", "value", "view")

    def __init__(self, value: Any, view: View, tied: bool) -> None:
        self.value = value
        self.view = view
        self.tied = tied
        self.key = (value, view, tied)


_Memory = tuple[tuple[_Message, ...], ...]


@dataclass(frozen=True)
class _Running:
    """One thread: where it stands, its registers, its views, the locks it holds."""

    at: int
    registers: tuple[tuple[str, Any], ...]
    now: View  # what it must respect
    later: View  # what an acquire fence would add
    fenced: View  # what it had at its last release fence
    locks: tuple[str, ...]
    dead: bool = False

    def key(self) -> tuple[Any, ...]:
        return (self.at, self.registers, self.now, self.later, self.fenced, self.locks, self.dead)


def _join(a: View, b: View) -> View:
    return a if a == b else tuple(map(max, a, b))


def _value(value: Value, registers: Registers) -> Any:
    return value(registers) if callable(value) else value


class _Found(Exception):
    """One violation is enough."""


class Explorer:
    """Explores all executions of the threads.

    Args:
        memory: the initial value of each location.
        threads: the programs.
        hunt: stop at the first violation.
    """

    def __init__(
        self, memory: dict[str, Any], threads: Sequence[Thread], hunt: bool = False
    ) -> None:
        self._hunt = hunt
        self._names = {name: i for i, name in enumerate(memory)}
        zero = (0,) * len(memory)
        self._memory: _Memory = tuple((_Message(value, zero, False),) for value in memory.values())
        self._programs = [assemble(thread.steps) for thread in threads]
        self._mortal = [thread.mortal for thread in threads]
        self._start = [_Running(0, (), zero, zero, zero, ()) for _ in threads]
        self._result = Result()
        self._counted: dict[Any, int] = {}

    def run(self) -> Result:
        """Explore."""
        before = sys.getrecursionlimit()
        sys.setrecursionlimit(max(before, 20_000))
        try:
            threads = tuple(self._settle(i, t) for i, t in enumerate(self._start))
            self._result.executions = self._explore(self._memory, threads)
        except _Found:
            pass
        finally:
            sys.setrecursionlimit(before)
        self._result.states = len(self._counted)
        return self._result

    def _explore(self, memory: _Memory, threads: tuple[_Running, ...]) -> int:
        key = (
            tuple(tuple(message.key for message in place) for place in memory),
            tuple(thread.key() for thread in threads),
        )
        known = self._counted.get(key)
        if known is not None:
            return known
        count = 0
        for i, thread in enumerate(threads):
            for after, moved in self._moves(i, thread, memory):
                settled = self._settle(i, moved)
                others = threads
                if after is not memory:
                    others, after, settled = self._shifted(i, threads, after, settled)
                count += self._explore(after, (*others[:i], settled, *others[i + 1 :]))
        if count == 0:
            count = 1
            self._result.outcomes.add(tuple(thread.registers for thread in threads))
        self._counted[key] = count
        return count

    # A store in the middle of a location's order moves the indices behind it. `_store` leaves a
    # note of that here, for the views of the others.
    _inserted: tuple[int, int] | None = None

    def _shifted(
        self, i: int, threads: tuple[_Running, ...], memory: _Memory, moved: _Running
    ) -> tuple[tuple[_Running, ...], _Memory, _Running]:
        if self._inserted is None:
            return threads, memory, moved
        place, at = self._inserted
        self._inserted = None

        def shift(view: View) -> View:
            if view[place] < at:
                return view
            return (*view[:place], view[place] + 1, *view[place + 1 :])

        others = tuple(
            thread
            if j == i
            else _Running(
                thread.at,
                thread.registers,
                shift(thread.now),
                shift(thread.later),
                shift(thread.fenced),
                thread.locks,
                thread.dead,
            )
            for j, thread in enumerate(threads)
        )
        # The new message and the mover's own view already have their final indices: they end at
        # `at` exactly, and nothing else of theirs is behind it.
        mended = tuple(
            tuple(
                message
                if p == place and n == at
                else _Message(message.value, shift(message.view), message.tied)
                for n, message in enumerate(messages)
            )
            for p, messages in enumerate(memory)
        )
        return others, mended, moved

    def _settle(self, i: int, thread: _Running) -> _Running:
        """Run the steps that concern nobody else."""
        program = self._programs[i]
        at, now, later, fenced = thread.at, thread.now, thread.later, thread.fenced
        registers: Registers | None = None
        while at < len(program) and not thread.dead:
            step = program[at]
            if isinstance(step, (Load, Store, Cas, Lock, Unlock)):
                break
            if registers is None:
                registers = dict(thread.registers)
            if isinstance(step, Fence):
                if step.order in ACQUIRES:
                    now = later
                if step.order in RELEASES:
                    fenced = now
            elif isinstance(step, Do):
                step.run(registers)
            elif isinstance(step, Check):
                fault = step.run(registers)
                if fault:
                    self._result.violations.add(fault)
                    if self._hunt:
                        raise _Found
            elif step.condition(registers):
                at = step.target
                continue
            at += 1
        kept = thread.registers if registers is None else tuple(sorted(registers.items()))
        return _Running(at, kept, now, later, fenced, thread.locks, thread.dead)

    def _moves(
        self, i: int, thread: _Running, memory: _Memory
    ) -> Iterable[tuple[_Memory, _Running]]:
        program = self._programs[i]
        if thread.dead or thread.at >= len(program):
            return
        if self._mortal[i]:
            yield self._die(thread, memory)
        step = program[thread.at]
        registers = dict(thread.registers)
        if isinstance(step, Load):
            place = self._place(step.place, registers)
            for n in range(thread.now[place], len(memory[place])):
                registers[step.register] = memory[place][n].value
                yield memory, self._read(thread, memory, place, n, step.order, registers)
        elif isinstance(step, Store):
            place = self._place(step.place, registers)
            value = _value(step.value, registers)
            for n in range(thread.now[place] + 1, len(memory[place]) + 1):
                if n < len(memory[place]) and memory[place][n].tied:
                    continue  # between a CAS and what it read nothing can come
                yield self._store(thread, memory, place, n, value, step.order)
        elif isinstance(step, Cas):
            place = self._place(step.place, registers)
            expected = _value(step.expected, registers)
            desired = _value(step.desired, registers)
            for n in range(thread.now[place], len(memory[place])):
                if memory[place][n].value != expected:
                    registers[step.register] = False
                    yield memory, self._read(thread, memory, place, n, "relaxed", registers)
                elif n + 1 == len(memory[place]) or not memory[place][n + 1].tied:
                    registers[step.register] = True
                    read = self._read(thread, memory, place, n, step.order, registers, 0)
                    yield self._store(
                        read, memory, place, n + 1, desired, step.order, memory[place][n].view
                    )
        elif isinstance(step, Lock):
            place = self._names[step.place]
            last = len(memory[place]) - 1
            if memory[place][last].value == 0:
                order = "acquire" if step.synchronises else "relaxed"
                read = self._read(thread, memory, place, last, order, registers, 0)
                after, taken = self._store(read, memory, place, last + 1, 1, "relaxed", None, True)
                yield after, self._holding(taken, (*thread.locks, step.place))
        else:
            place = self._names[step.place]
            after, moved = self._store(thread, memory, place, len(memory[place]), 0, "release")
            yield after, self._holding(moved, tuple(x for x in thread.locks if x != step.place))

    def _place(self, place: Place, registers: Registers) -> int:
        return self._names[place(registers) if callable(place) else place]

    @staticmethod
    def _holding(thread: _Running, locks: tuple[str, ...]) -> _Running:
        return _Running(
            thread.at, thread.registers, thread.now, thread.later, thread.fenced, locks, thread.dead
        )

    @staticmethod
    def _read(
        thread: _Running,
        memory: _Memory,
        place: int,
        n: int,
        order: str,
        registers: Registers,
        step: int = 1,
    ) -> _Running:
        view = thread.now
        if n != view[place]:
            view = (*view[:place], n, *view[place + 1 :])
        carried = memory[place][n].view
        later = _join(_join(thread.later, view), carried)
        if order in ACQUIRES:
            view = _join(view, carried)
        return _Running(
            thread.at + step,
            tuple(sorted(registers.items())),
            view,
            later,
            thread.fenced,
            thread.locks,
        )

    def _store(
        self,
        thread: _Running,
        memory: _Memory,
        place: int,
        n: int,
        value: Any,
        order: str,
        inherited: View | None = None,
        tied: bool = False,
    ) -> tuple[_Memory, _Running]:
        now = (*thread.now[:place], n, *thread.now[place + 1 :])
        later = (*thread.later[:place], max(n, thread.later[place]), *thread.later[place + 1 :])
        messages = memory[place]
        if n < len(messages):
            self._inserted = (place, n)
            if thread.later[place] >= n:  # known from a relaxed load, not yet acquired
                later = (*later[:place], thread.later[place] + 1, *later[place + 1 :])
        carried = now if order in RELEASES else thread.fenced
        carried = (*carried[:place], n, *carried[place + 1 :])
        if inherited is not None:
            shifted = inherited
            if n < len(messages) and inherited[place] >= n:
                shifted = (*inherited[:place], inherited[place] + 1, *inherited[place + 1 :])
            carried = _join(carried, shifted)
        message = _Message(value, carried, tied or inherited is not None)
        after = (*messages[:n], message, *messages[n:])
        moved = _Running(
            thread.at + 1, thread.registers, now, later, thread.fenced, thread.locks, thread.dead
        )
        return (*memory[:place], after, *memory[place + 1 :]), moved

    def _die(self, thread: _Running, memory: _Memory) -> tuple[_Memory, _Running]:
        """End here. The kernel frees its locks, behind everything that the thread has done."""
        for lock in thread.locks:
            place = self._names[lock]
            memory, thread = self._store(thread, memory, place, len(memory[place]), 0, "release")
        gone = _Running(
            thread.at, thread.registers, thread.now, thread.later, thread.fenced, (), True
        )
        return memory, gone


def explore(memory: dict[str, Any], *threads: Thread, hunt: bool = False) -> Result:
    """Every execution of the threads from the initial memory."""
    return Explorer(memory, threads, hunt).run()
