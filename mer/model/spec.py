"""What the forward pass must know about a model: numbers only, no tensor names and no files."""

from __future__ import annotations

from typing import Literal

from attrs import evolve, frozen


@frozen
class RopeScaling:
    """How frequencies were changed, for whoever writes it down. factor: of the context `original`."""

    kind: Literal["linear", "llama3", "yarn", "factors", "longrope"]
    factor: float
    original: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    # Beyond `original` queries grow by this times ln(position / original); mer's contexts end there.
    temperature: float = 0.0


@frozen
class RopeSpec:
    """Rotary embedding: pair i at position p turns by p * inv_freq[i]; cos and sin are times `scale`.

    With fewer than head_dim / 2 pairs only the head's first 2 * pairs elements turn.
    """

    inv_freq: tuple[float, ...]
    scale: float = 1.0
    # True: pairs are neighbours (2i, 2i+1); False: pairs are (i, i + pairs).
    interleaved: bool = False
    # What the frequencies were made of.
    theta: float = 10000.0
    scaling: RopeScaling | None = None
    # LongRoPE: what takes this one's place where sequences may be longer than scaling.original.
    long: RopeSpec | None = None


@frozen
class AttentionSpec:
    """Grouped-query attention: query head h reads key/value head h // (n_heads / n_kv_heads)."""

    n_heads: int
    n_kv_heads: int
    head_dim: int
    scale: float
    # RMS norm of query and key: over each head, or over the whole projected vector.
    qk_norm: Literal["none", "head", "vector"] = "none"
    clip: float | None = None
    # Values are divided by their root mean square, head by head.
    v_norm: bool = False
    # A learnt score for each head that takes part in the softmax and has no value.
    sinks: bool = False
    # A head's output is multiplied by the sigmoid of a projection of its own.
    gated: bool = False
    # The norm of query and key comes behind the rotary embedding, not before it.
    qk_norm_last: bool = False


@frozen
class IndexerSpec:
    """DeepSeek's sparse attention (DSA): a token sees the `top_k` positions whose index keys suit it best.

    Each position leaves an index key in the cache. A position's score for a token is the sum over index heads
    of weight * max(0, query . key); ties go to the lowest position.
    """

    n_heads: int
    head_dim: int
    top_k: int
    # As RopeSpec says it, of the first elements of index queries and keys.
    interleaved: bool
    # False: the layer has no index keys, and takes the choice of the last layer that has.
    own: bool = True


@frozen
class LatentAttentionSpec:
    """Multi-head latent attention (MLA): a token has one latent and one rotary key for all heads."""

    n_heads: int
    nope_dim: int
    rope_dim: int
    value_dim: int
    kv_rank: int
    # None: queries come from one projection of the hidden state.
    query_rank: int | None
    scale: float
    # The latents' own norms have an eps of their own.
    norm_eps: float = 1e-6
    # None: a token sees all before it.
    indexer: IndexerSpec | None = None

    @property
    def latent_dim(self) -> int:
        """What one token leaves in the cache: the latent and the rotary key, in elements."""
        return self.kv_rank + self.rope_dim


@frozen
class CompressedAttentionSpec:
    """DeepSeek-V4's: a window, and compressed positions behind it.

    One rotated key for all heads is the value, too. What heads give is rotated back, and made narrower in
    groups of heads, before it is made a hidden state.
    """

    n_heads: int
    head_dim: int
    # The last elements of a head turn.
    rope_dim: int
    query_rank: int
    scale: float
    norm_eps: float
    o_groups: int
    o_rank: int
    # As many positions become one; 0: there is the window alone.
    rate: int = 0
    # Such a window also takes part in the next one's vector.
    overlap: bool = False
    # Of those vectors a token sees the index_top_k that suit it best, as in IndexerSpec; 0: all.
    index_heads: int = 0
    index_dim: int = 0
    index_top_k: int = 0


Attention = AttentionSpec | LatentAttentionSpec | CompressedAttentionSpec


@frozen
class StreamsSpec:
    """Hyper-connections: a hidden state is n streams; learnt weights make them one before each block.

    They are mixed behind it: the matrix for that is made doubly stochastic by `rounds` of Sinkhorn and
    Knopp's normalisation (Xie and others, mHC: Manifold-Constrained Hyper-Connections).
    """

    n: int
    rounds: int
    eps: float


@frozen
class DeltaSpec:
    """Gated delta rule: a causal convolution over q, k and v, then each head's state [key_dim, value_dim]."""

    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int
    # Positions that the convolution sees.
    kernel: int
    # Value head h reads key head h % key_heads; False: h // (value_heads / key_heads).
    tiled: bool = False

    @property
    def channels(self) -> int:
        """Of the convolution: all of q, k and v."""
        return 2 * self.key_heads * self.key_dim + self.out_width

    @property
    def out_width(self) -> int:
        """What a token leaves the state's heads with."""
        return self.value_heads * self.value_dim


