"""Engines and shards with a network between them that does what it is told, and no clock but its own.

Of both sides it is the program's own logic that runs: Members, Sessions and RemoteTier with a streamer,
Service and Guests. What is left out are threads, gRPC, and of a shard the cache: `Memory` stands for it.
"""

from __future__ import annotations

from collections import deque

import numpy as np
from attrs import define, evolve, field
from moe_model import EXPERTS, KERNELS, Model, Streamed

from mer.cluster.identity import Identity
from mer.cluster.members import Local, Members
from mer.cluster.server import Service
from mer.cluster.session import Session
from mer.errors import ConfigError
from mer.v1 import expert_pb2 as pb

RIGHT = Identity("1", b"model", "avx2", b"probe")
KEPT = 2
# A streamer waits so long for who does not answer: ns of the real clock.
_PATIENCE = 300_000


class AbortedError(Exception):
    """What a shard ends a stream with."""


class Context:
    def invocation_metadata(self):
        return ()

    def peer(self):
        return "simulated"

    def cancel(self):
        raise AssertionError("nobody waits here")

    def abort(self, code, details):
        raise AbortedError(f"{code.name}: {details}")


class Memory:
    """Stands for mer.cluster.shard.Shard: what is assigned, and what of it has been read."""

    def __init__(self, model: Model, capacity: int, identity: Identity) -> None:
        self.model, self.capacity, self.identity = model, capacity, identity
        self.n_experts, self.total = EXPERTS, model.tables.total
        self.hidden = [layer[2] for layer in model.layers]
        self.assigned: frozenset[int] = frozenset()
        self.loaded: set[int] = set()
        self.reads = 0

    def assign(self, experts) -> None:
        wanted = frozenset(experts)
        if len(wanted) > self.capacity or not all(0 <= key < self.total for key in wanted):
            raise ConfigError("too many")
        self.assigned = wanted
        self.loaded &= wanted

    def held(self) -> list[int]:
        return sorted(self.loaded)

    def compute(self, layer, x, experts, weights, until):
        if any(layer * EXPERTS + int(e) not in self.loaded for e in experts.ravel()):
            return None
        return self.model.exact(KERNELS, layer, x, experts, weights)

    def load(self, count: int) -> None:
        for key in sorted(self.assigned - self.loaded)[:count]:
            self.loaded.add(key)
            self.reads += 1


@define(eq=False)
class Process:
    """A shard, from its start until it is killed."""

    memory: Memory
    alive: bool = True
    frozen: bool = False
    service: Service = field(init=False)

    def __attrs_post_init__(self) -> None:
        self.service = Service(self.memory, "")


@define(eq=False)
class Link:
    """One stream. Messages of one way come in order; either side may not know yet that it is over."""

    engine: Node
    index: int
    server: int
    process: Process | None  # None: nobody listened
    to_server: deque = field(factory=deque)
    to_engine: deque = field(factory=deque)
    ended: bool = False  # for the engine
    responses: object = None  # what the service yields; None: over for the shard, or not begun
    fed: deque = field(factory=deque)

    def feed(self):
        while True:
            yield self.fed.popleft()


class Node:
    """An engine."""

    def __init__(self, world: World, number: int, streamed: Streamed) -> None:
        self.world, self.number, self.made = world, number, streamed
        layers = len(world.model.layers)
        local = Local(layers, EXPERTS, max(layer[2] for layer in world.model.layers), KEPT)
        self.members = Members(local, ["s0"], ["shards"])
        self.members.resolved("shards", world.names)
        self.links: dict[int, Link] = {}
        self.again: dict[int, float] = {}
        self.heat = np.zeros(layers * EXPERTS, np.float32)
        self.tokens = self.assigns = 0
        self.placed = self.gave_way = 0  # times, and experts that were held and are to be no more
        self.found = np.full(layers * EXPERTS, -1, np.int32)
        self.how: dict[int, str] = {}
        streamed.cache.clear()
        self.tier = streamed.streamer.use_peers(self, _PATIENCE)
        self.tick()

    def expected_ns(self, peer, rows):
        """Nothing is known: the drive's time is real, that of the peers is not."""
        return 0

    def ask(self, peer, ask):
        """What the tier calls in a step. Who is asked answers at once, later, or is lost: `how` says it."""
        session = self.members.sessions.get(peer)
        if session is None:
            return False
        keys = {ask.layer * EXPERTS + e for e in ask.experts}
        assert keys <= session.held, "asked for what it does not hold"
        messages = session.ask(self.world.now, ask._replace(deadline=int(self.world.now * 1e9)))
        self.send(peer, messages)
        if messages and self.how.get(peer) == "now":
            self.world.flush(self.links[peer])
        elif messages and self.how.get(peer) == "lost":
            self.world.cut(self.links[peer])
        return bool(messages)

    def send(self, index, messages):
        if messages:
            self.links[index].to_server.extend(messages)

    def take(self, link, response):
        if link.ended:
            return
        if isinstance(response, str):
            self.end(link, response)
            return
        news = self.members.sessions[link.index].take(self.world.now, response)
        if news.changed:
            self.changed()
        if news.answer is not None:
            self.tier.answer(news.answer.turn, link.index, news.answer.experts, news.answer.rows)

    def end(self, link, why):
        link.ended = True
        session = self.members.sessions[link.index]
        del self.links[link.index]
        owed, _ = session.end(why)
        self.again[link.index] = self.world.now + session.next_delay()
        if owed is not None:
            self.tier.answer(owed.turn, link.index, owed.experts, owed.rows)
        self.changed()

    def changed(self):
        self.found, _ = self.members.changed()
        self.tier.hold(self.found)

    def holding(self):
        members = self.members
        held = (members._placed.get(i) or members.sessions[i].held for i in members._room())
        return frozenset().union(*held)

    def tick(self):
        now, sessions = self.world.now, self.members.sessions
        self.members.reach(
            lambda address: Session(
                address, self.number.to_bytes(16, "big"), RIGHT, self.world.model.tables.total
            )
        )
        for index in self.members.forget():
            if index in self.links:  # it was just tried again
                self.links.pop(index).ended = True
            self.changed()
        before = self.holding()
        placed = self.members.place(self.heat, self.tokens)
        if placed:
            self.placed += 1
            room = sum(sessions[index].capacity for index in placed)
            out = before - frozenset().union(*placed.values())
            self.gave_way += max(len(out) - max(len(before) - room, 0), 0)
        for index, keys in placed.items():
            messages = sessions[index].assign(now, keys)
            self.assigns += len(messages)
            self.send(index, messages)
        for index, session in list(sessions.items()):
            link = self.links.get(index)
            if link is not None and session.silent(now):
                self.end(link, "silent")
            elif link is not None:
                self.send(index, session.ping(now))
            elif self.again.get(index, 0) <= now:
                self.links[index] = self.world.connect(self, index, session)

    def step(self, layer, tokens, seed, how):
        self.how = {index: how[index % len(how)] for index in self.members.sessions}
        self.made.check(layer, tokens, seed)


