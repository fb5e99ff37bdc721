"""A server under everything at once, for as long as wanted: no leak, no wrong byte, no error but those made.

    python -m bench.soak --minutes 30
    python -m bench.soak /models/store --minutes 600 --clients 16 --seed 7 --json soak.json

Clients ask over HTTP (completions and chats, streamed and whole, embeddings) and gRPC, all with answers that
are known from the beginning: they are compared to the last character, those that are left midway as far as
they came. Some requests make no sense. Long prompts go out to a prefix store and come back. Meanwhile the
model is reloaded, with another way to draft each time (it is its own draft model), also to a damaged copy of
it, which must be refused; `ram` goes up and down; files are touched under the server; and reads fail, of
which the requests that need them, and no others, may end with an error that says so. Every few seconds the
server's memory, file descriptors and threads are looked at. It ends with 1 where an answer was wrong, an
error came that nobody made, or the server holds more in the last quarter than in the second.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import shutil
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import click
import grpc
import httpx2
from attrs import Factory, define

from bench.help import help_of
from mer.demo import model_path
from mer.engine.engine import Engine
from mer.v1 import inference_pb2 as pb
from mer.v1.inference_pb2_grpc import InferenceStub

PROMPTS = (
    "Once upon a time",
    "The old man looked at the sea",
    "She said that",
    "In the morning",
    "A cat and a dog",
    # What the prefix cache has no room for, and its store has.
    *(
        f"{n} years ago, an old man and his dog went down to the sea to look for the ship. " * 4
        for n in range(6)
    ),
)
DRAFTS = ("auto", "ngram", "draft", "off")
# Of a model that has none, as the bundled one.
TEMPLATE = "{% for each in messages %}{{ each.content }} {% endfor %}"
TOKENS = (1, 7, 24, 60)
# May more be held in the end: bytes, descriptors and threads of what is under way just then. A draft model
# takes 12 files and some 30 MiB, and is there half of the time.
MORE = {"rss": 64 << 20, "files": 24, "threads": 4}


class WrongError(Exception):
    """What may not happen."""


@define
class Soak:
    url: str
    admin: str
    stub: Any
    http: httpx2.AsyncClient
    random: random.Random
    good: Path
    bad: Path
    inject: Callable[[], Awaitable[None]]
    counts: Counter[str] = Factory(Counter)
    wrong: list[str] = Factory(list)
    expected: dict[Any, Any] = Factory(dict)
    fault_at: float = -1e9
    touch_at: float = -1e9

    async def learn(self) -> None:
        for prompt in PROMPTS:
            for tokens in TOKENS:
                self.expected["text", prompt, tokens] = await self.completion(prompt, tokens)
                self.expected["chat", prompt, tokens] = await self.chat(prompt, tokens)
            self.expected["embed", prompt, 0] = await self.embed(prompt)

    def body(self, tokens: int, **more: Any) -> dict[str, Any]:
        return {"max_tokens": tokens, "temperature": 0, "ignore_eos": True, **more}

    async def post(self, path: str, body: dict[str, Any]) -> Any:
        answer = await self.http.post(self.url + path, json=body)
        if answer.status_code != 200:
            raise self.refused(answer.status_code, answer.text)
        return answer.json()

    def refused(self, status: object, text: str) -> Exception:
        """What was made to happen a while ago, and WrongError for anything else."""
        now = time.monotonic()
        if "Input/output error" in text and now - self.fault_at < 60:
            return OSError(text)
        ended = ("written over", "is being loaded", "was closed", "is closed", "files changed while")
        if any(words in text for words in ended) and now - self.touch_at < 60:
            return InterruptedError(text)
        return WrongError(f"{status}: {text[:300]}")

    async def completion(self, prompt: str, tokens: int) -> str:
        told = await self.post("/v1/completions", self.body(tokens, prompt=prompt))
        return str(told["choices"][0]["text"])

    async def chat(self, prompt: str, tokens: int) -> str:
        asked = [{"role": "user", "content": prompt}]
        told = await self.post("/v1/chat/completions", self.body(tokens, messages=asked))
        return str(told["choices"][0]["message"]["content"] or "")

    async def embed(self, prompt: str) -> list[float]:
        told = await self.post("/v1/embeddings", {"model": "", "input": prompt})
        return list(told["data"][0]["embedding"])

    async def streamed(self, path: str, body: dict[str, Any], leave: int | None) -> str:
        """The text; only what came in `leave` events where that is a number."""
        text, events = "", 0
        async with self.http.stream("POST", self.url + path, json=body | {"stream": True}) as answer:
            if answer.status_code != 200:
                raise self.refused(answer.status_code, (await answer.aread()).decode())
            async for line in answer.aiter_lines():
                if not line.startswith("data: ") or line == "data: [DONE]":
                    continue
                event = json.loads(line[6:])
                if "error" in event:
                    raise self.refused("event", json.dumps(event))
                for choice in event["choices"]:
                    text += choice.get("text") or choice.get("delta", {}).get("content") or ""
                events += 1
                if events == leave:
                    break
        return text

    async def over_grpc(self, prompt: str, tokens: int, leave: int | None) -> str:
        how = self.random.choice(pb.Speculate.values())
        params = pb.SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True, speculate=how)
        call, text, events = self.stub.Generate(pb.GenerateRequest(text=prompt, params=params)), "", 0
        try:
            async for piece in call:
                text += piece.text
                events += 1
                if events == leave:
                    call.cancel()
                    break
        except grpc.aio.AioRpcError as error:
            raise self.refused(error.code().name, error.details() or "") from None
        return text

    async def client(self) -> None:
        while True:
            kind = self.random.choice(("text", "text", "chat", "grpc", "grpc", "embed", "nonsense"))
            prompt, tokens = self.random.choice(PROMPTS), self.random.choice(TOKENS)
            leave = self.random.choice((None, None, 1, 5)) if kind in ("text", "chat", "grpc") else None
            try:
                await self.once(kind, prompt, tokens, leave)
                self.counts[f"{kind}{' left' * (leave is not None)}"] += 1
            except WrongError as error:
                self.wrong.append(f"{kind}: {error}")
            except OSError as error:
                self.counts["failed reads" if not isinstance(error, InterruptedError) else "touched"] += 1
            except httpx2.HTTPError as error:
                self.wrong.append(f"{kind}: {error!r}")
            await asyncio.sleep(self.random.random() * 0.05)

    async def once(self, kind: str, prompt: str, tokens: int, leave: int | None) -> None:
        if kind == "nonsense":
            answer = await self.http.post(f"{self.url}/v1/completions", json={"prompt": prompt, "top_p": 7})
            if answer.status_code != 400:
                raise WrongError(f"{answer.status_code} for nonsense")
            return
        if kind == "embed":
            if await self.embed(prompt) != self.expected["embed", prompt, 0]:
                raise WrongError("another embedding")
            return
        if kind == "grpc":
            found = await self.over_grpc(prompt, tokens, leave)
        elif kind == "text" and self.random.random() < 0.5:
            found, leave = await self.completion(prompt, tokens), None
        elif kind == "text":
            found = await self.streamed("/v1/completions", self.body(tokens, prompt=prompt), leave)
        else:
            asked = [{"role": "user", "content": prompt}]
            found = await self.streamed("/v1/chat/completions", self.body(tokens, messages=asked), leave)
        known = self.expected["chat" if kind == "chat" else "text", prompt, tokens]
        if not (known.startswith(found) if leave else found == known):
            raise WrongError(f"{found!r} in place of {known!r}")

    async def operate(self, pause: float) -> None:
        while True:
            await asyncio.sleep(self.random.uniform(0.5, 1.5) * pause)
            kind = self.random.choice(("reload", "reload", "damaged", "ram", "faults", "touch"))
            try:
                await getattr(self, kind)()
                self.counts[f"operator: {kind}"] += 1
            except (WrongError, httpx2.HTTPError) as error:
                self.wrong.append(f"{kind}: {error!r}")

    async def ask_admin(self, path: str, body: dict[str, Any], *statuses: int) -> None:
        answer = await self.http.post(self.admin + path, json=body)
        if answer.status_code not in statuses:
            raise WrongError(f"{answer.status_code}: {answer.text[:300]}")

    async def reload(self) -> None:
        touched, how = time.monotonic() - self.touch_at < 60, self.random.choice(DRAFTS)
        draft = str(self.good) if how in ("auto", "draft") else ""
        body = {"path": str(self.good), "settings": {"speculate": how, "draft-model": draft}}
        await self.ask_admin("/admin/reload", body, 200, *[409] * touched)

    async def damaged(self) -> None:
        await self.ask_admin("/admin/reload", {"path": str(self.bad)}, 409)

    async def ram(self) -> None:
        await self.ask_admin("/admin/ram", {"ram": str(self.random.randrange(600, 2000) << 20)}, 200)

    async def faults(self) -> None:
        self.fault_at = time.monotonic()
        await self.inject()

    async def touch(self) -> None:
        self.touch_at = time.monotonic()
        os.utime(self.random.choice(sorted(self.good.glob("experts*.safetensors"))))


def look(pid: int) -> dict[str, int]:
    status = dict(
        line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":" in line
    )
    return {
        "rss": int(status["VmRSS"].split()[0]) << 10,
        "files": len(os.listdir(f"/proc/{pid}/fd")),
        "threads": int(status["Threads"]),
    }


def quarters(seen: list[dict[str, int]]) -> dict[str, list[float]]:
    """Medians of what was held."""
    size = max(1, len(seen) // 4)
    parts = [seen[i : i + size] for i in range(0, 4 * size, size)]
    return {name: [statistics.median(each[name] for each in part or seen) for part in parts] for name in MORE}


def grown(seen: list[dict[str, int]]) -> dict[str, str]:
    """What the last quarter holds more of than the second."""
    found = {}
    for name, (_, before, _, after) in quarters(seen).items():
        if after > before + MORE[name]:
            found[name] = f"{before:.0f} -> {after:.0f}"
    return found


def serve(model: str, config: str) -> None:
    """The server: a line on standard input has the next reads fail."""
    from mer.api.http import logs
    from mer.api.model import Model
    from mer.api.models import Models
    from mer.api.serving import serve as run
    from mer.api.settings import ServerSettings
    from mer.config import EngineConfig

    logs.configure("text")
    models = Models([Model("soak", Path(model), EngineConfig(**json.loads(config)))])
    settings = ServerSettings(model_name="soak", port=0, grpc_port=0, admin_port=0, max_body=1 << 20)

    def fail() -> None:
        if not sys.stdin.readline():
            asyncio.get_running_loop().remove_reader(0)
        elif (engine := models.first.engine) is not None:
            readers = [engine._runner.reader]
            readers += [engine._store._reader] if engine._store is not None else []
            for reader in readers:
                for file in range(len(reader.paths)):
                    reader.set_fault(file, 0, 1 << 50, times=20)

    def announce(engine: Engine, url: str, port: int | None) -> None:
        asyncio.get_running_loop().add_reader(0, fail)
        print(json.dumps({"url": url, "port": port}), flush=True)

    asyncio.run(run(models, settings, announce))


async def soak(
    model: Path, minutes: float, clients: int, pause: float, seed: int, config: dict[str, Any]
) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="mer-soak-") as place:
        good, bad = (Path(shutil.copytree(model, Path(place) / name)) for name in ("good", "bad"))
        for each in (good, bad):
            if not (each / "chat_template.jinja").exists():
                (each / "chat_template.jinja").write_text(TEMPLATE)
        file = sorted(bad.glob("experts*.safetensors"))[0]
        with file.open("r+b") as opened:
            opened.seek(file.stat().st_size // 2)
            byte = opened.read(1)
            opened.seek(-1, os.SEEK_CUR)
            opened.write(bytes([byte[0] ^ 255]))
        store = {"prefix_store": str(Path(place) / "prefixes"), "prefix_store_size": 16 << 20}
        words = [sys.executable, "-m", "bench.soak", "serve", str(good), json.dumps(config | store)]
        pipe = asyncio.subprocess.PIPE
        server = await asyncio.create_subprocess_exec(*words, stdin=pipe, stdout=pipe, stderr=pipe)
        log: list[str] = []

        async def read() -> None:
            assert server.stderr is not None
            async for line in server.stderr:
                log.append(line.decode(errors="replace"))
                del log[:-400]

        reading = asyncio.create_task(read())
        try:
            assert server.stdout is not None
            told = json.loads(await server.stdout.readline())
            admin = next(line.split(" at ")[1].split()[0] for line in log if "admin endpoints at" in line)
            made = await run_clients(server, told, admin, good, bad, minutes, clients, pause, seed)
        finally:
            if server.returncode is None:
                server.terminate()
            made_status = await server.wait()
            await reading
        made["server ended with"] = made_status
        made["log"] = [line for line in log if "Traceback" in line or " error: " in line][-20:]
        return made


async def run_clients(
    server: Any,
    told: Any,
    admin: str,
    good: Path,
    bad: Path,
    minutes: float,
    clients: int,
    pause: float,
    seed: int,
) -> dict[str, Any]:
    async def inject() -> None:
        server.stdin.write(b"\n")
        await server.stdin.drain()

    limits = httpx2.Limits(max_connections=None)
    async with (
        httpx2.AsyncClient(timeout=120, limits=limits) as http,
        grpc.aio.insecure_channel(f"127.0.0.1:{told['port']}") as channel,
    ):
        stub = InferenceStub(channel)  # type: ignore[no-untyped-call]
        each = Soak(told["url"], admin, stub, http, random.Random(seed), good, bad, inject)
        await each.learn()
        tasks = [asyncio.create_task(each.client()) for _ in range(clients)]
        tasks.append(asyncio.create_task(each.operate(pause)))
        seen, end = [], time.monotonic() + 60 * minutes
        while time.monotonic() < end and server.returncode is None and not any(task.done() for task in tasks):
            await asyncio.sleep(min(2.0, 60 * minutes / 20))
            seen.append(look(server.pid))
        for task in tasks:
            task.cancel()
        ended = await asyncio.gather(*tasks, return_exceptions=True)
        each.wrong += [repr(one) for one in ended if not isinstance(one, asyncio.CancelledError)]
    return {
        "counts": dict(sorted(each.counts.items())),
        "wrong": each.wrong[:20],
        "wrong in all": len(each.wrong),
        "grown": grown(seen),
        "held by quarters": quarters(seen),
        "looks": len(seen),
    }


@click.command(help=help_of(__doc__))
@click.argument("model", type=click.Path(exists=True, path_type=Path), default=model_path())
@click.option("--minutes", type=float, default=30, show_default=True)
@click.option("--clients", type=int, default=8, show_default=True)
@click.option(
    "--pause", type=float, default=3, show_default=True, help="Seconds between an operator's deeds, about."
)
@click.option("--cache-experts", default="25%", show_default=True, help="Of the server.")
@click.option("--seed", type=int, default=1, show_default=True)
@click.option("--json", "file", type=click.Path(path_type=Path), help="Write what came out.")
def main(
    model: Path, minutes: float, clients: int, pause: float, cache_experts: str, seed: int, file: Path | None
) -> None:
    config = {"cache_experts": cache_experts, "context": 1024}
    made = asyncio.run(soak(model, minutes, clients, pause, seed, config))
    text = json.dumps(made, indent=1)
    click.echo(text)
    if file:
        file.write_text(text + "\n")
    if made["wrong in all"] or made["grown"] or made["server ended with"]:
        raise SystemExit(1)


if __name__ == "__main__":
    if sys.argv[1:2] == ["serve"]:
        serve(sys.argv[2], sys.argv[3])
    else:
        main()
