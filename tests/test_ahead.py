"""How much is read ahead: the rule by table, its counters with predictors that are surely right or wrong."""

from __future__ import annotations

import numpy as np
import pytest
from engine_models import GREEDY, opened, prompt
from moe_model import EXPERTS, KERNELS, TOP_K, Model, Streamed
from oracle.make_checkpoints import make
from safetensors.torch import load_file, save_file

from mer._ext.ahead import AheadDepth, AheadSwitch
from mer.weights import formats

LAYERS = 4
# of mer/_ext/ahead.pyx
WINDOW, TRIAL, LONGEST = 32, 64, 8192
ROUND, LONGEST_ROUND = 48, 4096


def feed(depth: AheadDepth, rank: int, outcomes: dict[str, int]) -> None:
    for outcome, times in outcomes.items():
        for _ in range(times):
            depth.note_py(rank, outcome)


JUDGED = {
    "all in time": ({"in time": 32}, True),
    "one in eight wanted, the others in nobody's way": ({"in time": 4, "spare": 28}, True),
    "one in sixteen wanted": ({"in time": 2, "spare": 30}, False),
    "none wanted": ({"spare": 32}, False),
    "two of three wanted, the device has no time for the third": ({"in time": 21, "in the way": 11}, True),
    "one of three wanted, the device has no time for the others": ({"in time": 11, "in the way": 21}, False),
    "all late": ({"late": 32}, True),
    "the device is busy, nearly all are right": ({"late": 31, "in the way": 1}, True),
    "the device is busy, nine of ten are right": ({"late": 29, "in the way": 3}, False),
    "half of them late, one in ten in the way": ({"in time": 14, "late": 15, "in the way": 3}, True),
}


@pytest.mark.parametrize("case", JUDGED)
def test_a_rank_is_kept_or_given_up(case):
    outcomes, kept = JUDGED[case]
    depth = AheadDepth(4)
    feed(depth, 1, outcomes)
    assert depth.depth == (4 if kept else 1)


def test_it_takes_a_window_of_outcomes():
    depth = AheadDepth(4)
    feed(depth, 0, {"in the way": WINDOW - 1})
    assert depth.depth == 4
    feed(depth, 0, {"in the way": 1})
    assert depth.depth == 0


def test_what_comes_of_ranks_given_up_counts_no_more():
    depth = AheadDepth(4)
    feed(depth, 3, {"in the way": WINDOW - 1})
    feed(depth, 2, {"spare": WINDOW})
    assert depth.depth == 2
    feed(depth, 3, {"in the way": 5})
    for _ in range(2 * TRIAL):
        depth.tick_py()
    assert depth.depth == 4
    feed(depth, 3, {"in the way": WINDOW - 1})  # counted from new
    assert depth.depth == 4


def turns_until(depth: AheadDepth, wanted: int) -> int:
    turns = 0
    while depth.depth != wanted:
        depth.tick_py()
        turns += 1
        assert turns <= LONGEST
    return turns


def test_it_is_tried_again_after_pauses_that_double():
    depth = AheadDepth(2)
    pauses = []
    for _ in range(9):
        feed(depth, 0, {"in the way": WINDOW})
        assert depth.depth == 0
        pauses.append(turns_until(depth, 1))
    assert pauses == [TRIAL << i for i in range(8)] + [LONGEST]


def test_it_comes_back_where_it_begins_to_pay():
    depth = AheadDepth(3)
    for _ in range(4):
        feed(depth, 0, {"in the way": WINDOW})
        turns_until(depth, 1)
    feed(depth, 0, {"in time": WINDOW})
    assert [turns_until(depth, d) for d in (2, 3)] == [TRIAL, TRIAL]
    feed(depth, 2, {"in the way": WINDOW})
    assert turns_until(depth, 3) == TRIAL  # the long pauses are forgotten


def test_it_does_not_hang_on_ranks_that_are_never_read():
    """What the cache holds anyway is not read, so those ranks have no outcomes."""
    depth = AheadDepth(8)
    feed(depth, 0, {"in the way": WINDOW})
    for _ in range(8 * TRIAL):
        depth.tick_py()
    assert depth.depth == 8


# --- whether at all

MS = 1_000_000


def waits(device: str, on: bool, reads: int, vain: int) -> int:
    """ns that a layer waits for reads of 10 ms beside 12 ms of work. vain: of guesses that are wrong."""
    read, work = 10 * MS, 12 * MS
    asked = (reads + vain * on) * read
    return {
        "idles without": max(asked - work, 0) if on else asked,
        # as a throttled volume does: what was not used can be used later
        "gives back idle time": max(asked - work, 0),
        "is fast": 0,
    }[device]


