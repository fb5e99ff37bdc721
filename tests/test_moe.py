"""The streamer gives the bytes of experts that are all in memory, whatever cache, reader and others do."""

from __future__ import annotations

import asyncio
import ctypes
import errno
import gc
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from moe_model import EXPERTS, KERNELS, MAX_TOKENS, TOP_K, Model, Streamed, assert_idle, open_reader

from mer._ext.cache import ExpertCache
from mer._ext.kernels import Pool
from mer._ext.moe import ExpertStreamer, scratch_bytes
from mer.errors import BudgetError, CheckpointError, DeviceReadError
from mer.weights import formats


def until(condition: Callable[[], bool], thread: threading.Thread) -> None:
    """Wait for what another thread does before it ends."""
    while not condition():
        assert thread.is_alive() or condition()
        time.sleep(0.001)


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


@pytest.mark.parametrize("form", formats.WRITTEN, ids=lambda form: form.name)
def test_against_numpy_and_single_products(form: formats.Format, tmp_path: Path) -> None:
    hidden, inter = (256, 512) if form.block == 256 else (96, 160) if form.block == 32 else (100, 67)
    model = Model(tmp_path, [(form, form, hidden, inter), (form, form, hidden, 2 * inter)])
    streamed = Streamed(model, TOP_K + 1)
    with streamed.reader:
        for layer, tokens in [(0, 1), (1, 1), (0, 2), (1, 5), (0, MAX_TOKENS)]:
            inputs = model.inputs(layer, tokens)
            out = streamed.forward(layer, *inputs)
            want, bound = model.reference(layer, *inputs)
            assert np.all(np.abs(out - want) <= bound)
            # as a whole: rounding of float32, or activations in int8
            assert np.linalg.norm(out - want) <= (1e-6 if form.block == 1 else 0.02) * np.linalg.norm(want)
            assert out.tobytes() == model.exact(KERNELS, layer, *inputs).tobytes()


@pytest.mark.parametrize("slots", [1, 2, TOP_K, EXPERTS, 2 * EXPERTS])
def test_any_number_of_slots_gives_the_same_bytes(model: Model, slots: int) -> None:
    streamed = Streamed(model, slots)
    with streamed.reader:
        for tokens in [*range(1, MAX_TOKENS, 4), MAX_TOKENS]:
            for layer in (0, 1):
                streamed.check(layer, tokens, seed=slots)
    assert streamed.cache.stats()["resident"] == slots


@pytest.mark.parametrize("backend", ["uring", "preadv", "buffered"])
@pytest.mark.parametrize("depth", [1, 64])
def test_every_back_end_gives_the_same_bytes(model: Model, backend: str, depth: int) -> None:
    with open_reader(model, backend, queue_depth=depth) as reader:
        for slots in (2, None):
            streamed = Streamed(model, slots, reader=reader)
            for tokens in (1, 7, MAX_TOKENS):
                for layer in (0, 1, 0):
                    streamed.check(layer, tokens)


def test_a_registered_arena_gives_the_same_bytes(model: Model) -> None:
    streamed = Streamed(model, EXPERTS, reader=open_reader(model, "uring"))
    with streamed.reader as reader:
        registered = reader.add_buffer(streamed.cache.arena_address, streamed.cache.arena_bytes)
        for tokens in (1, 7, MAX_TOKENS):
            for layer in (0, 1):
                streamed.check(layer, tokens)
        assert registered == (reader.stats()["fixed_ops"] > 0)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("slots", [1, None])
def test_more_tokens_than_are_computed_together(model: Model, threads: int, slots: int | None) -> None:
    streamed = Streamed(model, slots, threads=threads, max_tokens=500)
    with streamed.reader:
        streamed.check(0, 500)
        streamed.check(1, 333)
        streamed.check(0, 1)


def test_biases_and_clamps(tmp_path: Path) -> None:
    layers = [(formats.MXFP4, formats.Q8_0, 64, 96), (formats.BF16, formats.MXFP4, 50, 32)]
    model = Model(tmp_path, layers)
    plain = model.exact(KERNELS, 0, *model.inputs(0, 5))
    model.add_biases(1.702, 0.7)
    assert np.abs(model.exact(KERNELS, 0, *model.inputs(0, 5)) - plain).max() > 0.1
    streamed = Streamed(model, 3, max_tokens=300)
    with streamed.reader:
        for tokens in (1, 5, 300):
            for layer in (0, 1):
                streamed.check(layer, tokens)
        with pytest.raises(ValueError, match="biases"):
            streamed.streamer.add_biases(model.biases[:1])
        with pytest.raises(ValueError, match="shapes"):
            streamed.streamer.add_biases(model.biases[::-1])


