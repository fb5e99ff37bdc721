"""Experts that other machines compute: the same bytes come, whoever answers, late, wrong or never."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest
from moe_model import EXPERTS, KERNELS, MAX_TOKENS, Model, Streamed, assert_idle, wired

from mer._ext.uring import Reader
from mer.errors import DeviceReadError
from mer.weights import formats

LONG, NEVER = 60_000_000_000, 1_000_000


class Peers:
    """Machines that compute as Model.exact does, each row by itself; `how` they answer, by peer."""

    def __init__(self, model: Model, how: dict[int, str]) -> None:
        self.model, self.how = model, how
        self.asked: list[tuple[int, int, list[int]]] = []
        self.left: list[tuple[int, int, list[int], bytes]] = []
        self.expected: dict[int, int] = {}
        self.probed: list[tuple[int, int, list[int]]] = []

    def expected_ns(self, peer, rows):
        return self.expected.get(peer, 0)

    def probe(self, peer, ask):
        self.probed.append((peer, ask.turn, ask.experts))

    def ask(self, peer, ask):
        turn, _, layer, x, experts, counts, tokens, weights = ask
        self.asked.append((peer, layer, experts))
        how, x = self.how[peer], x.copy()
        if how == "busy":
            return False
        if how == "raises":
            raise OSError("no way there")
        rows, at = [], 0
        for e, count in zip(experts, counts, strict=True):
            for t, weight in zip(tokens[at : at + count], weights[at : at + count], strict=True):
                one = (np.array([[e]], np.int32), np.array([[weight]], np.float32))
                rows.append(self.model.exact(KERNELS, layer, x[t : t + 1], *one)[0])
            at += count
        answer = (turn, peer, experts, wired(np.array(rows), self.model.wire))
        if how == "at once":
            self.tier.answer(*answer)
        elif how == "soon":
            threading.Timer(0.01, self.tier.answer, answer).start()
        elif how == "short":
            self.tier.answer(*answer[:3], answer[3][:-2])
        elif how == "lost":
            threading.Timer(0.01, self.tier.answer, (turn, peer, experts, None)).start()
        else:
            assert how == "never"
            self.left.append(answer)
        return True


def with_peers(
    model: Model, how: dict[int, str], patience_ns: int, slots: int, **options
) -> tuple[Streamed, Peers]:
    made, peers = Streamed(model, slots, **options), Peers(model, how)
    peers.tier = made.streamer.use_peers(peers, patience_ns)
    peers.tier.hold(np.arange(model.tables.total, dtype=np.int32) % (len(how) + 1) - 1)
    return made, peers


@pytest.fixture(scope="module", params=["q8_0", "f32", "q8_0 bf16", "f32 f16"])
def model(request, tmp_path_factory):
    """Of a format; rows may be rounded to another."""
    name, *wire = request.param.split()
    form = formats.by_name(name)
    made = Model(tmp_path_factory.mktemp("remote"), [(form, form, 64, 96), (form, form, 64, 32)])
    made.wire = wire[0] if wire else "f32"
    return made


WAYS = {
    "at once": ({0: "at once", 1: "at once"}, LONG),
    "soon": ({0: "soon", 1: "at once"}, LONG),
    "one is busy": ({0: "busy", 1: "soon"}, LONG),
    "one never answers": ({0: "never", 1: "at once"}, NEVER),
    "one is lost": ({0: "lost", 1: "at once"}, LONG),
    "all are lost": ({0: "lost", 1: "lost"}, LONG),
    "one answers too little": ({0: "short", 1: "at once"}, NEVER),
    "can't be asked": ({0: "raises"}, LONG),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("slots", [1, EXPERTS])
def test_the_same_bytes(model, way, slots):
    how, patience = WAYS[way]
    made, peers = with_peers(model, how, patience, slots, prefetch=2)
    for seed in range(2):
        for tokens in (1, 7, MAX_TOKENS):
            for layer in (0, 1):
                made.check(layer, tokens, seed)
    assert peers.asked
    stats = made.streamer.stats()
    if "at once" in how.values() or "soon" in how.values():
        assert stats["peer_hits"] > 0
    if "never" in how.values() or "short" in how.values():
        assert stats["peer_late"] > 0
    made.streamer.settle()
    assert_idle(made.cache)


def test_only_what_is_not_here_is_asked_for(model):
    made, peers = with_peers(model, {0: "at once"}, LONG, model.tables.total)
    peers.tier.hold(np.full(model.tables.total, -1, np.int32))
    for tokens in (MAX_TOKENS, MAX_TOKENS):
        made.check(0, tokens)
    assert not peers.asked
    peers.tier.hold(np.zeros(model.tables.total, np.int32))
    made.check(0, MAX_TOKENS)
    assert not peers.asked
    made.cache.clear()
    made.check(0, MAX_TOKENS)
    assert peers.asked
    before = made.streamer.stats()["misses"]
    made.check(1, MAX_TOKENS)
    assert made.streamer.stats()["misses"] == before, "all of it came from the peer"


def test_an_answer_for_a_layer_that_is_over_changes_nothing(model):
    made, peers = with_peers(model, {0: "never"}, NEVER, 2)
    made.check(0, 7)
    for turn, peer, experts, rows in peers.left:
        peers.tier.answer(turn, peer, experts, b"\xff" * len(rows))
    peers.how = {0: "at once"}
    made.check(0, 7, 1)
    made.check(1, 5, 1)


def once_asked(peers: Peers, tell) -> threading.Thread:
    """Calls `tell` with what was not answered, a while behind the question."""

    def wait() -> None:
        while not peers.left:
            time.sleep(0.01)
        time.sleep(0.05)
        for each in peers.left:
            tell(*each)

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    return thread


def test_a_peer_answers_where_the_own_drive_fails(model, tmp_path):
    """The own drive is asked when the peer is late; as it fails, the peer is waited for."""
    reader = Reader(model.paths)
    made, peers = with_peers(model, {0: "never"}, NEVER, 2, reader=reader)
    peers.tier.hold(np.zeros(model.tables.total, np.int32))
    for file in range(2):
        reader.set_fault(file, 0, 1 << 40, error=5, times=1000)
    answering = once_asked(peers, peers.tier.answer)
    made.check(0, 3)
    answering.join()
    peers.left.clear()
    losing = once_asked(peers, lambda *answer: peers.tier.answer(*answer[:3], None))
    with pytest.raises(DeviceReadError):
        made.check(0, 3, 1)
    losing.join()
    assert_idle(made.cache)
    reader.clear_faults()
    peers.how = {0: "soon"}
    made.check(0, 3, 2)


def test_heat_is_the_share_of_tokens(model):
    made, peers = with_peers(model, {0: "at once"}, LONG, 4)
    x, _, weights = model.inputs(0, MAX_TOKENS)
    ids = np.tile(np.array([5, 2, 7], np.int32), (MAX_TOKENS, 1))
    for _ in range(8):
        made.forward(0, x, ids, weights)
    heat, tokens = peers.tier.heats()
    assert tokens == 8 * MAX_TOKENS
    assert sorted(np.argsort(heat)[-3:].tolist()) == [2, 5, 7]
    assert heat[5] == pytest.approx(1 - 0.98 ** (8 * MAX_TOKENS), rel=1e-3)
    assert heat[8:].max() == heat[0] == 0
    made, peers = with_peers(model, {0: "at once"}, LONG, 4)
    peers.tier.remember(heat)
    assert peers.tier.heats()[0].tobytes() == heat.tobytes()
    assert peers.tier.heats()[1] == 0


def test_who_would_be_later_than_the_drive_is_not_asked(model):
    """The slower one's experts are read first; what that takes counts for the other."""
    x, _, weights = model.inputs(0, 1)
    ids, holders = np.array([[0, 1, 2]], np.int32), np.zeros(model.tables.total, np.int32)
    holders[2] = 1
    exact = model.exact(KERNELS, 0, x, ids, weights)
    for times, asked, probed in (
        (3.5, [], [(0, 0, [0, 1]), (1, 0, [2])]),
        (2.5, [(0, 0, [0, 1])], [(1, 0, [2])]),  # turn 0 is nobody's
        (0.5, [(0, 0, [0, 1]), (1, 0, [2])], []),
    ):
        made, peers = with_peers(model, {0: "never", 1: "never"}, 0, EXPERTS)
        peers.tier.hold(holders)
        one_ns = made.cache.slot_bytes  # 1 ns a byte, before any is measured
        peers.expected = dict.fromkeys((0, 1), int(times * one_ns))
        assert made.forward(0, x, ids, weights).tobytes() == exact.tobytes()
        assert (sorted(peers.asked), sorted(peers.probed)) == (asked, probed)
        assert made.streamer.stats()["peer_skipped"] == sum(len(experts) for *_, experts in probed)


