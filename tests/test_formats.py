"""Weight formats against the `gguf` package, bit for bit."""

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from mer.errors import UnsupportedModelError
from mer.weights import formats

READ = ["q4_1", "q5_0", "q5_1", "q2_k", "q3_k", "q5_k", "q6_k", "iq4_nl", "iq4_xs"]
PEERS = {name: gguf.GGMLQuantizationType[name.upper()] for name in READ} | {
    "q8_0": gguf.GGMLQuantizationType.Q8_0,
    "q4_0": gguf.GGMLQuantizationType.Q4_0,
    "bf16": gguf.GGMLQuantizationType.BF16,
    "f16": gguf.GGMLQuantizationType.F16,
    "f32": gguf.GGMLQuantizationType.F32,
    "q4_k": gguf.GGMLQuantizationType.Q4_K,
    "mxfp4": gguf.GGMLQuantizationType.MXFP4,
}
BLOCKS = {name: gguf.GGML_QUANT_SIZES[PEERS[name]] for name in READ} | {
    "f32": (1, 4),
    "f16": (1, 2),
    "bf16": (1, 2),
    "q4_0": (32, 18),
    "q8_0": (32, 34),
    "q4_k": (256, 144),
    "mxfp4": (32, 17),
}
QUANTISED_BY_PEER = ["q8_0", "q4_0", "mxfp4", "bf16", "f16", "f32"]


def weights(rng, rows, cols, scale=0.02):
    return (scale * rng.standard_normal((rows, cols))).astype(np.float32)


def peer_quantize(name, values):
    return gguf.quants.quantize(values, PEERS[name]).view(np.uint8)


def peer_dequantize(name, data):
    with np.errstate(invalid="ignore", over="ignore"):
        return gguf.quants.dequantize(data, PEERS[name])


@pytest.mark.parametrize("form", formats.FORMATS, ids=lambda f: f.name)
def test_ids_and_block_sizes_are_those_of_ggml(form):
    assert form.id == int(PEERS[form.name])
    assert (form.block, form.block_bytes) == gguf.GGML_QUANT_SIZES[PEERS[form.name]] == BLOCKS[form.name]
    assert formats.by_id(form.id) is form
    assert formats.by_name(form.name.upper()) is form


@pytest.mark.parametrize("name", QUANTISED_BY_PEER)
@pytest.mark.parametrize("scale", [1e-7, 0.02, 1.0, 3000.0])
def test_quantises_as_the_gguf_package(name, scale):
    values = weights(np.random.default_rng(1), 37, 2304, scale)
    values[3, :64] = 0
    values[4, 32:64] = np.tile([1.5, -1.5], 16)  # two values of the largest magnitude
    values[5, 32:64] = np.tile([-1.5, 1.5], 16)
    got = formats.by_name(name).quantize(values)
    np.testing.assert_array_equal(got, peer_quantize(name, values))


@pytest.mark.parametrize("name", ["q8_0", "q4_0", "mxfp4"])
def test_rounds_ties_as_the_gguf_package(name):
    """Values that fall on and beside the middle between two codes."""
    top = {"q8_0": 127.0, "q4_0": -8.0, "mxfp4": 12.0}[name]
    ties = np.concatenate(
        [np.arange(-7.5, 8, 1), np.nextafter(np.arange(-7.5, 7, 1, np.float32), np.float32(9))]
    )
    values = np.full((1, 32), top, np.float32)
    values[0, 1:] = ties[:31]
    np.testing.assert_array_equal(formats.by_name(name).quantize(values), peer_quantize(name, values))


@settings(max_examples=200, deadline=None)
@given(
    st.sampled_from(["q8_0", "q4_0", "mxfp4"]),
    # Scales so small that their inverse overflows have no defined result in GGUF.
    arrays.arrays(
        np.float32,
        (3, 32),
        elements=st.floats(-(2**15), 2**15, width=32).filter(lambda x: x == 0 or abs(x) > 1e-30),
    ),
)
def test_quantises_any_block_as_the_gguf_package(name, values):
    np.testing.assert_array_equal(formats.by_name(name).quantize(values), peer_quantize(name, values))


def test_bf16_rounds_every_pattern_to_nearest_even():
    high = np.arange(1 << 16, dtype=np.uint32) << 16
    for low in (0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF):
        values = (high | low).view(np.float32)
        got = formats.BF16.quantize(values).view(np.uint16)
        # A NaN's payload may differ, that it is a quiet NaN may not.
        nan = np.isnan(values)
        np.testing.assert_array_equal(got[~nan], peer_quantize("bf16", values).view(np.uint16)[~nan])
        assert np.isnan(formats.BF16.dequantize(got[nan].view(np.uint8))).all()


