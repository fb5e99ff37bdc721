"""Memory of the expert cache is touched ahead of its use: as much as asked for, less while others compute."""

from __future__ import annotations

import re
import time
from contextlib import suppress
from pathlib import Path

import numpy as np

from mer._ext.cache import ExpertCache

MIB = 1 << 20
SLOT, SLOTS, AHEAD = 2 * MIB, 24, 8 * MIB


def touched(cache: ExpertCache) -> int:
    """Bytes of the arena that take memory."""
    total, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if match := re.match(r"([0-9a-f]+)-[0-9a-f]+ ", line):
            inside = 0 <= int(match[1], 16) - cache.arena_address < cache.arena_bytes
        elif inside and line.startswith("Rss:"):
            total += int(line.split()[1]) << 10
    return total


def settled(cache: ExpertCache, least: int) -> int:
    """What is touched once it is at least that much and grows no more."""
    end, before = time.monotonic() + 60, -1
    while time.monotonic() < end:
        now = touched(cache)
        if now >= least and now == before:
            return now
        before = now
        time.sleep(0.05)
    raise AssertionError(f"only {before} of {least} bytes were touched")


def threads() -> set[Path]:
    """Those that touch memory; some may be of other tests, and about to end."""
    found = set()
    for task in Path("/proc/self/task").iterdir():
        with suppress(OSError):
            if (task / "comm").read_text() == "mer-prefault\n":
                found.add(task)
    return found


def test_so_much_is_touched_ahead_of_what_is_used() -> None:
    before = threads()
    cache = ExpertCache(SLOTS, SLOTS, SLOT)
    assert touched(cache) == 0
    assert cache.prefault(AHEAD)
    assert settled(cache, AHEAD) == AHEAD
    mine = threads() - before
    assert len(mine) == 1
    for expert in range(4):
        assert cache.acquire_py(expert) == ("miss", expert)  # from the lowest address on
        cache.slot_view(expert)[:] = expert
    assert settled(cache, 4 * SLOT + AHEAD) == 4 * SLOT + AHEAD
    for expert in range(4):
        assert (cache.slot_view(expert) == expert).all()
    for expert in range(4, SLOTS):
        cache.acquire_py(expert)
    del cache
    assert not threads() & mine


def test_all_of_a_small_arena_and_no_more() -> None:
    cache = ExpertCache(SLOTS, SLOTS, SLOT + 4096)
    assert cache.prefault(1 << 40)
    assert settled(cache, cache.arena_bytes) == cache.arena_bytes
    assert not np.frombuffer(cache, np.uint8).any()


def test_little_is_touched_while_it_is_held() -> None:
    cache = ExpertCache(SLOTS, SLOTS, SLOT)
    assert cache.prefault(12 * SLOT)
    settled(cache, 12 * SLOT)
    cache.hold_prefault_py(True)
    time.sleep(0.05)  # a page that it had begun
    for expert in range(4):
        cache.acquire_py(expert)
    time.sleep(0.1)
    assert touched(cache) == 12 * SLOT
    cache.acquire_py(4)
    assert settled(cache, 13 * SLOT) == 13 * SLOT
    cache.hold_prefault_py(False)
    assert settled(cache, 17 * SLOT) == 17 * SLOT
