"""Messages between an engine and a shard: their limits, checksums and shapes."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from typing import Final
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

from mer._ext.mixture import narrow, widen
from mer.config import ExpertWire
from mer.errors import MerError
from mer.v1 import expert_pb2 as pb
from mer.weights import formats

# Most rows that one message asks for: their activations, or outputs, are some megabytes.
MOST_ROWS = 256
# What a message takes beside activations, whatever their size: numbers, and names of held experts.
_BESIDE = 1 << 20
# Characters or bytes of one part of a Hello.
_LONGEST = 100

# What rows can be.
WIRES: Final[Mapping[str, formats.Format]] = {
    form.name: form for form in (formats.F32, formats.BF16, formats.F16)
}


class WireError(MerError):
    """A message that does not keep to protos/mer/v1/expert.proto, or was damaged on its way."""


def most_bytes(hidden: int, n_keys: int) -> int:
    """The limit of a message's size."""
    return MOST_ROWS * hidden * 4 + n_keys * 5 + _BESIDE


def make_rows(
    number: int,
    layer: int,
    x: NDArray[np.float32],
    experts: Sequence[int],
    counts: Sequence[int],
    tokens: NDArray[np.int32],
    weights: NDArray[np.float32],
    wire: ExpertWire = "f32",
    *,
    part: int = 0,
    patience_ms: int = 0,
) -> pb.Rows:
    """A request for these rows, see the proto; x f32 [T, hidden], of which it has only what it needs.

    tokens, weights: of each pair of a token and an expert.
    """
    # Of few tokens numpy takes several times as long for this as plain Python.
    order: dict[int, int] = {}
    places = [order.setdefault(token, len(order)) for token in tokens.tolist()]
    data, factors = narrow(WIRES[wire].id, x[list(order)]), weights.tobytes()
    head = number & 0xFFFFFFFF, layer, part, patience_ms
    return pb.Rows(
        id=number, layer=layer, experts=experts, counts=counts, tokens=places, part=part,
        patience_ms=patience_ms, weights=factors, x=data,
        checksum=_checksum(data, *head, *experts, *counts, *places, weights=factors),
    )  # fmt: skip


def cut(experts: Sequence[int], counts: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """The same, in their order, as messages of at most MOST_ROWS; an expert may be in two."""
    pieces: list[tuple[list[int], list[int]]] = [([], [])]
    room = MOST_ROWS
    for expert, count in zip(experts, counts, strict=True):
        while count:
            if not room:
                pieces.append(([], []))
                room = MOST_ROWS
            part = min(count, room)
            pieces[-1][0].append(expert)
            pieces[-1][1].append(part)
            count -= part
            room -= part
    return pieces


def check_hello(hello: pb.Hello) -> None:
    """Raises WireError where a part of it is longer than any can be, or could spoil a log."""
    names = hello.version, hello.arithmetic
    if max(map(len, (*names, hello.model, hello.probe))) > _LONGEST or not all(map(str.isprintable, names)):
        raise WireError(f"a Hello has printable parts of at most {_LONGEST} characters")
    if len(hello.engine) != 16:
        raise WireError("an engine has a name of 16 bytes")
    if hello.wire not in WIRES:
        raise WireError(f"rows can be {', '.join(WIRES)}, and the engine's are something else")


def rows_checksum(rows: pb.Rows) -> int:
    """Of what a request asks for."""
    return _rows_checksum(rows, list(rows.experts), list(rows.counts), list(rows.tokens))


def _rows_checksum(rows: pb.Rows, experts: list[int], counts: list[int], tokens: list[int]) -> int:
    head = rows.id & 0xFFFFFFFF, rows.layer, rows.part, rows.patience_ms
    return _checksum(rows.x, *head, *experts, *counts, *tokens, weights=rows.weights)


def outputs_checksum(number: int, rows: bytes) -> int:
    """Of an answer."""
    return _checksum(rows, number & 0xFFFFFFFF)


def _checksum(rows: bytes, *head: int, weights: bytes = b"") -> int:
    return crc32(rows, crc32(weights, crc32(struct.pack(f"<{len(head)}I", *head))))


def unpack(
    rows: pb.Rows, hidden: Sequence[int], n_experts: int, wire: str = "f32"
) -> tuple[NDArray[np.float32], NDArray[np.int32], NDArray[np.float32]]:
    """(x f32 [pairs, hidden], the expert and the weight of each pair, i32 and f32 [pairs, 1]) of a request.

    hidden: of each layer. wire: what its rows are, of WIRES. Raises WireError for what can't be.
    """
    # First how much it is: what is too much is not looked at.
    most = max(len(rows.tokens), len(rows.experts), len(rows.counts))
    if most > MOST_ROWS:
        raise WireError(f"{most} rows in one message, at most {MOST_ROWS} are allowed")
    experts, counts, tokens = list(rows.experts), list(rows.counts), list(rows.tokens)
    if _rows_checksum(rows, experts, counts, tokens) != rows.checksum:
        raise WireError("the checksum of the rows is wrong: they were damaged on their way")
    if rows.layer >= len(hidden):
        raise WireError(f"layer {rows.layer}: there are {len(hidden)} with experts")
    if len(counts) != len(experts) or not counts or min(counts) < 1 or sum(counts) != len(tokens):
        raise WireError(f"{len(experts)} experts with {len(counts)} counts do not fit {len(tokens)} tokens")
    if max(experts) >= n_experts:
        raise WireError(f"expert {max(experts)}: a layer has {n_experts}")
    if len(rows.weights) != 4 * len(tokens):
        raise WireError(f"{len(rows.weights)} bytes of weights do not fit {len(tokens)} tokens")
    data, width = rows.x, hidden[rows.layer]
    count, rest = divmod(len(data), WIRES[wire].block_bytes * width)
    if rest or count > MOST_ROWS or not tokens or max(tokens) >= count:
        raise WireError(f"{len(data)} bytes of activations are no rows of {width} for these tokens")
    x = widen(WIRES[wire].id, data, width)
    pairs = [expert for expert, times in zip(experts, counts, strict=True) for _ in range(times)]
    weights = np.frombuffer(rows.weights, np.float32)[:, None]
    return x if tokens == list(range(count)) else x[tokens], np.array(pairs, np.int32)[:, None], weights
