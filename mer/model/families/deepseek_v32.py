"""DeepSeek-V3.2 and GLM-5: DeepSeek-V3 with an indexer that chooses which positions a token sees (DSA)."""

from __future__ import annotations

from mer.model.families import deepseek_v3
from mer.model.families.config import Config
from mer.model.families.deepseek_blocks import Blocks, sigmoid_router
from mer.model.families.tensors import Tensors
from mer.model.spec import IndexerSpec, ModelSpec


def read_deepseek(config: Config, tensors: Tensors) -> ModelSpec:
    """ModelSpec of a DeepSeek-V3.2, without the layers for multi-token prediction."""
    own = [True] * config.integer("num_hidden_layers")
    return _read(config, tensors, "deepseek_v32", own, heads=64, interleaved=False, eps=1e-6)


def read_glm(config: Config, tensors: Tensors) -> ModelSpec:
    """ModelSpec of a GLM-5, without the layers for multi-token prediction."""
    return _read(config, tensors, "glm_moe_dsa", _own(config), heads=32, interleaved=True, eps=1e-5)


def read_deepseek_without_indexers(config: Config, tensors: Tensors) -> ModelSpec:
    """The same, a token seeing all positions."""
    return _read(config, tensors, "deepseek_v32", [], heads=64, interleaved=False, eps=1e-6)


def read_glm_without_indexers(config: Config, tensors: Tensors) -> ModelSpec:
    """The same, a token seeing all positions."""
    return _read(config, tensors, "glm_moe_dsa", [], heads=32, interleaved=True, eps=1e-5)


def _read(
    config: Config,
    tensors: Tensors,
    family: str,
    own: list[bool],
    *,
    heads: int,
    interleaved: bool,
    eps: float,
) -> ModelSpec:
    """own: of each layer, whether it chooses positions itself; empty: none has an indexer.

    heads, eps: where the file does not say.
    """
    config.integer("q_lora_rank")  # index queries are made of the query latent
    indexers = [
        IndexerSpec(
            n_heads=config.integer("index_n_heads", default=heads),
            head_dim=config.integer("index_head_dim", default=128),
            top_k=config.integer("index_topk", default=2048),
            interleaved=interleaved,
            own=each,
        )
        for each in own
    ]
    if indexers and indexers[0].head_dim < config.integer("qk_rope_head_dim"):
        raise config.wrong("index_head_dim is less than qk_rope_head_dim, so its first part can't turn")
    blocks = Blocks(config, sigmoid_router(config, default_scale=2.5), default_plain=3)
    return deepseek_v3.read_with(config, tensors, blocks, family, default_eps=eps, indexers=indexers)


def _own(config: Config) -> list[bool]:
    """Which layers choose positions themselves: the others take the last choice before them."""
    n_layers = config.integer("num_hidden_layers")
    kinds = config.get("indexer_types", "index_topk_pattern")
    if kinds is None:
        every = config.integer("index_topk_freq", default=1)
        first = config.integer("index_skip_topk_offset", default=2, minimum=0)
        return [max(i - first + 1, 0) % every == 0 for i in range(n_layers)]
    if isinstance(kinds, str):
        kinds = [{"F": "full", "S": "shared"}.get(letter) for letter in kinds]
    if isinstance(kinds, list):  # layers for multi-token prediction may follow
        kinds = kinds[:n_layers]
    if not isinstance(kinds, list) or len(kinds) != n_layers or set(kinds) - {"full", "shared"}:
        raise config.wrong(f"indexer_types must say full or shared for each of the {n_layers} layers")
    if kinds[0] != "full":
        raise config.wrong("indexer_types: the first layer can't share a choice that none has made")
    return [kind == "full" for kind in kinds]
