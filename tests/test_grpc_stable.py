"""Names and numbers of protos/ only ever grow: what clients were built with goes on to work.

tests/inference.fields.txt has every field, value and call that there ever was. After an addition:
python tests/test_grpc_stable.py, and commit it.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from google.protobuf.descriptor import Descriptor, EnumDescriptor, FieldDescriptor, FileDescriptor

from mer.v1 import inference_pb2 as pb

KNOWN = Path(__file__).parent / "inference.fields.txt"


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


def test_nothing_was_removed_or_changed():
    known, now = KNOWN.read_text().splitlines(), shape(pb.DESCRIPTOR)
    assert not set(known) - set(now), "clients rely on these; see docs/grpc.md"
    assert now == known, f"new, and not yet in {KNOWN.name}: python {Path(__file__).name}"


@pytest.mark.parametrize(
    "line", ["mer.v1.Usage.prompt_tokens = 1: uint32", "mer.v1.FinishReason.FINISH_REASON_STOP = 1"]
)
def test_the_list_has_numbers_and_types(line):
    assert line in KNOWN.read_text().splitlines()


if __name__ == "__main__":
    KNOWN.write_text("\n".join(shape(pb.DESCRIPTOR)) + "\n")
