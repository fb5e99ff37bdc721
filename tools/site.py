"""Writes the documentation as a site: python tools/site.py DIR (`make site`); warnings are errors.

The first page is README.md, the others are docs/*.md; the reference follows from docstrings, the commands'
help, the protos and the OpenAPI document.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import click
from google.protobuf.descriptor_pb2 import (
    DescriptorProto,
    FieldDescriptorProto,
    FileDescriptorProto,
    FileDescriptorSet,
)
from sphinx.cmd.build import main as sphinx

from mer.api.http.openapi import document
from mer.cli.main import COMMANDS, cli

ROOT = Path(__file__).parent.parent


NAV = {
    "Use it": ["how-it-works", "python", "http", "grpc", "models", "speculative", "gpu", "cluster"],
    "Run it": ["deploy", "kubernetes", "ray", "operations", "security", "top", "metrics", "performance"],
    "Reference": ["reference/cli", "reference/python", "reference/http", "reference/grpc"],
    "Build it": ["architecture", "adding-a-model", "CONTRIBUTING", "CHANGELOG"],
}
CONF = """
project = "mer"
extensions = ["myst_parser", "sphinx.ext.autodoc"]
html_theme = "furo"
html_title = "mer"
html_show_sphinx = html_show_copyright = False
html_extra_path = ["openapi.json"]
myst_heading_anchors = 3
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
python_maximum_signature_line_length = 88
exclude_patterns = []
"""


def beside(text: str) -> str:
    """Links of a file in the repository's root, as they are among the pages."""
    return re.sub(r"\]\((?:docs/)?([\w./-]+\.(?:md|png|svg))", r"](\1", text)


def contents() -> str:
    """What stands in the sidebar."""
    trees = ["```{toctree}\n:hidden:\n\nStart <self>\n```\n"]
    for caption, pages in NAV.items():
        lines = "\n".join(pages)
        trees.append(f"```{{toctree}}\n:hidden:\n:caption: {caption}\n\n{lines}\n```\n")
    return "\n".join(trees)


def commands() -> str:
    context = click.Context(cli, info_name="mer")
    parts = ["# Command line\n"]
    for name in ("", *COMMANDS):
        command = cli.get_command(context, name) if name else cli
        assert command is not None
        inner = click.Context(
            command, info_name=name or "mer", parent=context if name else None, max_content_width=100,
            help_option_names=["-h", "--help"], terminal_width=100,
        )  # fmt: skip
        parts.append(f"## mer {name}\n\n```text\n{command.get_help(inner)}\n```\n".replace("mer \n", "mer\n"))
    return "\n".join(parts)


# ---- gRPC ----

_KINDS = {number: name.removeprefix("TYPE_").lower() for name, number in FieldDescriptorProto.Type.items()}


def described(protos: list[Path]) -> FileDescriptorSet:
    with tempfile.TemporaryDirectory() as made:
        out = Path(made) / "set"
        subprocess.run(
            [sys.executable, "-m", "grpc_tools.protoc", f"-I{ROOT / 'protos'}", f"--descriptor_set_out={out}",
             "--include_source_info", *map(str, protos)], check=True,
        )  # fmt: skip
        return FileDescriptorSet.FromString(out.read_bytes())


class Proto:
    """One file as Markdown. Comments are found by the path of what they stand at."""

    def __init__(self, file: FileDescriptorProto) -> None:
        self.file = file
        places = file.source_code_info.location
        self.comments = {tuple(each.path): each.leading_comments or each.trailing_comments for each in places}

    def comment(self, *path: int) -> str:
        return " ".join(self.comments.get(path, "").split())

    def text(self) -> str:
        parts = [f"## {self.file.name}\n"]
        for i, service in enumerate(self.file.service):
            parts.append(f"### service {service.name}\n\n{self.comment(6, i)}\n\n| call | | |\n|---|---|---|")
            for j, method in enumerate(service.method):
                sides = [
                    ("stream " if stream else "") + link(kind)
                    for stream, kind in (
                        (method.client_streaming, method.input_type),
                        (method.server_streaming, method.output_type),
                    )
                ]
                parts.append(f"| `{method.name}` | {sides[0]} → {sides[1]} | {self.comment(6, i, 2, j)} |")
            parts.append("")
        for i, message in enumerate(self.file.message_type):
            parts += self.message(message, "", 4, i)
        for i, enum in enumerate(self.file.enum_type):
            parts += self.enum(enum, "", 5, i)
        return "\n".join(parts)

    def message(self, message: DescriptorProto, outer: str, *path: int) -> list[str]:
        if message.options.map_entry:
            return []
        name = outer + message.name
        parts = [f"({anchor(name)})=\n### {name}\n", self.comment(*path), ""]
        if message.field:
            parts.append("| | field | type | |\n|---|---|---|---|")
        for i, field in enumerate(message.field):
            kind = self.kind(message, field)
            parts.append(f"| {field.number} | `{field.name}` | {kind} | {self.comment(*path, 2, i)} |")
        parts.append("")
        for i, enum in enumerate(message.enum_type):
            parts += self.enum(enum, f"{name}.", *path, 4, i)
        for i, inner in enumerate(message.nested_type):
            parts += self.message(inner, f"{name}.", *path, 3, i)
        return parts

    def enum(self, enum: Any, outer: str, *path: int) -> list[str]:
        name = outer + enum.name
        parts = [f"({anchor(name)})=\n### {name}\n", self.comment(*path), "", "| | value | |\n|---|---|---|"]
        for i, value in enumerate(enum.value):
            parts.append(f"| {value.number} | `{value.name}` | {self.comment(*path, 2, i)} |")
        return [*parts, ""]

    def kind(self, message: DescriptorProto, field: FieldDescriptorProto) -> str:
        kind = link(field.type_name) if field.type_name else _KINDS[field.type]
        for entry in message.nested_type:
            if entry.options.map_entry and field.type_name.endswith(f".{message.name}.{entry.name}"):
                return f"map of {_KINDS[entry.field[0].type]} to {_KINDS[entry.field[1].type]}"
        if field.label == FieldDescriptorProto.LABEL_REPEATED:
            return f"repeated {kind}"
        if field.proto3_optional:
            return f"optional {kind}"
        if field.HasField("oneof_index"):
            return f"{kind}, one of `{message.oneof_decl[field.oneof_index].name}`"
        return kind


