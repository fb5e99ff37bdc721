"""The C functions of layers with a state against torch, compiled here and called through ctypes."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from levels import LEVELS, AtLevel
from transformers.models.qwen3_next.modeling_qwen3_next import (
    Qwen3NextRMSNormGated,
    torch_recurrent_gated_delta_rule,
)

CSRC = Path(__file__).parent.parent / "mer" / "_ext" / "csrc"
POINTER, LONG, FLOAT, INT = ctypes.c_void_p, ctypes.c_long, ctypes.c_float, ctypes.c_int
COLUMNS = 32


class Conv(ctypes.Structure):
    _fields_ = (
        *((name, POINTER) for name in ("x", "w", "bias")),
        *((name, LONG) for name in ("stride", "channels", "kernel")),
        ("silu", INT),
    )


class Delta(ctypes.Structure):
    _fields_ = (
        *((name, POINTER) for name in ("mixed", "out", "decay", "beta", "rate", "bias")),
        *((name, LONG) for name in ("stride", "key_heads", "value_heads", "key_dim", "value_dim")),
        ("tiled", INT),
    )


@pytest.fixture(scope="module")
def lib(tmp_path_factory):
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler")
    target = tmp_path_factory.mktemp("recurrent") / "recurrent.so"
    sources = [str(file) for part in ("recurrent", "decoder") for file in sorted((CSRC / part).glob("*.c"))]
    flags = ["-O3", "-std=gnu11", "-fno-math-errno", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"]
    subprocess.run([compiler, *flags, f"-I{CSRC}", "-o", str(target), *sources, "-lm"], check=True)
    return ctypes.CDLL(str(target))


def at(array: np.ndarray | None) -> ctypes.c_void_p | None:
    if array is None:
        return None
    assert array.flags.c_contiguous
    return ctypes.c_void_p(array.ctypes.data)


def blank(*shape: int) -> np.ndarray:
    return np.full(shape, np.nan, np.float32)


@pytest.mark.parametrize(
    ("channels", "kernel", "silu", "bias"), [(16, 4, 1, False), (37, 2, 0, True), (70, 6, 1, True)]
)
@pytest.mark.parametrize("cuts", [(11,), (1,) * 11, (3, 8)])
def test_convolution(lib, channels, kernel, silu, bias, cuts):
    """Steps of these sizes, channels in two tasks, against one convolution; rows are wider than channels."""
    rng = np.random.default_rng(channels)
    given = rng.normal(size=(11, channels + 5)).astype(np.float32)
    w = rng.normal(size=(channels, kernel)).astype(np.float32)
    b = rng.normal(size=channels).astype(np.float32) if bias else None
    nothing = np.zeros((kernel - 1, channels), np.float32)
    padded = torch.from_numpy(np.concatenate([nothing, given[:, :channels]]).T)
    expected = torch.conv1d(
        padded[None].double(),
        torch.from_numpy(w)[:, None].double(),
        None if b is None else torch.from_numpy(b).double(),
        groups=channels,
    )[0]
    if silu:
        expected = torch.nn.functional.silu(expected)
    x, weights = given.copy(), np.ascontiguousarray(w.T)
    before, start = None, 0
    for count in cuts:
        after, kept = blank(kernel - 1, channels), blank(kernel - 1, channels)
        conv = Conv(x.ctypes.data, weights.ctypes.data, None, x.shape[1], channels, kernel, silu)
        if b is not None:
            conv.bias = b.ctypes.data
        for c0, c1 in ((0, 16), (16, channels)):
            lib.mer_convolve(
                ctypes.byref(conv), LONG(start), LONG(start + count), LONG(c0), LONG(c1), at(before),
                at(after), at(kept), LONG(1),
            )  # fmt: skip
        start += count
        np.testing.assert_array_equal(after, padded.T[start : start + kernel - 1])
        np.testing.assert_array_equal(kept, padded.T[start - count + 1 :][: kernel - 1])
        before = after
    np.testing.assert_allclose(x[:, :channels], expected.T, rtol=2e-5, atol=2e-6)
    np.testing.assert_array_equal(x[:, channels:], given[:, channels:])


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("tiled", [0, 1])
@pytest.mark.parametrize(
    ("key_heads", "value_heads", "key_dim", "value_dim"), [(2, 4, 16, 32), (3, 3, 7, 20), (1, 2, 64, 70)]
)
def test_delta_rule(lib, key_heads, value_heads, key_dim, value_dim, tiled, level):
    """A sequence at once and in steps."""
    lib = AtLevel(lib, level)
    rng = np.random.default_rng(key_dim)
    tokens, width = 9, 2 * key_heads * key_dim + value_heads * value_dim
    mixed = rng.normal(size=(tokens, width)).astype(np.float32)
    a, b = rng.normal(size=(2, tokens, value_heads)).astype(np.float32) * 2
    a[0, 0] = 40.0  # where softplus is the identity
    rate = -np.exp(rng.normal(size=value_heads) - 2).astype(np.float32)
    bias = rng.normal(size=value_heads).astype(np.float32)

    group = value_heads // key_heads
    order = [h % key_heads if tiled else h // group for h in range(value_heads)]
    q, k = (
        torch.from_numpy(mixed[:, i * key_heads * key_dim :][:, : key_heads * key_dim].copy()).reshape(
            1, tokens, key_heads, key_dim
        )[:, :, order]
        for i in range(2)
    )
    v = torch.from_numpy(mixed[:, 2 * key_heads * key_dim :].copy())
    v = v.reshape(1, tokens, value_heads, value_dim)
    decay = torch.from_numpy(rate) * torch.nn.functional.softplus(torch.from_numpy(a + bias))
    expected, state = torch_recurrent_gated_delta_rule(
        q, k, v, g=decay[None], beta=torch.from_numpy(b).sigmoid()[None], output_final_state=True,
        use_qk_l2norm_in_kernel=True,
    )  # fmt: skip

    blocks = -(-value_dim // COLUMNS)
    shape = (value_heads, blocks, key_dim, COLUMNS)
    found = []
    for cuts in ((tokens,), (1,) * tokens, (4, 5)):
        inputs, out = mixed.copy(), blank(tokens, value_heads, value_dim)
        decays, betas = a.copy(), b.copy()
        d = Delta(
            inputs.ctypes.data, out.ctypes.data, decays.ctypes.data, betas.ctypes.data, rate.ctypes.data,
            bias.ctypes.data, width, key_heads, value_heads, key_dim, value_dim, tiled,
        )  # fmt: skip
        for t in range(tokens):
            lib.mer_delta_prepare(ctypes.byref(d), LONG(t))
        before, start = None, 0
        for count in cuts:
            after, kept = blank(*shape), blank(*shape)
            for h in range(value_heads):
                for column in range(0, value_dim, COLUMNS):
                    states = [None if each is None else at(each[h]) for each in (before, after, kept)]
                    lib.mer_delta_rule(
                        ctypes.byref(d), LONG(start), LONG(start + count), LONG(h), LONG(column), *states,
                        LONG(4 - start),
                    )  # fmt: skip
            if start < 4 <= start + count:
                fourth = kept
            before, start = after, start + count
        found.append((out.tobytes(), before.tobytes(), fourth.tobytes()))
        np.testing.assert_allclose(out, expected[0], rtol=1e-4, atol=2e-6)
        columns = before.transpose(0, 2, 1, 3).reshape(value_heads, key_dim, -1)
        np.testing.assert_allclose(columns[..., :value_dim], state[0], rtol=1e-4, atol=2e-6)
        assert not columns[..., value_dim:].any()
    assert found[1:] == found[:-1], "cut otherwise"


@pytest.mark.parametrize("n", [16, 20, 5])
def test_gates(lib, n):
    rng = np.random.default_rng(n)
    x, w, gate = rng.normal(size=(3, n)).astype(np.float32) * 4
    gate[:4] = (100.0, -100.0, 0.0, -0.0)
    norm = Qwen3NextRMSNormGated(n, eps=1e-5)
    with torch.no_grad():
        norm.weight.copy_(torch.from_numpy(w))
        expected = norm(torch.from_numpy(x), torch.from_numpy(gate)).numpy()
    y = blank(n)
    lib.mer_gated_rms_norm(at(x), at(w), at(gate), at(y), LONG(n), FLOAT(1e-5))
    np.testing.assert_allclose(y, expected, rtol=3e-6, atol=1e-7)
    expected = x * torch.from_numpy(gate).double().sigmoid().numpy()
    lib.mer_gate(at(x), at(gate), LONG(n))
    np.testing.assert_allclose(x, expected, rtol=2e-6, atol=1e-37)
