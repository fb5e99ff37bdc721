"""A draft head: one decoder layer that guesses the token after next from the main model's hidden state.

What DeepSeek-V3 calls a multi-token-prediction module (arXiv 2412.19437, section 2.2): with h the main
model's hidden state at position i and t the token at i + 1,

    x = W [norm_e(embedding(t)); norm_h(h)],  h' = norm(layer(x)),  logits of the token at i + 2 = head(h')

Embedding and output head are the main model's. For the tokens after that, h' takes the place of h (as in
EAGLE, arXiv 2401.15077). h is taken behind the main model's final norm and h' behind the head's own: that
is what SGLang hands on (sglang/srt/models/deepseek_nextn.py); vLLM takes h there, too
(vllm/model_executor/models/deepseek_mtp.py, deepseek_v2.py).

DeepSeek-V4's hidden states are several streams, and so are h and h', before what makes one of them and the
final norm (`mtp.0` of its files; inference/model.py beside them, and deepseek_v4_mtp.py of vLLM):

    stream i of x = W_e norm_e(embedding(t)) + W_h norm_h(stream i of h)
"""

from __future__ import annotations

from hashlib import blake2b
from pathlib import Path
from typing import Any, Final

import numpy as np
from attrs import evolve, frozen
from numpy.typing import NDArray

from mer.errors import CheckpointError
from mer.model.dense import DenseWeights, Matrix
from mer.model.families import Architecture
from mer.model.families.config import Config
from mer.model.families.tensors import Tensors
from mer.model.spec import AttentionSpec, LayerSpec, ModelSpec, RopeSpec
from mer.weights import formats
from mer.weights.checkpoint import Checkpoint, open_checkpoint

FORMAT: Final = "mer-draft-head"
VERSION: Final = 1


@frozen(eq=False)
class Head:
    """A head on disk.

    architecture: of its layer, with 'enorm', 'hnorm', 'eh_proj' (or 'e_proj' and 'h_proj') and 'final_norm'
    beside it. vocabulary: i32 [n], ascending: the tokens that it can draft; None: all. fingerprint: see
    `fingerprint`; None where it is part of the main model's checkpoint. model: the main model's name.
    """

    checkpoint: Checkpoint
    architecture: Architecture
    vocabulary: NDArray[np.int32] | None = None
    fingerprint: str | None = None
    model: str = ""

    @property
    def spec(self) -> ModelSpec:
        """Its layer as a model of one; `vocab` counts the tokens that it can draft."""
        return self.architecture.spec

    @property
    def state_width(self) -> int:
        """Elements of a state: one stream, or as many as the model has if the head reads them all."""
        streams = self.spec.streams
        return self.spec.hidden * (1 if streams is None else streams.n)

    def check(self, main: DenseWeights) -> None:
        """Raise CheckpointError if it was trained for another model."""
        if self.fingerprint not in (None, fingerprint(main)):
            raise CheckpointError(
                f"{self.checkpoint.path}: this draft head was trained for another model"
                f"{f' ({self.model})' if self.model else ''}; train one for this model with mer draft train"
            )


def fingerprint(main: DenseWeights) -> str:
    """Of what no conversion changes, norms and routers: a head serves a model in every format of weights."""
    digest = blake2b(digest_size=16)
    for weights in (main.model, *main.layers):
        for name in sorted(weights):
            part = weights[name]
            if name in ("attention_norm", "mlp_norm", "final_norm"):
                digest.update(np.asarray(part, np.float32).tobytes())
            elif name == "router":
                digest.update(formats.by_id(part.format).dequantize(part.data).tobytes())
    return digest.hexdigest()


