"""bench/cluster.py, once on a small model."""

from __future__ import annotations

import json
import re

from click.testing import CliRunner
from engine_models import write_text_model
from shards import LONG

from bench import cluster, cluster_sim
from mer.cluster import peers


def test_one_node_against_two(tmp_path, monkeypatch):
    monkeypatch.setattr(peers, "PATIENCE_NS", int(LONG * 1e9))  # however busy the machine
    model = write_text_model(tmp_path / "tiny")
    command = [
        str(model),
        "--share",
        "50%",
        "--tokens",
        "8",
        "--rounds",
        "2",
        "--expert-wire",
        "bf16",
        "--json",
        str(tmp_path / "out"),
    ]
    done = CliRunner().invoke(cluster.main, command)
    assert done.exit_code == 0, done.output
    assert "tokens/s" in done.output
    found = json.loads((tmp_path / "out").read_text())
    one, two = found["nodes"]
    assert (one["nodes"], two["nodes"]) == (1, 2)
    assert one["experts_each"] == two["experts_each"] == 6
    assert one["sent_bytes"] == one["received_bytes"] == one["by_peers"] == 0
    assert two["sent_bytes"] > 0 < two["received_bytes"]
    assert two["tokens_per_s"] > 0 < two["asks"]
    assert found["wire"] == "bf16"
    assert cluster_sim.measured(found)[0].number_bytes == 2
    assert found["message"]["trip_s"] > found["message"]["send_s"] > 0
    assert [nodes for nodes, *_ in cluster_sim.measured(found)[1]] == [1, 2]
    done = CliRunner().invoke(cluster_sim.main, ["--check", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    assert re.search(r"0 ms, 25 Gbit/s, bf16 .* ms .*\+0%.* GB/s", done.output), "its own costs"
