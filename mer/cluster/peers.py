"""All peers of an engine: who is asked for which expert, and who is to hold which."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping
from functools import partial
from itertools import count
from typing import Final

import grpc
import numpy as np
from attrs import frozen
from numpy.typing import NDArray

from mer._ext.remote import RemoteTier
from mer.cluster import security
from mer.cluster.identity import Identity
from mer.cluster.names import Names
from mer.cluster.peer import Peer
from mer.cluster.placement import place
from mer.cluster.state import PeerState
from mer.cluster.wire import most_bytes
from mer.config import EngineConfig, parse_address, peer_name
from mer.errors import ConfigError

_log = logging.getLogger("mer")

# Seconds between looks at the peers; how long the start waits for them.
_TICK: Final = 0.5
_AT_START: Final = 3.0
# A peer has at least as long to answer, however quick the own drive is: ns.
PATIENCE_NS: Final = 2_000_000
# Experts are placed anew once so many tokens were seen, counted in every layer, and again with twice as many,
# and so on; later whenever so many came.
_FIRST_TOKENS: Final = 4096
_TOKENS: Final = 1 << 18


@frozen
class Local:
    """What this machine has: of how many layers, experts of each, hidden size; how many it keeps itself."""

    layers: int
    experts: int
    hidden: int
    kept: int


class Peers:
    """What `mer._ext.remote` wants to carry activations. First `begin` it, then `close`."""

    def __init__(self, config: EngineConfig, identity: Identity, local: Local) -> None:
        """Raises ConfigError for a peer, certificates or a token that can't be used."""
        self._local, self._identity = local, identity
        # Those that are named one by one, and each name with the addresses that it has now.
        self._fixed = tuple(address for address in config.peers if peer_name(address) is None)
        self._named: dict[str, frozenset[str]] = {
            name: frozenset() for name in map(peer_name, config.peers) if name is not None
        }
        self._token = security.read_token(config.peer_token)
        self._credentials: grpc.ChannelCredentials | None = None
        ca, cert, key = config.peer_ca, config.peer_cert, config.peer_key
        if ca is not None and cert is not None and key is not None:
            self._credentials = security.channel_credentials(cert, key, ca)
        for address in (*self._fixed, *self._named):
            if not security.is_loopback(address) and (self._credentials is None or not self._token):
                raise ConfigError(
                    f"peer {address} is another machine: give --peer-ca, --peer-cert, --peer-key and "
                    "--peer-token"
                )
        limit = most_bytes(local.hidden, local.layers * local.experts)
        self._options = [
            ("grpc.max_receive_message_length", limit),
            ("grpc.max_send_message_length", limit),
            ("grpc.keepalive_time_ms", 10_000),
            ("grpc.keepalive_timeout_ms", 10_000),
            ("grpc.use_local_subchannel_pool", 1),
        ]
        self._lock = threading.Lock()
        self._closed = False
        self._news = threading.Event()  # there is something to place, or it is the end
        self._due = True  # to be placed anew
        self._next_tokens = _FIRST_TOKENS
        self._placed: dict[int, frozenset[int]] = {}
        self._peers: dict[int, Peer] = {}
        self._numbers = count()
        self._names: Names | None = None

    def begin(self, tier: RemoteTier) -> None:
        """Reach for all of them; waits a little until it is known who is there."""
        self._tier = tier
        until = time.monotonic() + _AT_START
        self._thread = threading.Thread(target=self._run, name="mer-peers", daemon=True)
        self._thread.start()
        self._reach()
        if self._named:
            self._names = Names(self._named, self._resolved)
            self._names.wait_first(_AT_START)
        for peer in self._now():
            peer.wait_tried(until - time.monotonic())

    def ask(
        self,
        peer: int,
        turn: int,
        deadline: int,
        layer: int,
        x: NDArray[np.float32],
        experts: list[int],
        counts: list[int],
        tokens: NDArray[np.int32],
    ) -> bool:
        """See mer._ext.remote."""
        asked = self._peers.get(peer)
        return asked is not None and asked.ask(turn, deadline, layer, x, experts, counts, tokens)

    def states(self) -> tuple[PeerState, ...]:
        """Of each that is known, in the order in which they became so."""
        return tuple(peer.state() for peer in self._now())

    def close(self) -> None:
        """Leave them; no step may be under way."""
        with self._lock:
            self._closed = True
        self._news.set()
        if self._names is not None:
            self._names.close()
        for peer in self._now():
            peer.close()
        self._thread.join()

    def _now(self) -> list[Peer]:
        with self._lock:
            return list(self._peers.values())

    def _channel(self, address: str, name: str | None) -> grpc.Channel:
        """name: by which the address was found, and which its certificate is for then."""
        if self._credentials is None:
            return grpc.insecure_channel(address, self._options)
        called = [("grpc.ssl_target_name_override", parse_address(name)[0])] if name is not None else []
        return grpc.secure_channel(address, self._credentials, [*self._options, *called])

    def _resolved(self, name: str, addresses: frozenset[str]) -> None:
        """What a name's addresses are now."""
        if self._credentials is None:  # the name was one of this machine
            addresses = frozenset(filter(security.is_loopback, addresses))
        with self._lock:
            self._named[name] = addresses
        self._reach()

    def _wanted(self) -> dict[str, str | None]:
        """The addresses of all peers that there should be; by which name each was found."""
        found: dict[str, str | None] = dict.fromkeys(self._fixed)
        for name, addresses in self._named.items():
            for address in sorted(addresses):
                found.setdefault(address, name)
        return found

    def _reach(self) -> None:
        """For whoever is new."""
        with self._lock:
            known = {peer.address for peer in self._peers.values()}
            for address, name in self._wanted().items():
                if address not in known and not self._closed:
                    index = next(self._numbers)
                    self._peers[index] = Peer(
                        index, address, self._identity, partial(self._channel, address, name), self._token,
                        self._tier.n_keys, answered=self._tier.answer, lost=self._tier.lost,
                        changed=self._changed,
                    )  # fmt: skip

    def _forget(self) -> None:
        """Those that their name has not any more, once they are lost: while they answer they are used."""
        with self._lock:
            wanted = self._wanted()
            gone = [
                peer
                for peer in self._peers.values()
                if peer.address not in wanted and peer.state().condition == "lost"
            ]
            for peer in gone:
                del self._peers[peer.index]
        for peer in gone:
            _log.info("peer %s has gone: its name is that of others now", peer.address)
            peer.close()

    def _changed(self) -> None:
        """A peer has come, gone, or holds something else."""
        with self._lock:
            peers = self._peers
            self._tier.hold(holders({i: peer.held for i, peer in peers.items()}, self._tier.n_keys))
            there = {index for index, peer in peers.items() if peer.capacity and peer.assigns}
            if there != self._placed.keys():
                self._due = True
                self._news.set()

    def _run(self) -> None:
        while True:
            self._news.wait(_TICK)
            self._news.clear()
            if self._closed:
                return
            try:
                self._forget()
                self._place()
                for peer in self._now():
                    peer.check()
            except Exception:
                _log.exception("placing experts failed")

    def _place(self) -> None:
        heat, tokens = self._tier.heats()
        with self._lock:
            if tokens >= self._next_tokens:
                self._due, self._next_tokens = True, tokens + min(tokens, _TOKENS)
            if not self._due:
                return
            self._due = False
            peers = dict(self._peers)
            room = {i: peer.capacity for i, peer in peers.items() if peer.capacity and peer.assigns}
            held = {index: self._placed.get(index) or peers[index].held for index in room}
            shape = (self._local.layers, self._local.experts)
            self._placed = place(heat.reshape(shape), self._local.kept, room, held)
            placed = dict(self._placed)
        for index, experts in placed.items():
            peers[index].assign(experts)


def holders(held: Mapping[int, frozenset[int]], n_keys: int) -> NDArray[np.int32]:
    """i32 [n_keys]: a peer that holds each expert, -1: none; of several each has its share."""
    if not held:
        return np.full(n_keys, -1, np.int32)
    there = np.zeros((len(held), n_keys), bool)
    for row, keys in zip(there, held.values(), strict=True):
        row[list(keys)] = True
    count = there.sum(axis=0)
    chosen = np.arange(n_keys) % np.maximum(count, 1) + 1
    found = np.argmax((np.cumsum(there, axis=0) == chosen) & there, axis=0)
    return np.where(count > 0, np.array(list(held))[found], -1).astype(np.int32)
