"""llama with experts: Mixtral."""

from __future__ import annotations

from mer.weights.gguf_families.family import GGUFFamily
from mer.weights.gguf_families.names import Names

_BLOCK = "block_sparse_moe"
FAMILY = GGUFFamily(
    architecture="llama",
    model_type="mixtral",
    config=lambda keys: {},
    names=Names(
        {
            # Of files that are older than stacked experts.
            "ffn_gate.{e}": f"{_BLOCK}.experts.{{e}}.w1",
            "ffn_down.{e}": f"{_BLOCK}.experts.{{e}}.w2",
            "ffn_up.{e}": f"{_BLOCK}.experts.{{e}}.w3",
        },
        aliases={f"{_BLOCK}.gate": "mlp.gate"},
    ),
    # Rows of q and k stand in another order in these files than in Hugging Face's.
    neighbours=True,
)
