"""`mer run`: one prompt, one answer."""

from __future__ import annotations

import asyncio
import json
import re
import sys
from pathlib import Path
from typing import Any, Final, TextIO

import attrs
import click

from mer.cli.common import messages, model_argument
from mer.cli.generation import (
    describe,
    engine_options,
    print_summary,
    sampling_options,
    show,
    split,
    tell_gpu,
    trace_option,
)
from mer.config import EngineConfig
from mer.engine.engine import Engine
from mer.engine.outputs import Delta, join
from mer.engine.params import SamplingParams
from mer.engine.structure import Structure
from mer.errors import RequestError

_STDIN: Final = "<stdin>"


@click.command()
@click.argument("model", callback=model_argument)
@click.argument("prompt")
@click.option(
    "--chat", is_flag=True, help="Send the prompt as a user's message, by the model's chat template."
)
@click.option("--ids", is_flag=True, help="PROMPT is token ids, separated by spaces or commas.")
@click.option("--logprobs", type=int, help="With --json: log-probabilities of this many likeliest tokens.")
@click.option(
    "--json-schema",
    "schema",
    type=click.File(encoding="utf-8"),
    help="The answer is JSON that is valid by the schema in this file (- for standard input).",
)
@click.option("--regex", help="The answer matches this regular expression as a whole.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of the text.")
@trace_option
@click.option(
    "--profile",
    type=click.Path(path_type=Path),
    help="Write where the time of every step went, as a Chrome trace (open it in ui.perfetto.dev).",
)
@click.option("-q", "--quiet", is_flag=True, help="No summary.")
@engine_options
@sampling_options
def run(
    model: Path,
    prompt: str,
    chat: bool,
    ids: bool,
    schema: TextIO | None,
    regex: str | None,
    as_json: bool,
    quiet: bool,
    **options: Any,
) -> None:
    """Generate text that continues PROMPT (- for standard input).

    The text goes to standard output as it is made, a summary of what it took to standard error.
    """
    if prompt == "-" and schema is not None and _name(schema) == _STDIN:
        raise click.UsageError("the prompt and --json-schema can't both be standard input")
    config, params = split(options | {"structure": _structure(schema, regex)})
    if prompt == "-":
        try:
            prompt = sys.stdin.read()
        except UnicodeDecodeError as error:
            raise RequestError(f"standard input is not text in {error.encoding}: {error}", "prompt") from None
    asyncio.run(_run(model, prompt, chat, ids, as_json, quiet, config, params))


async def _run(
    model: Path,
    text: str,
    chat: bool,
    ids: bool,
    as_json: bool,
    quiet: bool,
    config: EngineConfig,
    params: SamplingParams,
) -> None:
    async with Engine.open(model, config) as engine:
        prompt = _prompt(engine, text, chat, ids)
        if as_json:
            result = await engine.generate(prompt, params)
            answer = {
                "text": result.text,
                "token_ids": result.token_ids,
                "logprobs": None
                if result.logprobs is None
                else [attrs.asdict(each) for each in result.logprobs],
                "finish_reason": result.finish_reason,
                "seed": result.seed,
                **describe(engine, result.usage, result.timings),
            }
            click.echo(json.dumps(answer, indent=2))
            return
        if not quiet:
            tell_gpu(messages(), engine)
        deltas: list[Delta] = []
        async for delta in engine.stream(prompt, params):
            if not deltas and not chat and isinstance(prompt, str):
                show(prompt)  # not before: until here it may be refused
            show(delta.text if engine.tokenizer else "".join(f" {token}" for token in delta.token_ids))
            deltas.append(delta)
        click.echo()
        if not quiet:
            result = join(deltas, seed=0)
            print_summary(messages(), engine, result.usage, result.timings)


def _name(file: TextIO) -> str:
    return getattr(file, "name", _STDIN)


def _structure(schema: TextIO | None, regex: str | None) -> Structure | None:
    if schema is not None and regex is not None:
        raise click.UsageError("--json-schema and --regex can't be combined")
    if schema is not None:
        try:
            return Structure.json_schema(schema.read())
        except RequestError as error:
            raise RequestError(f"{_name(schema)}: {error}", error.param) from None
        except UnicodeDecodeError as error:
            raise RequestError(f"{_name(schema)}: is not text in UTF-8: {error}", "structure") from None
    return None if regex is None else Structure.regex(regex)


def _prompt(engine: Engine, text: str, chat: bool, ids: bool) -> str | list[int]:
    if chat and ids:
        raise click.UsageError("--chat and --ids can't be combined")
    if chat:
        return engine.chat_prompt([{"role": "user", "content": text}])
    if not ids:
        return text
    words = [word for word in re.split(r"[\s,]+", text) if word]
    for word in words:
        if not re.fullmatch(r"[0-9]{1,9}", word):
            shown = word[:40] + "..." * (len(word) > 40)
            raise RequestError(
                f"--ids: {shown!r} is no token id; write numbers separated by spaces", "prompt"
            )
    return [int(word) for word in words]
