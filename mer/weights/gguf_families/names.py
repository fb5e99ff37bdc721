"""Names of tensors, GGUF's and Hugging Face's: one table, read in both directions."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final

_WHOLE: Final = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
    "output_norm.bias": "model.norm.bias",
    "output.bias": "lm_head.bias",
}
# Of a layer: GGUF's `blk.N.` and Hugging Face's `model.layers.N.` stand before these. An entry without an
# ending stands for both, NAME.weight and NAME.bias; `{e}` for the number of an expert.
_LAYER: Final = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_gate_exps.weight": "mlp.experts.gate_proj",
    "ffn_up_exps.weight": "mlp.experts.up_proj",
    "ffn_down_exps.weight": "mlp.experts.down_proj",
    "ffn_gate_up_exps.weight": "mlp.experts.gate_up_proj",
}
_ENDINGS: Final = (".weight", ".bias")


class Names:
    """The names of one family.

    layer: what its layers have besides, or call otherwise than most (see _LAYER). aliases: further names that
    Hugging Face's files have for a layer's tensors, and those of the table that they stand for. whole:
    tensors of no layer that most families do not have.
    """

    def __init__(
        self,
        layer: Mapping[str, str],
        aliases: Mapping[str, str] | None = None,
        whole: Mapping[str, str] | None = None,
    ) -> None:
        self._whole = _WHOLE | dict(whole or {})
        self._layer = _LAYER | dict(layer)
        # Where two names of GGUF mean the same, the first is written, the family's own before the common one.
        self._back: dict[str, str] = {}
        for ours, theirs in [*layer.items(), *_LAYER.items()]:
            self._back.setdefault(theirs, ours)
        self._aliases = dict(aliases or {})

    def hugging_face(self, name: str) -> str | None:
        """Hugging Face's name of a tensor of a GGUF file; None for one that is not known."""
        if name in self._whole:
            return self._whole[name]
        match = re.fullmatch(r"blk\.(\d+)\.(.+)", name)
        found = match and _look_up(self._layer, match[2])
        return f"model.layers.{match[1]}.{found}" if match and found else None

    def gguf(self, name: str) -> str | None:
        """GGUF's name of a tensor of Hugging Face's; None for one that is not known."""
        whole = {theirs: ours for ours, theirs in self._whole.items()}
        if name in whole:
            return whole[name]
        match = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", name)
        if match is None:
            return None
        found = _look_up(self._back, _look_up(self._aliases, match[2]) or match[2])
        return f"blk.{match[1]}.{found}" if found else None


def _look_up(table: Mapping[str, str], name: str) -> str | None:
    """What the table has for a name, or for one without its ending, which it then gets back."""
    number = re.search(r"\.(\d+)(?=\.|$)", name)
    if number:
        name = f"{name[: number.start(1)]}{{e}}{name[number.end(1) :]}"
    found = table.get(name)
    for ending in _ENDINGS:
        if found is None and name.endswith(ending):
            found = table.get(name.removesuffix(ending))
            found = found and found + ending
    return found.replace("{e}", number[1]) if found and number else found
