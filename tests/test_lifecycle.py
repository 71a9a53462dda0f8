"""The life of slots and leases as a state machine, over real processes.

Nodes and routers are children of one pool process, each told what to do by lines. The model knows
who lives, who is dead and who holds what; where something that belonged to the dead may have been
given back already (anybody may do so at any time), it knows both answers, and after a reap one.
No beat helps: intervals are an hour, so that the numbers are exact after each step.
"""

from __future__ import annotations

import os
import secrets

from helpers import SHM, Child, Raw
from hypothesis import HealthCheck, event, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    multiple,
    precondition,
    rule,
)

from shmcoord import Health, Segment, State

SLOTS, LEASES, CAPACITY = 4, 4, 2
NAMES = ["n0", "n1", "n2", "n3", "n4"]

POOL = """
import psutil  # once, not in each child

def node(words):
    segment = Segment.open(name)
    node = segment.join(words[0], group="GREEN", endpoint="e", capacity=int(words[1]),
                        interval_s=3600)
    requests = {}
    def answer(words):
        what = words[0]
        if what == "begin":
            requests[words[1]] = node.begin()
        elif what == "adopt":
            requests[words[1]] = node.adopt(words[2])
        elif what == "end":
            requests.pop(words[1]).end()
        else:
            getattr(node, what)()
        return "ok"
    return answer

def router(words):
    router = Router(name, seed=1)  # the same course each time: Hypothesis repeats what it drew
    leases = {}
    def answer(words):
        what = words[0]
        if what == "acquire":
            lease = leases[words[1]] = router.acquire("GREEN")
            return f"{lease.node} {lease.token}"
        if what == "release":
            return str(leases.pop(words[1]).release())
        router.close()
        return "ok"
    return answer

def run(kind, words, commands, answers):
    def tell(text):
        os.write(answers, text.encode() + b"\\n")
    try:
        answer = kind(words)
    except (ShmcoordError, ValueError) as error:
        return tell(type(error).__name__)
    tell("ok")
    with os.fdopen(commands) as lines:
        for line in lines:
            try:
                tell(answer(line.split()))
            except (ShmcoordError, ValueError) as error:
                tell(type(error).__name__)

children = {}
while line := hear():
    what, key, *words = line.split()
    if what in ("node", "router"):
        commands, telling = os.pipe()
        hearing, answers = os.pipe()
        def work():
            os.close(telling)
            for _, other, _ in children.values():
                os.close(other)
            run(node if what == "node" else router, words, commands, answers)
        pid = forked(work)
        os.close(commands); os.close(answers)
        children[key] = (pid, telling, os.fdopen(hearing))
        reply = children[key][2].readline().strip()
        if reply != "ok":
            what = "kill"
    elif what == "tell":
        os.write(children[key][1], (" ".join(words) + "\\n").encode())
        reply = children[key][2].readline().strip()
    if what == "kill":
        pid, telling, hearing = children.pop(key)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(telling); hearing.close()
        reply = "ok" if line.startswith("kill") else reply
    say(reply)
for pid, _, _ in children.values():
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
"""


class Member:
    """A process of the model."""

    def __init__(self, key, name=""):
        self.key = key
        self.name = name
        self.alive = True
        self.claimed = False  # has a slot
        self.state = State.IDLE  # or DRAINING, SHUTDOWN: what is stored


class Held:
    """A cell of the model: a lease, or a request of the node's own."""

    def __init__(self, key, node, owner, token=""):
        self.key = key
        self.node = node  # where the cell is
        self.owner = owner  # who must live
        self.router = owner
        self.token = token
        self.adopted = False
        self.freed = False  # certainly

    @property
    def lives(self):
        return not self.freed and self.owner.alive and self.node.alive


