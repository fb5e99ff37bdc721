"""Peers by a name: its addresses come and go, and so do they, without stopping."""

from __future__ import annotations

import socket

import pytest
import trustme
from engine_models import opened, prompt, write_text_model
from shards import certificates, here, peers, until

from mer import SamplingParams
from mer.cluster import names, session
from mer.cluster.names import resolve
from mer.config import EngineConfig, peer_name
from mer.errors import ConfigError

PARAMS = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_text_model(tmp_path_factory.mktemp("names") / "tiny")


class NameServer:
    """What the names are; an error is raised."""

    def __init__(self) -> None:
        self.addresses: dict[str, list[tuple[str, int]] | OSError] = {}

    def __call__(self, host, port, **_):
        found = self.addresses[host]
        if isinstance(found, OSError):
            raise found
        six = [
            (socket.AF_INET6, socket.SOCK_STREAM, 6, "", (a, p or port, 0, 0)) for a, p in found if ":" in a
        ]
        return six + [
            (socket.AF_INET, socket.SOCK_STREAM, 6, "", (a, p or port)) for a, p in found if ":" not in a
        ]


@pytest.fixture
def server(monkeypatch):
    made = NameServer()
    monkeypatch.setattr(names.socket, "getaddrinfo", made)
    monkeypatch.setattr(names, "INTERVAL", 0.05)
    monkeypatch.setattr(session, "LAST_DELAY", 0.5)
    return made


def known(engine):
    return sorted(peer.address for peer in peers(engine))


async def test_peers_come_and_go(model, server, caplog):
    server.addresses["localhost"] = socket.gaierror(socket.EAI_NONAME, "Name or service not known")
    async with opened(model) as alone:
        expected = (await alone.generate(prompt(20), PARAMS)).token_ids
    async with opened(model, peers="dns:localhost:9100", cache_experts=4, prefetch=0) as engine:

        async def answers():
            assert (await engine.generate(prompt(20), PARAMS)).token_ids == expected

        assert not peers(engine)
        await answers()
        assert "peers localhost:9100: the name can't be looked up" in caplog.text
        with here(model, most=5) as (one, _), here(model, most=7) as (two, _):
            server.addresses["localhost"] = [("127.0.0.1", one.port)]
            await until(lambda: [peer.held for peer in peers(engine)] == [5], "one is used")
            await answers()
            server.addresses["localhost"] = [("127.0.0.1", two.port), ("127.0.0.1", one.port)]
            await until(lambda: [peer.held for peer in peers(engine)] == [5, 7], "both are used")
            assert known(engine) == sorted([one.address, two.address])
            await answers()
            # Who answers is used, whatever the name is now.
            server.addresses["localhost"] = [("127.0.0.1", two.port)]
            await until(lambda: len(engine._runner.experts._peers._members.wanted()) == 1, "it is seen")
            await answers()
            assert known(engine) == sorted([one.address, two.address])
            # And no answer of the name server is no reason to give up anyone.
            server.addresses["localhost"] = socket.gaierror(socket.EAI_AGAIN, "Temporary failure")
            two.stop()
            await until(lambda: peers(engine)[1].condition == "lost", "it is lost")
            assert len(peers(engine)) == 2
            server.addresses["localhost"] = [("127.0.0.1", two.port)]
            one.stop()
            await until(lambda: known(engine) == [two.address], "it is forgotten")
            await answers()
            server.addresses["localhost"] = [("192.0.2.1", 9100)]
            await until(lambda: not peers(engine), "without certificates nobody is asked elsewhere")


async def test_its_certificate_is_for_the_name(model, server, tmp_path):
    """Which an address that was found is not."""
    ca, token = trustme.CA(), tmp_path / "token"
    token.write_text("0123456789abcdef0123\n")
    own = certificates(tmp_path / "engine", ca, "engine.test")
    asking = {f"peer_{part}": file for part, file in own.items()} | {"peer_token": token}
    for name, right in (("shards.test", True), ("others.test", False)):
        files = certificates(tmp_path / name, ca, name)
        tls = {"tls_cert": files["cert"], "tls_key": files["key"], "tls_client_ca": files["ca"]}
        with here(model, token, **tls) as (shard, _):
            server.addresses["shards.test"] = [("127.0.0.1", shard.port)]
            async with opened(model, peers=("dns:shards.test:9100",), cache_experts=4, **asking) as engine:
                if right:
                    await until(lambda engine=engine: peers(engine)[0].held, "it is used")
                else:
                    await until(lambda engine=engine: peers(engine)[0].failures, "it is refused")
                    assert not peers(engine)[0].capacity


async def test_a_name_elsewhere_needs_certificates(model):
    with pytest.raises(ConfigError, match=r"shards\.test:9100 is another machine"):
        await open_engine(model, "dns:shards.test:9100")


async def open_engine(model, address):
    async with opened(model, peers=(address,)):
        pass


def test_a_machine_with_addresses_of_both_kinds_is_one(server):
    server.addresses["both.test"] = [("192.0.2.1", 0), ("2001:db8::1", 0), ("192.0.2.2", 0)]
    assert resolve("both.test:9100") == {"192.0.2.1:9100", "192.0.2.2:9100"}
    server.addresses["six.test"] = [("2001:db8::1", 0), ("2001:db8::2", 0)]
    assert resolve("six.test:1") == {"[2001:db8::1]:1", "[2001:db8::2]:1"}


def test_what_is_a_name():
    assert peer_name("dns:node1:9100") == "node1:9100"
    assert peer_name("dns:9100") is None, "a machine whose name is dns"
    assert peer_name("node1:9100") is None
    EngineConfig(peers=("dns:node1:9100", "node1:9100", "dns:9100"))
    for bad in ("dns:node1:x", "dns::9100", "dns:a b:1"):
        with pytest.raises(ConfigError, match="HOST:PORT"):
            EngineConfig(peers=(bad,))
