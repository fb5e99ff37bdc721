"""Write a synthetic checkpoint with a real model's shapes: a Hugging Face directory of BF16 safetensors.

    python bench/make_model.py qwen3-30b-a3b /tmp/qwen3-12l --layers 12
    python bench/make_model.py qwen3-30b-a3b /tmp/sparse --layers 8 --sparse

The values are random with the scale of a freshly initialised model; there is no tokenizer, so prompts are
token ids. `--sparse` leaves the experts as holes in the files (they read as zeros): no disk space, no time,
for tests of memory and of I/O sizes, where the values do not matter. Memory use is flat: one pool of random
numbers is written again and again from changing places.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import numpy as np

SHARD_BYTES = 4 << 30
POOL_ELEMENTS = 16 << 20

SHAPES: dict[str, dict[str, Any]] = {
    "qwen3-30b-a3b": {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "hidden_size": 2048,
        "num_hidden_layers": 48,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "vocab_size": 151936,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "max_position_embeddings": 40960,
        "tie_word_embeddings": False,
        "hidden_act": "silu",
        "attention_bias": False,
        "torch_dtype": "bfloat16",
    },
    "mixtral-8x7b": {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "intermediate_size": 14336,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "vocab_size": 32000,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1000000.0,
        "max_position_embeddings": 32768,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "hidden_act": "silu",
        "torch_dtype": "bfloat16",
    },
}

Tensor = tuple[str, tuple[int, ...], bool]


def tensors(config: dict[str, Any]) -> Iterator[Tensor]:
    """Every tensor as (name, shape, whether it belongs to an expert), in file order."""
    hidden, vocab = config["hidden_size"], config["vocab_size"]
    head = config.get("head_dim") or hidden // config["num_attention_heads"]
    q, kv = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    qwen = config["model_type"] == "qwen3_moe"
    yield "model.embed_tokens.weight", (vocab, hidden), False
    for n in range(config["num_hidden_layers"]):
        layer = f"model.layers.{n}."
        yield layer + "input_layernorm.weight", (hidden,), False
        yield layer + "post_attention_layernorm.weight", (hidden,), False
        yield layer + "self_attn.q_proj.weight", (q, hidden), False
        yield layer + "self_attn.k_proj.weight", (kv, hidden), False
        yield layer + "self_attn.v_proj.weight", (kv, hidden), False
        yield layer + "self_attn.o_proj.weight", (hidden, q), False
        if qwen:
            yield layer + "self_attn.q_norm.weight", (head,), False
            yield layer + "self_attn.k_norm.weight", (head,), False
            moe, names = layer + "mlp.", ("gate_proj", "up_proj", "down_proj")
            experts, inter = config["num_experts"], config["moe_intermediate_size"]
        else:
            moe, names = layer + "block_sparse_moe.", ("w1", "w3", "w2")
            experts, inter = config["num_local_experts"], config["intermediate_size"]
        yield moe + "gate.weight", (experts, hidden), False
        for e in range(experts):
            yield f"{moe}experts.{e}.{names[0]}.weight", (inter, hidden), True
            yield f"{moe}experts.{e}.{names[1]}.weight", (inter, hidden), True
            yield f"{moe}experts.{e}.{names[2]}.weight", (hidden, inter), True
    yield "model.norm.weight", (hidden,), False
    yield "lm_head.weight", (vocab, hidden), False


def shards(config: dict[str, Any]) -> list[list[Tensor]]:
    found: list[list[Tensor]] = [[]]
    size = 0
    for tensor in tensors(config):
        nbytes = 2 * int(np.prod(tensor[1]))
        if size + nbytes > SHARD_BYTES:
            found.append([])
            size = 0
        found[-1].append(tensor)
        size += nbytes
    return found


def bf16(values: np.ndarray) -> np.ndarray:
    return (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)


class Noise:
    """Random BF16 numbers of mean 0 and deviation 0.02, drawn from one pool at changing places."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.pool = bf16(0.02 * self.rng.standard_normal(POOL_ELEMENTS, dtype=np.float32))

    def pieces(self, count: int) -> Iterator[np.ndarray]:
        while count > 0:
            start = int(self.rng.integers(0, POOL_ELEMENTS // 2))
            piece = self.pool[start : start + min(count, POOL_ELEMENTS // 2)]
            yield piece
            count -= piece.size


def write_shard(path: Path, wanted: list[Tensor], noise: Noise, sparse: bool) -> int:
    header: dict[str, Any] = {}
    offset = 0
    for name, shape, _ in wanted:
        end = offset + 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    with path.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for _, shape, expert in wanted:
            count = int(np.prod(shape))
            if sparse and expert:
                out.seek(2 * count, 1)
            elif len(shape) == 1:
                out.write(np.full(count, 0x3F80, np.uint16).data)  # norms: 1.0
            else:
                for piece in noise.pieces(count):
                    out.write(piece.data)
        out.truncate(8 + len(text) + offset)
    return offset


def make_model(shape: str, out: Path, layers: int | None = None, sparse: bool = False, seed: int = 0) -> int:
    """Write the checkpoint and return the bytes of its tensors."""
    config = dict(SHAPES[shape])
    config["num_hidden_layers"] = layers or config["num_hidden_layers"]
    out.mkdir(parents=True)
    noise = Noise(seed)
    parts = shards(config)
    weight_map, total = {}, 0
    for i, part in enumerate(parts, 1):
        name = f"model-{i:05d}-of-{len(parts):05d}.safetensors"
        total += write_shard(out / name, part, noise, sparse)
        weight_map.update({tensor: name for tensor, _, _ in part})
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (out / "model.safetensors.index.json").write_text(json.dumps(index))
    (out / "config.json").write_text(json.dumps(config, indent=2))
    return total


@click.command()
@click.argument("shape", type=click.Choice(sorted(SHAPES)))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--layers", type=int, help="Fewer layers than the real model has.")
@click.option("--sparse", is_flag=True, help="Leave the experts as holes in the files: they read as zeros.")
@click.option("--seed", type=int, default=0, show_default=True)
def main(shape: str, out: Path, layers: int | None, sparse: bool, seed: int) -> None:
    if out.exists():
        raise click.ClickException(f"{out} exists already; name a new directory")
    total = make_model(shape, out, layers, sparse, seed)
    click.echo(f"{out}: {total / 1e9:.2f} GB of tensors")


if __name__ == "__main__":
    main()
