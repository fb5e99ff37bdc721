"""How soon a server gives memory back: to `mer set ram`, and to another process in its control group.

    python -m bench.breath /tmp/qwen3-12l --ram 4GiB --json breath.json

`mer serve` runs in a memory control group (version 1 or 2; that takes root), in turns while nobody asks,
while two clients decode, and while prompts of `--prompt` tokens are computed, in chunks. `set ram`: half of
the cache is asked back; the time until the process holds so much less (nine tenths of it: it works
meanwhile). `pressure`: another process in the group takes memory until half of what the server leaves free
is left (see docs/operations.md); the time from when it begins until it has all of that, and as much is free
again as shall be. Between two times the cache is filled again. MODEL is an expert store. Seconds, of
`--repeat` times each; what is held is looked at every 2 ms.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import re
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

import click
import httpx2
from attrs import define, field
from rich.console import Console
from rich.table import Table

from bench.help import help_of
from mer.cli.common import model_argument, size, size_option
from mer.engine.breath import Breath

_ROOT: Final = Path("/sys/fs/cgroup")
_LOOK_S: Final = 0.002
_PATIENCE_S: Final = 60.0
_HOG: Final = """
import sys
held = []
for line in sys.stdin:
    if n := int(line):
        held.append(b"x" * n)
    else:
        held.clear()
    print("there", flush=True)
