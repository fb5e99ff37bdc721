"""Draft heads with random weights, and what transformers' modules make of the same weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from oracle.make_checkpoints import ZERO_CENTRED, edit_config, make
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4HyperHead
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRMSNorm, LlamaRotaryEmbedding

from mer._ext.uring import Reader
from mer.model.dense import load_dense
from mer.model.draft_head import fingerprint
from mer.model.families import load
from mer.weights.checkpoint import open_checkpoint

HEADS, KV_HEADS, DIM, INTER, WINDOW = 4, 2, 16, 48, 24


def main_weights(path: Path):
    """(ModelSpec, DenseWeights) of the model at `path`."""
    checkpoint = open_checkpoint(path)
    architecture = load(checkpoint)
    reader = Reader(checkpoint.files)
    try:
        return architecture.spec, load_dense(checkpoint, architecture, reader)
    finally:
        reader.close()


class TorchHead(torch.nn.Module):
    """A draft head made of transformers' parts."""

    def __init__(
        self, hidden: int, embedding: torch.Tensor, output: torch.Tensor, layer, norm, rotary
    ) -> None:
        super().__init__()
        self.enorm, self.hnorm, self.norm = norm(), norm(), norm()
        self.eh_proj = torch.nn.Linear(2 * hidden, hidden, bias=False)
        self.layer, self.rotary = layer, rotary
        self.embedding, self.output = embedding, output

    def states(self, main, tokens: torch.Tensor) -> torch.Tensor:
        """What it reads of the main model: tokens [1, T] -> [T, hidden]."""
        return main.model(tokens).last_hidden_state[0]

    def forward(self, tokens: torch.Tensor, states: torch.Tensor, window: int | None):
        """tokens [T], states [T, hidden] -> what it leaves [T, hidden], logits [T, vocab]."""
        x = self.eh_proj(torch.cat([self.enorm(self.embedding[tokens]), self.hnorm(states)], -1))[None]
        n = len(tokens)
        at = torch.arange(n)
        seen = at[:, None] >= at
        if window is not None:
            seen &= at[:, None] - at < window
        mask = torch.where(seen, 0.0, -torch.inf)[None, None]
        places = at[None]
        out = self.layer(
            x, attention_mask=mask, position_ids=places, position_embeddings=self.rotary(x, places)
        )
        h = self.norm(out[0] if isinstance(out, tuple) else out)[0]
        return h, h @ self.output.T


class TorchStreamsHead(TorchHead):
    """DeepSeek-V4's, whose states are several streams."""

    def __init__(self, config, *parts) -> None:
        super().__init__(config.hidden_size, *parts)
        del self.eh_proj
        self.e_proj, self.h_proj = (
            torch.nn.Linear(config.hidden_size, config.hidden_size, bias=False) for _ in range(2)
        )
        self.hc_head = DeepseekV4HyperHead(config)

    def forward(self, tokens: torch.Tensor, states: torch.Tensor, window: int | None):
        """The same, states being [T, streams, hidden]."""
        e = self.e_proj(self.enorm(self.embedding[tokens]))
        x = (e[:, None] + self.h_proj(self.hnorm(states)))[None]
        at = torch.arange(len(tokens))
        seen = (at[:, None] >= at) & (at[:, None] - at < window)
        ropes = {kind: self.rotary(x[:, :, 0], at[None], kind) for kind in ("main", "compress")}
        out = self.layer(
            x, input_ids=tokens[None], attention_mask=torch.where(seen, 0.0, -torch.inf)[None, None],
            position_ids=at[None], position_embeddings=ropes,
        )  # fmt: skip
        return out[0], self.norm(self.hc_head(out))[0] @ self.output.T

    def states(self, main, tokens: torch.Tensor) -> torch.Tensor:
        """What comes before the main model's own collapse of the streams."""
        found = []
        with main.model.hc_head.register_forward_pre_hook(lambda _, given: found.append(given[0])):
            main.model(tokens)
        return found[0][0]


