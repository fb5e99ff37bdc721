"""Peers of an open engine are exchanged for others."""

from __future__ import annotations

import pytest
from engine_models import opened, prompt, write_text_model
from shards import peers, settled, shard, until, with_peers

from mer import SamplingParams
from mer.errors import ConfigError

PARAMS = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_text_model(tmp_path_factory.mktemp("exchanged") / "tiny")


async def test_another_address(model):
    async with opened(model) as engine:
        expected = (await engine.generate(prompt(20), PARAMS)).token_ids
        with pytest.raises(ConfigError, match="opened without peers"):
            engine.exchange_peers(["127.0.0.1:1"])
    with shard(model) as one, shard(model) as two:
        async with with_peers(model, one) as engine:
            for bad, words in (("192.0.2.1:9100", "is another machine"), ("nowhere", "HOST:PORT")):
                with pytest.raises(ConfigError, match=words):
                    engine.exchange_peers([bad])
            engine.exchange_peers([two.address])
            await until(lambda: len(peers(engine)) == 2 and settled(engine), "both hold experts")
            assert (await engine.generate(prompt(20), PARAMS)).token_ids == expected
            one.kill()
            await until(lambda: [each.address for each in peers(engine)] == [two.address], "it is forgotten")
            assert (await engine.generate(prompt(20), PARAMS)).token_ids == expected
            assert peers(engine)[0].condition == "up"
