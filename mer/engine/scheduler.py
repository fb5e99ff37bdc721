"""Who is computed in the next step: pure logic, no input or output, no clock."""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable, Iterable
from itertools import takewhile
from typing import Final, Literal, Protocol

from attrs import Factory, define, field, frozen

from mer.engine.blocks import BlockPool, extend_keys
from mer.engine.states import WORTHWHILE, Images, StatePool
from mer.model.kv import BLOCK

# One step of priority is worth as much as coming this many requests earlier: nobody waits for ever.
AGEING: Final = 64


@define(eq=False)
class Sequence:
    """What the scheduler knows of a request. tokens: the prompt, then the answer so far.

    wants: logits after the last token, after each token (both for its answer), or the hidden states alone.
    priority: lower comes sooner. deadline: when it is to be given up, by the clock of who asks for that.
    computed: leading tokens whose keys and values are in `blocks`. cached: how many of them others had
    computed before its first step; None until then. keys: of its full blocks (see mer.engine.blocks).
    fetched: whether the store was asked for them. images: of its state, for models that have such.
    """

    tokens: list[int]
    wants: Literal["last", "all", "hidden"] = "last"
    priority: int = 0
    deadline: float | None = None
    computed: int = 0
    cached: int | None = None
    blocks: list[int] = Factory(list)
    keys: list[bytes] = Factory(list)
    fetched: bool = False
    images: Images = Factory(Images)
    place: tuple[int, int] = (0, 0)

    @property
    def pending(self) -> int:
        """Tokens still to be computed: 1 while decoding."""
        return len(self.tokens) - self.computed

    @property
    def last_block(self) -> int:
        """How many tokens there are in full blocks, without the last token, which is always computed."""
        return (len(self.tokens) - 1) // BLOCK * BLOCK


@frozen(eq=False)
class Load:
    """Blocks to be read from the store: those with these keys, into these blocks."""

    keys: list[bytes]
    blocks: list[int]


class Store(Protocol):
    """Where blocks are kept that memory has no room for; mer.engine.prefix_store is one."""

    def __contains__(self, key: bytes) -> bool: ...


@define(eq=False)
class Chunk:
    """The next `count` tokens of a sequence, to be computed in one step, and behind them a draft.

    start: how many are computed before. width: how many this computes. last: whether the token after `count`
    is not known yet. rows: its last tokens whose logits are wanted. All as when the step was formed.
    """

    sequence: Sequence
    count: int
    draft: tuple[int, ...] = ()
    start: int = field(init=False)
    width: int = field(init=False)
    last: bool = field(init=False)
    rows: int = field(init=False)

    def __attrs_post_init__(self) -> None:
        sequence, drafted = self.sequence, len(self.draft)
        self.start = sequence.computed
        self.width = self.count + drafted
        self.last = self.start + self.count == len(sequence.tokens)
        if sequence.wants == "last":
            self.rows = self.last + drafted
        else:
            self.rows = self.count if sequence.wants == "all" else 0

    @property
    def tokens(self) -> list[int]:
        """What it computes."""
        return [*self.sequence.tokens[self.start : self.start + self.count], *self.draft]


def _place(sequence: Sequence) -> tuple[int, int]:
    return sequence.place


