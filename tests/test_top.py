"""`mer top`: what stands on the screen, against a server and for answers made by hand."""

from __future__ import annotations

import logging
import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import grpc
import numpy as np
import pytest
from click.testing import CliRunner
from engine_models import prompt, write_text_model
from grpc_client import FOREVER, generate, served, slowed
from screens import screen_text

from mer.api.access import Access
from mer.api.grpc.gate import Gate
from mer.api.grpc.operating import Operating
from mer.api.http import logs
from mer.api.http.logs import TAIL
from mer.cli.dashboard.app import Dashboard
from mer.cli.dashboard.heat import heat_map
from mer.cli.dashboard.panels import bar, requests, spark, stacked
from mer.cli.moments import Moment
from mer.cli.remote import Remote, RemoteError
from mer.cli.top import top
from mer.v1 import inference_pb2 as pb


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_text_model(tmp_path_factory.mktemp("top") / "tiny", chat=True)


async def shown(pilot, condition, what) -> list[str]:
    """The screen once `condition` holds for it."""
    for _ in range(1000):
        await pilot.pause(0.02)
        lines = screen_text(pilot.app)
        if condition(lines):
            return lines
    raise AssertionError(f"never: {what}: {lines}")


def having(lines: list[str], beginning: str) -> str:
    [line] = [each for each in lines if each.startswith(beginning)]
    return line


@pytest.mark.parametrize("size", [(80, 24), (132, 50)])
async def test_a_server_on_the_screen(model, size):
    async with served(model, {}, cache_experts=4, max_running=1) as (stub, _, server):
        with slowed(0.05):
            first = stub.Generate(generate(prompt(7), FOREVER))
            await first.read()
            second = stub.Generate(generate(prompt(30), FOREVER))
            app = Dashboard(Remote(f"127.0.0.1:{server.port}"), 0.1)
            async with app.run_test(size=size) as pilot:

                def busy(lines):
                    text = "\n".join(lines)
                    return "queued" in text and "hits" in text and "ms" in having(lines, "next")

                lines = await shown(pilot, busy, "two requests, and a step")
                assert "tiny at 127.0.0.1" in lines[0]
                assert "1 running, 1 waiting" in lines[0]
                head = next(i for i, line in enumerate(lines) if "prompt  cached" in line)
                assert lines[head + 1].split()[1:3] == ["decode", "7"]
                assert lines[head + 2].split()[1:5] == ["queued", "30", "0", "0"]
                assert "tok/s" in having(lines, "speed")
                assert "of 12" in having(lines, "experts")
                assert "of 32" in having(lines, "KV")
                assert "GB/s" in having(lines, "reads")
                time = having(lines, "time")[8:42].split()[0]
                assert set(time) <= set("█▓▒·")
                assert len(time) == 33
                # Two layers of six experts, three characters each; four are in memory.
                maps = [line[42:].split() for line in lines[:head] if line[42:44] in ("0 ", "1 ")]
                assert [len(cells) for _, cells in maps] == [18, 18]
                assert 0 < sum(cell != "·" for _, cells in maps for cell in cells) <= 12
                assert lines[-1].startswith("q quit  p pause")
                assert all(len(line) <= size[0] for line in lines)
                first.cancel()
                second.cancel()
                await shown(pilot, lambda lines: "0 running, 0 waiting" in lines[0], "nobody")
                await server.stop(0)
                lines = await shown(pilot, lambda lines: "trying again" in " ".join(lines[-3:]), "it is gone")
                assert "0 running" in lines[0], "what was seen last stays"
                await pilot.press("q")
            assert app.return_value is None


