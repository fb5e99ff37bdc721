# cython: language_level=3, boundscheck=False, wraparound=False
"""Arrays of strings as GGUF files have them: of each the length in eight bytes, little-endian, then UTF-8."""

from cpython.unicode cimport PyUnicode_DecodeUTF8
from libc.stdint cimport uint64_t
from libc.string cimport memcpy


cdef Py_ssize_t end_of(const unsigned char[::1] data, Py_ssize_t at) noexcept nogil:
    """Where the string at `at` ends; -1 where it does not lie in data whole."""
    cdef uint64_t size
    if at > data.shape[0] - 8:
        return -1
    memcpy(&size, &data[at], 8)
    if size > <uint64_t>(data.shape[0] - at - 8):
        return -1
    return at + 8 + <Py_ssize_t>size


def skip(const unsigned char[::1] data, Py_ssize_t at, Py_ssize_t count):
    cdef Py_ssize_t passed = 0, end
    while passed < count:
        end = end_of(data, at)
        if end < 0:
            break
        at = end
        passed += 1
    return at, passed


def decode(const unsigned char[::1] data, Py_ssize_t at, Py_ssize_t count):
    cdef Py_ssize_t i, end
    cdef list found = []
    for i in range(count):
        end = end_of(data, at)
        if end < 0:
            raise IndexError(f"string {i} of {count} is cut off")
        found.append(PyUnicode_DecodeUTF8(<const char *>&data[0] + at + 8, end - at - 8, NULL))
        at = end
    return found, at