class Scheduler:
    """Forms steps: one token of each running sequence first, then chunks of prompts, in order.

    The order is that of arrival, where each step of priority counts as AGEING arrivals. A prompt is admitted
    when there are blocks for all of it. When a running sequence needs a block and there is none, the last
    one in order gives up its own and is computed again later: the same bytes come out, since no result
    depends on how a prompt was cut. A waiting one takes the place of a running one only if that has less
    priority. Every sequence must fit into n_blocks by itself.

    Work whose experts are resident is not preferred: every running sequence is in every step, and which
    experts it needs is known only while the step runs, layer by layer.

    Prefixes are shared through the pool's keys. One that begins with what a running one is just computing, or
    with what is being read from the store, waits for that instead of computing it as well; others go first
    meanwhile. Logits of earlier tokens need all of a prompt computed: who wants them shares nothing.

    Drafts are verified in steps without prompts, with the rows of logits, and in the blocks, that nobody else
    needs. A recurrent state is committed once it is known how much of the draft is right.

    Where layers have a recurrent state, a prefix is of use only up to where there is a snapshot of it, too:
    at the last full block of a prompt, at the latest one of an answer, and at the end of a beginning that
    several have, from the second of them on.
    """

    def __init__(
        self,
        *,
        n_blocks: int,
        step_tokens: int,
        max_running: int,
        rows: int | None = None,
        prefix_cache: bool = True,
        root: bytes = b"",
        store: Store | None = None,
        n_images: int = 0,
    ) -> None:
        """root: what all keys stand on. rows: tokens of a step whose logits can be had; None: max_running.

        n_images: of recurrent states, at least two for each of max_running; 0 for a model without.
        """
        self.pool = BlockPool(n_blocks)
        self.states = StatePool(n_images)
        self.step_tokens = step_tokens
        self.max_running = min(max_running, step_tokens)
        self.rows = self.max_running if rows is None else rows
        # All three by place in the order.
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.paused: list[Sequence] = []
        self.hold = False  # nobody new is admitted
        self.preemptions = 0
        self.hit_tokens = 0
        self.query_tokens = 0
        self._prefix_cache = prefix_cache
        self._root = root
        self.store = store
        self._loads: list[Load] = []
        self._loading: set[bytes] = set()
        self._wanted: set[Load] = set()  # loads that are to be published
        self._arrivals = 0
        self._deadlines: dict[Sequence, float] = {}

    def __bool__(self) -> bool:
        """Whether anybody is here, or blocks are on their way."""
        return bool(self.waiting or self.running or self.paused or self._loading)

    @property
    def next_deadline(self) -> float | None:
        return min(self._deadlines.values(), default=None)

    def add(self, sequence: Sequence) -> None:
        sequence.place = (self._arrivals + AGEING * sequence.priority, self._arrivals)
        self._arrivals += 1
        if sequence.deadline is not None:
            self._deadlines[sequence] = sequence.deadline
        self._find_keys(sequence)
        insort(self.waiting, sequence, key=_place)

    def remove(self, sequence: Sequence) -> None:
        """It has ended, or nobody wants it any more."""
        for place in (self.running, self.waiting, self.paused):
            if sequence in place:
                place.remove(sequence)
        self._deadlines.pop(sequence, None)
        self.states.release(sequence.images)
        self.pool.release(sequence.blocks)

    def expired(self, now: float) -> list[Sequence]:
        """Those whose deadline has come; they are still here."""
        return [sequence for sequence, deadline in self._deadlines.items() if deadline <= now]

    def pause(self, sequence: Sequence) -> None:
        """Not to be computed for now. It keeps its blocks as long as nobody else needs them."""
        (self.running if sequence in self.running else self.waiting).remove(sequence)
        insort(self.paused, sequence, key=_place)

    def resume(self, sequence: Sequence) -> None:
        """It may go on, when its turn comes."""
        if sequence in self.paused:
            self.paused.remove(sequence)
            insort(self.waiting, sequence, key=_place)

    def schedule(self, prompt_room: Callable[[], int] | None = None) -> list[Chunk]:
        """The next step; empty when nobody can be computed now. Between two calls the step is committed.

        prompt_room: gives the most tokens of prompts beside the next tokens of others, unless a prompt has
        priority over all of those; None: as many as fit.
        """
        preempted = self.preemptions
        for sequence in list(self.running):
            if sequence.pending == 1 and len(sequence.tokens) > BLOCK * len(sequence.blocks):
                self._grow(sequence)
        if self.preemptions == preempted:
            self._admit()
        decoding: list[Sequence] = []
        prompts: list[Sequence] = []
        for sequence in self.running:
            (decoding if sequence.pending == 1 else prompts).append(sequence)
        chunks = [Chunk(sequence, 1) for sequence in decoding]
        if prompts:
            self._add_prompts(chunks, prompts, prompt_room)
        if self.states:
            self._reserve_states(chunks)
        return chunks

    def _add_prompts(
        self, chunks: list[Chunk], prompts: list[Sequence], prompt_room: Callable[[], int] | None
    ) -> None:
        """As much of prompts as there is room for beside the chunks of those that decode."""
        room = self.step_tokens - len(chunks)
        rows = self.rows - sum(chunk.rows for chunk in chunks)
        if prompt_room is not None:
            first = min(each.priority for each in prompts)
            if any(chunk.sequence.priority <= first for chunk in chunks):
                room = min(room, prompt_room())
        for sequence in prompts:
            count = min(room, sequence.pending)
            if 0 < sequence.images.branch - sequence.computed < count:
                count = sequence.images.branch - sequence.computed  # where a snapshot is to be left
            if sequence.wants == "all":
                count = min(count, rows)
            elif sequence.wants == "last" and count == sequence.pending and not rows:
                count -= 1
            if count:
                chunks.append(Chunk(sequence, count))
                room -= count
                rows -= chunks[-1].rows

    def draft_room(self, chunks: list[Chunk]) -> int:
        """How many drafted tokens this step could verify."""
        rows = self.rows
        for chunk in chunks:
            if chunk.sequence.pending > 1:
                return 0
            rows -= chunk.rows
        return min(self.step_tokens - len(chunks), rows)

    def with_drafts(self, chunks: list[Chunk], drafts: Iterable[list[int]]) -> list[Chunk]:
        """The same step, in which as much of each one's draft is verified as there is room for."""
        found: list[Chunk] = []
        room = self.draft_room(chunks)
        for chunk, tokens in zip(chunks, drafts, strict=True):
            sequence, draft = chunk.sequence, tuple(tokens[:room])
            if draft and self.pool.extend(sequence.blocks, len(sequence.tokens) + len(draft)):
                room -= len(draft)
                chunk = Chunk(sequence, chunk.count, draft)
            found.append(chunk)
        return found

    def _reserve_states(self, chunks: list[Chunk]) -> None:
        for chunk in chunks:
            while not self.states.reserve(chunk.sequence.images):
                holder = self._holder(self.waiting)
                assert holder is not None, "two images for each that runs"
                self._strip(holder)
        for chunk in chunks:
            sequence, end = chunk.sequence, chunk.sequence.last_block
            if sequence.keys and sequence.computed < end < sequence.computed + chunk.count:
                self.states.keep(sequence.images, end)

    def take_loads(self) -> list[Load]:
        """What is to be read from the store since the last call; `loaded` must follow for each."""
        loads, self._loads = self._loads, []
        return loads

    def loaded(self, load: Load, count: int) -> None:
        """The first `count` blocks are there, the others could not be read."""
        for at in range(count if load in self._wanted else 0):
            self.pool.publish(load.blocks, at, load.keys[at])
        self._wanted.discard(load)
        self._loading.difference_update(load.keys)
        self.pool.release(load.blocks)

    def restart(self) -> None:
        """Keys and values are lost, also what is being read: whoever has begun is computed again."""
        self._wanted.clear()
        for sequence in list(self.running):
            self._set_back(sequence)
        for sequence in (*self.waiting, *self.paused):
            self._strip(sequence)
        self.pool.clear()

    def commit(self, chunks: list[Chunk]) -> None:
        """The step has been computed."""
        for chunk in chunks:
            self.advance(chunk.sequence, chunk.count)
            if self.states and not chunk.draft:
                self.commit_state(chunk)

    def advance(self, sequence: Sequence, count: int) -> None:
        """Its next `count` tokens have been computed; those of a draft count once they turn out right."""
        full = sequence.computed // BLOCK
        sequence.computed += count
        if sequence.computed // BLOCK == full:
            return
        self._find_keys(sequence)
        for at in range(full, min(sequence.computed // BLOCK, len(sequence.keys))):
            self.pool.publish(sequence.blocks, at, sequence.keys[at])

    def commit_state(self, chunk: Chunk) -> None:
        """`next` has the state behind its computed tokens; of a draft, behind those that are right."""
        sequence = chunk.sequence
        images, keys = sequence.images, sequence.keys
        self.states.commit(images, keys[images.kept_at // BLOCK - 1] if images.kept else None)
        full, rest = divmod(sequence.computed, BLOCK)
        branches = sequence.computed == images.branch
        if not rest and (branches or sequence.computed >= sequence.last_block) and full <= len(keys):
            self.states.snapshot(images, keys[full - 1], answering=chunk.count == 1 and not branches)

    def _find_keys(self, sequence: Sequence) -> None:
        if self._prefix_cache and sequence.wants == "last":
            extend_keys(sequence.keys, sequence.tokens, self._root)

    def _grow(self, sequence: Sequence) -> None:
        """Blocks for its next token, taken from the last in order if need be, which may be itself."""
        while sequence in self.running and not self.pool.extend(sequence.blocks, len(sequence.tokens)):
            holder = self._holder(self.waiting)
            if holder is None:
                holder = self.running[-1]
                self._set_back(holder)
            self._strip(holder)

    def _admit(self) -> None:
        for sequence in list(self.waiting):
            if self.hold and sequence.cached is None:
                continue
            full = len(self.running) == self.max_running
            if full and not self._yields(self.running[-1], sequence):
                break
            self._share(sequence)
            if self._is_coming(sequence) or self._fetch(sequence):
                continue
            if full:
                self._set_back(self.running[-1])
            if not self._take_blocks(sequence):
                break
            self.waiting.remove(sequence)
            insort(self.running, sequence, key=_place)
            if sequence.cached is None:
                sequence.cached = sequence.computed
                self.hit_tokens += sequence.computed
                self.query_tokens += len(sequence.tokens) if self._prefix_cache else 0

    def _is_coming(self, sequence: Sequence) -> bool:
        """Whether a running one is just computing the first block that it would have to compute.

        With recurrent states: whether it will leave a snapshot that this one can go on from.
        """
        if self.states:
            return any(
                max(other.computed, sequence.computed) < other.last_block <= sequence.last_block
                and other.keys[other.last_block // BLOCK - 1] == sequence.keys[other.last_block // BLOCK - 1]
                for other in self.running
                if other.keys and sequence.keys
            )
        at = len(sequence.blocks)
        missing = self._missing(sequence)
        return bool(missing) and (
            missing[0] in self._loading
            or any(
                other.keys[at : at + 1] == missing[:1] and other.computed < (at + 1) * BLOCK
                for other in self.running
            )
        )

    def _fetch(self, sequence: Sequence) -> bool:
        """Whether the store is now asked for blocks that it would have to compute; it is, once."""
        if self.store is None or sequence.fetched:
            return False
        sequence.fetched = True
        keys = list(takewhile(self.store.__contains__, self._missing(sequence)))
        blocks = self.pool.spare(len(keys))
        if not blocks:
            return False
        load = Load(keys[: len(blocks)], blocks)
        self._loads.append(load)
        self._wanted.add(load)
        self._loading.update(load.keys)
        return True

    def _share(self, sequence: Sequence) -> None:
        """Take up what is in memory of the beginning of one that has computed nothing itself."""
        keys = self._missing(sequence)
        keys = keys[: self.pool.match(keys)]
        if self.states:
            common = len(keys)
            keys = keys[: self.states.match(keys, common)]
            self._find_branch(sequence, len(sequence.blocks) + common, common - len(keys))
            if keys:
                self.states.resume(sequence.images, keys[-1])
        self.pool.share(sequence.blocks, keys)
        sequence.computed += len(keys) * BLOCK

    @staticmethod
    def _find_branch(sequence: Sequence, blocks: int, new: int) -> None:
        """Its first `blocks` are those of earlier prompts, too; the last `new` lead to no snapshot."""
        branch = blocks * BLOCK
        sequence.images.branch = branch if new >= WORTHWHILE and branch < sequence.last_block else 0

    @staticmethod
    def _missing(sequence: Sequence) -> list[bytes]:
        """Keys behind its blocks, if those are all full: all that it need not compute but the last token."""
        at = len(sequence.blocks)
        if sequence.computed < at * BLOCK:
            return []
        return sequence.keys[at : (len(sequence.tokens) - 1) // BLOCK]

    @staticmethod
    def _yields(running: Sequence, waiting: Sequence) -> bool:
        return running.priority > waiting.priority and running.place > waiting.place

    def _take_blocks(self, sequence: Sequence) -> bool:
        """Blocks for all its tokens: free ones, or those of others behind it."""
        while not self.pool.extend(sequence.blocks, len(sequence.tokens)):
            holder = self._holder([other for other in self.waiting if other.place > sequence.place])
            if holder is None:
                if not (self.running and self._yields(self.running[-1], sequence)):
                    return False
                holder = self.running[-1]
                self._set_back(holder)
            self._strip(holder)
        return True

    def _holder(self, waiting: list[Sequence]) -> Sequence | None:
        """The last in order that holds blocks and is not computed now: of the paused ones, then of these."""
        for place in (self.paused, waiting):
            for sequence in reversed(place):
                if sequence.blocks:
                    return sequence
        return None

    def _set_back(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        insort(self.waiting, sequence, key=_place)
        self.preemptions += 1

    def _strip(self, sequence: Sequence) -> None:
        self.states.release(sequence.images)
        self.pool.release(sequence.blocks)
        sequence.computed, sequence.fetched = 0, False
