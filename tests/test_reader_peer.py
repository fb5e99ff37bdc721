"""The reader beside another user of io_uring: the liburing package reads the same bytes of the same file."""

from __future__ import annotations

import os

import pytest

from mer.errors import ConfigError
from mer.streaming.reader import Reader

liburing = pytest.importorskip("liburing")
BLOCK = 4096


def peer_read(path, offset: int, length: int) -> bytes:
    """By the package's own ring, through the page cache: it takes no aligned memory."""
    ring, cqe = liburing.Ring(), liburing.Cqe()
    buffer = bytearray(length)
    fd = os.open(path, os.O_RDONLY)
    try:
        liburing.trap_error(liburing.io_uring_queue_init(4, ring, 0))
        try:
            sqe = liburing.io_uring_get_sqe(ring)
            liburing.io_uring_prep_read(sqe, fd, buffer, offset)
            liburing.io_uring_submit(ring)
            liburing.io_uring_wait_cqe(ring, cqe)
            assert cqe[0].res == length
        finally:
            liburing.io_uring_queue_exit(ring)
    finally:
        os.close(fd)
    return bytes(buffer)


def test_the_same_bytes(tmp_path):
    path = tmp_path / "data"
    path.write_bytes(os.urandom(64 * BLOCK))
    try:
        reader = Reader([path], backend="uring")
    except ConfigError as error:
        pytest.skip(str(error))
    with reader:
        for first, blocks in ((0, 1), (3, 5), (63, 1), (0, 64)):
            found = reader.read(0, first * BLOCK, blocks * BLOCK)
            assert found == peer_read(path, first * BLOCK, blocks * BLOCK)