def test_what_a_slower_peer_has_is_read_ahead(model):
    """As it will be read anyway; from the first time on that it was not asked."""
    made, peers = with_peers(model, {0: "at once"}, 0, model.tables.total, prefetch=4)
    peers.tier.hold(np.zeros(model.tables.total, np.int32))
    x, _, weights = model.inputs(0, 1)
    ids, ahead = np.array([[0, 1, 2]], np.int32), np.array([[3, 4, 5]], np.int32)
    peers.expected = {0: LONG}
    before = made.streamer.stats()["prefetched"]
    made.forward(0, x, ids, weights, ahead)
    assert peers.probed
    assert made.streamer.stats()["prefetched"] == before + 3
    made.streamer.settle()
    peers.expected = {}
    made.forward(0, x, np.array([[5, 6, 7]], np.int32), weights)
    made.forward(0, x, np.array([[3, 4, 5]], np.int32), weights, np.array([[0, 1, 2]], np.int32))
    assert made.streamer.stats()["prefetched"] == before + 3, "it is asked again"


def test_a_peer_that_answers_soon_is_asked_however_quick_the_drive(model):
    made, peers = with_peers(model, {0: "at once"}, LONG, EXPERTS)
    peers.tier.hold(np.zeros(model.tables.total, np.int32))
    peers.expected = {0: LONG // 5}
    made.check(0, 3)
    assert peers.asked


def test_the_drive_is_measured_now_and_then(model):
    made, peers = with_peers(model, {0: "at once"}, LONG, 1)
    peers.tier.hold(np.zeros(model.tables.total, np.int32))
    x, ids, weights = model.inputs(0, 1)
    for _ in range(256):
        made.forward(0, x, ids, weights)
    assert made.streamer.stats()["misses"] == 0
    made.forward(0, x, ids, weights)
    assert made.streamer.stats()["misses"] == 1


def test_how_quick_the_drive_is(model):
    """A mean at first; of what ended while this thread computed only the bounds are known."""
    _, peers = with_peers(model, {0: "never"}, LONG, 4)
    tier = peers.tier
    for ns, unseen, expected in (
        (2000, 0, 2.0),
        (4000, 0, 3.0),
        (9000, 7000, 3.0),  # between 2 and 9: as before
        (7000, 0, 4.0),
        (9000, 0, 5.0),
        (3000, 2000, 5 - 2 / 6),  # at most 3
        (9000, 1000, 14 / 3 + (8 - 14 / 3) / 7),  # at least 8
    ):
        tier.note_read_py(ns, unseen, 1000)
        assert tier.read_ns == pytest.approx(expected)
    before = tier.read_ns
    for _ in range(5):
        tier.note_read_py(1000, 0, 1000)
    assert tier.read_ns < before
    before = tier.read_ns
    tier.note_read_py(11000, 0, 1000)
    assert tier.read_ns == pytest.approx(before + 0.1 * (11 - before)), "the last ten or so"


def test_each_time_it_reads_is_measured_by_itself(model):
    """With one slot an expert is read once the one before is computed: that is not the drive's time."""
    x, _, weights = model.inputs(0, 1)
    made, peers = with_peers(model, {0: "at once"}, LONG, 1)
    peers.tier.hold(np.full(model.tables.total, -1, np.int32))
    for call, ids in enumerate(([0, 1, 2], [3, 4, 5])):
        made.forward(0, x, np.array([ids], np.int32), weights)
        assert peers.tier.reads == made.streamer.stats()["misses"] == 3 * (call + 1)


def test_what_does_not_fit(model):
    _, peers = with_peers(model, {0: "at once"}, LONG, 4)
    with pytest.raises(ValueError, match="holders of 3 experts"):
        peers.tier.hold(np.zeros(3, np.int32))
    with pytest.raises(ValueError, match="heat of 3 experts"):
        peers.tier.remember(np.zeros(3, np.float32))