@pytest.mark.parametrize("form", formats.FORMATS, ids=lambda f: f.name)
def test_dequantises_any_bytes_as_the_gguf_package(form):
    data = np.random.default_rng(2).integers(0, 256, (19, 5 * form.row_bytes(form.block)), dtype=np.uint8)
    if form.block == 1:
        data = data[:, : 4 * (data.shape[1] // 4)]
    got, wanted = form.dequantize(data), peer_dequantize(form.name, data)
    np.testing.assert_array_equal(got.view(np.uint32), wanted.view(np.uint32))


def test_what_is_only_read_is_not_written():
    assert {form.name for form in formats.FORMATS} - {form.name for form in formats.WRITTEN} == set(READ)
    with pytest.raises(ValueError, match="q6_k is only read"):
        formats.by_name("q6_k").quantize(np.zeros((1, 256)))


@pytest.mark.parametrize("form", formats.WRITTEN, ids=lambda f: f.name)
def test_a_row_has_the_same_bytes_whatever_is_around_it(form):
    values = weights(np.random.default_rng(3), 300, 1024)
    whole = form.quantize(values)
    np.testing.assert_array_equal(form.quantize(values[123:124]), whole[123:124])
    np.testing.assert_array_equal(form.quantize(values.reshape(10, 30, 1024)).reshape(300, -1), whole)
    np.testing.assert_array_equal(form.quantize(values[:, ::-1][:, ::-1]), whole)
    np.testing.assert_array_equal(form.dequantize(whole[7]), form.dequantize(whole)[7])


@pytest.mark.parametrize(
    ("name", "most"), [("q8_0", 0.006), ("q4_0", 0.11), ("q4_k", 0.08), ("mxfp4", 0.16), ("bf16", 0.002)]
)
def test_error_of_a_round_trip(name, most):
    form = formats.by_name(name)
    values = weights(np.random.default_rng(4), 64, 1024)
    error = form.dequantize(form.quantize(values)) - values
    assert np.sqrt((error**2).mean() / (values**2).mean()) < most


def test_q4_k_keeps_what_it_can_represent():
    """Multiples of one step with few bits come back exactly; so do zeros, and blocks of one value nearly."""
    rng = np.random.default_rng(6)
    codes = rng.integers(0, 16, (4, 8, 32)).astype(np.float32)
    codes[..., 0], codes[..., 1] = 0, 15
    values = (codes * 0.5 - 4).reshape(4, 256)
    restored = formats.Q4_K.dequantize(formats.Q4_K.quantize(values))
    assert np.abs(restored - values).max() < 0.02
    assert not formats.Q4_K.dequantize(formats.Q4_K.quantize(np.zeros((2, 256)))).any()
    for constant in (0.125, -0.125):
        restored = formats.Q4_K.dequantize(formats.Q4_K.quantize(np.full((1, 256), constant, np.float32)))
        np.testing.assert_allclose(restored, constant, rtol=2e-3)


@pytest.mark.parametrize(
    "form", [formats.Q8_0, formats.Q4_0, formats.Q4_K, formats.MXFP4], ids=lambda f: f.name
)
def test_what_has_no_code_disturbs_only_its_block(form):
    values = weights(np.random.default_rng(7), 1, 4 * 256)
    clean = form.quantize(values)
    values[0, 5], values[0, 6], values[0, 7] = np.nan, np.inf, -np.inf
    dirty = form.quantize(values)
    np.testing.assert_array_equal(dirty[0, form.row_bytes(256) :], clean[0, form.row_bytes(256) :])
    np.testing.assert_array_equal(form.quantize(values), dirty)
    tiny = np.full((1, 256), 1e-42, np.float32)
    assert np.isfinite(form.dequantize(form.quantize(tiny))).all()


def test_e4m3_against_ml_definition():
    values = formats.F8_E4M3.dequantize(np.arange(256, dtype=np.uint8))
    assert values[0x7E] == 448
    assert values[0x08] == 2.0**-6
    assert values[0x01] == 2.0**-9
    assert values[0x38] == 1
    assert values[0xB8] == -1
    assert np.isnan(values[[0x7F, 0xFF]]).all()
    assert np.isnan(values).sum() == 2


def test_errors_say_what_is_known():
    with pytest.raises(UnsupportedModelError, match=r"tq1_0.*known are f32, f16, bf16, q8_0"):
        formats.by_name("tq1_0")
    with pytest.raises(UnsupportedModelError, match="34 is not known"):
        formats.by_id(34)
    with pytest.raises(ValueError, match="blocks of 256"):
        formats.Q4_K.quantize(np.zeros((2, 128), np.float32))
    with pytest.raises(ValueError, match="no whole q8_0 blocks"):
        formats.Q8_0.dequantize(np.zeros(35, np.uint8))
