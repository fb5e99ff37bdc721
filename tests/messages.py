"""Messages that clients could send, and ways to change them: for fuzzing."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

from google.protobuf.descriptor import FieldDescriptor as Field
from google.protobuf.message import DecodeError, Message

from mer.v1 import admin_pb2 as admin
from mer.v1 import inference_pb2 as pb

KINDS: tuple[type[Message], ...] = (
    pb.GenerateRequest, pb.ChatRequest, pb.SessionRequest, pb.TokenizeRequest, pb.DetokenizeRequest,
    pb.EmbedRequest, pb.WatchRequest, admin.ReloadRequest, admin.SetRamRequest, admin.PinRequest,
)  # fmt: skip
TEXTS = (
    "", "a", "Once upon a time", "\0", "ö\U0001f600", '{"type": "object"}', "[1]", "{", "null",
    '{"a": NaN}', "1e999",
    "user", "system", "tool", "(", "(a*)*", "start: \"x\"", "{}", '{"$ref": "#"}', "[" * 2000, "x" * 3000,
)  # fmt: skip
NUMBERS = (0, 1, 2, -1, 3, 20, 21, 127, 128, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, -(2**63), 2**64 - 1)
FLOATS = (0.0, 1.0, -1.0, 0.5, 2.0, 1e-30, 1e30, float("inf"), float("-inf"), float("nan"))
BITS = {
    Field.TYPE_INT32: (-(2**31), 2**31 - 1),
    Field.TYPE_UINT32: (0, 2**32 - 1),
    Field.TYPE_INT64: (-(2**63), 2**63 - 1),
    Field.TYPE_UINT64: (0, 2**64 - 1),
    Field.TYPE_SINT64: (-(2**63), 2**63 - 1),
    Field.TYPE_ENUM: (0, 2**31 - 1),
}


def seeds() -> Iterator[bytes]:
    """Sound ones, with the byte before them that says which kind it is."""
    params = pb.SamplingParams(temperature=0.7, max_tokens=5, stop=["x"])
    with_schema = pb.SamplingParams(structure=pb.Structure(json_schema='{"type": "string"}'))
    for message in (
        pb.GenerateRequest(text="Once", params=params),
        pb.GenerateRequest(token_ids=pb.TokenIds(ids=[1, 2]), params=with_schema),
        pb.ChatRequest(
            messages=[pb.Message(role="user", content="Hello"), pb.Message(role="assistant", content="Hi")],
            tools=[pb.Tool(name="f", parameters='{"type": "object", "properties": {}}')],
            tool_choice=pb.ToolChoice(name="f"),
            params=params,
        ),
        pb.SessionRequest(id="a", generate=pb.GenerateRequest(text="Once")),
        pb.SessionRequest(id="a", cancel=pb.Cancel()),
        pb.TokenizeRequest(text="Once"),
        pb.DetokenizeRequest(token_ids=[1, 2]),
        pb.EmbedRequest(text="Once"),
        pb.WatchRequest(interval=1),
        admin.ReloadRequest(settings={"ram": "1GiB"}),
    ):
        yield bytes([KINDS.index(type(message))]) + message.SerializeToString()


def changed(data: bytes, draw: random.Random) -> bytes:
    """Another message of the same kind, or of another one."""
    kind = data[0] % len(KINDS)
    message: Any = KINDS[kind]()
    try:
        message.ParseFromString(data[1:])
    except DecodeError:
        message = KINDS[kind]()
    for _ in range(draw.randrange(1, 4)):
        _change(message, draw)
    head = draw.randrange(256) if draw.random() < 0.02 else kind
    return bytes([head]) + message.SerializeToString()


def _change(message: Any, draw: random.Random, depth: int = 0) -> None:
    field = draw.choice(message.DESCRIPTOR.fields) if message.DESCRIPTOR.fields else None
    if field is None:
        return
    if draw.random() < 0.15:
        message.ClearField(field.name)
    elif field.message_type is not None and field.message_type.GetOptions().map_entry:
        key, value = (_value(each, draw) for each in field.message_type.fields)
        getattr(message, field.name)[key] = value
    elif field.message_type is not None:
        inside = getattr(message, field.name)
        if field.is_repeated:
            inside = inside.add() if not inside or draw.random() < 0.3 else draw.choice(inside)
        else:
            inside.SetInParent()
        if depth < 4:
            _change(inside, draw, depth + 1)
    elif field.is_repeated:
        getattr(message, field.name).extend(_value(field, draw) for _ in range(draw.choice((1, 1, 2, 70))))
    else:
        setattr(message, field.name, _value(field, draw))


def _value(field: Field, draw: random.Random) -> Any:
    if field.type == Field.TYPE_STRING:
        return draw.choice(TEXTS)
    if field.type == Field.TYPE_BYTES:
        return draw.randbytes(draw.randrange(5))
    if field.type == Field.TYPE_BOOL:
        return draw.random() < 0.5
    if field.type in (Field.TYPE_FLOAT, Field.TYPE_DOUBLE):
        return draw.choice(FLOATS)
    least, most = BITS[field.type]
    return draw.choice([each for each in NUMBERS if least <= each <= most])
