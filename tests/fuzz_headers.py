"""Fuzzing what `mer` reads of a model file before it reads weights: atheris, steered by what the code does.

    python tests/fuzz_headers.py gguf --seconds 600
    python tests/fuzz_headers.py safetensors --seconds 600

Damage may be an error that names the file, or harmless; anything else ends the run and leaves a file
crash-... with the input (run it again: --again FILE). What the safetensors package takes, `mer` takes, too,
and finds the same tensors in it. The test suite runs some thousand inputs of each.

An input is a header behind a byte that says what is done with it: bit 0, for GGUF: zeros follow it, as far as
weights would go; for safetensors: the header gets its right length, and as much data as it asks for.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import random
import re
import resource
import struct
import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["mer.weights", "mer.model"]):
    from mer.model.families import load
    from mer.model.tokenizer import Tokenizer
    from mer.streaming.experts import expert_tables
    from mer.weights.checkpoint import open_checkpoint
    from mer.weights.gguf import read_gguf
    from mer.weights.safetensors import read_header

import safetensors

from mer.errors import MerError

WEIGHTS = 1 << 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("kind", choices=sorted(TARGETS))
    parser.add_argument("--seconds", type=int, default=0, help="0: until it is interrupted")
    parser.add_argument("--runs", type=int, default=-1, help="inputs")
    parser.add_argument("--seeds", type=Path, help="folder of inputs to begin with, which gets what is new")
    parser.add_argument("--again", type=Path, help="one input")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        place = Path(folder)
        if asked.again:
            TARGETS[asked.kind](place, asked.again.read_bytes())
            return
        seeds = asked.seeds
        if seeds is None:
            seeds = place / "seeds"
            # It brings torch with it.
            from header_seeds import write_seeds

            write_seeds(asked.kind, seeds)
        options = [f"-max_total_time={asked.seconds}", f"-runs={asked.runs}", "-seed=1", "-max_len=20000"]
        # libFuzzer's own limit takes the peak of whoever started this process for ours.
        resource.setrlimit(resource.RLIMIT_DATA, (1500 << 20, 1500 << 20))
        options += ["-timeout=20", "-rss_limit_mb=0", "-print_final_stats=1"]
        atheris.Setup(
            [sys.argv[0], *options, str(seeds)],
            lambda data: TARGETS[asked.kind](place, data),
            custom_mutator=MUTATORS[asked.kind],
        )
        # Ends the process.
        atheris.Fuzz()


def gguf_file(place: Path, data: bytes) -> None:
    """Everything of a GGUF file but its weights."""
    path = place / "model.gguf"
    path.write_bytes(data[1:])
    if data[:1] and data[0] & 1:
        os.truncate(path, len(data) + WEIGHTS)
    size = path.stat().st_size
    try:
        found = read_gguf(path)
        for tensor in found.tensors:
            assert 0 < tensor.offset <= tensor.offset + tensor.nbytes <= size, tensor
        for key in found.metadata:
            found.metadata[key]
        checkpoint = open_checkpoint(path)
        architecture = load(checkpoint)
        expert_tables(architecture.experts, path)
    except MerError as error:
        _check_name(place, error)
    try:
        tokenizer = Tokenizer.open(path)
        if tokenizer is not None:
            tokenizer.decode(tokenizer.encode("Hello wörld 123"))
    except MerError as error:
        _check_name(place, error)


def safetensors_file(place: Path, data: bytes) -> None:
    """The header of a safetensors file, which the package reads, too."""
    path, header = place / "model.safetensors", data[1:]
    if data[:1] and data[0] & 1:
        header = len(header).to_bytes(8, "little") + header + bytes(_data_bytes(header))
    path.write_bytes(header)
    problem, found = None, {}
    try:
        found = {t.name: (t.dtype, list(t.shape), t.nbytes) for t in read_header(path).tensors}
    except MerError as error:
        problem = str(error)
        assert str(path) in problem, problem
    try:
        theirs = safetensors.deserialize(header)
    except Exception:
        return
    if problem is not None and "stands there twice" in problem:
        return  # Of two entries of one name it takes the last.
    assert problem is None, f"the safetensors package takes it: {problem}"
    assert found == {name: (each["dtype"], each["shape"], len(each["data"])) for name, each in theirs}


def _check_name(place: Path, error: MerError) -> None:
    assert str(place) in str(error), error


def _data_bytes(header: bytes) -> int:
    """Where the last tensor ends, as the header says."""
    try:
        ends = [entry["data_offsets"][1] for name, entry in json.loads(header).items() if name[:2] != "__"]
        return max(0, min(int(max(ends)), WEIGHTS))
    except Exception:
        return 0


def change_gguf(data: bytes, max_size: int, seed: int) -> bytes:
    """A number behind some name of a GGUF header, or whatever libFuzzer thinks of."""
    rng = random.Random(seed)
    names = list(re.finditer(rb"[a-z0-9_]+(\.[a-z0-9_]+)+", data))
    if rng.random() < 0.5 or not names:
        return bytes(atheris.Mutate(data, max_size))
    at = rng.choice(names).end() + rng.choice((0, 4, 8, 12, 16, 20, 24, 28))
    old = data[at : at + 8].ljust(8, b"\0")
    number = rng.choice((*EDGES, int.from_bytes(old, "little") + rng.choice((-1, 1)), rng.randrange(14)))
    new = rng.choice((struct.pack("<q", number % 2**63), struct.pack("<I", number % 2**32), NAN, old[::-1]))
    return (data[:at] + new + data[at + len(new) :])[:max_size]


def change_safetensors(data: bytes, max_size: int, seed: int) -> bytes:
    """A value of the JSON, or whatever libFuzzer thinks of."""
    rng = random.Random(seed)
    try:
        root = json.loads(data[1:])
        entries = list(root.items())
        entry = rng.choice(entries)[1]
        new = rng.choice(
            (*EDGES, -1, 1.0, True, None, "F32", "F4", "F6_E2M3", "U16", [], {}, [0, 0], "\ud800")
        )
        key = rng.choice(sorted(entry.keys()))
    except Exception:
        return bytes(atheris.Mutate(data, max_size))
    what = rng.randrange(5)
    if what == 0 and isinstance(entry[key], list) and entry[key]:
        at = rng.randrange(len(entry[key]))
        old = entry[key][at]
        entry[key][at] = old + rng.choice((-1, 1)) if isinstance(old, int) and rng.random() < 0.5 else new
    elif what == 1:
        entry[key] = copy.deepcopy(rng.choice((new, rng.choice(entries)[1])))
    elif what == 2:
        del entry[key]
    elif what == 3:
        root = dict(rng.sample(entries, rng.randrange(len(entries) + 1)))
    else:
        return bytes(atheris.Mutate(data, max_size))
    text = json.dumps(root, indent=rng.choice((None, 1))).encode()
    return (data[:1] + text)[:max_size]


EDGES = (0, 1, 2, 3, 255, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**62, 2**63 - 1)
NAN = struct.pack("<f", float("nan"))
TARGETS = {"gguf": gguf_file, "safetensors": safetensors_file}
MUTATORS = {"gguf": change_gguf, "safetensors": change_safetensors}

if __name__ == "__main__":
    main()
