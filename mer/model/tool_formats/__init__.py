"""How models write calls of tools, one module a kind, and the table by which a model's format is found."""

from __future__ import annotations

from typing import Final

from mer.model.tool_formats.base import ToolFormat
from mer.model.tool_formats.gemma import Gemma
from mer.model.tool_formats.harmony import Harmony
from mer.model.tool_formats.json_calls import Hermes, JsonList, Llama, Mistral
from mer.model.tool_formats.sections import DeepSeek, Kimi
from mer.model.tool_formats.tagged import DEEPSEEK_V4, DEEPSEEK_V32, GLM, MINIMAX, QWEN_CODER

__all__ = ["TABLE", "Harmony", "Llama", "ToolFormat", "find"]

# What a chat template must contain, all of it -> the format. The first that fits counts.
TABLE: Final[tuple[tuple[tuple[str, ...], ToolFormat], ...]] = (
    (("<|channel|>", "<|message|>"), Harmony()),
    (("<|tool_call>", '<|"|>'), Gemma()),
    (("<|tool_calls_section_begin|>",), Kimi()),
    (("｜DSML｜", "function_calls"), DEEPSEEK_V32),  # whose tags a template puts together
    (("｜DSML｜",), DEEPSEEK_V4),
    (("<｜tool▁calls▁begin｜>", "```json"), DeepSeek(fenced=True)),
    (("<｜tool▁calls▁begin｜>",), DeepSeek(fenced=False)),
    (("[TOOL_CALLS]", "[ARGS]"), Mistral(named=True)),
    (("[TOOL_CALLS]",), Mistral(named=False)),
    (("<minimax:tool_call>",), MINIMAX),
    (("<function=", "<parameter="), QWEN_CODER),
    (("<tool_call>", "<arg_key>"), GLM),
    (("<tool_call>",), Hermes()),
    (("<|tool_call|>",), JsonList()),
    (("<tool_calls>", "</tool_calls>"), JsonList(("<tool_calls>", "</tool_calls>"), closes=True)),
    (("<|python_tag|>",), Llama()),
    (("<|start_header_id|>", "tools"), Llama()),
)


def find(template: str) -> ToolFormat | None:
    """The format that a model with this chat template writes; None when it is none of these."""
    for marks, format in TABLE:
        if all(mark in template for mark in marks):
            return format
    return None
