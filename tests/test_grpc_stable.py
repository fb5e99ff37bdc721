"""Names and numbers of protos/ only ever grow: what clients were built with goes on to work.

tests/inference.fields.txt and admin.fields.txt have every field, value and call that there ever was. After an
addition: python tests/test_grpc_stable.py, and commit them.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from google.protobuf.descriptor import Descriptor, EnumDescriptor, FieldDescriptor, FileDescriptor

from mer.v1 import admin_pb2, inference_pb2

FILES = {
    Path(__file__).parent / "inference.fields.txt": inference_pb2.DESCRIPTOR,
    Path(__file__).parent / "admin.fields.txt": admin_pb2.DESCRIPTOR,
}


def shape(file: FileDescriptor) -> list[str]:
    """A line for everything that clients rely on."""
    lines: list[str] = []
    for enum in file.enum_types_by_name.values():
        lines += _enum(enum)
    for message in file.message_types_by_name.values():
        lines += _message(message)
    for service in file.services_by_name.values():
        for method in service.methods:
            given, answer = (
                ("stream " if streams else "") + kind.full_name
                for streams, kind in (
                    (method.client_streaming, method.input_type),
                    (method.server_streaming, method.output_type),
                )
            )
            lines.append(f"{service.full_name}.{method.name}: {given} -> {answer}")
    return sorted(lines)


def _enum(enum: EnumDescriptor) -> Iterator[str]:
    for value in enum.values:
        yield f"{enum.full_name}.{value.name} = {value.number}"


def _message(message: Descriptor) -> Iterator[str]:
    for field in message.fields:
        yield f"{message.full_name}.{field.name} = {field.number}: {_kind(field)}"
    for enum in message.enum_types:
        yield from _enum(enum)
    for nested in message.nested_types:
        yield from _message(nested)


def _kind(field: FieldDescriptor) -> str:
    names = {
        number: name[5:].lower() for name, number in vars(FieldDescriptor).items() if name.startswith("TYPE_")
    }
    kind = field.message_type or field.enum_type
    words = ["repeated"] if field.is_repeated else ["optional"] if field.has_presence else []
    inside = field.containing_oneof
    if inside is not None and not inside.name.startswith("_"):
        words = [f"oneof {inside.name}"]
    return " ".join([*words, kind.full_name if kind else names[field.type]])


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_nothing_was_removed_or_changed(file):
    known, now = file.read_text().splitlines(), shape(FILES[file])
    assert not set(known) - set(now), "clients rely on these; see docs/grpc.md"
    assert now == known, f"new, and not yet in {file.name}: python {Path(__file__).name}"


@pytest.mark.parametrize(
    "line",
    [
        "mer.v1.Usage.prompt_tokens = 1: uint32",
        "mer.v1.FinishReason.FINISH_REASON_STOP = 1",
        "mer.v1.Admin.Reload: mer.v1.ReloadRequest -> mer.v1.ReloadResponse",
    ],
)
def test_the_lists_have_numbers_and_types(line):
    assert any(line in file.read_text().splitlines() for file in FILES)


if __name__ == "__main__":
    for file, described in FILES.items():
        file.write_text("\n".join(shape(described)) + "\n")