def test_some_reads_end_after_the_file(model: Model) -> None:
    """The layout that these tests rest on: unaligned pieces, one and several, and supersets past the end."""
    reads = model.tables.reads[model.tables.reads[..., 2] > 0]
    sizes = np.array([path.stat().st_size for path in model.paths])[reads[:, 0]]
    assert np.any(reads[:, 1] + reads[:, 2] > sizes)
    assert np.any(reads[:, 1] + reads[:, 3] == sizes)
    assert set(np.count_nonzero(model.tables.reads[..., 2], axis=1)) == {1, 3}
    assert np.any(model.tables.matrices % 4096)


# ---- what is counted ----


def test_statistics(streamed: Streamed) -> None:
    model, before = streamed.model, streamed.reader.stats()
    first, second = model.inputs(0, 4, seed=1), model.inputs(0, 9, seed=2)
    a, b = set(first[1].flat), set(second[1].flat)
    streamed.forward(0, *first)
    stats = streamed.streamer.stats()
    assert (stats["hits"], stats["misses"]) == (0, len(a))
    assert stats["bytes_read"] == sum(model.length(e) for e in a)
    assert streamed.reader.stats()["batches"] == before["batches"] + 1
    streamed.forward(0, *second)
    stats = streamed.streamer.stats()
    assert (stats["hits"], stats["misses"]) == (len(a & b), len(a | b))
    assert stats["bytes_read"] == sum(model.length(e) for e in a | b)
    assert streamed.reader.stats()["ops"] - before["ops"] == sum(
        np.count_nonzero(model.tables.reads[e, :, 2]) for e in a | b
    )
    assert stats["compute_s"] > 0
    assert streamed.cache.stats()["hits"] == stats["hits"]
    assert streamed.cache.stats()["misses"] == stats["misses"]


def test_what_is_resident_is_not_evicted_for_what_is_missing(model: Model) -> None:
    """The least recently used experts are needed by this very step: they are hits nevertheless."""
    streamed = Streamed(model, 4)
    with streamed.reader:
        x, _, weights = model.inputs(0, 1)
        for ids in ([5, 6, 7], [0, 6, 7], [1, 2, 5]):  # 5 is the oldest of four when the last one comes
            chosen = np.array([ids], np.int32)
            assert streamed.forward(0, x, chosen, weights).tobytes() == (
                model.exact(KERNELS, 0, x, chosen, weights).tobytes()
            )
        stats = streamed.streamer.stats()
        assert (stats["hits"], stats["misses"]) == (3, 6)


class Mallinfo2(ctypes.Structure):
    names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    _fields_ = [(name, ctypes.c_size_t) for name in names.split()]


def allocated() -> int:
    """Bytes that malloc has given out."""
    try:
        mallinfo2 = ctypes.CDLL(None).mallinfo2
    except AttributeError:
        pytest.skip("only glibc 2.33 and later can say")
    mallinfo2.restype = Mallinfo2
    now = mallinfo2()
    return int(now.hblkhd + now.uordblks)


@pytest.mark.parametrize("max_tokens", [16, 512, 4096])
def test_scratch_bytes_are_what_is_allocated(model: Model, max_tokens: int) -> None:
    tables = model.tables
    want = scratch_bytes(tables.layers, tables.reads, TOP_K, max_tokens)
    with open_reader(model) as reader:
        cache, pool = ExpertCache(tables.total, 1, tables.slot_bytes), Pool(1)
        gc.collect()  # or it might give back, just then, what others left
        before = allocated()
        streamer = ExpertStreamer(
            cache, reader, KERNELS, pool, tables.layers, tables.reads, tables.matrices, TOP_K, max_tokens
        )
        taken = allocated() - before
    assert streamer.scratch_bytes == want
    # malloc may give each array whole pages, or none of its own: that hangs on what was there before.
    assert abs(taken - want) <= 6 * 4096 + want // 1000


# ---- when reads fail ----


def piece_of(model: Model, key: int, number: int = -1) -> tuple[int, int, int]:
    """File, start and end of one of an expert's reads."""
    used = model.tables.reads[key][model.tables.reads[key, :, 2] > 0]
    file, offset, _, needed, _ = used[number]
    return int(file), int(offset), int(offset + needed)


