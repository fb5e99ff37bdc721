"""How long do large HTTP bodies keep the event loop waiting? Streams, one body after another, and a clock.

    python -m bench.bodies
    python -m bench.bodies --seconds 8 --kinds nothing,chat-16MiB,bias --uvloop --json bodies.json

The bundled model with a chat template and a context of 131,072 tokens (its answers make no sense there), in a
server in this process; some streams run all the time. Another process sends a body, waits for the status, and
sends it again. Meanwhile a coroutine sleeps a millisecond at a time and writes down how late it wakes, as in
bench.eventloop. What is late with `nothing` sent is what streams and the machine cost.
"""

from __future__ import annotations

import asyncio
import gc
import http.client
import json
import random
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import click
from rich.console import Console
from rich.table import Table

from bench.eventloop import lateness, summary
from bench.help import help_of
from mer import Engine, EngineConfig, SamplingParams
from mer.api.http.app import create_app
from mer.api.http.server import HttpServer
from mer.api.http.service import Service
from mer.api.settings import ServerSettings
from mer.cli.common import model_argument

CONTEXT: Final = 1 << 17
# As published ones are: the text is cut, searched and put together once or twice.
TEMPLATE: Final = """\
{%- for message in messages %}
    {%- set content = message.content %}
    {%- if message.role == 'assistant' and '</think>' in content %}
        {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
    {%- endif %}
    {{- '<|im_start|>' + message.role + '\\n' + content | trim + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""
MIB: Final = 1 << 20
_CHAT: Final = "/v1/chat/completions"
_FAST: Final = {"max_tokens": 1, "temperature": 0}


def _prose(size: int) -> str:
    """About `size` characters."""
    draw = random.Random(1)
    words = ["".join(draw.choices("etaoinshrdlucmfw", k=draw.randint(2, 9))) for _ in range(2000)]
    text = " ".join(draw.choices(words, k=MIB // 4))[: min(size, MIB)]
    return text * (size // len(text))


def _chat(*texts: str, **more: Any) -> tuple[str, Any]:
    return _CHAT, {"messages": [{"role": "user", "content": text} for text in texts], **_FAST, **more}


# By name: path and body.
KINDS: Final[dict[str, Callable[[], tuple[str, Any]]]] = {
    "nothing": lambda: ("", None),
    "chat-1MiB": lambda: _chat(_prose(MIB)),
    "chat-4MiB": lambda: _chat(_prose(4 * MIB)),
    "chat-16MiB": lambda: _chat(_prose(16 * MIB - 4096)),
    "chat-escapes": lambda: _chat('\n\u00e9"\U0001f600' * (MIB // 8)),
    "chat-30000-messages": lambda: _chat(*["word " * 80] * 30_000),
    "text-16MiB": lambda: ("/v1/completions", {"prompt": _prose(16 * MIB - 4096), **_FAST}),
    "ids-120000": lambda: ("/v1/completions", {"prompt": [7] * 120_000 + [1 << 20], **_FAST}),
    "ids-4000000": lambda: ("/v1/completions", {"prompt": [7] * 4_000_000, **_FAST}),
    "bias-100000": lambda: _chat("Hello", logit_bias={str(i): 1 for i in range(100_000)}),
    "messages-16MiB": lambda: (
        "/v1/messages",
        {
            "messages": [{"role": "user", "content": _prose(16 * MIB - 4096)}],
            "max_tokens": 1,
            "model": "demo",
        },
    ),
    "responses-16MiB": lambda: ("/v1/responses", {"input": _prose(16 * MIB - 4096), "max_output_tokens": 1}),
    "schema-1MiB": lambda: _chat("Hello", guided_json={"enum": ["word" * 12] * 19_000}),
}


def send(port: int, kind: str, seconds: float) -> None:
    """In a process of its own: that body again and again; prints how often, and what was answered."""
    path, value = KINDS[kind]()
    body = json.dumps(value, ensure_ascii=kind == "chat-escapes").encode()
    answers: dict[str, int] = {}
    end, took = time.monotonic() + seconds, []
    while path and time.monotonic() < end:
        begun = time.monotonic()
        connection = http.client.HTTPConnection("127.0.0.1", port)
        connection.request("POST", path, body, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        said = answer.read()
        connection.close()
        took.append(time.monotonic() - begun)
        code = "" if answer.status == 200 else json.loads(said)["error"].get("code", "")
        key = f"{answer.status} {code}".strip()
        answers[key] = answers.get(key, 0) + 1
    print(
        json.dumps(
            {"bytes": len(body) if path else 0, "answers": answers, "mean_s": sum(took) / max(len(took), 1)}
        )
    )


def prepared(model: Path, into: Path) -> Path:
    """The same model with TEMPLATE and a context of CONTEXT tokens."""
    for file in model.iterdir():
        if file.name not in ("config.json", "chat_template.jinja", "draft"):
            (into / file.name).symlink_to(file.resolve())
    config = json.loads((model / "config.json").read_text()) | {"max_position_embeddings": CONTEXT}
    (into / "config.json").write_text(json.dumps(config))
    (into / "chat_template.jinja").write_text(TEMPLATE)
    return into


async def _stream(engine: Engine) -> None:
    while True:
        async for _ in engine.stream("Once upon a time", SamplingParams(max_tokens=100, ignore_eos=True)):
            pass


async def measure(model: Path, kinds: list[str], streams: int, seconds: float) -> dict[str, dict[str, Any]]:
    """Milliseconds, and what the bodies were answered by, of each kind."""
    found: dict[str, dict[str, Any]] = {}
    config = EngineConfig(context=CONTEXT, prefix_cache=False)
    async with Engine.open(model, config) as engine:
        service = Service(ServerSettings(model_name="demo", port=0), engine)
        gc.freeze()  # both as `mer serve` does
        sys.setswitchinterval(0.001)
        async with HttpServer(create_app(service), service.settings) as server:
            running = [asyncio.create_task(_stream(engine)) for _ in range(streams)]
            for kind in kinds:
                code = f"from bench.bodies import send; send({server.port}, {kind!r}, {seconds + 4})"
                with tempfile.TemporaryFile() as printed:
                    client = await asyncio.create_subprocess_exec(sys.executable, "-c", code, stdout=printed)
                    await asyncio.sleep(3)
                    late = await lateness(seconds)
                    await client.wait()
                    printed.seek(0)
                    found[kind] = summary(late) | json.load(printed)
                click.echo(f"{kind}: {found[kind]['cpu max']:.2f} ms on the loop at most", err=True)
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)
    return found


def show(found: dict[str, dict[str, Any]]) -> None:
    table = Table(
        "body", "MiB", "answers", "s each", "ticks", "ms late: p50", "p99", "max", "on the loop: max"
    )
    for kind, row in found.items():
        answers = ", ".join(f"{count} x {answer}" for answer, count in row["answers"].items())
        figures = (f"{row[name]:.2f}" for name in ("p50", "p99", "max", "cpu max"))
        table.add_row(
            kind, f"{row['bytes'] / MIB:.1f}", answers, f"{row['mean_s']:.2f}", str(row["ticks"]), *figures
        )
    Console(width=140).print(table)


@click.command(help=help_of(__doc__))
@click.argument("model", callback=model_argument, default="demo")
@click.option("--kinds", default=",".join(KINDS), help="Of bodies, with commas.")
@click.option("--streams", type=click.IntRange(0), default=4, show_default=True)
@click.option("--seconds", default=3.0, show_default=True, help="For each kind.")
@click.option("--uvloop", "use_uvloop", is_flag=True, help="Under uvloop.")
@click.option("--json", "out", type=click.Path(path_type=Path), help="Write everything there, too.")
def main(model: Path, kinds: str, streams: int, seconds: float, use_uvloop: bool, out: Path | None) -> None:
    if unknown := set(kinds.split(",")) - set(KINDS):
        raise click.BadParameter(f"no kind {unknown.pop()!r}; there are {', '.join(KINDS)}")
    factory = None
    if use_uvloop:
        import uvloop

        factory = uvloop.new_event_loop
    with tempfile.TemporaryDirectory() as directory, asyncio.Runner(loop_factory=factory) as runner:
        found = runner.run(measure(prepared(model, Path(directory)), kinds.split(","), streams, seconds))
    show(found)
    if out is not None:
        out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    with suppress(KeyboardInterrupt):
        main()
