"""What coding agents sent to `mer serve` in November 2026, cut down to its shape, with words of our own.

Claude Code 2.1, Codex 0.171, Qwen Code 0.15 and opencode 1.18 were run against it, each with a turn that
calls a tool; these are the second requests of those turns, with the result in them.
"""

from __future__ import annotations

from typing import Any, Final

_CACHED: Final = {"type": "ephemeral"}
PATH: Final = {"type": "object", "properties": {"file_path": {"type": "string"}}, "required": ["file_path"]}
COMMAND: Final = {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    "type": "object",
    "properties": {
        "cmd": {"type": "string", "description": "What to run."},
        "timeout": {"type": "number", "exclusiveMinimum": 0, "maximum": 600000},
        "env": {"type": "object", "propertyNames": {"type": "string"}, "additionalProperties": {}},
        "mode": {"anyOf": [{"const": "a"}, {"type": "string", "enum": ["b", "c"]}], "default": "a"},
        "items": {"minItems": 1, "type": "array", "items": {"type": "object", "additionalProperties": False}},
    },
    "required": ["cmd"],
    "additionalProperties": False,
}

CLAUDE_HEADERS: Final = {
    "anthropic-version": "2023-06-01",
    "anthropic-beta": "claude-code-20250219,effort-2025-11-24,mid-conversation-system-2026-04-07",
    "anthropic-dangerous-direct-browser-access": "true",
    "x-app": "cli",
    "X-Stainless-Timeout": "600",
}
CLAUDE_CODE: Final[dict[str, Any]] = {
    "system": [
        {"type": "text", "text": "x-anthropic-billing-header: cc_version=2.1.0.abc; cc_entrypoint=cli;"},
        {"type": "text", "text": "You help.", "cache_control": _CACHED},
        {"type": "text", "text": "\nYou help with code.", "cache_control": _CACHED},
    ],
    "messages": [
        {"role": "user", "content": [
            {"type": "text", "text": "<system-reminder>\nToday is Thursday.\n</system-reminder>\n\n"},
            {"type": "text", "text": "What is in hello.txt?", "cache_control": _CACHED},
        ]},
        {"role": "system", "content": "Agents that may be asked:\n- one"},
        {"role": "assistant", "content": [
            {"type": "text", "text": "I look."},
            {"type": "tool_use", "id": "call_1", "name": "Read", "input": {"file_path": "/hello.txt"}},
        ]},
        {"role": "user", "content": [
            {"type": "tool_result", "tool_use_id": "call_1", "content": "1\thello", "cache_control": _CACHED},
        ]},
    ],
    "tools": [
        {"name": "Read", "description": "Reads a file.", "input_schema": PATH},
        {"name": "Bash", "description": "Runs a command.", "input_schema": COMMAND},
    ],
    "metadata": {"user_id": '{"device_id":"0","account_uuid":"","session_id":"1"}'},
    "max_tokens": 32000,
    "thinking": {"type": "adaptive"},
    "context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
    "output_config": {"effort": "high"},
    "stream": True,
}  # fmt: skip


def _said(role: str, text: str, kind: str = "input_text", **more: Any) -> dict[str, Any]:
    return {"type": "message", "role": role, "content": [{"type": kind, "text": text}], **more}


CODEX: Final[dict[str, Any]] = {
    "instructions": "You write code.",
    "input": [
        _said("developer", "You are careful.", id="msg_1"),
        _said("developer", "These are your skills.", id="msg_2"),
        _said("user", "<environment_context>\n  <cwd>/home</cwd>\n</environment_context>", id="msg_3"),
        _said("user", "What is in hello.txt?", id="msg_4"),
        {"type": "reasoning", "id": "rs_1", "summary": [], "content": None, "encrypted_content": "gAAA"},
        {"type": "message", "status": "completed", "role": "assistant", "content": [
            {"type": "output_text", "text": "I look.", "annotations": [], "logprobs": []}
        ]},
        {"type": "function_call", "status": "completed", "name": "close", "namespace": "agents_v1",
         "arguments": '{"target": "x"}', "call_id": "call_1"},
        {"type": "function_call_output", "id": "fco_1", "call_id": "call_1", "output": "There is none."},
        {"type": "function_call", "name": "exec_command", "arguments": '{"cmd": "cat hello.txt"}',
         "call_id": "call_2"},
        {"type": "function_call_output", "id": "fco_2", "call_id": "call_2", "output": "Output:\nhello"},
    ],
    "tools": [
        {"type": "function", "name": "exec_command", "description": "Runs.", "strict": False,
         "parameters": COMMAND},
        {"type": "namespace", "name": "agents_v1", "description": "Other agents.", "tools": [
            {"type": "function", "name": "close", "description": "Ends one.", "strict": False, "parameters": {
                "type": "object", "properties": {"target": {"type": "string", "enum": ["x", "y"]}},
                "required": ["target"], "additionalProperties": False}},
        ]},
        {"type": "web_search", "external_web_access": False},
    ],
    "tool_choice": "auto",
    "parallel_tool_calls": True,
    "reasoning": {"summary": "auto"},
    "store": False,
    "stream": True,
    "include": ["reasoning.encrypted_content"],
    "prompt_cache_key": "01a2",
    "client_metadata": {"x-codex-window-id": "01a2:0", "turn_id": "01a2"},
}  # fmt: skip

# Of Qwen Code: a user's content is a list of parts, an answer's may be null beside calls.
QWEN_CODE: Final[dict[str, Any]] = {
    "messages": [
        {"role": "system", "content": "You are Qwen Code."},
        {"role": "user", "content": [{"type": "text", "text": "This is the folder."}]},
        {"role": "assistant", "content": "Got it."},
        {"role": "user", "content": [{"type": "text", "text": "What is in hello.txt?"}]},
        {"role": "assistant", "content": None, "tool_calls": [
            {"id": "call_1", "type": "function",
             "function": {"name": "read_file", "arguments": '{"file_path":"/hello.txt"}'}},
        ]},
        {"role": "tool", "tool_call_id": "call_1", "content": [{"type": "text", "text": "hello"}]},
    ],
    "tools": [
        {"type": "function", "function": {"name": "read_file", "description": "d", "parameters": PATH}},
    ],
    "max_tokens": 8000,
    "stream": True,
    "stream_options": {"include_usage": True},
}  # fmt: skip
OPENCODE: Final[dict[str, Any]] = {
    **QWEN_CODE,
    "messages": [
        {"role": "system", "content": "You are opencode."},
        {"role": "user", "content": "What is in hello.txt?"},
        *QWEN_CODE["messages"][4:5],
        {"role": "tool", "tool_call_id": "call_1", "content": "<content>\n1: hello\n</content>"},
    ],
    "max_tokens": 8192,
    "tool_choice": "auto",
}
