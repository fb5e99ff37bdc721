"""bench/cluster_sim.py: layers whose time can be told by hand."""

from __future__ import annotations

import pytest
from attrs import evolve
from click.testing import CliRunner

from bench import cluster_sim
from bench.cluster_sim import World, layer_s, shares, turn_over

WORLD = World(
    layers=1, experts=8, top_k=2, hidden=250, expert_bytes=1_000_000, dense_s=0.0, expert_s=0.001,
    send_s=0.0, take_s=0.0, serve_s=0.0, ask_s=0.002,
    drive_bytes_per_s=1e8, delay_s=0.005, bits_per_s=1e12, skew=0.0,
)  # fmt: skip


def test_layers_by_hand():
    assert layer_s(WORLD, 3, [], 0) == pytest.approx(0.003)
    assert layer_s(WORLD, 0, [], 2) == pytest.approx(0.021), "the second is read, then computed"
    assert layer_s(WORLD, 0, [2], 0) == pytest.approx(0.014, rel=1e-3)
    assert layer_s(WORLD, 0, [1, 1], 0) == pytest.approx(0.013, rel=1e-3), "peers work side by side"
    slow = evolve(WORLD, bits_per_s=8 * (1000 + 150) / 0.1)
    assert layer_s(slow, 0, [1, 1], 0) == pytest.approx(0.1 + 0.013 + 0.2, rel=1e-2), "one port"


def about(seconds):
    """Beside what is on the wire."""
    return pytest.approx(seconds, rel=1e-3)


def test_what_messages_take():
    world = evolve(WORLD, ask_s=0.0, delay_s=0.0, send_s=0.001, serve_s=0.004, take_s=0.003)
    assert layer_s(world, 0, [1], 0) == about(0.009)
    assert layer_s(world, 0, [1, 1], 0) == about(0.012), "sent at 1 and 2, answered at 6 and 7"
    assert layer_s(world, 20, [1, 0, 1], 0) == about(0.022), "computed here behind what is sent"
    carried = evolve(world, carry_s=0.002)
    assert layer_s(carried, 0, [1, 1], 0) == about(0.016), "there at 3 and 5, back at 10 and 12"


def test_shared_cores():
    world = evolve(WORLD, ask_s=0.0, delay_s=0.0, send_s=0.001, serve_s=0.004, take_s=0.003)
    one = evolve(world, cores=1)
    assert layer_s(one, 5, [1, 1], 0) == about(0.002 + 0.005 + 0.010 + 0.006), "one after the other"
    assert layer_s(evolve(one, carry_s=0.002), 0, [1, 1], 0) == about(0.018 + 0.008)
    assert layer_s(one, 3, [], 1) == about(0.011), "the drive needs none"
    two = evolve(world, cores=2)
    assert layer_s(two, 5, [1, 1], 0) == about(0.013), "the second peer from 3 to 8, taken from 10 to 13"
    assert layer_s(evolve(world, cores=4), 5, [1, 1], 0) == layer_s(world, 5, [1, 1], 0)


def test_the_drive_of_one_node():
    world = evolve(WORLD, dense_s=0.003)
    seconds = cluster_sim.token_s(world, (0.0, 0.4), 0)
    found = cluster_sim._drive(evolve(world, drive_bytes_per_s=1.0), 0.4, seconds)
    assert found == pytest.approx(WORLD.drive_bytes_per_s, rel=1e-3)


def test_half_as_wide_rows():
    slow = evolve(WORLD, ask_s=0.0, delay_s=0.0, bits_per_s=8e6)
    beside = 2 * 150e-6
    assert layer_s(slow, 0, [1], 0) == pytest.approx(0.002 + 0.001 + beside)
    assert layer_s(evolve(slow, number_bytes=2), 0, [1], 0) == pytest.approx(0.001 + 0.001 + beside)


def test_where_it_turns():
    rate = turn_over(WORLD)
    assert rate == float("inf"), "10 ms of the link, 3 ms there: the drive needs 11"
    near = evolve(WORLD, delay_s=0.001)
    rate = turn_over(near)  # 11 ms less 5 ms are there for 2300 bytes
    assert rate == pytest.approx(8 * 2300 / 0.006, rel=1e-3)


def test_shares():
    assert shares(WORLD, 1, 2) == pytest.approx((0, 0.75))
    assert shares(WORLD, 2, 2) == pytest.approx((0.25, 0.5))
    assert shares(WORLD, 8, 2) == pytest.approx((0.75, 0))


def test_command():
    done = CliRunner().invoke(cluster_sim.main, ["--nodes", "2"])
    assert done.exit_code == 0, done.output
    assert "DeepSeek-V3" in done.output
    tables = [
        CliRunner().invoke(cluster_sim.main, ["--expert-wire", wire]).output for wire in ("f32", "bf16")
    ]
    assert all("Mbit/s" in each for each in tables)
    assert tables[0] != tables[1], "less goes over the wire"
