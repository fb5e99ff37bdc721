"""What may be drafted behind each token of an answer: chains and trees of it. For bench.draft_trees."""

from __future__ import annotations

import json
import tempfile
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from attrs import define, field, frozen
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor

from mer.config import EngineConfig
from mer.train.fit import MainModel
from mer.train.head import HeadSizes, TorchHead
from mer.train.record import continued, hidden_states

PROMPT, LENGTH = 128, 256  # tokens of a window: of its prompt, and in all
DEPTH, BEAM, CHILDREN = 8, 6, 4  # how far candidates go, how many of a depth go on, into how many
SIZES = (1, 2, 3, 4, 5, 6, 8, 12, 16)
LOOKUPS = (5, 3, 2)  # tokens that must have stood there before
FADES, OLDER = 0.8, 0.5  # what prompt lookup thinks of one more token, and of one more earlier place
SHARP = 0.3  # temperature at which the head's chances are about those of greedy answers
CONFIG = EngineConfig(threads=1)


@define
class Node:
    """A candidate. chance: that it is right and so are those before it. ranks: its own behind theirs."""

    token: int
    chance: float
    ranks: tuple[int, ...]
    hit: bool  # whether the answer goes so


@define
class Start:
    """A place in an answer, behind the first `at` tokens of a window. nodes: candidates, the likeliest first.

    first: what the head thinks of each token that it knows, f32 [n].
    """

    window: int
    at: int
    nodes: list[Node] = field(factory=list)
    first: NDArray[np.float32] | None = None


@frozen
class Answers:
    """tokens i32 [N, L]; states f32 [N, L, hidden] of the main model; first: where answers begin."""

    tokens: NDArray[np.int32]
    states: NDArray[np.float32]
    first: int


def answers(
    model: Path, prompts: NDArray[np.int32], length: int, temperature: float
) -> tuple[Answers, Any, Any]:
    """And the model's spec and dense weights."""
    tokens = continued(model, CONFIG, prompts, length, [temperature] * len(prompts), lambda *_: None)
    with tempfile.TemporaryDirectory() as folder:
        states, spec, dense = hidden_states(model, CONFIG, tokens, Path(folder) / "states", lambda *_: None)
        return Answers(tokens, np.array(states), prompts.shape[1]), spec, dense


