"""KV blocks: who holds which, and what those that nobody holds are still good for."""

from __future__ import annotations

import struct
from collections import OrderedDict
from collections.abc import Callable, Sequence
from hashlib import blake2b
from typing import Final

from mer.model.kv import BLOCK

_TOKENS: Final = struct.Struct(f"<{BLOCK}i")


def blocks_for(tokens: int) -> int:
    """KV blocks that this many tokens take."""
    return -(-tokens // BLOCK)


def extend_keys(keys: list[bytes], tokens: Sequence[int], root: bytes = b"") -> None:
    """Append the keys of the full blocks of `tokens` that are not in `keys` yet.

    A block's key stands for its tokens and all before them: the hash of the key before it (`root` at the
    beginning) and of its own tokens.
    """
    for at in range(len(keys), len(tokens) // BLOCK):
        content = _TOKENS.pack(*tokens[at * BLOCK : (at + 1) * BLOCK])
        keys.append(blake2b((keys[-1] if keys else root) + content, digest_size=16).digest())


class BlockPool:
    """KV blocks by number.

    A full block may get a key, and is then found and shared by it. It is never written again while it has
    one, so nothing needs to be copied: whoever goes on behind a shared prefix does so in a block of its own.
    Blocks with a key that nobody holds keep their content until their memory is needed, the one that was
    given back first goes first. `dropped(key, block)` is called just before that.
    """

    def __init__(self, n_blocks: int, dropped: Callable[[bytes, int], None] | None = None) -> None:
        self.n_blocks = n_blocks
        self.dropped = dropped
        self._holders = [0] * n_blocks
        self._keys: list[bytes | None] = [None] * n_blocks
        self._found: dict[bytes, int] = {}
        self._blank = list(range(n_blocks - 1, -1, -1))
        self._kept: OrderedDict[int, None] = OrderedDict()

    @property
    def free(self) -> int:
        """Blocks that nobody holds, those with content included."""
        return len(self._blank) + len(self._kept)

    @property
    def cached(self) -> int:
        """Blocks that nobody holds and that have content."""
        return len(self._kept)

    def __contains__(self, key: bytes) -> bool:
        return key in self._found

    def match(self, keys: Sequence[bytes]) -> int:
        """How many of the keys, from the first on, are here."""
        return next((i for i, key in enumerate(keys) if key not in self._found), len(keys))

    def share(self, blocks: list[int], keys: Sequence[bytes]) -> None:
        """Append the blocks with these keys, which are here, to someone's `blocks`."""
        for key in keys:
            block = self._found[key]
            self._hold(block)
            blocks.append(block)

    def extend(self, blocks: list[int], tokens: int) -> bool:
        """Make someone's `blocks` enough for `tokens` tokens; False, and nothing, when there are too few."""
        missing = blocks_for(tokens) - len(blocks)
        if missing > self.free:
            return False
        blocks += [self._take() for _ in range(missing)]
        return True

    def spare(self, count: int) -> list[int]:
        """Up to so many blocks, which are now someone's."""
        return [self._take() for _ in range(min(count, self.free))]

    def publish(self, blocks: list[int], at: int, key: bytes) -> None:
        """Block number `at` of someone's is full; where the same is here already, that takes its place."""
        mine, known = blocks[at], self._found.get(key)
        if known is None:
            self._found[key] = mine
            self._keys[mine] = key
        elif known != mine:
            self._hold(known)
            blocks[at] = known
            self._give_back(mine)

    def forget(self, key: bytes) -> None:
        """Nobody will want the block with this key; if somebody holds it, it stays."""
        block = self._found.get(key)
        if block is not None and not self._holders[block]:
            del self._found[key], self._kept[block]
            self._keys[block] = None
            self._blank.append(block)

    def clear(self) -> None:
        """What is in the blocks is lost; nobody may hold one with a key."""
        for key, _ in self.kept():
            self.forget(key)

    def release(self, blocks: list[int]) -> None:
        """Nobody needs someone's `blocks` any more. Of a prefix the end will go first."""
        for block in reversed(blocks):
            self._give_back(block)
        blocks.clear()

    def kept(self) -> list[tuple[bytes, int]]:
        """Keys and numbers of the blocks that nobody holds and that have content, the next to go first."""
        return [(self._keys[block] or b"", block) for block in self._kept]

    def _hold(self, block: int) -> None:
        if not self._holders[block]:
            del self._kept[block]
        self._holders[block] += 1

    def _give_back(self, block: int) -> None:
        self._holders[block] -= 1
        if self._holders[block]:
            return
        if self._keys[block] is None:
            self._blank.append(block)
        else:
            self._kept[block] = None

    def _take(self) -> int:
        if self._blank:
            block = self._blank.pop()
        else:
            block, _ = self._kept.popitem(last=False)
            key = self._keys[block]
            assert key is not None
            if self.dropped is not None:
                self.dropped(key, block)
            del self._found[key]
            self._keys[block] = None
        self._holders[block] = 1
        return block