class World:
    """Shards have the addresses s0, s1 ..., and the first another one, too."""

    def __init__(self, model: Model, streamed: list[Streamed], capacities: list[int]) -> None:
        self.model, self.streamed, self.now = model, streamed, 1000.0
        self.addresses = {f"s{i}": i for i in range(len(capacities))} | {"s0-again": 0}
        self.names = frozenset(self.addresses)
        self.processes = [Process(Memory(model, capacity, RIGHT)) for capacity in capacities]
        self.apart: set[tuple[Streamed, int]] = set()
        self.links: list[Link] = []
        self.refusals: list[str] = []
        self.born = 0
        self.nodes = [self.open(made) for made in streamed]

    def open(self, made):
        self.born += 1
        return Node(self, self.born, made)

    # The network.

    def connect(self, node, index, session):
        server = self.addresses[session.address]
        process = self.processes[server]
        link = Link(node, index, server, process if process.alive else None)
        self.links.append(link)
        link.to_server.append(session.begin(self.now))
        return link

    def cuts(self, link):
        return (link.engine.made, link.server) in self.apart

    def to_server(self, link):
        """The next message reaches the shard, which answers."""
        process = link.process
        if self.cuts(link) or not link.to_server:
            return
        if process is None or not process.alive:
            link.to_server.clear()
            link.to_engine.append("UNAVAILABLE")
        elif not process.frozen:
            message = link.to_server.popleft()
            if message.WhichOneof("kind") == "hello":
                link.responses = process.service.Compute(link.feed(), Context())
            if link.responses is None:
                return
            link.fed.append(pb.ComputeRequest.FromString(message.SerializeToString()))
            try:
                link.to_engine.append(next(link.responses))
            except AbortedError as error:
                link.responses = None
                link.to_engine.append(str(error))
                self.refusals.append(str(error))

    def to_engine(self, link):
        """The next answer, or the end, reaches the engine."""
        if not self.cuts(link) and link.to_engine:
            link.engine.take(link, link.to_engine.popleft())

    def flush(self, link):
        """All of one stream, as far as it gets through."""
        for _ in range(20):
            if not link.to_server and not link.to_engine:
                break
            self.to_server(link)
            self.to_engine(link)

    def cut(self, link):
        """The engine finds the stream broken; the shard knows nothing of that yet."""
        link.to_engine.clear()
        link.to_server.clear()
        if not link.ended:
            link.engine.end(link, "broken")

    def notice(self, link):
        """The shard finds out that the engine is gone."""
        if link.ended and link.responses is not None and not link.process.frozen:
            link.responses.close()
            link.responses = None

    # What happens to machines.

    def kill(self, server, lose):
        process = self.processes[server]
        process.alive = False
        for link in self.links:
            if link.process is process:
                link.responses = None
                if lose:
                    link.to_engine.clear()
                link.to_engine.append("UNAVAILABLE")

    def start(self, server, capacity, other):
        if not self.processes[server].alive:
            identity = {
                "": RIGHT,
                "model": evolve(RIGHT, model=b"other"),
                "version": evolve(RIGHT, version="2"),
            }
            self.processes[server] = Process(Memory(self.model, capacity, identity[other]))

    def restart(self, number):
        """An engine is killed, and another comes in its place; shards may take it for alive for a while."""
        old = self.nodes[number]
        for link in self.links:
            if link.engine is old:
                link.ended = True
        self.nodes[number] = self.open(old.made)

    def advance(self, seconds):
        self.now += seconds
        for node in self.nodes:
            node.tick()
        self.links = [each for each in self.links if not each.ended or each.responses is not None]

    def heal(self):
        """No more faults: all machines are there, names are right, and nobody is apart."""
        self.apart.clear()
        self.names = frozenset(self.addresses)
        for node in self.nodes:
            node.members.resolved("shards", self.names)
        for server, process in enumerate(self.processes):
            process.frozen = False
            self.start(server, process.memory.capacity, "")

    def run(self, seconds, each=2.0):
        """Time passes, everything is delivered, and shards read."""
        until = self.now + seconds
        while self.now < until:
            self.advance(each)
            for link in list(self.links):
                self.flush(link)
                if self.now > until - seconds + 25:
                    self.notice(link)
            for process in self.processes:
                process.memory.load(3)

    def healthy(self):
        return [each.memory for each in self.processes if each.memory.identity == RIGHT]
