"""The kernel that chooses experts, run by the simulated device, against the router's C; and its products."""

from __future__ import annotations

import ctypes
import subprocess
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from gpu_simulator import Simulator
from test_decoder import CSRC, Router, at
from test_gpu_kernels import PRODUCT, Memory

from mer._ext.device import Device

WARPS, MOST_GROUPS = 4, 32
POINTERS = (
    "logits",
    "bias",
    "expert_scale",
    "experts",
    "gate_bias",
    "up_bias",
    "down_bias",
    "gate_rows",
    "up_rows",
)
POINTERS += ("out_rows", "ids", "weights", "places", "index", "products")
NUMBERS = ("tokens", "n_experts", "top_k", "n_groups", "top_groups", "group_best", "sigmoid", "normalise")
NUMBERS += ("inter", "hidden", "n_products")
CHOICE = np.dtype(
    [(name, "u8") for name in POINTERS]
    + [("scale", "f4"), ("epsilon", "f4")]
    + [(name, "i4") for name in NUMBERS],
    align=True,
)
INTER, HIDDEN = 7, 5


@pytest.fixture(scope="module")
def lib(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    target = tmp_path_factory.mktemp("router") / "router.so"
    flags = ["-O2", "-std=gnu11", "-ffp-contract=off", "-fno-math-errno", "-shared", "-fPIC", f"-I{CSRC}"]
    sources = [str(CSRC / "decoder" / name) for name in ("router.c", "token.c")]
    subprocess.run(["gcc", *flags, "-o", str(target), *sources, "-lm"], check=True)
    return ctypes.CDLL(str(target))


@pytest.fixture
def device() -> Iterator[Device]:
    simulator = Simulator()
    yield simulator.open()
    simulator.reset()


def reference(lib: ctypes.CDLL, logits: np.ndarray, **r: Any) -> tuple[np.ndarray, np.ndarray]:
    tokens, n = logits.shape
    bias, scale = r["bias"], r["expert_scale"]
    router = Router(
        n, r["top_k"], r["n_groups"], r["top_groups"], r["group_best"], r["sigmoid"], r["normalise"],
        r["scale"], r["epsilon"], 0.0, None if bias is None else bias.ctypes.data,
        None if scale is None else scale.ctypes.data,
    )  # fmt: skip
    ids, weights = np.zeros((tokens, r["top_k"]), np.int32), np.zeros((tokens, r["top_k"]), np.float32)
    for t in range(tokens):
        row, scratch = logits[t].copy(), np.empty(n, np.float32)
        lib.mer_route(ctypes.byref(router), at(row), at(scratch), None, at(ids[t]), at(weights[t]))
    return ids, weights


CASES = {
    "softmax": {"n_experts": 128, "top_k": 8, "normalise": 1},
    "softmax of some": {"n_experts": 60, "top_k": 4, "scale": 2.5, "expert_scale": True},
    "one group of four, its best": {
        "n_experts": 64,
        "top_k": 6,
        "n_groups": 8,
        "top_groups": 3,
        "group_best": 1,
    },
    "sigmoid": {"n_experts": 256, "top_k": 8, "sigmoid": 1, "normalise": 1, "epsilon": 1e-20, "bias": True},
    "groups": {"n_experts": 160, "top_k": 6, "sigmoid": 1, "n_groups": 8, "top_groups": 4, "bias": True},
    "as many groups as lanes": {"n_experts": 64, "top_k": 4, "n_groups": 32, "top_groups": 5, "bias": True},
    "all of few": {"n_experts": 3, "top_k": 3, "expert_scale": True, "normalise": 1},
    "a group of one": {"n_experts": 4, "top_k": 2, "n_groups": 4, "top_groups": 3, "sigmoid": 1},
}


@pytest.mark.parametrize("tokens", [1, 4, 12])
@pytest.mark.parametrize("case", CASES)
def test_choice(lib: ctypes.CDLL, device: Device, case: str, tokens: int) -> None:
    rng = np.random.default_rng([tokens, len(case)])
    router = {"n_groups": 1, "top_groups": 1, "group_best": 2, "sigmoid": 0, "normalise": 0, "scale": 1.0}
    router |= {"epsilon": 0.0, "bias": None, "expert_scale": None} | CASES[case]
    n, top_k = router["n_experts"], router["top_k"]
    for name in ("bias", "expert_scale"):
        if router[name]:
            router[name] = rng.normal(size=n).astype(np.float32)
    logits = rng.normal(size=(tokens, n)).astype(np.float32) * 3
    logits[1::3] = np.round(logits[1::3])  # ties, everywhere
    logits[2::4] = 0.5
    if tokens == 12:
        logits[3, : n // 2] = np.nan
        logits[6, 0] = np.nan
        logits[7, n // 3] = np.inf
        logits[8, ::2] = -np.inf
        logits[9] = -np.inf
        logits[10] *= 100
    want_ids, want_weights = reference(lib, logits, **router)

    pairs, listed = tokens * top_k, min(tokens * top_k, n)
    experts = rng.integers(1 << 40, size=(n, 3)).astype(np.uint64)
    with Memory(device) as memory:
        spaces = {"ids": 4 * pairs, "weights": 4 * pairs, "places": 4 * pairs, "index": 4 * pairs}
        places = {name: memory.room(nbytes) for name, nbytes in spaces.items()}
        products = memory.room(PRODUCT.itemsize * 3 * listed)
        arrays = {"logits": logits, "experts": experts}
        arrays |= {name: router[name] for name in ("bias", "expert_scale") if router[name] is not None}
        given = {name: memory.put(array) for name, array in arrays.items()} | places
        # Nobody looks there: numbers that must come out right. Of the gates alone there is a bias.
        given |= {"gate_bias": 1 << 33, "gate_rows": 1 << 34, "up_rows": 1 << 35, "out_rows": 1 << 36}
        given |= {
            "products": products,
            "tokens": tokens,
            "inter": INTER,
            "hidden": HIDDEN,
            "n_products": listed,
        }
        given |= {name: router[name] for name in CHOICE.names if name in router and name not in given}
        choice = np.zeros((), CHOICE)
        for name, value in given.items():
            choice[name] = 0 if value is None else value
        words = WARPS * (2 * n + MOST_GROUPS) + 2 * pairs
        device.launch_py("mer_choose", (1, 1, 1), 128, [choice[()]], 4 * words)
        ids, place, index = (
            memory.get(places[name], (pairs,), np.int32) for name in ("ids", "places", "index")
        )
        weights = memory.get(places["weights"], (tokens, top_k))
        found = memory.get(products, (3, listed), PRODUCT)

    np.testing.assert_array_equal(ids.reshape(tokens, top_k), want_ids)
    whole = ~np.isnan(want_weights)
    assert weights[whole].tobytes() == want_weights[whole].tobytes()
    assert np.isnan(weights[~whole]).all()
    order = np.argsort(ids, kind="stable")
    np.testing.assert_array_equal(place[order], np.arange(pairs))
    np.testing.assert_array_equal(index, order // top_k)

    chosen, first, counts = np.unique(np.sort(ids).astype(np.int64), return_index=True, return_counts=True)
    used = len(chosen)
    assert not found["f5"][:, used:].any()
    gate, up, down = found[:, :used]
    for part, each in enumerate((gate, up, down)):
        np.testing.assert_array_equal(each["f0"], experts[chosen, part])
        np.testing.assert_array_equal(each["f5"], counts)
    np.testing.assert_array_equal(gate["f1"], (1 << 33) + 4 * INTER * chosen)
    assert not up["f1"].any()
    assert not down["f1"].any()
    np.testing.assert_array_equal(gate["f2"], (1 << 34) + 4 * INTER * first)
    np.testing.assert_array_equal(up["f2"], (1 << 35) + 4 * INTER * first)
    np.testing.assert_array_equal(down["f2"], (1 << 36) + 4 * HIDDEN * first)
    np.testing.assert_array_equal(gate["f3"], places["index"] + 4 * first)
    np.testing.assert_array_equal(up["f3"], gate["f3"])
    assert not down["f3"].any()
    np.testing.assert_array_equal(down["f4"], first)
