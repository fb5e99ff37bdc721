# cython: language_level=3, boundscheck=False, wraparound=False
"""What the tokens of a step chose: the experts that drafted ones alone wanted, and what each token chose last.

With numpy each of these took 20 to 150 us, of a small model's step of 640.
"""

import numpy as np

from cpython.mem cimport PyMem_Calloc, PyMem_Free
from libc.stdint cimport int32_t, uint16_t
from libc.string cimport memset

cdef enum:
    PLAIN = 1       # in place of a draft's number: wanted by a token that was not drafted
    DRAFTS = 2      # the first draft's


def extra_experts(const int32_t[:, :, ::1] routes, Py_ssize_t n_experts, list chunks not None):
    cdef Py_ssize_t layer, i, at, in_all = 0, n = len(chunks)
    cdef Py_ssize_t *ends = <Py_ssize_t *>PyMem_Calloc(3 * n + n_experts, sizeof(Py_ssize_t))
    cdef Py_ssize_t *cuts = ends + n            # of each chunk where its draft begins, and ends
    cdef Py_ssize_t *extra = ends + 2 * n
    cdef Py_ssize_t *wanted = ends + 3 * n      # of each expert, by whom as the last one; 0: nobody
    if ends == NULL:
        raise MemoryError("experts of drafts")
    try:
        at = 0
        for i in range(n):
            count, draft = chunks[i]
            cuts[i], ends[i] = at + <Py_ssize_t>count, at + <Py_ssize_t>count + <Py_ssize_t>draft
            at = ends[i]
        if at > routes.shape[1]:
            raise ValueError(f"{at} tokens, and the choices of {routes.shape[1]}")
        for layer in range(routes.shape[0]):
            memset(wanted, 0, n_experts * sizeof(Py_ssize_t))
            for i in range(n):
                mark(routes[layer], ends[i - 1] if i else 0, cuts[i], n_experts, wanted, PLAIN, NULL)
            for i in range(n):
                in_all += mark(routes[layer], cuts[i], ends[i], n_experts, wanted, DRAFTS + i, &extra[i])
        return [extra[i] for i in range(n)], in_all
    finally:
        PyMem_Free(ends)


cdef Py_ssize_t mark(const int32_t[:, ::1] routes, Py_ssize_t begin, Py_ssize_t end, Py_ssize_t n_experts,
                     Py_ssize_t *wanted, Py_ssize_t who, Py_ssize_t *own) except -1:
    """What these tokens chose is wanted by `who`. How much of it nobody wanted; *own: no plain token, counted once."""
    cdef Py_ssize_t token, k, found = 0
    cdef int32_t e
    for token in range(begin, end):
        for k in range(routes.shape[1]):
            e = routes[token, k]
            if not 0 <= e < n_experts:
                raise ValueError(f"expert {e} of {n_experts}")
            if wanted[e] == PLAIN or wanted[e] == who:
                continue
            found += wanted[e] == 0
            if own != NULL:
                own[0] += 1
            wanted[e] = who
    return found


def remember(uint16_t[:, :, ::1] chosen, const int32_t[::1] tokens, const int32_t[:, :, ::1] routes):
    cdef Py_ssize_t layer, t, k
    if tokens.shape[0] > routes.shape[1] or chosen.shape[1] > routes.shape[0] or chosen.shape[2] != routes.shape[2]:
        raise ValueError("the choices are not those of these tokens")
    for t in range(tokens.shape[0]):
        if not 0 <= tokens[t] < chosen.shape[0]:
            raise ValueError(f"token {tokens[t]} of {chosen.shape[0]}")
        for layer in range(chosen.shape[1]):
            for k in range(chosen.shape[2]):
                chosen[tokens[t], layer, k] = <uint16_t>(routes[layer, t, k] + 1)


def remembered(const uint16_t[:, :, ::1] chosen, list tokens not None, Py_ssize_t layers):
    cdef Py_ssize_t layer, t, k, token
    if not 0 <= layers <= chosen.shape[1]:
        raise ValueError(f"{layers} layers of {chosen.shape[1]}")
    found = np.empty((layers, len(tokens), chosen.shape[2]), np.int32)
    cdef int32_t[:, :, ::1] likely = found
    for t in range(len(tokens)):
        token = tokens[t]
        if not 0 <= token < chosen.shape[0]:
            raise ValueError(f"token {token} of {chosen.shape[0]}")
        for layer in range(layers):
            for k in range(chosen.shape[2]):
                likely[layer, t, k] = <int32_t>chosen[token, layer, k] - 1
    return found
