"""What 'auto' takes when the kernel, a container or the file system refuses something, and what it says."""

from __future__ import annotations

import errno
import gc
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mer.errors import CheckpointError, ConfigError
from mer.streaming.reader import Reader

# Forbids io_uring_setup to this process, as the seccomp profiles of containers do: allow all else.
FORBID_URING = """
import ctypes, struct
program = b"".join(struct.pack("HBBI", *i) for i in [
    (0x20, 0, 0, 0), (0x15, 0, 1, 425), (0x06, 0, 0, 0x00050000 | 1), (0x06, 0, 0, 0x7FFF0000)])
text = ctypes.create_string_buffer(program)
filter = struct.pack("HxxxxxxP", 4, ctypes.addressof(text))
libc = ctypes.CDLL(None, use_errno=True)
assert libc.prctl(38, 1, 0, 0, 0) == 0
assert libc.prctl(22, 2, ctypes.c_char_p(filter), 0, 0) == 0
"""

# Gives up CAP_IPC_LOCK, which lets root pass the limit.
LOW_MEMLOCK = """
import ctypes, resource, struct
resource.setrlimit(resource.RLIMIT_MEMLOCK, (65536, 65536))
libc = ctypes.CDLL(None, use_errno=True)
header, sets = struct.pack("Ii", 0x20080522, 0), ctypes.create_string_buffer(24)
assert libc.capget(header, sets) == 0
words = struct.unpack("6I", sets.raw)
sets.raw = struct.pack("6I", *(w & ~(1 << 14) for w in words[:3]), *words[3:])
assert libc.capset(header, sets) == 0
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "data.bin"
    path.write_bytes(bytes(range(256)) * 1000)
    return path


def run(code: str, *args: object) -> list[str]:
    done = subprocess.run([sys.executable, "-c", code, *map(str, args)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_where_io_uring_is_forbidden_threads_read(path: Path) -> None:
    code = (
        FORBID_URING
        + """
import sys
from mer.errors import ConfigError
from mer.streaming.reader import Reader
with Reader([sys.argv[1]]) as reader:
    print(reader.backend); print(reader.why); print(reader.read(0, 100, 5) == bytes(range(100, 105)))
try:
    Reader([sys.argv[1]], backend="uring")
except ConfigError as e:
    print(e)
"""
    )
    backend, why, right, refusal = run(code, path)
    if backend == "buffered":
        pytest.skip(why)
    assert backend == "preadv"
    assert "seccomp" in why
    assert right == "True"
    assert "use auto or preadv" in refusal


def test_a_low_memlock_limit_costs_the_registration_only(path: Path) -> None:
    code = (
        LOW_MEMLOCK
        + """
import sys
from mer.streaming.reader import Reader, aligned_empty
reader = Reader([sys.argv[1]])
memory = aligned_empty(1 << 22)
print(reader.backend); print(reader.add_buffer(memory.ctypes.data, memory.nbytes)); print(reader.buffers_note)
reader.read_into([(0, 4096, 8192, memory, 4096)])
print(memory[4096:12288].tobytes() == (bytes(range(256)) * 32))
"""
    )
    backend, registered, note, right = run(code, path)
    assert right == "True"
    assert registered == "False"
    if backend == "uring":
        assert "memlock" in note


def test_where_o_direct_is_refused_reads_are_buffered(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.open

    def refuse(name: str, flags: int, *rest: int) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL), name)
        return real(name, flags, *rest)

    monkeypatch.setattr(os, "open", refuse)
    with Reader([path]) as reader:
        assert reader.backend == "buffered"
        assert reader.alignment == 1
        assert "O_DIRECT" in reader.why
        assert reader.read(0, 1, 3) == b"\1\2\3"
    for backend in ("uring", "preadv"):
        with pytest.raises(ConfigError, match="O_DIRECT"):
            Reader([path], backend=backend)


def test_what_cannot_be_opened_is_named(tmp_path: Path, path: Path) -> None:
    missing = tmp_path / "missing.safetensors"
    for backend in ("auto", "buffered"):
        with pytest.raises(CheckpointError, match=r"missing\.safetensors.*No such file"):
            Reader([path, missing], backend=backend)
        with pytest.raises(CheckpointError, match="directory"):
            Reader([path, tmp_path], backend=backend).read(1, 0, 1)


@pytest.mark.parametrize(
    ("option", "value"), [("backend", "aio"), ("queue_depth", 0), ("queue_depth", 5000), ("threads", 0)]
)
def test_settings_out_of_range(path: Path, option: str, value: object) -> None:
    with pytest.raises(ConfigError, match=str(value)):
        Reader([path], **{option: value})


def test_no_file_descriptor_is_left(path: Path) -> None:
    def count() -> int:
        return len(os.listdir("/proc/self/fd"))

    gc.collect()  # what others left
    before = count()
    for _ in range(5):
        Reader([path, path]).close()
        with pytest.raises(CheckpointError):
            Reader([path, path.with_suffix(".missing")])
    assert count() <= before
