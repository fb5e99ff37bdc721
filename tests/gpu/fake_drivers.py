"""Drivers that say what a test wants, for what asks before anything is computed."""

from __future__ import annotations

import subprocess
from pathlib import Path

SOURCE = Path(__file__).parent / "fake_driver.c"
TOTAL, FREE = 8 << 30, 6 << 30


def build(folder: Path, *, alone: bool = False, **says: int | str) -> str:
    """The path of a library. says: INIT, VERSION, COUNT, MAJOR, MINOR, TOTAL, FREE, CONTEXT, PIN, IMAGE.

    alone: it has the symbols that a probe needs, and no more.
    """
    known: dict[str, int | str] = {
        "INIT": 0, "VERSION": 13000, "COUNT": 1, "NAME": "Fake GPU #", "MAJOR": 9, "MINOR": 0, "TOTAL": TOTAL,
        "FREE": FREE, "CONTEXT": 0, "PIN": 0, "IMAGE": "simulated",
    }  # fmt: skip
    library = folder / "libfake.so"
    given = [
        f'-D{name}="{value}"' if isinstance(value, str) else f"-D{name}={value}L"
        for name, value in (known | says).items()
    ]
    command = ["gcc", "-shared", "-fPIC", "-Wall", "-Wextra", *given, "-DPROBE_ALONE"][
        : None if alone else -1
    ]
    subprocess.run([*command, str(SOURCE), "-o", str(library)], check=True)
    return str(library)
