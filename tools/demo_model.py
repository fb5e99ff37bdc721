"""A Mixtral in plain torch, shaped for training on a CPU: the experts of a layer are one stacked parameter.

Same mathematics as transformers' MixtralForCausalLM (RMSNorm, half-rotated RoPE, grouped-query attention,
softmax router over the top 2 of 8, SwiGLU experts); `export` writes its names. Development only.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 (everybody's name for it)

CONFIG: dict[str, Any] = {
    "architectures": ["MixtralForCausalLM"],
    "model_type": "mixtral",
    "vocab_size": 4096,
    "hidden_size": 256,
    "intermediate_size": 320,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "sliding_window": None,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "torch_dtype": "float32",
}


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    x = x.float()
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + CONFIG["rms_norm_eps"]) * weight


class Layer(nn.Module):
    def __init__(self, c: dict[str, Any], dropout: float) -> None:
        super().__init__()
        h, i, e = c["hidden_size"], c["intermediate_size"], c["num_local_experts"]
        q, kv = c["num_attention_heads"] * c["head_dim"], c["num_key_value_heads"] * c["head_dim"]
        std, out_std = 0.02, 0.02 / math.sqrt(2 * c["num_hidden_layers"])
        self.c, self.dropout = c, dropout
        self.norm1, self.norm2 = nn.Parameter(torch.ones(h)), nn.Parameter(torch.ones(h))
        self.q, self.k, self.v = (nn.Parameter(torch.randn(n, h) * std * 2) for n in (q, kv, kv))
        self.o = nn.Parameter(torch.randn(h, q) * out_std)
        self.router = nn.Parameter(torch.randn(e, h) * std)
        self.gate_up = nn.Parameter(torch.randn(e, 2 * i, h) * std * 2)
        self.down = nn.Parameter(torch.randn(e, h, i) * out_std * 2)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = x + F.dropout(self.attention(rms_norm(x, self.norm1), cos, sin), self.dropout, self.training)
        moved, balance, share = self.mixture(rms_norm(x, self.norm2))
        return x + F.dropout(moved, self.dropout, self.training), balance, share

    def attention(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        b, t, _ = x.shape
        d = self.c["head_dim"]
        q, k, v = (F.linear(x, w).view(b, t, -1, d).transpose(1, 2) for w in (self.q, self.k, self.v))
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        # Plain products in one batch are quicker on a CPU than the fused attention at these sizes.
        with torch.autocast("cpu", enabled=False):
            heads, groups = k.shape[1], q.shape[1] // k.shape[1]
            q = (q * d**-0.5).reshape(b * heads, groups * t, d)
            scores = torch.bmm(q, k.reshape(b * heads, t, d).mT).view(b * heads, groups, t, t)
            future = torch.full((t, t), float("-inf"), dtype=scores.dtype).triu(1)
            y = torch.bmm((scores + future).softmax(-1).view(-1, groups * t, t), v.reshape(b * heads, t, d))
        return F.linear(y.view(b, -1, t, d).transpose(1, 2).reshape(b, t, -1), self.o)

    def mixture(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        shape, x = x.shape, x.flatten(0, 1)
        n, k = self.c["num_local_experts"], self.c["num_experts_per_tok"]
        probs = F.linear(x.float(), self.router.float()).softmax(-1)
        top, ids = probs.topk(k, -1)
        top = top / top.sum(-1, keepdim=True)
        order = ids.flatten().argsort()
        counts = torch.bincount(ids.flatten(), minlength=n)
        rows = (x.bfloat16() if torch.is_autocast_enabled("cpu") else x)[order // k]
        outs = []
        parts = rows.split(counts.tolist())
        for part, gate_up, down in zip(parts, self.gate_up.unbind(0), self.down.unbind(0), strict=True):
            gate, up = F.linear(part, gate_up).chunk(2, -1)
            outs.append(F.linear(F.silu(gate) * up, down))
        y = torch.cat(outs).float() * top.flatten()[order, None]
        out = torch.zeros_like(x, dtype=torch.float32).index_add(0, order // k, y)
        share = counts / counts.sum()
        balance = n * (share * probs.mean(0)).sum()
        return out.view(shape), balance, share


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1).to(x.dtype)


class Mixtral(nn.Module):
    def __init__(self, c: dict[str, Any], dropout: float = 0.0) -> None:
        super().__init__()
        self.c = c
        self.embed = nn.Parameter(torch.randn(c["vocab_size"], c["hidden_size"]) * 0.02)
        self.layers = nn.ModuleList(Layer(c, dropout) for _ in range(c["num_hidden_layers"]))
        self.norm = nn.Parameter(torch.ones(c["hidden_size"]))
        half = torch.arange(0, c["head_dim"], 2) / c["head_dim"]
        angle = torch.outer(torch.arange(c["max_position_embeddings"]).float(), c["rope_theta"] ** -half)
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """ids [batch, time] -> logits [batch, time, vocab], balance loss, expert shares [layers, experts]."""
        t = ids.shape[1]
        x = F.embedding(ids, self.embed)
        balances, shares = [], []
        for layer in self.layers:
            x, balance, share = layer(x, self.cos[:t], self.sin[:t])
            balances.append(balance)
            shares.append(share)
        logits = F.linear(rms_norm(x, self.norm), self.embed)
        return logits, torch.stack(balances).mean(), torch.stack(shares)

    def export(self) -> dict[str, Tensor]:
        """The weights under the names that published Mixtral checkpoints use."""
        i = self.c["intermediate_size"]
        named = {"model.embed_tokens.weight": self.embed, "model.norm.weight": self.norm}
        for n, layer in enumerate(self.layers):
            p = f"model.layers.{n}."
            named[p + "input_layernorm.weight"] = layer.norm1
            named[p + "post_attention_layernorm.weight"] = layer.norm2
            for name in "qkvo":
                named[f"{p}self_attn.{name}_proj.weight"] = getattr(layer, name)
            named[p + "block_sparse_moe.gate.weight"] = layer.router
            for e in range(self.c["num_local_experts"]):
                expert = f"{p}block_sparse_moe.experts.{e}."
                named[expert + "w1.weight"] = layer.gate_up[e, :i]
                named[expert + "w3.weight"] = layer.gate_up[e, i:]
                named[expert + "w2.weight"] = layer.down[e]
        return {name: tensor.detach().float().contiguous().clone() for name, tensor in named.items()}

    @torch.no_grad()
    def load(self, named: dict[str, Tensor]) -> None:
        """Take the weights of an earlier export."""
        i = self.c["intermediate_size"]
        self.embed.copy_(named["model.embed_tokens.weight"])
        self.norm.copy_(named["model.norm.weight"])
        for n, layer in enumerate(self.layers):
            p = f"model.layers.{n}."
            layer.norm1.copy_(named[p + "input_layernorm.weight"])
            layer.norm2.copy_(named[p + "post_attention_layernorm.weight"])
            for name in "qkvo":
                getattr(layer, name).copy_(named[f"{p}self_attn.{name}_proj.weight"])
            layer.router.copy_(named[p + "block_sparse_moe.gate.weight"])
            for e in range(self.c["num_local_experts"]):
                expert = f"{p}block_sparse_moe.experts.{e}."
                layer.gate_up[e, :i].copy_(named[expert + "w1.weight"])
                layer.gate_up[e, i:].copy_(named[expert + "w3.weight"])
                layer.down[e].copy_(named[expert + "w2.weight"])