@pytest.mark.parametrize("backend", ["uring", "preadv", "buffered"])
@pytest.mark.parametrize("slots", [1, 2, None])
def test_a_failed_read_fails_the_call_and_leaves_nothing(
    model: Model, backend: str, slots: int | None
) -> None:
    x, _, weights = model.inputs(0, 2)
    ids = np.array([[0, 1, 2], [3, 1, 4]], np.int32)
    with open_reader(model, backend) as reader:
        streamed = Streamed(model, slots, reader=reader)
        for bad in ([0], [3], [4], [1, 2], [0, 1, 2, 3, 4]):
            streamed.cache.clear()
            for key in bad:
                file, _, end = piece_of(model, key)
                reader.set_fault(file, end - 1, end, error=errno.EIO, times=1)
            with pytest.raises(DeviceReadError, match=r"(a|b)\.bin: \d+ bytes at offset \d+: .*EIO"):
                streamed.forward(0, x, ids, weights)
            reader.clear_faults()
            assert_idle(streamed.cache)
            assert streamed.cache.stats()["resident"] <= EXPERTS - len(bad)
            assert streamed.forward(0, x, ids, weights).tobytes() == (
                model.exact(KERNELS, 0, x, ids, weights).tobytes()
            )
            assert_idle(streamed.cache)


@pytest.mark.parametrize("backend", ["uring", "preadv", "buffered"])
@pytest.mark.parametrize("number", [0, 1, 2])
def test_one_of_several_reads_of_an_expert_fails(model: Model, backend: str, number: int) -> None:
    x, _, weights = model.inputs(0, 1)
    ids = np.array([[0, 3, 2]], np.int32)
    file, start, end = piece_of(model, 3, number)
    with open_reader(model, backend, queue_depth=1, threads=1) as reader:
        streamed = Streamed(model, reader=reader)
        reader.set_fault(file, end - 1, end)
        with pytest.raises(DeviceReadError, match=f"{end - start} bytes at offset {start}"):
            streamed.forward(0, x, ids, weights)
        # with one read at a time, those after the failed one were still to come: it waited for them
        assert reader.stats()["ops"] == np.count_nonzero(model.tables.reads[ids[0], :, 2])
        assert streamed.cache.state_py(3) == "absent"
        assert streamed.cache.stats()["failures"] == 1
        assert streamed.forward(0, x, ids, weights).tobytes() == (
            model.exact(KERNELS, 0, x, ids, weights).tobytes()
        )


def test_short_reads_go_on(streamed: Streamed) -> None:
    for file in (0, 1):
        streamed.reader.set_fault(file, 0, 1 << 40, limit=4096, times=20)
    streamed.check(0, MAX_TOKENS)
    assert streamed.reader.stats()["short_reads"] > 0


def test_a_file_that_became_shorter_is_named(tmp_path: Path) -> None:
    model = Model(tmp_path, [(formats.F32, formats.F32, 100, 67)])
    streamed = Streamed(model)
    file, start, _ = max(piece_of(model, key) for key in range(EXPERTS))
    with streamed.reader:
        model.paths[file].write_bytes(model.paths[file].read_bytes()[: start + 100])
        with pytest.raises(CheckpointError, match=f"{model.paths[file].name}.*truncated"):
            streamed.forward(0, *model.inputs(0, MAX_TOKENS))
        assert_idle(streamed.cache)


def test_a_closed_reader(streamed: Streamed) -> None:
    inputs = streamed.model.inputs(0, 3)
    streamed.forward(0, *inputs)
    streamed.reader.close()
    streamed.check(0, 3)  # all of them are resident
    with pytest.raises(DeviceReadError, match="closed"):
        streamed.forward(1, *streamed.model.inputs(1, 3))
    assert_idle(streamed.cache)


# ---- others on the same cache and reader ----


def in_thread(work: Callable[[], object]) -> tuple[threading.Thread, list[object]]:
    results: list[object] = []

    def run() -> None:
        try:
            results.append(work())
        except BaseException as e:
            results.append(e)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread, results


def test_waits_for_an_expert_that_somebody_else_reads(streamed: Streamed) -> None:
    model, cache = streamed.model, streamed.cache
    inputs = model.inputs(0, 1)
    ids = inputs[1]
    keys = [int(e) for e in ids[0]]
    slots = [cache.acquire_py(key) for key in keys]
    assert [found for found, _ in slots] == ["miss"] * 3
    thread, results = in_thread(lambda: streamed.forward(0, *inputs))
    until(lambda: all(cache.pins(key) == 2 for key in keys), thread)
    # one arrives, one fails and is read by the streamer itself, one fails and is read by us at the second try
    for file, offset, length, needed, place in model.tables.reads[keys[0]]:
        if length:
            raw = streamed.reader.read(int(file), int(offset), int(needed))
            cache.slot_view(slots[0][1])[place : place + needed] = np.frombuffer(raw, np.uint8)
    cache.publish_py(keys[0])
    cache.fail_py(keys[1])
    cache.fail_py(keys[2])
    for key in keys:
        cache.release_py(key)
    thread.join()
    assert isinstance(results[0], np.ndarray), results
    assert results[0].tobytes() == model.exact(KERNELS, 0, *inputs).tobytes()
    stats = streamed.streamer.stats()
    assert (stats["hits"], stats["misses"]) == (1, 2)
    assert_idle(cache)


