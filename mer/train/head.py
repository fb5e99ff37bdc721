"""The draft head in torch, and how several of its passes are computed at once."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from attrs import frozen
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 (everybody's name for it)

from mer.model.draft_head import inverse_frequencies


@frozen
class HeadSizes:
    """A head's shape, by the names of its config.json."""

    hidden_size: int
    vocab_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int
    sliding_window: int
    rope_theta: float
    rms_norm_eps: float


class Attention(nn.Module):
    """Projections of grouped-query attention, by the names of the file."""

    def __init__(self, s: HeadSizes) -> None:
        super().__init__()
        q, kv = s.num_attention_heads * s.head_dim, s.num_key_value_heads * s.head_dim
        self.q_proj = nn.Linear(s.hidden_size, q, bias=False)
        self.k_proj = nn.Linear(s.hidden_size, kv, bias=False)
        self.v_proj = nn.Linear(s.hidden_size, kv, bias=False)
        self.o_proj = nn.Linear(q, s.hidden_size, bias=False)


class FeedForward(nn.Module):
    """A gated block."""

    def __init__(self, s: HeadSizes) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(s.hidden_size, s.intermediate_size, bias=False)
        self.up_proj = nn.Linear(s.hidden_size, s.intermediate_size, bias=False)
        self.down_proj = nn.Linear(s.intermediate_size, s.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return found


class TorchHead(nn.Module):
    """A head to be trained; its parameters have the names and shapes of the tensors in its file."""

    def __init__(self, s: HeadSizes) -> None:
        super().__init__()
        self.sizes = s
        norms = [nn.RMSNorm(s.hidden_size, s.rms_norm_eps) for _ in range(5)]
        self.enorm, self.hnorm, self.norm, self.input_layernorm, self.post_attention_layernorm = norms
        self.eh_proj = nn.Linear(2 * s.hidden_size, s.hidden_size, bias=False)
        self.self_attn, self.mlp = Attention(s), FeedForward(s)
        self._inv_freq = torch.tensor(inverse_frequencies(s.rope_theta, s.head_dim))

    def passes(self, embedded: Tensor, states: Tensor, count: int) -> Iterator[Tensor]:
        """What the first, second ... drafted token's pass leaves at every position, each f32 [N, L, hidden].

        embedded: of the token behind each position; states: the main model's there, both f32 [N, L, hidden].
        Pass j at position p goes on from pass j - 1 at p - 1; its first j - 1 positions mean nothing. It sees
        keys and values as a draft that began at p - j + 1 does: the main model's up to there, then those of
        the draft's own passes, which is what training for later tokens must see (HASS, arXiv 2408.15766).
        """
        keys: list[Tensor] = []
        values: list[Tensor] = []
        for _ in range(count):
            x = self.eh_proj(torch.cat([self.enorm(embedded), self.hnorm(states)], -1))
            h = self.input_layernorm(x)
            q, k, v = self._heads(h)
            keys.append(k)
            values.append(v)
            x = x + self.self_attn.o_proj(self._attend(q, keys, values))
            x = x + self.mlp(self.post_attention_layernorm(x))
            x = self.norm(x)
            yield x
            # Rolled by one position: the first takes up what the last left, which counts nowhere.
            states = torch.roll(x, 1, 1)

    def _heads(self, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v, each [N, heads, L, dim]; k and v repeated for the query heads that share them."""
        s, attention = self.sizes, self.self_attn
        n, length, _ = h.shape
        angles = torch.arange(length)[:, None] * self._inv_freq
        cosine, sine = angles.cos(), angles.sin()

        def split(x: Tensor, heads: int) -> Tensor:
            return x.view(n, length, heads, s.head_dim).transpose(1, 2)

        def turn(x: Tensor) -> Tensor:
            a, b = x.chunk(2, -1)
            return torch.cat([a * cosine - b * sine, b * cosine + a * sine], -1)

        group = s.num_attention_heads // s.num_key_value_heads
        q = turn(split(attention.q_proj(h), s.num_attention_heads))
        k = turn(split(attention.k_proj(h), s.num_key_value_heads)).repeat_interleave(group, 1)
        v = split(attention.v_proj(h), s.num_key_value_heads).repeat_interleave(group, 1)
        return q, k, v

    def _attend(self, q: Tensor, keys: list[Tensor], values: list[Tensor]) -> Tensor:
        """keys, values: of each pass so far, the last one's own among them."""
        n, heads, length, dim = q.shape
        own = len(keys) - 1  # passes of the draft before this one
        at = torch.arange(length)
        distance = at[:, None] - at
        seen = (distance >= own) & (distance < self.sizes.sliding_window)
        scores = (q @ keys[0].transpose(-1, -2)).masked_fill(~seen, -torch.inf)
        # Pass m of a draft stood so many positions before this one.
        back = [torch.roll(keys[m], own - m, 2) for m in range(1, own + 1)]
        columns = [(q * k).sum(-1, keepdim=True) for k in back]
        # A position with nothing behind it (one of the first) sees itself alone.
        weights = (torch.cat([scores, *columns], -1) * dim**-0.5).softmax(-1)
        mixed = weights[..., :length] @ values[0]
        for m in range(1, own + 1):
            column = length + m - 1
            mixed = mixed + weights[..., column : column + 1] * torch.roll(values[m], own - m, 2)
        found: Tensor = mixed.transpose(1, 2).reshape(n, length, heads * dim)
        return found
