"""What would make `mer` faster on this machine, of what it says of itself."""

from __future__ import annotations

from typing import Final

from mer.streaming.machine import Machine
from mer.streaming.probe import Device

# Over a network, or through a program.
_REMOTE: Final = frozenset(("nfs", "nfs4", "cifs", "smb3", "9p", "ceph", "lustre", "virtiofs", "glusterfs"))
_SLOW: Final = 1e9  # bytes a second: what any NVMe device reads
_FILES: Final = 256  # descriptors that a server needs beside those of its clients
_LOCKED: Final = 64 << 20


def advice(machine: Machine, device: Device, refusal: str | None) -> list[str]:
    """Sentences, the most important first. refusal: why io_uring can't be had; None where it can."""
    found = []
    if device.file_system in _REMOTE or device.file_system.startswith("fuse"):
        found.append(
            f"{device.path} is on {device.file_system}: copy the model to a local NVMe device (ext4, XFS)"
        )
    elif device.rotational and device.best < _SLOW:  # of virtual devices it is said that they turn
        found.append(f"{device.path} is on a disk that turns: copy the model to an NVMe device")
    elif device.best < _SLOW:
        found.append(
            f"the device reads {device.best / 1e9:.2f} GB/s, where an NVMe device reads several: see whether "
            "something else uses it, or put the model on a faster one"
        )
    if not device.direct:
        found.append(
            f"O_DIRECT does not work on {device.file_system}: the page cache takes memory that the expert "
            "cache could use; ext4 and XFS have it"
        )
    if refusal is not None:
        found.append(
            f"io_uring can't be had ({refusal}): allow it (docs/deploy.md has the seccomp profile, or sysctl "
            "kernel.io_uring_disabled=0); threads read meanwhile"
        )
    elif machine.memlock is not None and machine.memlock < _LOCKED and not machine.may_exceed_memlock:
        found.append(
            "the memlock limit is too small for fixed buffers: ulimit -l unlimited, LimitMEMLOCK=infinity in "
            "systemd, --ulimit memlock=-1 in docker"
        )
    if machine.governor in ("powersave", "conservative"):
        found.append(
            f"the CPU governor is {machine.governor}: echo performance | sudo tee "
            "/sys/devices/system/cpu/cpu*/cpufreq/scaling_governor"
        )
    if machine.huge_pages == "never":
        found.append(
            "transparent huge pages are off: echo madvise | sudo tee "
            "/sys/kernel/mm/transparent_hugepage/enabled"
        )
    if machine.open_files is not None and machine.open_files < _FILES:
        found.append(f"{machine.open_files} open files are allowed: ulimit -n 4096, for clients and weights")
    if machine.address_space is not None:
        found.append(
            "addresses are limited (ulimit -v): the expert cache can't grow later; ulimit -v unlimited"
        )
    return found
