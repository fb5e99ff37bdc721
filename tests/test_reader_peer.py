"""The reader beside another user of io_uring: the liburing package reads the same bytes of the same file."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from mer.errors import ConfigError
from mer.streaming.reader import Reader

pytest.importorskip("liburing")
BLOCK = 4096

# By its own ring, through the page cache: it takes no aligned memory. Arguments: a file, offset, length.
PEER = """
import os, sys, liburing
path, offset, length = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
ring, cqe, buffer = liburing.Ring(), liburing.Cqe(), bytearray(length)
liburing.trap_error(liburing.io_uring_queue_init(4, ring, 0))
sqe = liburing.io_uring_get_sqe(ring)
liburing.io_uring_prep_read(sqe, os.open(path, os.O_RDONLY), buffer, offset)
liburing.io_uring_submit(ring)
liburing.io_uring_wait_cqe(ring, cqe)
assert cqe[0].res == length, cqe[0].res
liburing.io_uring_queue_exit(ring)
sys.stdout.buffer.write(buffer)
"""


def peer_read(path, offset: int, length: int) -> bytes:
    """In a process of its own: the package's binary has instructions that not every x86-64 has."""
    done = subprocess.run([sys.executable, "-c", PEER, path, str(offset), str(length)], capture_output=True)
    if done.returncode == -signal.SIGILL:
        pytest.skip("the liburing package was built for another CPU than this one")
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout


def test_the_same_bytes(tmp_path):
    path = tmp_path / "data"
    path.write_bytes(os.urandom(64 * BLOCK))
    try:
        reader = Reader([path], backend="uring")
    except ConfigError as error:
        pytest.skip(str(error))
    with reader:
        for offset, length in ((0, BLOCK), (3 * BLOCK, 5 * BLOCK), (63 * BLOCK, BLOCK), (12_345, 70_001)):
            assert reader.read(0, offset, length) == peer_read(path, offset, length)
        assert reader.read(0, 0, 64 * BLOCK) == peer_read(path, 0, 64 * BLOCK)