@frozen
class ShortConvSpec:
    """Gated short convolution: out(c * conv(b * x)), b, c and x being projections of the hidden state."""

    channels: int
    # Positions that the convolution sees.
    kernel: int

    @property
    def out_width(self) -> int:
        return self.channels


@frozen
class RouterSpec:
    """How a token's experts are chosen and weighted. Ties go to the lowest index."""

    n_experts: int
    top_k: int
    # sparsemixer: for each choice in turn a softmax over those experts whose logits are at most 2 * `jitter`
    # (relative to their size) below the best one's.
    score: Literal["softmax", "sigmoid", "sqrt_softplus", "sparsemixer"]
    # Weights of the chosen experts are divided by their sum (plus `epsilon`), then multiplied by `scale`.
    normalise: bool
    scale: float = 1.0
    epsilon: float = 0.0
    # Experts form n_groups equal groups; only the `top_groups` best ones take part, by the sum of their
    # `group_best` best experts, two or one.
    n_groups: int = 1
    top_groups: int = 1
    group_best: Literal[1, 2] = 2
    jitter: float = 0.0
    # Of a router with a norm of its own, that norm's weights are times this.
    norm_scale: float = 1.0


@frozen
class ClampSpec:
    """Experts compute g * sigmoid(alpha * g) * (u + added), g at the most `limit`, u within +-limit."""

    alpha: float
    limit: float
    added: float = 1.0


@frozen
class LayerSpec:
    """One decoder layer."""

    # Positions a token sees, itself included; None: all before it.
    window: int | None
    # Index among the MoE layers, None where the layer has a plain feed-forward block.
    moe_index: int | None
    # Where they are not the model's own.
    attention: Attention | None = None
    rope: RopeSpec | None = None
    # Index among the layers with a recurrent state, None where the layer has attention.
    state_index: int | None = None


@frozen
class ModelSpec:
    """One model, as the forward pass and the budget planner see it. Sizes are in elements."""

    family: str
    vocab: int
    hidden: int
    norm_eps: float
    # A prompt with its answer may not be longer than this.
    max_positions: int
    attention: Attention
    rope: RopeSpec
    layers: tuple[LayerSpec, ...]
    # None, and a moe_inter of 0: a dense model, no layer has experts.
    router: RouterSpec | None
    moe_inter: int
    # Of the plain feed-forward layers; 0 where there is none.
    dense_inter: int
    # Width of the expert that every token passes; 0 where there is none.
    shared_inter: int
    # The shared expert's output is multiplied by a sigmoid gate of its own.
    shared_gate: bool = False
    tied_embeddings: bool = False
    # What the embedding is multiplied by.
    embedding_scale: float = 1.0
    # What a block's output is multiplied by before it is added to the hidden state, and the logits.
    residual_scale: float = 1.0
    logit_scale: float = 1.0
    # Logits are cap * tanh(logit / cap).
    logit_cap: float | None = None
    # A gated block is down(activation(gate) * up); gelu by tanh.
    activation: Literal["silu", "gelu"] = "silu"
    # Hidden states are of several streams.
    streams: StreamsSpec | None = None
    # Routed experts: gate, up and down each have a bias; and what stands in the place of silu(gate) * up.
    expert_bias: bool = False
    clamp: ClampSpec | None = None
    # Of the layers that have a state in the place of attention; None where there are none.
    recurrent: DeltaSpec | ShortConvSpec | None = None
    # Norms multiply by 1 + their weight (but for those of the recurrent layers' outputs).
    zero_centred_norms: bool = False

    @property
    def n_layers(self) -> int:
        return len(self.layers)

    @property
    def n_moe_layers(self) -> int:
        return sum(layer.moe_index is not None for layer in self.layers)

    def reaching(self, length: int) -> ModelSpec:
        """This model for sequences of up to `length` tokens: LongRoPE has other frequencies for long ones."""
        rope = self.rope
        if rope.long is None or rope.scaling is None or length <= rope.scaling.original:
            return self
        return evolve(self, rope=rope.long)

    @property
    def n_state_layers(self) -> int:
        return sum(layer.state_index is not None for layer in self.layers)

    @property
    def attentions(self) -> list[Attention]:
        """The attention of each layer; of those with a state instead, too, for which it means nothing."""
        return [layer.attention or self.attention for layer in self.layers]

    @property
    def ropes(self) -> list[RopeSpec]:
        """The rotary embedding of each layer."""
        return [layer.rope or self.rope for layer in self.layers]

    @property
    def n_experts(self) -> int:
        """Of each MoE layer; 0 in a dense model."""
        return self.router.n_experts if self.router else 0

    @property
    def top_k(self) -> int:
        """Experts of a token in each MoE layer; 0 in a dense model."""
        return self.router.top_k if self.router else 0