def open_head(path: Path, main: ModelSpec) -> Head:
    """The head that `mer draft train` wrote to `path`; reads no weights but its vocabulary.

    Raises CheckpointError for what is damaged, no head, or does not fit `main` by its shapes.
    """
    checkpoint = open_checkpoint(path)
    config = Config(path, checkpoint.config)
    if config.get("format") != FORMAT:
        raise CheckpointError(f"{path}: is no draft head; `mer draft train` writes them")
    if config.get("version") != VERSION:
        raise config.unsupported(f"version is {config.get('version')!r}, this mer reads {VERSION}")
    for key, value in (("hidden_size", main.hidden), ("vocab_size", main.vocab)):
        if config.integer(key) != value:
            raise config.wrong(
                f"{key} is {config.integer(key)}, the model has {value}: this draft head was trained for "
                f"another model{_named(config)}; train one for this model with mer draft train"
            )
    tensors, hidden = Tensors(checkpoint), main.hidden
    heads, dim = config.integer("num_attention_heads"), config.integer("head_dim")
    kv_heads, inter = config.integer("num_key_value_heads"), config.integer("intermediate_size")
    for part, name, *shape in (
        ("enorm", "enorm.weight", hidden),
        ("hnorm", "hnorm.weight", hidden),
        ("eh_proj", "eh_proj.weight", hidden, 2 * hidden),
        ("final_norm", "norm.weight", hidden),
        ("0.attention_norm", "input_layernorm.weight", hidden),
        ("0.q", "self_attn.q_proj.weight", heads * dim, hidden),
        ("0.k", "self_attn.k_proj.weight", kv_heads * dim, hidden),
        ("0.v", "self_attn.v_proj.weight", kv_heads * dim, hidden),
        ("0.o", "self_attn.o_proj.weight", hidden, heads * dim),
        ("0.mlp_norm", "post_attention_layernorm.weight", hidden),
        ("0.gate", "mlp.gate_proj.weight", inter, hidden),
        ("0.up", "mlp.up_proj.weight", inter, hidden),
        ("0.down", "mlp.down_proj.weight", hidden, inter),
    ):
        tensors.take(part, name, *shape)
    vocabulary = _vocabulary(checkpoint, main)
    window, theta = config.integer("sliding_window"), config.number("rope_theta")
    spec = evolve(
        main,
        vocab=main.vocab if vocabulary is None else len(vocabulary),
        norm_eps=config.number("rms_norm_eps"),
        attention=AttentionSpec(heads, kv_heads, dim, dim**-0.5),
        rope=RopeSpec(inverse_frequencies(theta, dim), theta=theta),
        layers=(LayerSpec(window, None),),
        router=None,
        moe_inter=0,
        dense_inter=inter,
        shared_inter=0,
        shared_gate=False,
        tied_embeddings=False,
        residual_scale=1.0,
        activation="silu",
        expert_bias=False,
        clamp=None,
        recurrent=None,
        streams=None,
        zero_centred_norms=False,
    )
    return Head(
        checkpoint,
        Architecture(spec, tensors.dense, []),
        vocabulary,
        str(config.get("fingerprint")),
        str(config.get("model") or ""),
    )


def inverse_frequencies(theta: float, dim: int) -> tuple[float, ...]:
    """Of a head's rotary embedding, one a pair."""
    exponents = np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)
    return tuple((1.0 / (np.float32(theta) ** exponents)).astype(np.float32).tolist())


def _named(config: Config) -> str:
    return f" ({config.get('model')})" if config.get("model") else ""


def _vocabulary(checkpoint: Checkpoint, main: ModelSpec) -> NDArray[np.int32] | None:
    if "vocabulary" not in checkpoint.tensors:
        return None
    found = checkpoint.read("vocabulary").view(np.int32)
    if len(found) == 0 or found[0] < 0 or found[-1] >= main.vocab or (np.diff(found) <= 0).any():
        raise CheckpointError(
            f"{checkpoint.path}: vocabulary must be ascending token ids below {main.vocab}; train it anew"
        )
    return found


def output_head(head: Head, main: DenseWeights) -> dict[str, Any]:
    """The main model's output head, its rows of those tokens alone that `head` can draft."""
    found: dict[str, Any] = {name: main.model[name] for name in ("head", "head_bias") if name in main.model}
    if head.vocabulary is not None:
        whole: Matrix = found["head"]
        found["head"] = Matrix(np.ascontiguousarray(whole.data[head.vocabulary]), whole.format, whole.cols)
        if "head_bias" in found:
            found["head_bias"] = found["head_bias"][head.vocabulary]
    return found
