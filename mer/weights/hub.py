"""Names of models on a hub ("org/name"), and where the cache of this machine has them; nothing is fetched."""

from __future__ import annotations

import re
from os import PathLike
from pathlib import Path, PurePosixPath
from typing import Final, Self

from attrs import frozen

from mer.demo import model_path
from mer.errors import CheckpointError
from mer.weights.gguf import SHARD

MAIN: Final = "main"
INDEX: Final = "model.safetensors.index.json"

_PART: Final = r"[A-Za-z0-9_][A-Za-z0-9._-]*"
_NAME: Final = re.compile(rf"({_PART}/{_PART})(?:@([^:@\s]+))?(?::([^:@/\s]+))?")
_COMMIT: Final = re.compile(r"[0-9a-f]{40}")
# How a file's name ends that says how the weights are stored: '-Q4_K_M', '.IQ4_XS', '-UD-Q4_K_XL', '-BF16'.
_LABEL: Final = re.compile(
    r"(?:^|[-._])((?:UD-)?(?:I?Q\d\w*|TQ\d_\d|BF16|FP?16|FP?32|MXFP4\w*|NVFP4))$", re.IGNORECASE
)
# What a repository of GGUF files has beside models: a model's eyes, its draft, statistics for quantising.
_NO_MODEL: Final = re.compile(r"mmproj|imatrix|(?:^|[-._])mtp(?:[-._]|$)", re.IGNORECASE)
# What is taken of several where nobody asked for one.
_USUAL: Final = ("Q4_K_M", "MXFP4", "Q4_K_S", "Q4_0", "Q8_0")


@frozen
class Name:
    """ORG/NAME[@REVISION][:QUANT]. quant: which of its GGUF files."""

    repo: str
    revision: str = MAIN
    quant: str | None = None

    @classmethod
    def parse(cls, text: str) -> Self | None:
        """None for what is no such name."""
        match = _NAME.fullmatch(text)
        if match is None or text.endswith((".gguf", ".safetensors")):
            return None
        return cls(match[1], match[2] or MAIN, match[3])

    def __str__(self) -> str:
        revision = "" if self.revision == MAIN else f"@{self.revision}"
        return self.repo + revision + (f":{self.quant}" if self.quant else "")


@frozen
class Variant:
    """One model among the GGUF files of a repository. label: its format; files: its parts, in order."""

    label: str
    files: tuple[str, ...]


def locate(model: str | PathLike[str]) -> Path:
    """Where a model is: a path that exists, 'demo' (the bundled one), or a hub's name that the cache has.

    A path that does not exist and is no name is given back as it is: who opens it knows what to say.
    Raises CheckpointError for a name that the cache has not.
    """
    if model == "demo":
        return model_path()
    path = Path(model)
    try:
        there = path.exists()
    except OSError:  # it can't be looked at
        there = True
    name = None if there else Name.parse(str(model))
    return path if name is None else cached(name)


def cached(name: Name) -> Path:
    """The directory, or the first GGUF file, of a model in the hub's cache. Raises CheckpointError."""
    snapshot = snapshot_of(name)
    if snapshot is None:
        raise CheckpointError(
            f"{name}: no such path, and the hub's cache ({cache()}) has no model of that name; "
            f"fetch it: mer pull {name}"
        )
    names = [file.relative_to(snapshot).as_posix() for file in sorted(snapshot.rglob("*")) if file.is_file()]
    if name.quant is None and (_safetensors(names) or not gguf_variants(names)):
        return snapshot
    variant = choose(name, gguf_variants(names), "in the hub's cache")
    return snapshot / variant.files[0]


def cache() -> Path:
    """The hub's cache on this machine, as HF_HOME, HF_HUB_CACHE or XDG_CACHE_HOME place it."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def folder_of(repo: str) -> Path:
    """Where the cache keeps a repository: refs/REVISION -> commit, snapshots/COMMIT/FILE -> blobs/ETAG."""
    return cache() / f"models--{repo.replace('/', '--')}"


def snapshot_of(name: Name) -> Path | None:
    """The directory of a model's files at its revision, whole or not; None where there is none."""
    folder, commit = folder_of(name.repo), name.revision
    if not _COMMIT.fullmatch(commit):
        try:
            commit = (folder / "refs" / name.revision).read_text().strip()
        except OSError:
            return None
    snapshot = folder / "snapshots" / commit
    return snapshot if snapshot.is_dir() else None


