"""What a streamer refuses: calls and tables that do not fit, before they could damage anything."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from moe_model import EXPERTS, KERNELS, MAX_TOKENS, TOP_K, Model, Streamed, assert_idle, open_reader

from mer._ext.cache import ExpertCache
from mer._ext.kernels import Pool
from mer._ext.moe import ExpertStreamer, scratch_bytes
from mer.weights import formats


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """Two layers of different shapes and formats; every size is odd where the format allows it."""
    folder = tmp_path_factory.mktemp("moe")
    return Model(folder, [(formats.Q8_0, formats.Q4_0, 96, 160), (formats.BF16, formats.F32, 101, 67)])


@pytest.fixture
def streamed(model: Model) -> Iterator[Streamed]:
    made = Streamed(model)
    with made.reader:
        yield made


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ids": np.array([[0, 1, EXPERTS]], np.int32)}, r"in 0\.\.7"),
        ({"ids": np.array([[0, -1, 2]], np.int32)}, r"in 0\.\.7"),
        ({"ids": np.array([[4, 1, 4]], np.int32)}, "distinct"),
        ({"ids": np.array([[0, 1]], np.int32)}, "shapes"),
        ({"ids": np.array([[0, 1, 2]], np.int64)}, "dtype"),
        ({"weights": np.ones((1, 2), np.float32)}, "shapes"),
        ({"weights": None}, "shapes"),
        ({"x": np.zeros((1, 95), np.float32)}, "shapes"),
        ({"x": np.zeros((1, 96), np.float64)}, "dtype"),
        ({"x": np.zeros((0, 96), np.float32)}, "shapes"),
        ({"x": np.zeros((2, 96), np.float32)}, "shapes"),
        ({"out": np.zeros((1, 97), np.float32)}, "shapes"),
        ({"out": np.zeros((1, 192), np.float32)[:, ::2]}, "contiguous"),
    ],
)
def test_calls_that_do_not_fit(streamed: Streamed, change: dict[str, object], message: str) -> None:
    x, _, weights = streamed.model.inputs(0, 1)
    call = {
        "x": x,
        "ids": np.array([[0, 1, 2]], np.int32),
        "weights": weights,
        "out": np.zeros_like(x),
    } | change
    with pytest.raises(ValueError, match=message):
        streamed.streamer.forward(0, **call)  # type: ignore[arg-type]
    assert_idle(streamed.cache)
    streamed.check(0, 1)


def test_more_tokens_than_were_promised_and_no_such_layer(streamed: Streamed) -> None:
    with pytest.raises(ValueError, match="max_tokens 40"):
        streamed.forward(0, *streamed.model.inputs(0, MAX_TOKENS + 1))
    for layer in (-1, 2):
        with pytest.raises(IndexError, match="layer"):
            streamed.forward(layer, *streamed.model.inputs(0, 1))


def changed(array: np.ndarray, place: tuple[int, ...], value: int) -> np.ndarray:
    array = array.copy()
    array[place] = value
    return array


@pytest.mark.parametrize(
    ("table", "place", "value", "message"),
    [
        ("layers", (1, 0), 7, "format 7"),
        ("layers", (0, 1), -1, "format -1"),
        ("layers", (0, 2), -1, "format -1"),
        ("layers", (0, 1), 1, "no kernels for gate and up in the formats"),
        ("layers", (0, 3), 100, "100 columns"),
        ("layers", (0, 4), 0, "0 columns"),
        ("matrices", (3, 2), 1 << 30, "expert 3: a matrix"),
        ("matrices", (0, 0), -1, "expert 0: a matrix"),
        ("reads", (5, 0, 0), 2, "expert 5: a read .* 2 files"),
        ("reads", (5, 1, 0), -1, "expert 5: a read"),
        ("reads", (5, 0, 1), -4096, "expert 5: a read"),
        ("reads", (5, 0, 1), 17, "expert 5: a read .* alignment 4096"),
        ("reads", (5, 0, 2), 0, "expert 5: a read"),
        ("reads", (5, 0, 2), 1 << 40, "expert 5: a read"),
        ("reads", (5, 0, 3), 0, "expert 5: a read"),
        ("reads", (5, 0, 3), 1 << 40, "expert 5: a read"),
        ("reads", (5, 0, 4), -4096, "expert 5: a read"),
        ("reads", (5, 2, 4), 1 << 40, "expert 5: a read"),
    ],
)
def test_tables_that_do_not_fit(
    model: Model, table: str, place: tuple[int, ...], value: int, message: str
) -> None:
    tables = {name: getattr(model.tables, name) for name in ("layers", "reads", "matrices")}
    tables[table] = changed(tables[table], place, value)
    with open_reader(model) as reader:
        if reader.alignment == 1 and "alignment" in message:
            pytest.skip("no O_DIRECT here")
        cache = ExpertCache(model.tables.total, 1, model.tables.slot_bytes)
        with pytest.raises(ValueError, match=message):
            ExpertStreamer(cache, reader, KERNELS, Pool(1), *tables.values(), TOP_K, MAX_TOKENS)


def test_sizes_that_do_not_fit(model: Model) -> None:
    t, pool = model.tables, Pool(1)
    with open_reader(model) as reader:
        cache = ExpertCache(t.total, 1, t.slot_bytes)
        for top_k, tokens in ((0, 1), (EXPERTS + 1, 1), (1, 0)):
            with pytest.raises(ValueError, match="top_k"):
                scratch_bytes(t.layers, t.reads, top_k, tokens)
        for layers, reads in (
            (t.layers[:, :3].copy(), t.reads),
            (t.layers, t.reads[:-1]),
            (t.layers[:0], t.reads),
        ):
            with pytest.raises(ValueError, match="tables do not fit"):
                ExpertStreamer(cache, reader, KERNELS, pool, layers, reads, t.matrices, TOP_K, 1)
        with pytest.raises(ValueError, match="matrices"):
            ExpertStreamer(cache, reader, KERNELS, pool, t.layers, t.reads, t.matrices[1:], TOP_K, 1)
        for experts, slot in ((t.total - 1, t.slot_bytes), (t.total, t.slot_bytes - 4096)):
            cache = ExpertCache(experts, 1, slot)
            with pytest.raises(ValueError, match="not"):
                ExpertStreamer(cache, reader, KERNELS, pool, t.layers, t.reads, t.matrices, TOP_K, 1)