"""


class Group:
    """A memory control group, removed at the end. Raises OSError where none can be made."""

    def __init__(self) -> None:
        self._old = (_ROOT / "memory/memory.limit_in_bytes").exists()
        self.path = (_ROOT / "memory" if self._old else _ROOT) / f"mer-bench-{os.getpid()}"
        self.path.mkdir()

    def limit(self, nbytes: int) -> None:
        (self.path / ("memory.limit_in_bytes" if self._old else "memory.max")).write_text(str(nbytes))

    @property
    def held(self) -> int:
        """Bytes that are charged to it, but for the page cache."""
        lines = (self.path / "memory.stat").read_text().splitlines()
        stat = {name: int(value) for name, value in (line.split() for line in lines)}
        return stat["total_rss"] if self._old else stat["anon"] + stat.get("kernel", 0)

    def start(self, command: list[str], **options: Any) -> subprocess.Popen[str]:
        words = ["sh", "-c", f'echo $$ > {self.path}/cgroup.procs; exec "$@"', "sh", *command]
        return subprocess.Popen(words, text=True, **options)

    def close(self) -> None:
        for _ in range(100):
            try:
                self.path.rmdir()
                return
            except OSError:
                time.sleep(0.1)


@define
class Bench:
    group: Group
    server: subprocess.Popen[str]
    hog: subprocess.Popen[str]
    url: str
    admin: str
    http: httpx2.AsyncClient
    ram: int
    prompt: int
    vocab: int
    experts: int  # bytes of all of them
    random: random.Random = field(factory=lambda: random.Random(1))

    def rss(self) -> int:
        return int(Path(f"/proc/{self.server.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")

    async def ask(self, tokens: int, answer: int) -> None:
        ids = [self.random.randrange(1, self.vocab) for _ in range(tokens)]
        body = {"prompt": ids, "max_tokens": answer, "temperature": 0, "ignore_eos": True}
        told = await self.http.post(f"{self.url}/v1/completions", json=body)
        told.raise_for_status()

    @asynccontextmanager
    async def load(self, kind: str) -> AsyncIterator[None]:
        async def client(tokens: int, answer: int) -> None:
            while True:
                await self.ask(tokens, answer)

        kinds = {"idle": [], "decode": [(8, 200)] * 2, "prefill": [(self.prompt, 1)]}
        tasks = [asyncio.create_task(client(*each)) for each in kinds[kind]]
        try:
            await asyncio.sleep(0.5 + self.random.random())  # anywhere in a chunk
            yield
        finally:
            for task in tasks:
                task.cancel()
            ended = await asyncio.gather(*tasks, return_exceptions=True)
            for each in ended:
                if not isinstance(each, asyncio.CancelledError):
                    raise RuntimeError(f"a client failed: {each!r}")

    async def states(self) -> dict[str, Any]:
        return dict((await self.http.get(f"{self.admin}/admin/models")).json())

    async def fill(self) -> None:
        """Prompts until the cache has all it may have."""
        while True:
            before = self.rss()
            await self.ask(min(self.prompt, 512), 1)
            if self.rss() < before + (16 << 20):
                return

    async def set_ram(self, ram: int) -> None:
        (await self.http.post(f"{self.admin}/admin/ram", json={"ram": str(ram)})).raise_for_status()

    async def until(self, condition: Callable[[], bool], begun: float) -> float:
        while not condition():
            if time.perf_counter() - begun > _PATIENCE_S:
                raise RuntimeError(f"not within {_PATIENCE_S:g} s; the server: {await self.states()}")
            await asyncio.sleep(_LOOK_S)
        return time.perf_counter() - begun

    async def time_set_ram(self, kind: str) -> dict[str, float]:
        """Half of what the cache holds is asked back."""
        await self.set_ram(self.ram)
        await self.fill()
        (model,) = (await self.states())["models"]
        less = self.ram - self.experts * model["cache_slots"] // model["experts"] // 2
        async with self.load(kind):
            before = self.rss()
            aim = before - (self.ram - less) * 9 // 10
            begun = time.perf_counter()
            asked = asyncio.create_task(self.set_ram(less))
            given = await self.until(lambda: self.rss() <= aim, begun)
            await asked
            answered = time.perf_counter() - begun
            return {"given": given, "answered": answered, "bytes": before - self.rss()}

    async def time_pressure(self, kind: str) -> dict[str, float]:
        """Another process takes all but half of what shall be free."""
        reserve = Breath(self.ram, self.ram).reserve
        await self.take(0)
        self.group.limit(1 << 40)
        await self.set_ram(self.ram)
        await self.fill()
        async with self.load(kind):
            limit = self.group.held + 3 * reserve
            self.group.limit(limit)
            await asyncio.sleep(0.3)
            before = self.rss()
            begun = time.perf_counter()
            await self.take(limit - self.group.held - reserve // 2)
            given = await self.until(lambda: limit - self.group.held >= reserve, begun)
            return {"given": given, "bytes": before - self.rss()}

    async def take(self, nbytes: int) -> None:
        assert self.hog.stdin is not None
        assert self.hog.stdout is not None
        self.hog.stdin.write(f"{nbytes}\n")
        self.hog.stdin.flush()
        if await asyncio.to_thread(self.hog.stdout.readline) != "there\n":
            raise RuntimeError("the other process was ended: the server did not give way in time")


def sizes_of(model: Path) -> dict[str, int]:
    """Of the vocabulary, and bytes of all experts."""
    config = json.loads((model / "config.json").read_text())
    experts = sum(file.stat().st_size for file in model.glob("experts*"))
    return {"vocab": config["vocab_size"], "experts": experts}


async def measure(model: Path, ram: int, context: int, prompt: int, repeat: int) -> list[dict[str, Any]]:
    group = Group()
    words = [sys.executable, "-m", "mer", "serve", str(model), "--ram", str(ram), "--context", str(context)]
    words += ["--port", "0", "--no-grpc", "--admin-port", "0"]
    server = group.start(words, stderr=subprocess.PIPE)
    hog = group.start([sys.executable, "-c", _HOG], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert server.stderr is not None
        found: dict[str, str] = {}
        lines = []
        for line in server.stderr:
            lines.append(line)
            for name, pattern in (("admin", r"admin endpoints at (\S+)"), ("url", r"serves \S+ at (\S+)$")):
                if told := re.search(pattern, line):
                    found[name] = told[1]
            if "url" in found:
                break
        else:
            raise RuntimeError("the server ended: " + "".join(lines))
        threading.Thread(target=server.stderr.read, daemon=True).start()  # its log is nobody's
        async with httpx2.AsyncClient(timeout=600) as http:
            each = Bench(group, server, hog, **found, http=http, ram=ram, prompt=prompt, **sizes_of(model))
            made = []
            for what, take in (("set ram", each.time_set_ram), ("pressure", each.time_pressure)):
                for kind in ("idle", "decode", "prefill"):
                    made.append({"what": what, "while": kind, "times": []})
                    for _ in range(repeat):
                        made[-1]["times"].append(await take(kind))
                        click.echo(f"{what}, {kind}: {made[-1]['times'][-1]}", err=True)
        return made
    finally:
        for process in (hog, server):
            process.kill()
            process.wait()
        group.close()


def show(made: list[dict[str, Any]]) -> None:
    table = Table("", "while", "given back, median", "longest", "memory given")
    for row in made:
        given = [each["given"] for each in row["times"]]
        nbytes = statistics.median(each["bytes"] for each in row["times"])
        cells = (f"{statistics.median(given):.3f} s", f"{max(given):.3f} s", size(int(nbytes)))
        table.add_row(row["what"], row["while"], *cells)
    Console().print(table)


@click.command(help=help_of(__doc__))
@click.argument("model", callback=model_argument)
@click.option("--ram", callback=size_option, default="4GiB", show_default=True)
@click.option("--context", type=int, default=8192, show_default=True)
@click.option("--prompt", type=int, default=4096, show_default=True, help="Tokens of the long prompt.")
@click.option("--repeat", type=int, default=5, show_default=True)
@click.option("--json", "file", type=click.Path(path_type=Path), help="Write the figures, too.")
def main(model: Path, ram: int, context: int, prompt: int, repeat: int, file: Path | None) -> None:
    made = asyncio.run(measure(model, ram, context, prompt, repeat))
    show(made)
    if file:
        file.write_text(json.dumps({"ram": ram, "prompt": prompt, "rows": made}, indent=1) + "\n")


if __name__ == "__main__":
    main()