def simulate(
    device: str, steps: int, switch: AheadSwitch | None, always: bool = True
) -> tuple[int, list[bool]]:
    """ns that steps of 8 layers wait in all, and whether each read ahead. A wait is off by up to a half."""
    rng = np.random.default_rng(7)
    total, ons = 0, []
    for _ in range(steps):
        if switch is not None:
            switch.begin_step_py()
        ons.append(always if switch is None else switch.on)
        for _ in range(8):
            reads, vain, noise = int(rng.binomial(8, 0.4)), int(rng.binomial(8, 0.05)), rng.uniform(0.5, 1.5)
            took = int(waits(device, ons[-1], reads, vain) * noise)
            total += took
            if switch is not None:
                switch.note_py(reads, took)
    return total, ons


@pytest.mark.parametrize(
    ("device", "pays"), [("idles without", True), ("gives back idle time", False), ("is fast", False)]
)
def test_what_waits_less_goes_on(device, pays):
    ways = {always: simulate(device, 1000, None, always)[0] for always in (True, False)}
    assert device == "is fast" or ways[pays] < 0.95 * ways[not pays]
    total, ons = simulate(device, 1000, AheadSwitch())
    assert total <= ways[pays] + 0.05 * (ways[not pays] - ways[pays])
    assert ons[0]  # most devices can do it, and have nothing to do at the start
    assert sum(on == pays for on in ons[500:]) > 450


def test_it_is_noticed_when_it_begins_to_pay_and_when_it_ends():
    switch = AheadSwitch()
    for device, pays in [("gives back idle time", False), ("idles without", True)] * 2:
        _, ons = simulate(device, 1000, switch)
        assert sum(on == pays for on in ons[500:]) > 450


def turns_of(switch: AheadSwitch, waits_with: int, count: int) -> list[int]:
    """Reads until `on` changes, so many times; without reading ahead each waits 100."""
    found, reads = [], 0
    while len(found) < count:
        was = switch.on
        switch.begin_step_py()
        if switch.on != was:
            found.append(reads)
            reads = 0
        switch.note_py(1, waits_with if switch.on else 100)
        reads += 1
    return found


def test_trials_become_rare_while_they_say_the_same():
    expected = [ROUND]
    for between in (4 * ROUND, 16 * ROUND, 64 * ROUND, LONGEST_ROUND, LONGEST_ROUND):
        expected += [2 * ROUND, ROUND + between + ROUND]
    assert turns_of(AheadSwitch(), 80, 11) == expected


@pytest.mark.parametrize(
    ("waits_with", "pays"), [(0, True), (80, True), (95, False), (100, False), (150, False)]
)
def test_it_has_to_save_what_more_it_reads(waits_with, pays):
    switch = AheadSwitch()
    turns_of(switch, waits_with, 2)
    for _ in range(2 * ROUND):
        switch.note_py(1, waits_with if switch.on else 100)
        switch.begin_step_py()
    assert switch.on is pays


def test_where_next_to_nothing_is_waited_there_is_no_trial():
    switch = AheadSwitch()
    for _ in range(100 * ROUND):
        switch.note_py(1, 24, 100)
        switch.begin_step_py()
        assert switch.on
    ons = []
    for _ in range(8 * ROUND):
        switch.note_py(1, 26 if switch.on else 10, 100)
        switch.begin_step_py()
        ons.append(switch.on)
    assert not ons[-1]  # what had not been looked at for so long was tried as soon as it cost time


def test_turns_without_reads_say_nothing():
    switch = AheadSwitch()
    for _ in range(1000):
        switch.note_py(0, 0)
        switch.begin_step_py()
        assert switch.on


# --- with a streamer


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Model:
    layers = [(formats.Q8_0, formats.Q8_0, 96, 160)] * LAYERS
    return Model(tmp_path_factory.mktemp("ahead"), layers)


def walk(model: Model, streamed: Streamed, steps: int, right: bool, start: int = 0) -> None:
    """One token a step through all layers, each layer told what the next one wants, or nothing of it."""
    for seed in range(start, start + steps):
        inputs = [model.inputs(layer, 1, seed) for layer in range(LAYERS)]
        for layer, (x, ids, weights) in enumerate(inputs):
            following = inputs[(layer + 1) % LAYERS][1]
            others = np.setdiff1d(np.arange(EXPERTS, dtype=np.int32), following)[None, :TOP_K].copy()
            guesses = following if right else others
            ahead = guesses if streamed.streamer.wants_guesses(1) else None
            out = streamed.forward(layer, x, ids, weights, ahead)
            assert out.tobytes() == model.exact(KERNELS, layer, x, ids, weights).tobytes()


