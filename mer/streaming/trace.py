"""Routing traces: which experts each token chose, as a CSV file that bench/policy.py replays."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mer.errors import ConfigError

_log = logging.getLogger("mer")

COLUMNS = "turn,phase,step,layer,slot,expert,weight"


@contextmanager
def writing(what: str, path: Path) -> Iterator[None]:
    """Failures to write the file become ConfigErrors that name it."""
    try:
        yield
    except OSError as error:
        raise ConfigError(f"{what} {path}: {error.strerror}; name a file that can be written") from error


class TraceWriter:
    """Writes a line per token, MoE layer and chosen expert, in the order in which they are computed.

    turn: the sequence's place in its step. phase: 0 for a prompt's tokens, 1 for one that comes alone. step:
    its position. layer counts MoE layers. slot: its rank in the router's choice. A file that can't be written
    any more ends the trace and no answer: a line of the log tells, and `close` raises ConfigError.
    """

    def __init__(self, path: Path, *, model: str, n_layers: int, n_experts: int, top_k: int) -> None:
        """Raises ConfigError where the file can't be written."""
        self._path = path
        self._failed: ConfigError | None = None
        with writing("trace", path):
            self._file = path.open("w")
        sizes = f"n_layer={n_layers} n_expert={n_experts} n_expert_used={top_k}"
        self._file.write(f"# route_trace v1\n# model={model} {sizes}\n{COLUMNS}\n")

    def record(
        self,
        layer: int,
        positions: NDArray[np.int32],
        query_offsets: NDArray[np.int32],
        ids: NDArray[np.int32],
        weights: NDArray[np.float32],
    ) -> None:
        """One layer of one step. positions [T], query_offsets [S + 1], ids and weights [T, top_k]."""
        if self._failed is not None:
            return
        lines = []
        for turn in range(len(query_offsets) - 1):
            start, end = int(query_offsets[turn]), int(query_offsets[turn + 1])
            phase = int(end - start == 1 and positions[start] > 0)
            for t in range(start, end):
                head = f"{turn},{phase},{positions[t]},{layer}"
                lines += [
                    f"{head},{slot},{expert},{weight:.6f}\n"
                    for slot, (expert, weight) in enumerate(zip(ids[t], weights[t], strict=True))
                ]
        try:
            with writing("trace", self._path):
                self._file.writelines(lines)
        except ConfigError as error:
            self._failed = error
            _log.warning("nothing more is recorded: %s", error)

    def close(self) -> None:
        with writing("trace", self._path):
            self._file.close()
        if self._failed is not None:
            raise self._failed
