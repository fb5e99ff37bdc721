"""The files of a Reader: opened, and what their errors mean."""

from __future__ import annotations

import errno
import mmap
import os
import stat
from collections.abc import Iterable

from mer.errors import CheckpointError


def open_all(paths: Iterable[str], direct: bool) -> list[int]:
    """File descriptors of `paths`, which close_all() closes, with O_DIRECT where `direct`.

    Raises CheckpointError for a file that can't be opened, OSError(EINVAL) where the file system refuses
    O_DIRECT.
    """
    fds: list[int] = []
    try:
        for path in paths:
            try:
                fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | (os.O_DIRECT if direct else 0))
            except OSError as e:
                if direct and e.errno == errno.EINVAL:
                    raise
                raise CheckpointError(
                    f"{path}: can't be opened: {os.strerror(e.errno or 0)}; check path and permissions"
                ) from None
            fds.append(fd)
            if stat.S_ISDIR(os.fstat(fd).st_mode):
                raise CheckpointError(f"{path}: is a directory; name the file")
            if direct:
                _try_direct(fd)
            else:
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
        return fds
    except BaseException:
        close_all(fds)
        raise


def _try_direct(fd: int) -> None:
    """Some file systems accept O_DIRECT and refuse the first read, or want more than our alignment."""
    with mmap.mmap(-1, 4096) as block:  # begins on a page
        os.preadv(fd, [block], 0)


def close_all(fds: Iterable[int]) -> None:
    for fd in fds:
        os.close(fd)


def size_of(path: str) -> int | str:
    """Bytes of a file, for a message."""
    try:
        return os.stat(path).st_size
    except OSError:
        return "unknown"


def uring_advice(code: int) -> str:
    """Why io_uring can't be had, from its errno."""
    if code == errno.ENOSYS:
        return "this kernel has none"
    if code in (errno.EPERM, errno.EACCES):
        return "kernel.io_uring_disabled or a seccomp filter of the container forbids it"
    if code == errno.ENOMEM:
        return "the memlock limit is too small (ulimit -l)"
    return "the kernel refused the ring"