def randomise(module: torch.nn.Module, seed: int) -> None:
    """Norms about 1, matrices so that products are about 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in [*module.named_parameters(), *module.named_buffers()]:
            if "inv_freq" in name:
                continue
            noise = torch.randn(value.shape, generator=generator)
            if "norm" in name:
                value.copy_(1 + 0.2 * noise)
            elif value.dim() == 1:
                value.copy_(0.2 * noise)
            else:
                value.copy_(1.6 * noise / value.shape[-1] ** 0.5)


def write_head(path: Path, model: Path, *, seed: int = 0, vocabulary: list[int] | None = None, **config: Any):
    """A head with random weights for `model`; returns its TorchHead."""
    spec, dense = main_weights(model)
    hidden = spec.hidden
    sizes = LlamaConfig(
        hidden_size=hidden,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=DIM,
        intermediate_size=INTER,
        rms_norm_eps=1e-5,
    )
    sizes._attn_implementation = "eager"
    embedding = torch.from_numpy(dense.embedding.data.view(np.float32).copy())
    output = torch.from_numpy(dense.model["head"].data.view(np.float32).copy())
    if vocabulary is not None:
        output = output[vocabulary]
    head = TorchHead(
        hidden, embedding, output, LlamaDecoderLayer(sizes, 0),
        lambda: LlamaRMSNorm(hidden, 1e-5), LlamaRotaryEmbedding(sizes),
    ).eval()  # fmt: skip
    randomise(head, seed)
    tensors = {
        name.removeprefix("layer."): value.detach().clone().contiguous()
        for name, value in head.named_parameters()
    }
    if vocabulary is not None:
        tensors["vocabulary"] = torch.tensor(vocabulary, dtype=torch.int32)
    path.mkdir(parents=True)
    save_file(tensors, path / "model.safetensors")
    values = {
        "format": "mer-draft-head",
        "version": 1,
        "model": "a test",
        "fingerprint": fingerprint(dense),
        "hidden_size": hidden,
        "vocab_size": spec.vocab,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": DIM,
        "intermediate_size": INTER,
        "sliding_window": WINDOW,
        "rope_theta": 10000.0,
        "rms_norm_eps": 1e-5,
    }
    (path / "config.json").write_text(json.dumps(values | config))
    return head


# What a layer for multi-token prediction has beside it, by its published name.
BEHIND = {"enorm": "enorm", "hnorm": "hnorm", "eh_proj": "eh_proj", "norm": "shared_head.norm"}
BESIDE = {"enorm": "pre_fc_norm_embedding", "hnorm": "pre_fc_norm_hidden", "eh_proj": "fc", "norm": "norm"}


def write_predicting(path: Path, family: str, **changes: Any):
    """A model with a layer for multi-token prediction; returns transformers' without it, and its head."""
    beside = family in ZERO_CENTRED
    layers = 4 if beside else 3  # of those with states each second one has attention
    model = make(path, family, num_hidden_layers=layers, **changes)
    config = model.config
    edit_config(path, num_hidden_layers=layers - 1, num_nextn_predict_layers=None if beside else 1)
    for kinds in "indexer_types", "mlp_layer_types":
        if getattr(config, kinds, None):
            edit_config(path, **{kinds: getattr(config, kinds)[: layers - 1]})
    prefix, names = f"model.layers.{layers - 1}.", BEHIND
    tensors = load_file(path / "model.safetensors")
    if beside:
        edit_config(path, layer_types=config.layer_types[: layers - 1])
        tensors = {name.replace(prefix, "mtp.layers.0."): each for name, each in tensors.items()}
        prefix, names = "mtp.", BESIDE
    (layer,) = model.model.layers[layers - 1 :]
    model.model.layers = model.model.layers[: layers - 1]
    norm = type(model.model.norm)
    head = TorchHead(
        config.hidden_size, model.model.embed_tokens.weight, model.lm_head.weight, layer,
        lambda: norm(config.hidden_size, config.rms_norm_eps), model.model.rotary_emb,
    ).eval()  # fmt: skip
    for seed, (name, full) in enumerate(names.items()):
        part = getattr(head, name)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            noise = torch.randn(part.weight.shape, generator=generator)
            matrix = part.weight.dim() == 2
            centre = 0.0 if beside else 1.0
            part.weight.copy_(1.6 * noise / noise.shape[-1] ** 0.5 if matrix else centre + 0.2 * noise)
        tensors[f"{prefix}{full}.weight"] = part.weight.detach().clone()
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return model, head


def write_predicting_v4(path: Path, **changes: Any):
    """The same of DeepSeek-V4, whose layer for multi-token prediction is `mtp.0`."""
    model = make(path, "deepseek_v4", num_hidden_layers=3, **changes)
    config = model.config
    edit_config(
        path,
        num_hidden_layers=2,
        num_nextn_predict_layers=1,
        layer_types=config.layer_types[:2],
        mlp_layer_types=config.mlp_layer_types[:2],
    )
    assert (config.layer_types[2], config.mlp_layer_types[2]) == ("sliding_attention", "moe")
    tensors = load_file(path / "model.safetensors")
    tensors = {name.replace("model.layers.2.", "mtp.0."): each for name, each in tensors.items()}
    layer = model.model.layers[2]
    model.model.layers = model.model.layers[:2]
    norm = type(model.model.norm)
    head = TorchStreamsHead(
        config, model.model.embed_tokens.weight.detach(), model.lm_head.weight.detach(), torch.nn.Identity(),
        lambda: norm(config.hidden_size, config.rms_norm_eps), model.model.rotary_emb,
    ).eval()  # fmt: skip
    randomise(head, 3)
    for name, each in head.named_parameters():
        tensors["mtp.0." + name.replace("hc_head.hc_", "hc_head_")] = each.detach().clone()
    head.layer = layer
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return model, head