class TreeHead:
    """The draft head, unfolding candidates from all places of a window at once."""

    def __init__(self, path: Path, spec: Any, dense: Any) -> None:
        config = json.loads((path / "config.json").read_text())
        weights = load_file(path / "model.safetensors")
        self.main = MainModel(spec, dense, weights.pop("vocabulary").numpy())
        self._sizes = HeadSizes(**{name.name: config[name.name] for name in HeadSizes.__attrs_attrs__})
        self._head = TorchHead(self._sizes)
        self._head.load_state_dict(weights)
        self._inv_freq = self._head._inv_freq

    @torch.no_grad()
    def unfold(self, found: Answers, window: int, sharp: float) -> list[Start]:
        tokens, s = found.tokens[window], self._sizes
        given = torch.from_numpy(found.states[window])
        at = torch.arange(len(tokens) - 1)
        x, q, keys, values = self._begin(self.main.embed(tokens[1:]), given[:-1], at)
        distance = at[:, None] - at
        seen = (distance >= 0) & (distance < s.sliding_window)
        out = self._end(x, q, keys, values, seen, None, None)
        starts = [Start(window, p) for p in range(found.first + 1, len(tokens) - DEPTH)]
        # Of each branch: its start, chance, ranks, whether it is right, and what it leaves.
        branches = [(start, 1.0, (), True) for start in starts]
        left = out[[start.at - 2 for start in starts]]
        own_keys = own_values = None
        for depth in range(1, DEPTH + 1):
            thought = (self.main.logits(left) / sharp).softmax(-1)
            if depth == 1:
                for start, row in zip(starts, thought.numpy(), strict=True):
                    start.first = row
            chances, ids = thought.topk(CHILDREN)
            rows = zip(branches, chances.tolist(), self.main.vocabulary[ids].tolist(), strict=True)
            grown: dict[int, list[tuple[Node, int]]] = defaultdict(list)
            for parent, ((start, chance, ranks, hit), ps, children) in enumerate(rows):
                right = int(tokens[start.at + depth - 1])
                for rank, (p, token) in enumerate(zip(ps, children, strict=True)):
                    node = Node(token, chance * p, (*ranks, rank), hit and token == right)
                    start.nodes.append(node)
                    grown[start.at].append((node, parent))
            kept = []
            for start in starts:  # the chain goes on in any case
                best = sorted(grown[start.at], key=lambda each: (any(each[0].ranks), -each[0].chance))
                best = best[:1] + sorted(best[1:], key=lambda each: -each[0].chance)[: BEAM - 1]
                kept += [(start, *each) for each in best]
            parents = [parent for *_, parent in kept]
            branches = [(start, node.chance, node.ranks, node.hit) for start, node, _ in kept]
            embedded = self.main.embed(np.array([node.token for _, node, _ in kept]))
            first = torch.tensor([start.at - 2 for start, *_ in kept])
            x, q, k, v = self._begin(embedded, left[parents], first + depth)
            if own_keys is None:
                own_keys, own_values = k[:, None], v[:, None]
            else:
                own_keys = torch.cat([own_keys[parents], k[:, None]], 1)
                own_values = torch.cat([own_values[parents], v[:, None]], 1)
            distance = first[:, None] - at
            seen = (distance >= 0) & (distance + depth < s.sliding_window)
            left = self._end(x, q, keys, values, seen, own_keys, own_values)
        for start in starts:
            start.nodes.sort(key=lambda node: (-node.chance, len(node.ranks)))
        return starts

    def _begin(self, embedded: Tensor, states: Tensor, positions: Tensor) -> tuple[Tensor, ...]:
        """x, and q, k, v [M, heads, dim], of tokens with the states before them."""
        h, s = self._head, self._sizes
        x = h.eh_proj(torch.cat([h.enorm(embedded), h.hnorm(states)], -1))
        normed = h.input_layernorm(x)
        angles = (positions[:, None] * self._inv_freq)[:, None]

        def turn(y: Tensor) -> Tensor:
            a, b = y.chunk(2, -1)
            return torch.cat([a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()], -1)

        def heads(y: Tensor) -> Tensor:
            return y.view(len(x), -1, s.head_dim)

        group = s.num_attention_heads // s.num_key_value_heads
        q, k, v = (
            heads(part(normed)) for part in (h.self_attn.q_proj, h.self_attn.k_proj, h.self_attn.v_proj)
        )
        return x, turn(q), turn(k).repeat_interleave(group, 1), v.repeat_interleave(group, 1)

    def _end(
        self, x: Tensor, q: Tensor, keys: Tensor, values: Tensor, seen: Tensor, own_keys: Tensor | None,
        own_values: Tensor | None,
    ) -> Tensor:  # fmt: skip
        """The state that is left. keys, values: of the window; own: of the branch, [M, depth, heads, dim]."""
        h = self._head
        scores = torch.einsum("mhd,phd->mhp", q, keys).masked_fill(~seen[:, None], -torch.inf)
        if own_keys is not None:
            scores = torch.cat([scores, torch.einsum("mhd,mphd->mhp", q, own_keys)], -1)
        weights = (scores * q.shape[-1] ** -0.5).softmax(-1)
        mixed = torch.einsum("mhp,phd->mhd", weights[..., : len(keys)], values)
        if own_values is not None:
            mixed = mixed + torch.einsum("mhp,mphd->mhd", weights[..., len(keys) :], own_values)
        x = x + h.self_attn.o_proj(mixed.reshape(len(x), -1))
        x = x + h.mlp(h.post_attention_layernorm(x))
        return h.norm(x)


def look_up(tokens: list[int], window: int, first: int) -> list[Start]:
    """Candidates of prompt lookup: what followed where the last few tokens stood before, the latest first.

    Longer matches come before shorter ones; where there is none there is no start.
    """
    starts = []
    for at in range(first + 1, len(tokens) - DEPTH):
        nodes: dict[tuple[int, ...], float] = {}
        seen: set[int] = set()
        weight = 1.0
        for size in LOOKUPS:
            for end in range(at - 1, size - 1, -1):
                if tokens[end - size : end] == tokens[at - size : at] and end not in seen:
                    seen.add(end)
                    path = tuple(tokens[end + i % (at - end)] for i in range(DEPTH))
                    for depth in range(1, DEPTH + 1):
                        nodes[path[:depth]] = nodes.get(path[:depth], 0.0) + weight * FADES**depth
                    weight *= OLDER
        if nodes:
            starts.append(Start(window, at, _ranked(nodes, tokens[at:])))
    return starts


