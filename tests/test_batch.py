"""The arrays of a step, beside numpy's own; what leads out of bounds is refused."""

import numpy as np
import pytest
from attrs import evolve

from mer.model.batch import Batch

LIMITS = {"vocab": 50, "max_tokens": 20, "max_rows": 4, "n_blocks": 9}
# tokens, the first one's position, how many get logits, blocks
PARTS = [([3, 1, 4], 15, 2, [8, 0, 5]), ([49], 40, 1, [1, 2, 3]), ([7, 7], 0, 0, [6])]


def test_of_sequences():
    batch = Batch.of(PARTS)
    tokens = np.concatenate([part[0] for part in PARTS])
    positions = np.concatenate([start + np.arange(len(each)) for each, start, _, _ in PARTS])
    tables = np.zeros((3, 3))
    for row, part in zip(tables, PARTS, strict=True):
        row[: len(part[3])] = part[3]
    for found, expected in [
        (batch.tokens, tokens),
        (batch.positions, positions),
        (batch.query_offsets, np.cumsum([0, 3, 1, 2])),
        (batch.block_tables, tables),
        (batch.logit_rows, [1, 2, 3]),
    ]:
        assert found.dtype == np.int32
        np.testing.assert_array_equal(found, expected)
    assert batch.states is None
    batch.check(**LIMITS)
    np.testing.assert_array_equal(Batch.of(PARTS[:1], [(-1, 2, -1, 0)]).states, [[-1, 2, -1, 0]])


def test_what_is_no_list_of_small_numbers():
    with pytest.raises(OverflowError):
        Batch.of([([1 << 31], 0, 1, [0])])
    with pytest.raises(TypeError):
        Batch.of([(np.zeros(3, np.int32), 0, 1, [0])])


@pytest.mark.parametrize(
    ("field", "at", "value", "message"),
    [
        ("tokens", 3, 50, "outside 0..49"),
        ("tokens", 0, -1, "outside 0..49"),
        ("positions", 0, -1, "positions do not fit"),
        ("positions", 1, 17, "positions of sequence 0"),
        ("positions", 5, 2**31 - 1, "positions of sequence 2"),
        ("positions", 3, 48, "sequence 1 needs 4 blocks within 0..8"),
        ("positions", 3, 2**31 - 1, "sequence 1 needs"),
        ("query_offsets", 0, 1, "query offsets"),
        ("query_offsets", 3, 7, "query offsets"),
        ("query_offsets", 2, 3, "query offsets"),
        ("query_offsets", 1, 2**31 - 1, "query offsets"),
        ("block_tables", (0, 1), 9, "sequence 0 needs 2 blocks"),
        ("block_tables", (1, 2), -1, "sequence 1 needs 3 blocks"),
        ("logit_rows", 2, 6, "logit row"),
        ("logit_rows", 0, -1, "logit row"),
    ],
)
def test_an_index_out_of_bounds(field, at, value, message):
    batch = Batch.of(PARTS)
    getattr(batch, field)[at] = value
    with pytest.raises(ValueError, match=message):
        batch.check(**LIMITS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": np.zeros(0, np.int32)}, "0 tokens"),
        ({"tokens": np.zeros(21, np.int32)}, "21 tokens"),
        ({"tokens": np.zeros(6, np.int64)}, "tokens must be C-contiguous int32"),
        ({"block_tables": np.zeros((3, 6), np.int32)[:, ::2]}, "block_tables must be"),
        ({"block_tables": np.zeros((2, 3), np.int32)}, "one row of block_tables"),
        ({"block_tables": np.zeros(3, np.int32)}, "block_tables must be"),
        ({"logit_rows": np.zeros(5, np.int32)}, "up to 4"),
        ({"positions": np.zeros(5, np.int32)}, "positions do not fit"),
        ({"query_offsets": np.zeros(1, np.int32)}, "query offsets"),
        ({"query_offsets": np.zeros(0, np.int32)}, "query offsets"),
    ],
)
def test_arrays_that_do_not_fit(change, message):
    with pytest.raises(ValueError, match=message):
        evolve(Batch.of(PARTS), **change).check(**LIMITS)
