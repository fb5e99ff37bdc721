"""`mer chat`: a conversation in the terminal."""

from __future__ import annotations

import asyncio
import contextlib
import sys
from pathlib import Path
from typing import Any, Final

import click
from rich.console import Console

from mer.cli.common import messages, model_argument
from mer.cli.generation import engine_options, print_summary, sampling_options, show, split, tell_gpu
from mer.config import EngineConfig
from mer.engine.engine import Engine
from mer.engine.outputs import Delta
from mer.engine.params import SamplingParams
from mer.errors import MerError, RequestError

_HELP: Final = "/reset forgets the conversation, /quit or Ctrl-D ends it, Ctrl-C stops an answer"

Message = dict[str, Any]


@click.command()
@click.argument("model", callback=model_argument)
@click.option("--system", help="What the model is told before the conversation.")
@click.option("--stats", is_flag=True, help="Print a summary behind each answer.")
@engine_options
@sampling_options
def chat(model: Path, system: str | None, stats: bool, **options: Any) -> None:
    """Talk with a model, by its own chat template.

    A line is a message; end a line with \\ to go on in the next one.
    """
    config, params = split(options)
    first: list[Message] = [{"role": "system", "content": system}] if system else []
    # One loop for the whole conversation, run for one answer at a time: between answers the terminal is read
    # as usual, and Ctrl-C during an answer ends that answer only.
    with asyncio.Runner() as runner:
        engine = runner.run(_open(model, config))
        try:
            try:
                engine.chat_prompt([*first, {"role": "user", "content": "?"}])  # at once, if it can't be done
            except RequestError as error:
                raise RequestError(f"{error} (`mer run MODEL PROMPT` does)", error.param) from None
            _talk(runner, engine, first, params, stats)
        finally:
            runner.run(engine.close(drain=False))


async def _open(model: Path, config: EngineConfig) -> Engine:
    return await Engine.open(model, config)


def _talk(
    runner: asyncio.Runner, engine: Engine, first: list[Message], params: SamplingParams, stats: bool
) -> None:
    console = messages()
    tell_gpu(console, engine)
    if sys.stdin.isatty():
        import readline  # noqa: F401 (editing and history of lines that input() reads)

        console.print(_HELP, style="dim")
    history = list(first)
    while (line := _read()) is not None and line.strip() != "/quit":
        if line.strip() == "/reset":
            history = list(first)
        elif line.strip():
            _turn(runner, engine, history, line, params, console if stats else None)


def _read() -> str | None:
    """The next message; None at the end of input."""
    lines: list[str] = []
    prompt = "> " if sys.stdin.isatty() else ""
    while True:
        try:
            line = input(prompt)
        except EOFError:
            return "\n".join(lines) if lines else None
        except UnicodeDecodeError as error:
            raise RequestError(f"the input is not text in {error.encoding}: {error}", "messages") from None
        if not line.endswith("\\"):
            return "\n".join([*lines, line])
        lines.append(line[:-1])


def _turn(
    runner: asyncio.Runner,
    engine: Engine,
    history: list[Message],
    line: str,
    params: SamplingParams,
    stats: Console | None,
) -> None:
    """Ask, print the answer as it comes, and add both to the history."""
    turn = [*history, {"role": "user", "content": line}]
    deltas: list[Delta] = []
    try:
        with contextlib.suppress(KeyboardInterrupt):
            runner.run(_answer(engine, turn, params, deltas))
    except MerError as error:  # too long, refused by the template, an expert can't be read: go on without it
        if deltas:
            click.echo()
        messages().print(f"error: {error}", style="red")
        return
    click.echo()
    history[:] = [*turn, {"role": "assistant", "content": "".join(delta.text for delta in deltas)}]
    if stats and deltas and deltas[-1].usage and deltas[-1].timings:
        print_summary(stats, engine, deltas[-1].usage, deltas[-1].timings)


async def _answer(engine: Engine, turn: list[Message], params: SamplingParams, deltas: list[Delta]) -> None:
    async for delta in engine.stream(engine.chat_prompt(turn), params):
        show(delta.text)
        deltas.append(delta)
