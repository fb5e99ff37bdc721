"""What a shard tells who looks after it: by gRPC's health protocol, as Kubernetes asks."""

from __future__ import annotations

import os
import re
import shutil
import socket
import time

import grpc
import pytest
from engine_models import write_text_model
from grpc_health.v1 import health_pb2, health_pb2_grpc
from shards import LONG, shard

from mer.cluster.health import HealthServer
from mer.cluster.shard import MOST_ENGINES, Shard
from mer.cluster.wire import MOST_ROWS
from mer.errors import BudgetError, ConfigError

STATUS = health_pb2.HealthCheckResponse


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_text_model(tmp_path_factory.mktemp("health") / "tiny")


def ask(port: int) -> int:
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        return health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=LONG).status


def test_of_a_running_shard(model):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with shard(model, "--ram", "1GiB", "--health", f"127.0.0.1:{port}") as one:
        end = time.monotonic() + LONG
        while ask(port) != STATUS.SERVING and time.monotonic() < end:
            time.sleep(0.05)
        assert ask(port) == STATUS.SERVING
        assert f"health at 127.0.0.1:{port}" in "".join(one.lines)
        assert one.end() == 0
        with pytest.raises(grpc.RpcError, match="UNAVAILABLE"):
            ask(port)


def test_what_is_told_and_what_is_refused():
    server = HealthServer("127.0.0.1:0")
    try:
        assert ask(server.port) == STATUS.NOT_SERVING
        server.tell(True)
        assert ask(server.port) == STATUS.SERVING
        with grpc.insecure_channel(f"127.0.0.1:{server.port}") as channel:
            stub = health_pb2_grpc.HealthStub(channel)
            for service, code in (("mer.v1.Expert", "NOT_FOUND"), ("x" * 5000, "RESOURCE_EXHAUSTED")):
                with pytest.raises(grpc.RpcError, match=code):
                    stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=LONG)
        with pytest.raises(ConfigError, match=f"--health 127.0.0.1:{server.port}: can't listen there"):
            HealthServer(f"127.0.0.1:{server.port}")
        with pytest.raises(ConfigError, match="HOST:PORT"):
            HealthServer("everywhere")
    finally:
        server.stop()


def test_a_shard_whose_files_are_changed_under_it_has_failed(model, tmp_path):
    own = shutil.copytree(model, tmp_path / "own")
    made = Shard(own, 1 << 40, 0, threads=1)
    try:
        assert not made.failed
        for file in own.iterdir():
            os.utime(file, ns=(1, 1))
        end = time.monotonic() + LONG
        while not made.failed and time.monotonic() < end:
            time.sleep(0.02)
        assert made.failed
        assert made.held() == []
    finally:
        made.close()


def test_what_was_on_its_way_when_it_left_what_is_assigned_takes_no_room(model):
    """An expert that is being read, as one in use here, can't be dropped at once."""
    made = Shard(model, 1 << 40, 0, most=2, threads=1)
    try:
        made.assign([0, 1])
        until_held(made, [0, 1])
        assert made._cache.acquire_py(0)[0] == "hit"
        made.assign([2, 3])
        until_held(made, [2])
        made._cache.release_py(0)
        made.assign([3, 4])
        until_held(made, [3, 4])
    finally:
        made.close()


def test_what_could_not_be_read_is_tried_again(model, monkeypatch, caplog):
    monkeypatch.setattr("mer.cluster.shard._AGAIN", 0.02)
    made = Shard(model, 1 << 40, 0, most=3, threads=1)
    try:
        for file in range(len(made._reader.paths)):
            made._reader.set_fault(file, 0, 1 << 40, times=5)
        made.assign([0, 1, 2])
        until_held(made, [0, 1, 2])
    finally:
        made.close()
    assert "experts could not be read; again in 0.02 s" in caplog.text


def test_every_engine_has_room_for_its_messages(model, monkeypatch):
    """Seven copies of the largest rows each."""

    def least() -> int:
        with pytest.raises(BudgetError, match="is too little") as error:
            Shard(model, 1 << 20, 0, threads=1)
        return int(re.search(r"take (\d+) MiB", str(error.value))[1]) << 20

    made = Shard(model, 1 << 40, 0, threads=1)
    made.close()
    before = least()
    monkeypatch.setattr("mer.cluster.shard.MOST_ENGINES", MOST_ENGINES + 1000)
    rows = MOST_ROWS * max(made.hidden) * 4
    assert abs(least() - before - 1000 * 7 * rows) <= 1 << 20


def until_held(made: Shard, keys: list[int]) -> None:
    end = time.monotonic() + LONG
    while made.held() != keys:
        assert time.monotonic() < end, made.held()
        time.sleep(0.02)