def test_a_predictor_that_knows_reads_100_percent(model):
    streamed = Streamed(model, slots=2 * TOP_K, prefetch=TOP_K)
    streamed.streamer.prefetcher.switch = None
    with streamed.reader:
        walk(model, streamed, 30, right=True)
        stats = streamed.streamer.stats()
    assert stats["guesses"] == stats["guesses_right"] == 30 * (LAYERS - 1) * TOP_K
    assert stats["prefetched"] == stats["prefetch_used"] > 0
    assert stats["prefetch_bytes"] == stats["prefetch_used_bytes"] > 0
    assert stats["prefetch_depth"] == TOP_K


def test_a_predictor_that_is_always_wrong_is_asked_no_more_and_later_again(model):
    streamed = Streamed(model, slots=2 * TOP_K, prefetch=TOP_K)
    streamed.streamer.prefetcher.switch = None
    with streamed.reader:
        walk(model, streamed, 60, right=False)
        stats = streamed.streamer.stats()
        assert stats["guesses_right"] == stats["prefetch_used"] == stats["prefetch_used_bytes"] == 0
        assert stats["prefetch_depth"] == 0
        # 60 more steps would read some 500 experts in vain; now it tries two windows or so.
        walk(model, streamed, 60, right=False, start=60)
        tried = streamed.streamer.stats()["prefetched"] - stats["prefetched"]
        assert 0 < tried <= 3 * WINDOW
        walk(model, streamed, 300, right=True, start=120)
        after = streamed.streamer.stats()
    assert after["prefetch_depth"] > 0
    assert after["prefetch_used"] > 0


def begin_trial(switch: AheadSwitch) -> None:
    switch.note_py(ROUND, 0)
    switch.begin_step_py()
    assert not switch.on


def test_nothing_is_read_ahead_meanwhile_but_for_chunks(model):
    streamed = Streamed(model, slots=LAYERS * TOP_K, prefetch=TOP_K)
    streamer = streamed.streamer
    with streamed.reader:
        assert streamer.wants_guesses(1)
        assert streamer.prefetcher.early_layers
        begin_trial(streamer.prefetcher.switch)
        assert not streamer.wants_guesses(1)
        assert streamer.wants_guesses(EXPERTS)
        stats = streamer.stats()
        assert stats["prefetch_depth"] == stats["early_layers"] == streamer.prefetcher.early_layers == 0
        streamer.prefetcher.read_likely(np.zeros((1, 1, TOP_K), np.int32))
        assert streamer.stats()["prefetched"] == 0
        streamer.prefetcher.switch = None
        assert streamer.wants_guesses(1)


def test_turns_are_counted_by_what_had_to_be_read(model):
    """Whoever had it read. The trial goes on with the first step behind so many; waiting counts, too."""
    streamed = Streamed(model, slots=2 * TOP_K, prefetch=TOP_K)
    streamer = streamed.streamer
    switch = streamer.prefetcher.switch
    switch.little = 0
    with streamed.reader:
        for step in range(ROUND):
            stats = streamer.stats()
            reads = stats["misses"] + stats["prefetch_used"]
            streamed.forward(0, *model.inputs(0, 1, step))
            assert switch.on is (reads < ROUND)
            assert switch.reads == [0, reads]
            assert switch.waited == pytest.approx([0, 1e9 * stats["io_wait_s"]])
            if not switch.on:
                break
            walk(model, streamed, 1, right=True, start=step)
        assert not switch.on
        assert stats["prefetch_used"] > 0
        assert stats["io_wait_s"] > 0


@pytest.mark.parametrize("still", [True, False])
async def test_the_engine_with_a_predictor_that_must_be_right(tmp_path, still):
    """Where no layer changes the hidden state, the next layer's router says early what it will say."""
    make(tmp_path, "qwen3_moe", num_hidden_layers=3)
    if still:
        file = tmp_path / "model.safetensors"
        tensors = load_file(file)
        changed = [name for name in tensors if "o_proj" in name or "down_proj" in name]
        assert len(changed) >= 2 * 3
        for name in changed:
            tensors[name].zero_()
        save_file(tensors, file, {"format": "pt"})
    async with opened(tmp_path, cache_experts="50%", prefetch=2) as engine:
        await engine.generate(prompt(5), GREEDY)
        stats = engine.stats
    assert stats.guesses > 50
    assert (stats.guesses_right == stats.guesses) is still
