"""The arrays of a step: made of lists, and looked at before C trusts them; see mer/model/batch.py.

With numpy a step of eight answers took a hundred calls for it, and as long as for their attention.
"""
import numpy as np

from libc.stdint cimport int32_t

cdef extern from "mer_decoder.h" nogil:
    enum: MER_KV_BLOCK

_NAMES = ("tokens", "positions", "query_offsets", "block_tables", "logit_rows")


def gather(list parts):
    cdef Py_ssize_t n = 0, n_rows = 0, most = 0, at = 0, row = 0, s, i, count, wanted
    cdef int32_t start
    cdef list numbers, blocks
    for numbers, _, wanted, blocks in parts:
        n += len(numbers)
        n_rows += wanted
        most = max(most, <Py_ssize_t>len(blocks))
    found = (np.empty(n, np.int32), np.empty(n, np.int32), np.empty(len(parts) + 1, np.int32),
             np.zeros((len(parts), most), np.int32), np.empty(n_rows, np.int32))
    cdef int32_t[::1] tokens = found[0], positions = found[1], offsets = found[2], rows = found[4]
    cdef int32_t[:, ::1] tables = found[3]
    offsets[0] = 0
    for s in range(len(parts)):
        numbers, start, wanted, blocks = parts[s]
        count = len(numbers)
        for i in range(count):
            tokens[at + i], positions[at + i] = numbers[i], start + <int32_t>i
        for i in range(len(blocks)):
            tables[s, i] = blocks[i]
        at += count
        offsets[s + 1] = <int32_t>at
        for i in range(at - wanted, at):
            rows[row] = <int32_t>i
            row += 1
    return found


def check(tokens, positions, query_offsets, block_tables, logit_rows, *, long vocab, long max_tokens, long max_rows,
          long n_blocks):
    cdef const int32_t[::1] ids = _array(tokens, 0, 1), places = _array(positions, 1, 1)
    cdef const int32_t[::1] offsets = _array(query_offsets, 2, 1), rows = _array(logit_rows, 4, 1)
    cdef const int32_t[:, ::1] tables = _array(block_tables, 3, 2)
    cdef long total = ids.shape[0], sequences = offsets.shape[0] - 1, i, s, used
    if not 0 < total <= max_tokens:
        raise ValueError(f"batch: {total} tokens, this forward pass takes 1 to {max_tokens}")
    if rows.shape[0] > max_rows:
        raise ValueError(f"batch: logits of {rows.shape[0]} tokens, this forward pass takes up to {max_rows}")
    for i in range(total):
        if not 0 <= ids[i] < vocab:
            raise ValueError(f"batch: a token is outside 0..{vocab - 1}")
    for i in range(rows.shape[0]):
        if not 0 <= rows[i] < total:
            raise ValueError("batch: a logit row is not a token of this step")
    if sequences < 1 or offsets[0] != 0 or offsets[sequences] != total:
        raise ValueError("batch: query offsets do not fit the tokens")
    for s in range(sequences):
        if offsets[s] >= offsets[s + 1]:
            raise ValueError("batch: query offsets do not fit the tokens")
    if tables.shape[0] != sequences:
        raise ValueError("batch: one row of block_tables per sequence")
    if places.shape[0] != total:
        raise ValueError("batch: positions do not fit the tokens")
    for s in range(sequences):
        if places[offsets[s]] < 0:
            raise ValueError("batch: positions do not fit the tokens")
        for i in range(offsets[s] + 1, offsets[s + 1]):
            if places[i] != <long>places[i - 1] + 1:
                raise ValueError(f"batch: positions of sequence {s} are not consecutive")
        used = places[offsets[s + 1] - 1] // MER_KV_BLOCK + 1
        for i in range(used):
            if i >= tables.shape[1] or not 0 <= tables[s, i] < n_blocks:
                raise ValueError(f"batch: sequence {s} needs {used} blocks within 0..{n_blocks - 1}")


cdef object _array(array, int which, int ndim):
    if array.dtype != np.int32 or array.ndim != ndim or not array.flags.c_contiguous:
        raise ValueError(f"batch: {_NAMES[which]} must be C-contiguous int32, of {ndim} dimensions")
    return array
