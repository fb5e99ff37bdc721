"""Fuzzing what `mer` makes of gRPC messages before the engine has them: atheris, steered by the code.

    python tests/fuzz_messages.py --seconds 600

An input is a byte that says which message it is, and its bytes. It may become what the engine takes, or a
RequestError that a client can be told; anything else ends the run and leaves a file crash-... (run it again:
--again FILE). The test suite runs some thousand inputs.
"""

from __future__ import annotations

import argparse
import random
import resource
import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["mer.api"]):
    from mer.api.grpc import convert
    from mer.api.grpc.errors import Failure

from messages import KINDS, changed, seeds

from mer.errors import MerError
from mer.v1 import inference_pb2 as pb


def one_input(data: bytes) -> None:
    """What the handlers do with a message, up to the engine."""
    kind = KINDS[data[0] % len(KINDS)] if data else KINDS[0]
    message = kind()
    try:
        message = convert.parsed(kind, data[1:])
        requests = [message]
        if isinstance(message, pb.SessionRequest):
            requests = [message.generate, message.chat]
        for request in requests:
            if isinstance(request, pb.GenerateRequest | pb.ChatRequest):
                params = convert.sampling(request.params, 1.0)
                assert params.timeout is not None
                assert params.seed is not None
                if isinstance(request, pb.ChatRequest):
                    convert.conversation(request, params)
            elif isinstance(request, pb.TokenizeRequest):
                convert.conversation(request, convert.sampling(pb.SamplingParams(), None))
    except MerError as error:
        failure = Failure.of(error, convert.path_of(message))
    else:
        return
    assert failure.reason != "INTERNAL", failure
    failure.metadata("id")
    failure.proto().SerializeToString()


def mutate(data: bytes, max_size: int, seed: int) -> bytes:
    """A field of the message, or whatever libFuzzer thinks of."""
    draw = random.Random(seed)
    if draw.random() < 0.3 or not data:
        return bytes(atheris.Mutate(data, max_size))
    return changed(data, draw)[:max_size]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seconds", type=int, default=0, help="0: until it is interrupted")
    parser.add_argument("--runs", type=int, default=-1, help="inputs")
    parser.add_argument("--again", type=Path, help="one input")
    asked = parser.parse_args()
    if asked.again:
        one_input(asked.again.read_bytes())
        return
    with tempfile.TemporaryDirectory() as folder:
        for number, seed in enumerate(seeds()):
            (Path(folder) / str(number)).write_bytes(seed)
        options = [f"-max_total_time={asked.seconds}", f"-runs={asked.runs}", "-seed=1", "-max_len=4000"]
        # libFuzzer's own limit takes the peak of whoever started this process for ours.
        resource.setrlimit(resource.RLIMIT_DATA, (1500 << 20, 1500 << 20))
        options += ["-timeout=20", "-rss_limit_mb=0", "-print_final_stats=1"]
        atheris.Setup([sys.argv[0], *options, folder], one_input, custom_mutator=mutate)
        # Ends the process.
        atheris.Fuzz()


if __name__ == "__main__":
    main()