def test_an_error_does_not_wait_for_what_others_read(streamed: Streamed) -> None:
    model, cache = streamed.model, streamed.cache
    x, _, weights = model.inputs(0, 1)
    assert cache.acquire_py(1)[0] == "miss"
    file, _, end = piece_of(model, 2)
    streamed.reader.set_fault(file, end - 1, end)
    with pytest.raises(DeviceReadError):
        streamed.forward(0, x, np.array([[0, 1, 2]], np.int32), weights)
    assert cache.pins(1) == 1
    assert cache.stats()["in_use"] == 1
    cache.fail_py(1)
    cache.release_py(1)
    streamed.check(0, 5)


def test_waits_for_slots_that_others_hold(model: Model) -> None:
    streamed = Streamed(model, 2)
    cache, inputs = streamed.cache, model.inputs(0, 3)
    with streamed.reader:
        for key in (EXPERTS, EXPERTS + 1):  # of the other layer
            assert cache.acquire_py(key)[0] == "miss"
            cache.publish_py(key)
        thread, results = in_thread(lambda: streamed.forward(0, *inputs))
        until(lambda: cache.stats()["full"] > 10, thread)
        cache.release_py(EXPERTS)
        thread.join()
        assert isinstance(results[0], np.ndarray), results
        assert results[0].tobytes() == model.exact(KERNELS, 0, *inputs).tobytes()
        assert cache.state_py(EXPERTS + 1) == "resident"
        cache.release_py(EXPERTS + 1)
        assert_idle(cache)


def test_a_pinned_set_that_leaves_no_slot(model: Model) -> None:
    streamed = Streamed(model, 2)
    with streamed.reader:
        x, _, weights = model.inputs(0, 1)
        ids = np.array([[1, 2, 6]], np.int32)
        for key in (0, 1):
            streamed.cache.acquire_py(key)
            streamed.cache.publish_py(key)
            streamed.cache.release_py(key)
        streamed.cache.pin_set([0, 1])
        with pytest.raises(BudgetError, match=r"all 2 slots .* raise --ram"):
            streamed.forward(0, x, ids, weights)
        assert_idle(streamed.cache)
        streamed.cache.unpin_set([0, 1])
        streamed.cache.clear()
        streamed.check(0, 1)


@pytest.mark.parametrize("backend", ["uring", "preadv", "buffered"])
@pytest.mark.parametrize("slots", [1, 3, 2 * EXPERTS])
def test_two_streamers_share_a_cache_and_reads_are_awaited_meanwhile(
    model: Model, backend: str, slots: int
) -> None:
    content = [path.read_bytes() for path in model.paths]
    rounds = [
        (layer, tokens, seed) for seed in range(10) for layer, tokens in ((0, 1), (1, 6), (0, 20), (1, 1))
    ]
    wanted = [
        model.exact(KERNELS, la, *model.inputs(la, tokens, seed)).tobytes() for la, tokens, seed in rounds
    ]
    cache = ExpertCache(model.tables.total, slots, model.tables.slot_bytes)
    with open_reader(model, backend, queue_depth=2) as reader:
        streamers = [Streamed(model, reader=reader, cache=cache) for _ in range(2)]

        def compute(streamed: Streamed) -> int:
            for (layer, tokens, seed), want in zip(rounds, wanted, strict=True):
                assert streamed.forward(layer, *model.inputs(layer, tokens, seed)).tobytes() == want
            return len(rounds)

        work = [in_thread(lambda s=s: compute(s)) for s in streamers]

        async def listen() -> None:
            at = 0
            while any(thread.is_alive() for thread, _ in work):
                at = (at + 4321) % (len(content[0]) - 5000)
                assert await reader.aread(0, at, 5000) == content[0][at : at + 5000]

        asyncio.run(listen())
        for thread, results in work:
            thread.join()
            assert results == [len(rounds)]
    assert_idle(cache)
    counts = [streamed.streamer.stats() for streamed in streamers]
    assert sum(c["misses"] for c in counts) == cache.stats()["misses"]
    distinct = 2 * sum(len(set(model.inputs(la, n, seed)[1].flat)) for la, n, seed in rounds)
    assert sum(c["hits"] + c["misses"] for c in counts) == distinct
