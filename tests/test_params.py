"""Sampling parameters: what makes no sense is refused by its name."""

from __future__ import annotations

import numpy as np
import pytest

from mer.engine.params import SamplingParams
from mer.errors import RequestError

NAN, INF = float("nan"), float("inf")

WRONG = [True, "1", None, [1], 1j, NAN]
REALS = {
    "temperature": [-0.1, INF, 10**400, -(10**400)],
    "top_p": [-0.01, 1.01, 2, INF, 10**400],
    "min_p": [-1e-9, 1.5, INF],
    "repetition_penalty": [0, 0.0, -1, 0.009, 101, INF],
    "presence_penalty": [-2.01, 2.01, 3, INF, -INF],
    "frequency_penalty": [-2.01, 2.01, 3, INF, -INF],
}
WHOLES = {
    "max_tokens": [0, -1, 1.0, 2**63],
    "top_k": [-1, 1.0, 2**63, None],
    "seed": [1.0, 2**63, -(2**63) - 1],
    "logprobs": [-1, 21, 1.0, 10**400],
}
OTHERS = {
    "stop": ["", ("a", ""), (1,), 1, None, b"a", (b"a",), [["a"]], True],
    "stop_token_ids": [(-1,), (1.0,), (True,), ("1",), "12", 5, None],
    "ignore_eos": [1, 0, "true", None],
    "speculative": [1, 0, "true", "", ["off"], None],
}
BAD = [
    *((name, value) for name, values in REALS.items() for value in (*values, *WRONG)),
    *((n, v) for n, vs in WHOLES.items() for v in (*vs, *(w for w in WRONG if w is not None))),
    *((name, value) for name, values in OTHERS.items() for value in values),
]


@pytest.mark.parametrize(("name", "value"), BAD, ids=lambda v: repr(v)[:20])
def test_values_that_make_no_sense_are_refused_by_name(name: str, value: object) -> None:
    with pytest.raises(RequestError, match=f"^{name} must be .+, not ") as error:
        SamplingParams(**{name: value})
    assert error.value.param == name
    assert len(str(error.value)) < 150


def test_values_that_make_sense_are_taken() -> None:
    p = SamplingParams(
        max_tokens=1, temperature=1, top_k=2**63 - 1, top_p=0, min_p=1, seed=-(2**63), stop=["a", "b"],
        stop_token_ids=[0, 5], logprobs=20, presence_penalty=-2, repetition_penalty=100,
    )  # fmt: skip
    assert type(p.temperature) is type(p.top_p) is type(p.min_p) is float
    assert (p.stop, p.stop_token_ids) == (("a", "b"), (0, 5))
    assert SamplingParams(stop="end").stop == ("end",)
    assert SamplingParams().stop == ()
    assert SamplingParams(temperature=np.float64(0.5)).temperature == 0.5
