"""llama.cpp on a GGUF file: prefill and decode tokens/s in a process of its own, as one JSON object.

    python3 -m venv /tmp/peer
    CMAKE_ARGS="-DGGML_NATIVE=ON -DLLAVA_BUILD=OFF" /tmp/peer/bin/pip install llama-cpp-python
    /tmp/peer/bin/python bench/peer.py model.gguf --prompt 0-511 --decode 64 --threads 2

An environment of its own, because the library is built for this CPU (a quarter of an hour on two cores);
this file needs nothing else, so that it runs there. bench/compare.py calls `measure`, which starts such a
process.

Only llama_decode is timed, not the choice of the likeliest token. `--group` moves the process into a memory
control group before anything is loaded. In a group smaller than the model the mapped file is read again and
again, and weights that were repacked do not fit: give `--no-extra-bufts` there, and `--drop-cache`, as pages
that are cached already count against whoever read them.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

FLASH = {"auto": -1, "off": 0, "on": 1}
LOAD = {"mmap": 1, "read": 0}


class PeerError(Exception):
    """llama.cpp could not do it: what it said last."""


def measure(
    python: Path | str, model: Path, prompt: list[int], decode: int, **options: Any
) -> dict[str, Any]:
    """Run this file under that interpreter; returns what it prints. Raises PeerError.

    options: the flags of the command by name (threads=2, n_ctx=4096, extra_bufts=False, flash="on",
    load="mmap", warmup=True, drop_cache=True, batch=512, group=Path("/sys/fs/cgroup/memory/bench")).
    """
    command = [
        str(python),
        __file__,
        str(model),
        "--prompt",
        ",".join(map(str, prompt)),
        "--decode",
        str(decode),
    ]
    for name, value in options.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            command.append(f"--{flag}" if value else f"--no-{flag}")
        elif value is not None:
            command += [f"--{flag}", str(value)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode == -9:
        raise PeerError(f"{model}: llama.cpp was killed: its memory did not fit, see --no-extra-bufts")
    if done.returncode:
        raise PeerError(f"{model}: llama.cpp failed ({done.returncode}): {done.stderr.strip()[-600:]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def read_bytes() -> int:
    """Bytes that this process had the device read, pages of mapped files included."""
    lines = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(lines["read_bytes"])


class Llama:
    """A model and a context of llama.cpp."""

    def __init__(self, args: argparse.Namespace) -> None:
        import llama_cpp  # type: ignore[import-not-found,unused-ignore]

        self.lib = llama_cpp
        llama_cpp.llama_backend_init()
        model = llama_cpp.llama_model_default_params()
        model.n_gpu_layers = 0
        model.use_extra_bufts = args.extra_bufts
        if hasattr(model, "load_mode"):
            model.load_mode = LOAD[args.load]
        else:  # before 0.3.30
            model.use_mmap = args.load == "mmap"
        self.model = llama_cpp.llama_model_load_from_file(str(args.model).encode(), model)
        if not self.model:
            raise SystemExit(f"{args.model}: llama.cpp does not load it")
        context = llama_cpp.llama_context_default_params()
        context.n_ctx, context.n_batch, context.n_ubatch = args.n_ctx, args.batch, args.batch
        context.n_threads = context.n_threads_batch = args.threads
        context.flash_attn_type = FLASH[args.flash]
        context.no_perf = True
        self.context = llama_cpp.llama_init_from_model(self.model, context)
        if not self.context:
            raise SystemExit(f"{args.model}: llama.cpp makes no context of {args.n_ctx} tokens")
        self.vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        self.batch = args.batch

    def forward(self, tokens: list[int]) -> float:
        """Append these tokens; returns the seconds."""
        lib = self.lib
        start = time.perf_counter()
        for at in range(0, len(tokens), self.batch):
            part = tokens[at : at + self.batch]
            array = (lib.llama_token * len(part))(*part)
            code = lib.llama_decode(self.context, lib.llama_batch_get_one(array, len(part)))
            if code:
                raise SystemExit(f"llama_decode returned {code} for {len(part)} tokens at {at}")
        lib.llama_synchronize(self.context)
        return time.perf_counter() - start

    def logits(self) -> Any:
        """f32 [vocab] after the last token."""
        import numpy as np

        return np.ctypeslib.as_array(self.lib.llama_get_logits_ith(self.context, -1), (self.vocab,))

    def forget(self) -> None:
        self.lib.llama_memory_clear(self.lib.llama_get_memory(self.context), True)


def token_ids(text: str) -> list[int]:
    """'3,7,10-12' -> [3, 7, 10, 11, 12]."""
    found: list[int] = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        found += range(int(first), int(last or first) + 1)
    return found


def run(args: argparse.Namespace) -> dict[str, Any]:
    reads = [read_bytes()]
    start = time.perf_counter()
    llama = Llama(args)
    load = time.perf_counter() - start
    reads.append(read_bytes())
    if args.warmup:
        llama.forward(args.prompt)
        llama.forward(args.prompt[-1:])
        llama.forget()
        reads[-1] = read_bytes()
    prefill = llama.forward(args.prompt)
    reads.append(read_bytes())
    tokens: list[int] = []
    times: list[float] = []
    for _ in range(args.decode):
        tokens.append(int(llama.logits().argmax()))
        times.append(llama.forward(tokens[-1:]))
    reads.append(read_bytes())
    names = ("load", "prefill", "decode")
    return {
        "program": f"llama-cpp-python {llama.lib.__version__}",
        "system": llama.lib.llama_print_system_info().decode(),
        "threads": args.threads,
        "extra_bufts": args.extra_bufts,
        "flash": args.flash,
        "load_seconds": load,
        "prefill_tokens": len(args.prompt),
        "prefill_seconds": prefill,
        "prefill_tokens_per_s": len(args.prompt) / prefill,
        "tokens": tokens,
        "decode_seconds": times,
        "decode_tokens_per_s": len(times) / sum(times) if times else None,
        "read_bytes": {name: b - a for name, a, b in zip(names, reads, reads[1:], strict=False)},
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("--prompt", type=token_ids, default="0-63", metavar="IDS", help="as 3,7,10-12")
    parser.add_argument("--decode", type=int, default=32, metavar="N", help="tokens, greedily")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--n-ctx", type=int, default=4096)
    parser.add_argument("--batch", type=int, default=512, help="tokens of one prefill step")
    parser.add_argument(
        "--extra-bufts", action=argparse.BooleanOptionalAction, default=True, help="repack weights"
    )
    parser.add_argument("--flash", choices=FLASH, default="auto", help="flash attention")
    parser.add_argument("--load", choices=LOAD, default="mmap")
    parser.add_argument(
        "--warmup", action=argparse.BooleanOptionalAction, default=False, help="run it once before"
    )
    parser.add_argument(
        "--drop-cache", action=argparse.BooleanOptionalAction, default=False, help="before loading"
    )
    parser.add_argument("--group", type=Path, help="directory of a memory control group")
    args = parser.parse_args()
    if not args.model.is_file():
        raise SystemExit(f"{args.model}: no such file")
    if args.group:
        try:
            (args.group / "cgroup.procs").write_text("0")
        except OSError as error:
            raise SystemExit(f"{args.group}: can't be joined: {error.strerror}") from None
    if args.drop_cache:
        with args.model.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    try:
        print(json.dumps(run(args)))
    except ImportError:
        raise SystemExit(f"{sys.executable} has no llama_cpp: see the top of {__file__}") from None


if __name__ == "__main__":
    main()
