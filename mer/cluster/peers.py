"""All peers of an engine: who is asked for which expert, and who is to hold which."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Final

import grpc

from mer._ext.remote import Ask, RemoteTier
from mer.cluster import security
from mer.cluster.identity import Identity
from mer.cluster.members import Local, Members
from mer.cluster.names import Names
from mer.cluster.peer import Peer
from mer.cluster.session import Answer, Session
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


class Peers:
    """What `mer._ext.remote` wants to carry activations. First `begin` it, then `close`."""

    def __init__(self, config: EngineConfig, identity: Identity, local: Local) -> None:
        """Raises ConfigError for a peer, certificates or a token that can't be used."""
        addresses = [peer for peer in config.peers if peer_name(peer) is None]
        names = [name for name in map(peer_name, config.peers) if name is not None]
        self._members, self._identity, self._names = Members(local, addresses, names), identity, names
        # Of several engines at a shard the first one decides.
        self._engine = time.time_ns().to_bytes(8, "big") + os.urandom(8)
        self._wire = config.expert_wire
        self._token = security.read_token(config.peer_token)
        self._credentials: grpc.ChannelCredentials | None = None
        ca, cert, key = config.peer_ca, config.peer_cert, config.peer_key
        if ca is not None and cert is not None and key is not None:
            self._credentials = security.channel_credentials(cert, key, ca)
        self._check([*addresses, *names])
        limit = most_bytes(local.hidden, local.layers * local.experts)
        self._options = [
            ("grpc.max_receive_message_length", limit),
            ("grpc.max_send_message_length", limit),
            ("grpc.keepalive_time_ms", 10_000),
            ("grpc.keepalive_timeout_ms", 10_000),
            ("grpc.use_local_subchannel_pool", 1),
            ("grpc.enable_http_proxy", 0),  # peers are machines of one's own
        ]
        self._lock = threading.Lock()
        self._closed = False
        self._news = threading.Event()  # there is something to place, or it is the end
        self._peers: dict[int, Peer] = {}
        self._looking: Names | None = None

    def begin(self, tier: RemoteTier) -> None:
        """Reach for all of them; waits a little until it is known who is there."""
        self._tier = tier
        until = time.monotonic() + _AT_START
        self._thread = threading.Thread(target=self._run, name="mer-peers", daemon=True)
        self._thread.start()
        self._reach()
        if self._names:
            self._looking = Names(self._names, self._resolved)
            self._looking.wait_first(_AT_START)
        for peer in self._now():
            peer.wait_tried(until - time.monotonic())

    def ask(self, peer: int, ask: Ask) -> bool:
        """See mer._ext.remote."""
        asked = self._peers.get(peer)
        return asked is not None and asked.ask(ask)

    def expected_ns(self, peer: int, rows: int) -> int:
        """See mer._ext.remote."""
        asked = self._peers.get(peer)
        return 0 if asked is None else round(1e9 * asked.expected(rows))

    def probe(self, peer: int, ask: Ask) -> None:
        """See mer._ext.remote."""
        if (asked := self._peers.get(peer)) is not None:
            asked.probe(ask)

    def states(self) -> tuple[PeerState, ...]:
        """Of each that is known, in the order in which they became so."""
        return tuple(peer.state() for peer in self._now())

    def exchange(self, addresses: Sequence[str]) -> None:
        """Other addresses in place of those that were given, which are used for as long as they answer.

        Raises ConfigError for what is no address, or another machine's without certificates.
        """
        self._check(addresses)
        with self._lock:
            self._members.exchange(addresses)
        self._reach()

    def close(self) -> None:
        """Leave them; no step may be under way."""
        with self._lock:
            self._closed = True
        self._news.set()
        if self._looking is not None:
            self._looking.close()
        for peer in self._now():
            peer.close()
        self._thread.join()

    def _check(self, addresses: Iterable[str]) -> None:
        for address in addresses:
            if not security.is_loopback(address) and (self._credentials is None or not self._token):
                raise ConfigError(
                    f"peer {address} is another machine: give --peer-ca, --peer-cert, --peer-key and "
                    "--peer-token"
                )

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
            self._members.resolved(name, addresses)
        self._reach()

    def _reach(self) -> None:
        """For whoever is new."""
        with self._lock:
            if self._closed:
                return
            for index, name in self._members.reach(self._session).items():
                made = self._members.sessions[index]
                peer = self._peers[index] = Peer(
                    made, partial(self._channel, made.address, name), self._token,
                    answered=partial(self._answered, index), changed=self._changed,
                )  # fmt: skip
                peer.start()

    def _session(self, address: str) -> Session:
        return Session(address, self._engine, self._identity, self._tier.n_keys, self._wire)

    def _answered(self, index: int, answer: Answer) -> None:
        self._tier.answer(answer.turn, index, answer.experts, answer.rows)

    def _forget(self) -> None:
        """Those that have gone from their name."""
        with self._lock:
            gone = [self._peers.pop(index) for index in self._members.forget()]
        for peer in gone:
            _log.info("peer %s has gone from its name", peer.state().address)
            peer.close()
            self._changed()

    def _changed(self) -> None:
        """A peer has come, gone, or holds something else."""
        with self._lock:
            found, due = self._members.changed()
            self._tier.hold(found)
        if due:
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
            told = [(self._peers[i], keys) for i, keys in self._members.place(heat, tokens).items()]
        for peer, experts in told:
            peer.assign(experts)