@asynccontextmanager
async def operated(engine) -> AsyncIterator[Remote]:
    """The admin API of this engine."""
    server = grpc.aio.server()
    handlers = Operating(lambda name: engine, Gate(Access({}))).handlers()
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("mer.v1.Admin", handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield Remote(f"127.0.0.1:{port}", key="MER_ADMIN_KEY")
    finally:
        await server.stop(None)


def logged(text: str, **fields: object) -> None:
    record = logging.LogRecord("mer", logging.INFO, "", 0, text, None, None)
    if fields:
        record.fields = {
            "client": "::1",
            "method": "gRPC",
            "path": "x",
            "status": "OK",
            "seconds": 1,
        } | fields
    TAIL.handle(record)


async def test_keys(model):
    TAIL.setFormatter(logs._Text())
    logged("a line from before")
    async with served(model, {}, cache_experts=4) as (_, engine, server), operated(engine) as admin:
        app = Dashboard(Remote(f"127.0.0.1:{server.port}"), 0.1, admin)
        async with app.run_test(size=(80, 24)) as pilot:
            await shown(pilot, lambda lines: any("a line from before" in line for line in lines), "the log")
            logged("request", caller="me", prompt="SECRET", prompt_tokens=5)
            lines = await shown(
                pilot, lambda lines: any("prompt_tokens=5" in line for line in lines), "a further line"
            )
            assert not any("SECRET" in line for line in lines)
            assert all(len(line) <= 80 for line in lines)

            await pilot.press("p")
            await shown(pilot, lambda lines: "PAUSED" in lines[0], "it is paused")
            assert engine.view().paused
            await pilot.press("p")
            await shown(pilot, lambda lines: "PAUSED" not in lines[0], "it goes on")

            await pilot.press("i", *"1/2", "enter")
            await shown(pilot, lambda lines: any("◆◆◆" in line for line in lines), "a pin")
            assert engine.view().experts.pinned == (8,)
            await pilot.press("i", *"9", "enter")
            await shown(pilot, lambda lines: "has 2 layers with experts" in " ".join(lines[-3:]), "a refusal")
            await pilot.press("i", *"-1", "enter")
            await shown(pilot, lambda lines: "0 experts are pinned" in " ".join(lines[-3:]), "none")
            assert engine.view().experts.pinned == ()
            await pilot.press("i", *"x", "enter")
            await shown(pilot, lambda lines: "write LAYER" in " ".join(lines[-3:]), "advice")
            await pilot.press("i", "q", "escape")
            await shown(pilot, lambda lines: "pin LAYER" not in "".join(lines), "it is left")
            await pilot.press("escape")
        assert app.return_value is None


async def test_keys_without_an_admin_api(model):
    async with served(model, {}) as (_, engine, server):
        app = Dashboard(Remote(f"127.0.0.1:{server.port}"), 0.1)
        async with app.run_test(size=(80, 24)) as pilot:
            await shown(pilot, lambda lines: "tiny" in lines[0], "the server")
            await pilot.press("p")
            await shown(pilot, lambda lines: "--admin" in " ".join(lines[-3:]), "advice")
            assert not engine.view().paused


def test_the_tail_of_the_log_is_bounded():
    tail = logs.Tail()
    tail.setFormatter(logs._Text())
    for n in range(1200):
        tail.handle(logging.LogRecord("mer", logging.INFO, "", 0, f"line {n}\nand more", None, None))
    found = tail.since(0)
    assert len(found) == 500
    assert found[-1] == (2400, "and more")
    assert [number for number, _ in tail.since(2397)] == [2398, 2399, 2400]


async def test_nobody_there():
    app = Dashboard(Remote("127.0.0.1:1"), 0.1)
    async with app.run_test() as pilot:
        for _ in range(1000):
            await pilot.pause(0.02)
            if isinstance(app.return_value, RemoteError):
                break
    assert "no server answers there" in str(app.return_value)


def test_without_a_terminal():
    done = CliRunner().invoke(top, [])
    assert done.exit_code == 2
    assert "mer monitor" in done.output


def plain(lines) -> list[str]:
    return [line.plain for line in lines]


def test_the_map():
    given = pb.ExpertMap(layers=2, experts=4, heat=bytes([0, 1, 128, 255, 64, 0, 0, 200]), pinned=[1, 5])
    assert plain(heat_map(given, 6, 2)) == ["0 ·◆▓█", "1 ▒◆·█"]
    assert plain(heat_map(given, 11, 9)) == ["0 ··◆◆▓▓██", "1 ▒▒◆◆··██"]
    # Two experts a character, both layers in a line.
    assert plain(heat_map(given, 4, 1)) == ["0 ◆█"]
    nobody_counts = pb.ExpertMap(layers=1, experts=4, heat=bytes([1, 0, 1, 1]))
    assert plain(heat_map(nobody_counts, 6, 1)) == ["0 █·██"]
    nothing = pb.ExpertMap(layers=1, experts=3, heat=bytes(3))
    assert plain(heat_map(nothing, 5, 1)) == ["0 ···"]


def test_the_map_of_a_large_model_fits():
    heat = np.random.default_rng(0).integers(0, 256, 61 * 384, np.uint8).tobytes()
    lines = plain(heat_map(pb.ExpertMap(layers=61, experts=384, heat=heat), 38, 11))
    assert len(lines) <= 11
    assert max(map(len, lines)) <= 38
    assert [line.split()[0] for line in lines] == [str(6 * n) for n in range(11)]


def test_bars():
    assert spark([0, 1, 4, 8], 3) == "▂▅█"
    assert spark([], 5) == spark([1], 0) == ""
    assert bar(1, 4, 15, "1 of 4") == (("██░░░░░░", "green"), " 1 of 4")
    assert bar(0, 0, 9, "none")[0][0] == "░░░░"
    shares = {"experts": 0.5, "waits": 0.25, "other": 0.0, "idle": 0.25}
    assert "".join(text for text, _ in stacked(shares, 8)) == "████▓▓··"
    assert math.isclose(sum(len(text) for text, _ in stacked(shares, 33)), 33)


def test_more_requests_than_lines():
    here = [pb.RequestStatus(id=n, state=pb.REQUEST_STATE_DECODE) for n in range(9)]
    answer = pb.WatchResponse(time=1, requests=here)
    lines = plain(requests(Moment.between(answer, answer), 6))
    assert [line.split()[0] for line in lines] == ["id", "0", "1", "2", "3", "and"]
    assert lines[-1].strip() == "and 5 more"