class Lifecycle(RuleBasedStateMachine):
    nodes = Bundle("nodes")
    routers = Bundle("routers")
    leases = Bundle("leases")
    requests = Bundle("requests")

    def __init__(self):
        super().__init__()
        self.name = f"test_life_{os.getpid()}_{secrets.token_hex(4)}"
        self.segment = Segment.open(self.name, slots=SLOTS, leases=LEASES)
        self.pool = Child(POOL, self.name)
        self.members: list[Member] = []
        self.held: list[Held] = []
        self.count = 0

    def teardown(self):
        try:
            assert self.pool.finish() == 0
            self.segment.reap()
            assert self.segment.snapshot() == ()
            assert Raw(self.name).taken() == 0
        finally:
            self.pool.close()
            self.segment.close()
            Segment.unlink(self.name)
            assert not (SHM / self.name).exists()

    # --- the model's eyes

    def ask(self, *words):
        self.pool.say(" ".join(map(str, words)))
        reply = self.pool.hear()
        what = words[2] if words[0] == "tell" else words[0]
        event(f"{what}: {reply if len(reply) < 20 else 'a lease'}")
        return reply

    def fresh(self):
        self.count += 1
        return f"k{self.count}"

    def living(self):
        """Participants that hold a slot."""
        return [member for member in self.members if member.alive and member.claimed]

    def living_nodes(self):
        return {member.name: member for member in self.living() if member.name}

    def cells(self, node):
        """Cells of a node that are certainly taken."""
        return [held for held in self.held if held.node is node and held.lives]

    def unsure(self, node):
        """Cells of a node whose owner is dead: taken or given back already."""
        return [h for h in self.held if h.node is node and not h.freed and not h.owner.alive]

    @initialize(target=nodes, names=st.sets(st.sampled_from(NAMES), min_size=1, max_size=3))
    def first_nodes(self, names):
        return multiple(*[self.join_as(name) for name in sorted(names)])

    @initialize(target=routers)
    def first_router(self):
        return self.start_router_process()

    # --- nodes

    @rule(target=nodes, name=st.sampled_from(NAMES))
    def join(self, name):
        member = self.join_as(name)
        return multiple() if member is None else member

    def join_as(self, name):
        member = Member(self.fresh(), name)
        reply = self.ask("node", member.key, name, CAPACITY)
        if name in self.living_nodes():
            assert reply == "NodeExists"
            return None
        if len(self.living()) == SLOTS:
            assert reply == "SegmentFull"
            return None
        assert reply == "ok"
        member.claimed = True
        self.members.append(member)
        return member

    @rule(node=consumes(nodes))
    def leave(self, node):
        if not node.alive:
            return
        assert self.ask("tell", node.key, "leave") == "ok"
        self.ask("kill", node.key)
        self.end_of(node)

    @rule(node=consumes(nodes))
    def end_regularly_or_kill(self, node):
        if node.alive:
            self.ask("kill", node.key)
            node.alive = False

    def end_of(self, member):
        """It gave back everything by itself."""
        member.alive = member.claimed = False
        for held in self.held:
            if held.node is member or held.owner is member:
                held.freed = True

    @rule(node=nodes, what=st.sampled_from(["drain", "resume", "resume", "shutdown"]))
    def change_state(self, node, what):
        if not node.alive:
            return
        reply = self.ask("tell", node.key, what)
        if node.state == State.SHUTDOWN and what != "shutdown":
            assert reply == "ValueError"
            return
        assert reply == "ok"
        node.state = {"drain": State.DRAINING, "resume": State.IDLE, "shutdown": State.SHUTDOWN}[
            what
        ]

    @rule(target=requests, node=nodes)
    def begin(self, node):
        if not node.alive or len(self.cells(node)) + len(self.unsure(node)) >= LEASES:
            return multiple()
        held = Held(self.fresh(), node, node)
        assert self.ask("tell", node.key, "begin", held.key) == "ok"
        held.adopted = True
        self.held.append(held)
        return held

    @rule(target=requests, lease=leases)
    def adopt(self, lease):
        return self.adopt_it(lease)

    def adopt_it(self, lease):
        if not lease.node.alive:
            return multiple()
        key = self.fresh()
        reply = self.ask("tell", lease.node.key, "adopt", key, lease.token)
        if lease.freed or lease.adopted:
            assert reply == "LeaseLost"
            return multiple()
        if not lease.owner.alive:  # reaped, or adopted in the nick of time
            assert reply in ("ok", "LeaseLost")
            if reply == "LeaseLost":
                lease.freed = True
                return multiple()
        assert reply == "ok"
        lease.adopted = True
        lease.owner = lease.node
        lease.key_of_request = key
        return lease

    @rule(request=consumes(requests))
    def end(self, request):
        if request.node.alive and request.adopted and not request.freed:
            key = getattr(request, "key_of_request", request.key)
            assert self.ask("tell", request.node.key, "end", key) == "ok"
            request.freed = True

    # --- routers

    @rule(target=routers)
    def start_router(self):
        return self.start_router_process()

    def start_router_process(self):
        member = Member(self.fresh())
        assert self.ask("router", member.key) == "ok"
        self.members.append(member)
        return member

    @rule(
        targets=(leases, requests),
        router=routers,
        adopts=st.lists(st.booleans(), min_size=1, max_size=3),
    )
    def acquire(self, router, adopts):
        """Some leases, each perhaps adopted at once (an end passes over those that are not)."""
        taken = []
        for adopt in adopts:
            held = self.acquire_one(router)
            if isinstance(held, Held):
                taken.append(held)
                if adopt:
                    self.adopt_it(held)
        return multiple(*taken)

    def acquire_one(self, router):
        if not router.alive:
            return multiple()
        key = self.fresh()
        reply = self.ask("tell", router.key, "acquire", key)
        eligible = [node for node in self.living_nodes().values() if node.state == State.IDLE]
        if not eligible:
            assert reply == "NoBackend"
            return multiple()
        if not router.claimed:
            if len(self.living()) == SLOTS:
                assert reply == "SegmentFull"
                return multiple()
            router.claimed = True
        if reply == "Saturated":
            assert all(len(self.cells(node)) >= CAPACITY for node in eligible)
            for node in eligible:  # looked at all of them, so what the dead held is free
                for held in self.unsure(node):
                    held.freed = True
            return multiple()
        name, token = reply.split()
        node = self.living_nodes()[name]
        assert node in eligible
        held_by_routers = [h for h in self.cells(node) if h.router is not node]
        assert len(held_by_routers) < CAPACITY, "above capacity"
        held = Held(key, node, router, token)
        self.held.append(held)
        return held

    @rule(lease=consumes(leases))
    def release(self, lease):
        router = lease.router
        if not router.alive:
            return
        reply = self.ask("tell", router.key, "release", lease.key)
        if lease.adopted or lease.freed:
            assert reply == "False"
        elif lease.node.alive:
            assert reply == "True"
            lease.freed = True
        else:
            assert reply in ("True", "False")
            lease.freed = True

    @rule(router=consumes(routers), regularly=st.booleans())
    def end_router(self, router, regularly):
        if not router.alive:
            return
        if regularly:
            assert self.ask("tell", router.key, "close") == "ok"
        self.ask("kill", router.key)
        if regularly:
            self.end_of(router)
        else:
            router.alive = False

    # --- anybody

    @precondition(lambda self: self.members)
    @rule()
    def reap(self):
        freed = self.segment.reap()
        dead = [member for member in self.members if not member.alive and member.claimed]
        unsure = [held for held in self.held if not held.freed and not held.lives]
        assert 0 <= freed <= len(dead) + len(unsure)
        for member in dead:
            member.claimed = False
        for held in unsure:
            held.freed = True
        assert self.segment.reap() == 0
        assert Raw(self.name).taken() == len([held for held in self.held if held.lives])
        assert {status.node for status in self.segment.snapshot()} == set(self.living_nodes())

    @invariant()
    def what_is_read_is_what_is(self):
        living = self.living_nodes()
        seen = set()
        for status in self.segment.snapshot():
            if status.health == Health.DEAD:
                assert any(
                    m.name == status.node and not m.alive and m.claimed for m in self.members
                )
                continue
            seen.add(status.node)
            node = living[status.node]
            sure, unsure = len(self.cells(node)), len(self.unsure(node))
            assert sure <= status.inflight <= sure + unsure
            stored = State.BUSY if status.inflight else State.IDLE
            assert status.state == (stored if node.state == State.IDLE else node.state)
        assert seen == set(living)

    @invariant()
    def no_cell_is_lost_or_made_up(self):
        certain = len([held for held in self.held if held.lives])
        possible = len([held for held in self.held if not held.freed])
        assert certain <= Raw(self.name).taken() <= possible


TestLifecycle = Lifecycle.TestCase
TestLifecycle.settings = settings(
    max_examples=50,
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow],
)