def name_of(path: Path) -> str | None:
    """The hub's name of a directory or GGUF file in a cache of a hub; None for any other path."""
    parts = path.absolute().parts
    for at, part in enumerate(parts[:-2]):
        if part.startswith("models--") and parts[at + 1] == "snapshots":
            repo = part.removeprefix("models--").replace("--", "/")
            return f"{repo}:{_label(path.name)}" if path.suffix == ".gguf" else repo
    return None


def title(path: Path) -> str:
    """What a model is called: 'demo', the hub's name, or that of its directory or file.

    Bytes in it that are no text become question marks.
    """
    name = "demo" if path == model_path() else name_of(path) or path.resolve().name
    return name.encode(errors="replace").decode()


def advice(path: Path) -> str:
    """What to do about a file of a model at `path` that is not there or not whole."""
    name = name_of(path)
    if name is None:
        return "fetch it again"
    repo, _, quant = name.partition(":")
    return f"go on with: mer pull {Name(repo, _revision_of(path), quant or None)}"


def gguf_variants(names: list[str]) -> list[Variant]:
    """The models among the files of a repository, by name."""
    found: dict[str, list[str]] = {}
    for name in sorted(names):
        if name.endswith(".gguf") and not _NO_MODEL.search(PurePosixPath(name).name):
            match = SHARD.fullmatch(name)
            found.setdefault(match[1] if match else name, []).append(name)
    return [Variant(_label(PurePosixPath(files[0]).name), tuple(files)) for files in found.values()]


def choose(name: Name, variants: list[Variant], where: str) -> Variant:
    """The one that is asked for, by its label or its file's name; where nobody asks, a usual one.

    where: for the error, which lists what there is. Raises CheckpointError.
    """
    labels = ", ".join(variant.label for variant in variants) or "none"
    if name.quant is not None:
        asked = name.quant.lower()
        found = [v for v in variants if asked in (v.label.lower(), _stem(v.files[0]).lower())]
        found = found or [v for v in variants if v.label.lower() == f"ud-{asked}"]
        if not found:
            hint = f"; fetch it: mer pull {name}" if "cache" in where else ""
            raise CheckpointError(f"{name}: {where} are GGUF files of {name.repo} as {labels}{hint}")
        if len(found) > 1:
            stems = ", ".join(f":{_stem(each.files[0])}" for each in found)
            raise CheckpointError(f"{name}: several files are {name.quant}; name one by its end: {stems}")
        return found[0]
    if len(variants) == 1:
        return variants[0]
    for label in _USUAL:
        found = [variant for variant in variants if variant.label.upper() == label]
        if len(found) == 1:
            return found[0]
    example = variants[0].label
    raise CheckpointError(f"{name}: choose one of {labels}: {name}:{example}")


def _revision_of(path: Path) -> str:
    """The revision to which the cache's snapshot with `path` belongs: main if it may be, else its commit."""
    parts = path.absolute().parts
    at = parts.index("snapshots")
    commit = parts[at + 1]
    current = snapshot_of(Name(parts[at - 1].removeprefix("models--").replace("--", "/")))
    return MAIN if current is None or current.name == commit else commit


def _safetensors(names: list[str]) -> bool:
    """Whether some of the model's own safetensors are there, or the list of them."""
    return any("/" not in name and name.endswith((".safetensors", INDEX)) for name in names)


def _stem(name: str) -> str:
    file = PurePosixPath(name).name
    match = SHARD.fullmatch(file)
    return match[1] if match else file.removesuffix(".gguf")


def _label(name: str) -> str:
    stem = _stem(name)
    match = _LABEL.search(stem)
    return match[1] if match else stem