def _ranked(weights: dict[tuple[int, ...], float], answer: list[int]) -> list[Node]:
    """The nodes of a trie. The likeliest child is the first that was put in: the latest place's."""
    ranks: dict[tuple[int, ...], tuple[int, ...]] = {(): ()}
    children: dict[tuple[int, ...], int] = defaultdict(int)
    for path in weights:
        ranks[path] = (*ranks[path[:-1]], children[path[:-1]])
        children[path[:-1]] += 1
    nodes = [
        Node(path[-1], weight / 2, ranks[path], list(path) == answer[: len(path)])
        for path, weight in weights.items()
    ]
    return sorted(nodes, key=lambda node: (-node.chance, len(node.ranks)))


Shape = Callable[[list[Start], int], list[list[Node]]]


def chain(starts: list[Start], size: int) -> list[list[Node]]:
    return [_behind(start, (0,) * size) for start in starts]


def two(starts: list[Start], size: int) -> list[list[Node]]:
    other = (1,) + (0,) * (size // 2 - 1) if size > 1 else ()
    return [_behind(start, (0,) * (size - size // 2)) + _behind(start, other) for start in starts]


def confident(starts: list[Start], size: int) -> list[list[Node]]:
    chains = chain(starts, DEPTH)
    chances = sorted((node.chance for nodes in chains for node in nodes), reverse=True)
    least = chances[min(size * len(starts), len(chances)) - 1]
    return [[node for node in nodes if node.chance >= least] for nodes in chains]


def static(starts: list[Start], size: int) -> list[list[Node]]:
    right = np.zeros((DEPTH + 1, len(starts) + 1))
    for node in (node for start in starts for node in start.nodes if node.hit):
        right[len(node.ranks), node.ranks[-1]] += 1
    reached = [len(starts), *right[1:].sum(1)]
    worth = {}
    for ranks in {node.ranks for start in starts for node in start.nodes}:
        worth[ranks] = np.prod([right[d, r] / max(reached[d - 1], 1) for d, r in enumerate(ranks, 1)])
    best = set(sorted(worth, key=lambda ranks: (-worth[ranks], len(ranks)))[:size])
    return [[node for node in start.nodes if node.ranks in best] for start in starts]


def tree(starts: list[Start], size: int) -> list[list[Node]]:
    return [start.nodes[:size] for start in starts]


SHAPES: dict[str, Shape] = {f.__name__: f for f in (chain, confident, two, static, tree)}


def _behind(start: Start, path: tuple[int, ...]) -> list[Node]:
    """The nodes on that path of ranks."""
    found = [node for node in start.nodes if node.ranks == path[: len(node.ranks)]]
    return sorted(found, key=lambda node: len(node.ranks))


def rejection(
    found: Answers, head: TreeHead, starts: list[Start], temperature: float, draws: int = 16
) -> dict[int, tuple[float, float]]:
    """By number of first tokens: the chance that one is right, of the likeliest ones and of drawn ones."""
    rng = np.random.default_rng(0)
    chances: dict[int, list[tuple[float, float]]] = defaultdict(list)
    for start in starts:
        state = torch.from_numpy(found.states[start.window, start.at - 1])
        target = (head.main.all_logits(state) / temperature).softmax(-1).double().numpy()
        firsts = [node for node in start.nodes if len(node.ranks) == 1]
        likeliest = [target[node.token] for node in firsts]
        ids, q = head.main.vocabulary.numpy(), np.asarray(start.first, np.float64)
        q /= q.sum()
        accepted = np.zeros(CHILDREN)
        for _ in range(draws):
            p, rest, lost = target[ids].copy(), q.copy(), 1.0
            outside = 1.0 - p.sum()
            for k, token in enumerate(rng.choice(len(q), CHILDREN, replace=False, p=q)):
                total = p.sum() + outside
                accepts = min(1.0, p[token] / total / rest[token])
                accepted[k:] += lost * accepts / draws
                lost *= 1 - accepts
                p, outside = np.maximum(p / total - rest, 0.0), outside / total
                rest[token] = 0.0
                rest /= rest.sum()
        for k in range(CHILDREN):
            chances[k + 1].append((sum(likeliest[: k + 1]), accepted[k]))
    return {k: tuple(np.mean(each, 0).tolist()) for k, each in chances.items()}