def anchor(name: str, api: str = "grpc") -> str:
    return f"{api}-{name.lower().replace('.', '-')}"


def link(kind: str) -> str:
    name = kind.removeprefix(".mer.v1.")
    return f"[{name}](#{anchor(name)})"


def grpc() -> str:
    files = described(sorted((ROOT / "protos/mer/v1").glob("*.proto"))).file
    head = "# gRPC reference\n\nThe files of `protos/`; [gRPC](../grpc.md) begins with an example.\n"
    return "\n".join([head, *(Proto(file).text() for file in files)])


# ---- HTTP ----


def http(api: dict[str, Any]) -> str:
    parts = ["# HTTP reference\n", "[The HTTP API](../http.md) begins with an example; this is what"]
    parts.append('<a href="../openapi.json">openapi.json</a> says; a server has it at `/openapi.json`.\n')
    for path, methods in api["paths"].items():
        for method, each in methods.items():
            parts.append(f"## {method.upper()} {path}\n\n{each['summary']}\n")
            if body := each.get("requestBody"):
                parts.append(f"Body: {typed(body['content']['application/json']['schema'])}\n")
            parts.append("| status | | |\n|---|---|---|")
            for status, answer in each["responses"].items():
                kinds = "; ".join(
                    content["schema"].get("description") or typed(content["schema"])
                    for content in answer["content"].values()
                )
                parts.append(f"| {status} | {answer['description']} | {kinds} |")
            parts.append("")
    parts.append("# Types\n")
    for name, schema in sorted(api["components"]["schemas"].items()):
        parts.append(f"({anchor(name, 'http')})=\n## {name}\n\n{schema.get('description', '')}\n")
        if properties := schema.get("properties"):
            needed = set(schema.get("required", []))
            parts.append("| field | type | |\n|---|---|---|")
            parts += [
                f"| `{field}` | {typed(each)} | {'needed' if field in needed else ''} |"
                for field, each in properties.items()
            ]
        else:
            parts.append(typed(schema))
        parts.append("")
    return "\n".join(parts)


def typed(schema: dict[str, Any]) -> str:
    """In words, with links to the types that have names."""
    if "$ref" in schema:
        name = schema["$ref"].rsplit("/", 1)[1]
        return f"[{name}](#{anchor(name, 'http')})"
    if several := schema.get("anyOf", schema.get("oneOf")):
        return " or ".join(map(typed, several))
    if "enum" in schema:
        return " or ".join(f"`{json.dumps(value)}`" for value in schema["enum"])
    kind = schema.get("type", "anything")
    if kind == "array":
        return f"list of {typed(schema.get('items') or {})}"
    limits = [
        f"{word} {schema[key]}"
        for key, word in (("minimum", "at least"), ("exclusiveMinimum", "above"), ("maximum", "at most"))
        if key in schema
    ]
    return f"{kind} ({', '.join(limits)})" if limits else str(kind)


def sources(at: Path) -> None:
    """What Sphinx reads."""
    shutil.copytree(ROOT / "docs", at)
    for page in at.glob("*.md"):
        page.write_text(
            page.read_text().replace("](../protos/mer/v1/inference.proto)", "](reference/grpc.md)")
        )
    made = {
        "conf.py": CONF,
        "index.md": beside((ROOT / "README.md").read_text()) + "\n" + contents(),
        "CONTRIBUTING.md": beside((ROOT / "CONTRIBUTING.md").read_text()),
        "CHANGELOG.md": beside((ROOT / "CHANGELOG.md").read_text()),
        "reference/cli.md": commands(),
        "reference/grpc.md": grpc(),
        "reference/http.md": http(document()),
        "openapi.json": json.dumps(document(), indent=1),
    }
    for name, text in made.items():
        (at / name).write_text(text)


def main() -> int:
    if len(sys.argv) != 2:
        sys.exit(f"usage: {sys.argv[0]} DIR")
    with tempfile.TemporaryDirectory() as made:
        sources(Path(made) / "pages")
        return sphinx(["-q", "-W", "--keep-going", "-b", "html", str(Path(made) / "pages"), sys.argv[1]])


if __name__ == "__main__":
    sys.exit(main())
