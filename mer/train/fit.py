"""Fitting a draft head to what the main model said, and how often it would have been right."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import numpy as np
import torch
from attrs import frozen
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 (everybody's name for it)

from mer.model.dense import DenseWeights
from mer.model.spec import ModelSpec
from mer.train.head import HeadSizes, TorchHead
from mer.weights import formats

# Weight of the distance between what a pass leaves and the main model's state (EAGLE: smooth L1).
_STATES: Final = 0.1
_WARM_UP: Final = 0.05  # of all steps
_CLIP: Final = 1.0


@frozen(eq=False)
class Recorded:
    """Windows of text, and the main model's states behind each token: i32 [N, L], f32 [N, L, hidden]."""

    tokens: NDArray[np.int32]
    states: NDArray[np.float32]


class MainModel:
    """What a head shares with it: embedding and output head, in f32."""

    def __init__(self, spec: ModelSpec, dense: DenseWeights, vocabulary: NDArray[np.int32] | None) -> None:
        """vocabulary: the tokens that can be drafted, ascending; None: all."""
        head = dense.model["head"]
        self._spec, self._embedding = spec, dense.embedding
        self._whole = torch.from_numpy(formats.by_id(head.format).dequantize(head.data))
        self._whole_bias = torch.from_numpy(dense.model.get("head_bias", np.zeros(spec.vocab, np.float32)))
        self.vocabulary = torch.arange(spec.vocab)
        if vocabulary is not None:
            self.vocabulary = torch.from_numpy(vocabulary.astype(np.int64))
        self._output = self._whole[self.vocabulary]

    def embed(self, tokens: NDArray[np.int32]) -> Tensor:
        """f32 [..., hidden]."""
        data = self._embedding.data[tokens]
        found = formats.by_id(self._embedding.format).dequantize(data)
        return torch.from_numpy(found * np.float32(self._spec.embedding_scale))

    def all_logits(self, states: Tensor) -> Tensor:
        """f32 [..., vocab] of every token."""
        return self._capped(states @ self._whole.T * self._spec.logit_scale + self._whole_bias)

    def logits(self, states: Tensor) -> Tensor:
        """f32 [..., n] of those that can be drafted."""
        bias = self._whole_bias[self.vocabulary]
        return self._capped(states @ self._output.T * self._spec.logit_scale + bias)

    def _capped(self, logits: Tensor) -> Tensor:
        cap = self._spec.logit_cap
        return logits if cap is None else cap * (logits / cap).tanh()


def often(main: MainModel, recorded: Recorded, count: int) -> NDArray[np.int32]:
    """Those `count` tokens, ascending, to which the main model gives the most in these texts."""
    total = torch.zeros(len(main.vocabulary), dtype=torch.float64)
    with torch.no_grad():
        for states in recorded.states:
            total += main.all_logits(torch.from_numpy(np.array(states))).softmax(-1).sum(0)
    return np.sort(total.topk(count).indices.numpy()).astype(np.int32)


def fit(
    sizes: HeadSizes,
    main: MainModel,
    recorded: Recorded,
    *,
    steps: int,
    batch: int,
    passes: int,
    rate: float,
    seed: int,
    progress: Callable[[int, float], None],
) -> TorchHead:
    """A head that expects what the main model does, `passes` tokens far.

    batch: windows of a step. rate: the highest learning rate; it rises, then falls to zero as a cosine.
    progress: told the number of steps and the last one's loss.
    """
    torch.manual_seed(seed)
    head = TorchHead(sizes)
    rng = np.random.default_rng(seed)
    optimisers: tuple[torch.optim.Optimizer, ...] = (
        torch.optim.Muon(
            [p for p in head.parameters() if p.dim() == 2], lr=rate, adjust_lr_fn="match_rms_adamw"
        ),
        torch.optim.AdamW([p for p in head.parameters() if p.dim() == 1], lr=rate, weight_decay=0.0),
    )
    first = max(1, round(_WARM_UP * steps))
    for step in range(steps):
        done = (step - first) / max(steps - first, 1)
        factor = (step + 1) / first if step < first else 0.5 * (1 + np.cos(np.pi * done))
        for group in (group for each in optimisers for group in each.param_groups):
            group["lr"] = rate * factor
        chosen = rng.choice(len(recorded.tokens), min(batch, len(recorded.tokens)), replace=False)
        loss = _loss(head, main, recorded.tokens[chosen], recorded.states[chosen], passes)
        head.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(head.parameters(), _CLIP)
        for each in optimisers:
            each.step()
        progress(step + 1, float(loss.detach()))
    return head


def _loss(
    head: TorchHead, main: MainModel, tokens: NDArray[np.int32], states: NDArray[np.float32], passes: int
) -> Tensor:
    """The mean over passes of: cross-entropy to the main model's distribution, and distance of states.

    A token that can't be drafted counts nothing.
    """
    given = torch.from_numpy(np.ascontiguousarray(states))
    with torch.no_grad():
        # What comes behind each position but the first, by the main model.
        whole = main.all_logits(given[:, 1:])
        wanted = (main.logits(given[:, 1:]) - whole.logsumexp(-1, keepdim=True)).exp()
    total = torch.zeros(())
    for number, left in enumerate(head.passes(main.embed(tokens[:, 1:]), given[:, :-1], passes)):
        guess = main.logits(left[:, number:]).log_softmax(-1)
        total = total - (wanted[:, number:] * guess).sum(-1).mean()
        total = total + _STATES * F.smooth_l1_loss(left[:, number:], given[:, 1 + number :])
    return total / passes


def acceptance(head: TorchHead, main: MainModel, recorded: Recorded, start: int, passes: int) -> list[float]:
    """How often the first, second ... drafted token is right where those before it were.

    recorded: greedy answers, that begin at position `start` of each window.
    """
    right, tried = np.zeros(passes), np.zeros(passes)
    with torch.no_grad():
        for tokens, states in zip(recorded.tokens, recorded.states, strict=True):
            given = torch.from_numpy(np.array(states))[None]
            embedded = main.embed(tokens[None, 1:])
            alive: Tensor | None = None
            for number, left in enumerate(head.passes(embedded, given[:, :-1], passes)):
                # At position p the token at p + 2 is drafted.
                guess = main.vocabulary[main.logits(left[0, :-1]).argmax(-1)].numpy()
                hit = torch.from_numpy(guess == tokens[2:])
                # A draft that began `number` positions before, its first token being one of the answer.
                began = torch.arange(len(hit)) - number >= start - 2
                before = began if alive is None else torch.roll(alive, 1) & began
                alive = hit & before
                right[number] += int(alive.sum())
                tried[number] += int(before.sum())
    return [float(r / t) if t else 0.0 for r, t in zip(right, tried, strict=True)]
