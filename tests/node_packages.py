"""Node and packages of npm, for the tests whose clients are written in JavaScript."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

NODE, NPM = shutil.which("node"), shutil.which("npm")

needs_node = pytest.mark.skipif(NODE is None or NPM is None, reason="Node is not installed")


def node_modules(client: Path) -> Path:
    """A directory with what package.json in directory `client` names, kept from run to run."""
    wanted = (client / "package.json").read_bytes()
    kept = Path(tempfile.gettempdir()) / f"mer-node-{os.getuid()}-{hashlib.sha256(wanted).hexdigest()[:12]}"
    if not kept.exists():
        with tempfile.TemporaryDirectory() as made:
            (Path(made) / "package.json").write_bytes(wanted)
            subprocess.run(
                [str(NPM), "install", "--no-audit", "--no-fund", "--ignore-scripts", "--silent"],
                cwd=made,
                check=True,
                timeout=300,
            )
            partial = kept.with_suffix(f".{os.getpid()}")
            shutil.copytree(made, partial)
            partial.rename(kept)
    return kept / "node_modules"


def run_node(client: Path, script: str, *arguments: object) -> str:
    """What the script of directory `client` prints; fails with what it says on standard error."""
    command = [str(NODE), client / script, *map(str, arguments)]
    environment = {**os.environ, "NODE_PATH": str(node_modules(client))}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout
