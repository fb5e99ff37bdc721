"""Model families: how a config.json becomes a ModelSpec, and which tensor plays which part."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from attrs import evolve, frozen

from mer.model.families import (
    bailing_moe,
    deepseek_v2,
    deepseek_v3,
    deepseek_v4,
    deepseek_v32,
    dots1,
    ernie4_5_moe,
    flex_olmo,
    gemma4,
    glm4_moe,
    glm4_moe_lite,
    gpt_oss,
    granite_moe,
    hunyuan_moe,
    lfm2_moe,
    llama,
    minimax_m2,
    mixtral,
    olmoe,
    phimoe,
    qwen_moe,
    qwen_next,
)
from mer.model.families.config import Config
from mer.model.families.tensors import Tensors
from mer.model.spec import CompressedAttentionSpec, LatentAttentionSpec, ModelSpec
from mer.weights.checkpoint import Checkpoint
from mer.weights.experts import MoeLayerSource

# By `model_type` of config.json.
FAMILIES: Final[dict[str, Callable[[Config, Tensors], ModelSpec]]] = {
    "bailing_moe": bailing_moe.read,
    "deepseek_v2": deepseek_v2.read,
    "deepseek_v3": deepseek_v3.read,
    "deepseek_v32": deepseek_v32.read_deepseek,
    "deepseek_v4": deepseek_v4.read,
    "dots1": dots1.read,
    "ernie4_5_moe": ernie4_5_moe.read,
    "gemma4": gemma4.read,
    "gemma4_text": gemma4.read,
    "flex_olmo": flex_olmo.read,
    "glm4_moe": glm4_moe.read,
    "glm_moe_dsa": deepseek_v32.read_glm,
    "glm4_moe_lite": glm4_moe_lite.read,
    "gpt_oss": gpt_oss.read,
    "granitemoe": granite_moe.read,
    "granitemoeshared": granite_moe.read,
    "hunyuan_v1_moe": hunyuan_moe.read,
    "kimi_k2": deepseek_v3.read,
    "lfm2_moe": lfm2_moe.read,
    "llama": llama.read_llama,
    "ministral3": llama.read_ministral3,
    "mistral": llama.read_mistral,
    "mistral3": llama.read_mistral3,
    "minimax_m2": minimax_m2.read,
    "mixtral": mixtral.read,
    "olmoe": olmoe.read,
    "phimoe": phimoe.read,
    "qwen2": llama.read_qwen2,
    "qwen2_moe": qwen_moe.read_qwen2,
    "qwen3": llama.read_qwen3,
    "qwen3_5_moe": qwen_next.read_qwen3_5,
    "qwen3_5_moe_text": qwen_next.read_qwen3_5,
    "qwen3_moe": qwen_moe.read_qwen3,
    "qwen3_next": qwen_next.read_qwen3_next,
    "solar_open": glm4_moe.read_solar_open,
}


# Those whose layers for multi-token prediction stand behind the others, as DeepSeek-V3 has them.
_PREDICTING: Final = ("deepseek_v3", "deepseek_v32", "glm4_moe", "glm4_moe_lite", "glm_moe_dsa")
# Those that have it beside the model, as `mtp.layers.0`.
_PREDICTING_BESIDE: Final = ("qwen3_next", "qwen3_5_moe", "qwen3_5_moe_text")
# Those whose layer chooses positions: it sees no more here than it would choose, so there is no choice.
_WITHOUT_CHOICE: Final = {
    "deepseek_v32": deepseek_v32.read_deepseek_without_indexers,
    "glm_moe_dsa": deepseek_v32.read_glm_without_indexers,
}
# Positions that such a layer sees here. It was trained to see all, but each would take memory.
_PREDICTION_WINDOW: Final = 512
# Parts of a draft head that belong to no layer.
_BESIDE_A_LAYER: Final[tuple[str, ...]] = (
    "enorm", "hnorm", "eh_proj", "e_proj", "h_proj", "final_norm",
    "head_streams", "head_streams_bias", "head_streams_scale",
)  # fmt: skip


@frozen
class Architecture:
    """A checkpoint, understood.

    dense: part ('embedding', '3.q', ...) -> tensor name. experts: one entry per MoE layer, in order.
    """

    spec: ModelSpec
    dense: dict[str, str]
    experts: list[MoeLayerSource]

    @property
    def kept(self) -> frozenset[str]:
        """Names of dense tensors that are small and that much hangs on: no conversion may change them."""
        ends = (
            "norm", "bias", "sinks", "scale", "router", "shared_gate", "index_weights", "conv", "a_log",
            "decay_rate", "router_table", "streams",
        )  # fmt: skip
        return frozenset(name for part, name in self.dense.items() if part.endswith(ends))


def load(checkpoint: Checkpoint) -> Architecture:
    """Understand a checkpoint; reads no weights.

    Raises UnsupportedModelError for an architecture that is not known, CheckpointError for a config.json that
    contradicts itself or the tensors.
    """
    config = Config(checkpoint.path, checkpoint.config)
    kind = config.get("model_type")
    if kind is None:
        raise config.wrong("the key model_type is missing, so the architecture is not known")
    read = FAMILIES.get(kind)
    if read is None:
        known = ", ".join(sorted(FAMILIES))
        raise config.unsupported(f"model_type {kind!r} is not supported; known are {known}")
    for each in config, config.inner("text_config"):
        _refuse_layers_without_tensors(each, len(checkpoint.tensors))
    tensors = Tensors(checkpoint)
    spec = read(config, tensors)
    _refuse_less_than_there_is(config, tensors, spec)
    return Architecture(spec, tensors.dense, tensors.experts)


def _refuse_layers_without_tensors(config: Config, n_tensors: int) -> None:
    """Before anybody makes a list of so many."""
    n_layers = config.get("num_hidden_layers")
    if isinstance(n_layers, int | float) and n_layers > n_tensors:
        raise config.wrong(
            f"num_hidden_layers is {n_layers:,}, but there are {n_tensors} tensors; fetch the files again"
        )


def load_head(checkpoint: Checkpoint, main: Architecture) -> Architecture | None:
    """The model's own draft head (mer.model.draft_head), where the checkpoint has one that mer can compute.

    It is the first of its layers for multi-token prediction, understood as a model of one layer, with
    'enorm', 'hnorm', 'eh_proj' (or 'e_proj' and 'h_proj') and 'final_norm' beside it. Raises CheckpointError
    where a part is missing.
    """
    config, at = Config(checkpoint.path, checkpoint.config), main.spec.n_layers
    kind, name = config.get("model_type"), f"model.layers.{at}"
    if kind in _PREDICTING:
        own = [f"{name}.{each}.weight" for each in ("eh_proj", "enorm", "hnorm", "shared_head.norm")]
        # Like the last layer of a model that has one more.
        tensors, longer = Tensors(checkpoint), config.but(num_hidden_layers=at + 1, mlp_layer_types=None)
    elif kind in _PREDICTING_BESIDE:
        parts = ("fc", "pre_fc_norm_embedding", "pre_fc_norm_hidden", "norm")
        own = [f"mtp.{each}.weight" for each in parts]
        tensors, longer = (
            Tensors(checkpoint, (f"{name}.", "mtp.layers.0.")),
            qwen_next.longer(config, main.spec),
        )
    elif kind == "deepseek_v4" and deepseek_v4.has_window_head(config, at):
        own = [f"mtp.0.{each}.weight" for each in ("e_proj", "enorm", "hnorm", "norm")]
        tensors = Tensors(checkpoint, (f"{name}.", "mtp.0."))
        longer = deepseek_v4.longer(config, at)
    else:
        return None
    # GGUF files may leave out some of them, and answer all the same.
    needed = own if checkpoint.kind == "gguf" else own[:1]
    if any(each not in checkpoint.tensors for each in needed):
        return None
    hidden, spec = main.spec.hidden, _WITHOUT_CHOICE.get(kind, FAMILIES[kind])(longer, tensors)
    for part, full in zip(("enorm", "hnorm", "final_norm"), own[1:], strict=True):
        tensors.take_full(part, full, hidden)
    if kind == "deepseek_v4":
        deepseek_v4.take_head(tensors, at, spec)
    else:
        tensors.take_full("eh_proj", own[0], hidden, 2 * hidden)
    dense = {part: tensors.dense[part] for part in _BESIDE_A_LAYER if part in tensors.dense}
    for part, tensor in tensors.dense.items():
        layer, _, rest = part.partition(".")
        if rest and layer == str(at):
            dense[f"0.{rest}"] = tensor
    # Behind plain first layers this one always has experts.
    last = evolve(spec.layers[-1], window=_prediction_window(main.spec), moe_index=0)
    spec = evolve(spec, layers=(last,), dense_inter=0, recurrent=None)
    return Architecture(spec, dense, tensors.experts[-1:])


def _prediction_window(main: ModelSpec) -> int:
    windows = [_PREDICTION_WINDOW]
    if isinstance(main.attention, CompressedAttentionSpec):
        windows += [layer.window for layer in main.layers if layer.window]
    if isinstance(main.attention, LatentAttentionSpec) and main.attention.indexer is not None:
        windows.append(main.attention.indexer.top_k)
    return min(windows)


def with_head(checkpoint: Checkpoint, main: Architecture) -> Architecture:
    """The model and its own draft head, if it has one: what a conversion takes along."""
    head = load_head(checkpoint, main)
    if head is None:
        return main
    dense = main.dense | {f"draft.{part}": name for part, name in head.dense.items()}
    return Architecture(main.spec, dense, [*main.experts, *head.experts])


def _refuse_less_than_there_is(config: Config, tensors: Tensors, spec: ModelSpec) -> None:
    """Without a layer or a bias that was trained, a model would answer, but nonsense."""
    predicting = config.integer("num_nextn_predict_layers", "num_mtp_modules", default=0, minimum=0)
    for name, layer in tensors.weights_not_asked_for().items():
        if layer < spec.n_layers:
            raise config.wrong(f"does not ask for the tensor {name}, which is there; fetch the file again")
        if layer >= spec.n_layers + predicting:
            raise config.wrong(
                f"num_hidden_layers is {spec.n_layers}, but there is the tensor {name}; fetch the file again"
            )
