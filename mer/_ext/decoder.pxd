"""The decoder: everything of a layer but its routed experts. All state of a model's forward pass is here."""
from libc.stdint cimport int32_t, int64_t, uint8_t, uint64_t

from mer._ext.kernels cimport Kernels, Pool

cdef extern from "mer_decoder.h" nogil:
    ctypedef struct mer_attention:
        const float *q
        float *out
        const char *blocks
        const int32_t *positions
        const float *sinks
        float *scratch
        size_t block_bytes
        size_t scratch_floats
        long n_heads
        long n_kv
        long key_dim
        long value_dim
        long window
        float scale
        int kv
        int latent
    ctypedef struct mer_index:
        const float *q
        const float *weights
        const char *keys
        size_t block_bytes
        long n_heads
        long dim
        int kv
    ctypedef struct mer_router:
        long n_experts
        long top_k
        long n_groups
        long top_groups
        int group_best
        int score
        int normalise
        float scale
        float epsilon
        float jitter
        const float *bias
        const float *expert_scale
    ctypedef struct mer_rows:
        const char *blocks
        size_t block_bytes
        size_t raw
        size_t entries
        long dim
        long rate
        int overlap
        int kv
        int raw_kv
    ctypedef struct mer_streams:
        long n
        long width
        long rounds
        float eps
        float norm_eps
        int last

cdef struct Matrix:
    const uint8_t *w             # NULL: there is no such matrix
    const float *bias            # NULL: none
    int format
    long rows, cols
    long row_bytes

cdef struct Rope:
    const float *inv_freq
    float *cosine                # of this step's tokens: [tokens, pairs]
    float *sine
    long pairs
    float scale
    bint interleaved

# A layer's attention in numbers; see mer.model.spec.
cdef struct Geometry:
    long n_heads, n_kv, head_dim
    long nope_dim, rope_dim, value_dim, kv_rank, latent_dim, query_rank
    float scale, clip, latent_eps
    long index_heads, index_dim, index_top_k  # index_top_k 0: all positions are seen
    long rate, o_groups, o_rank  # of compressed attention; rate 0: a window alone
    bint compressed, overlap
    bint latent, clips, v_norm, qk_norm_last, index_interleaved
    int qk_norm                  # 0 none, 1 each head, 2 the whole vector

cdef struct Layer:
    Geometry geometry
    const Rope *rope
    const float *attention_norm
    const float *mlp_norm
    const float *q_norm
    const float *k_norm
    const float *q_latent_norm
    const float *latent_norm
    const float *router_norm     # of the router's own input; NULL: it gets what the experts get
    const float *router_bias     # for the choice only
    const float *expert_scale    # times which the chosen experts' weights are
    # Norms of what a block gives, before it is added to x, of the shared expert's input; and what x is times at last.
    const float *attention_out_norm
    const float *mlp_out_norm
    const float *routed_out_norm
    const float *shared_out_norm
    const float *shared_norm
    const float *layer_scale
    const float *sinks
    Matrix q, k, v, o            # in latent attention q takes the query latent, where there is one
    Matrix q_gate                # of attention's output; none: NULL
    Matrix q_latent, latent, k_up, v_up
    Matrix index_q, index_k, index_weights  # NULL: the last choice of positions holds
    const float *index_norm      # weights, then biases
    Matrix gate, up, down        # of the plain feed-forward block, or of the shared expert
    Matrix router, shared_gate
    const int32_t *router_table  # [vocab, top_k] the experts of each token; NULL: the router chooses
    # Of compressed attention, with what is chosen by.
    Matrix o_in, compress_kv, compress_gate, index_kv, index_gate
    const float *compress_norm
    const float *compress_place_bias
    const float *index_entry_norm
    const float *index_place_bias
    mer_rows rows, index_rows
    # What makes one of several streams, before attention and before the feed-forward block.
    Matrix attention_streams, mlp_streams
    const float *attention_streams_scale
    const float *mlp_streams_scale
    char *blocks
    size_t block_bytes
    long window

cdef class Decoder

ctypedef void (*decoder_task)(Decoder d, long task, int thread) noexcept nogil

cdef class Decoder:
    cdef Kernels kernels
    cdef Pool pool
    cdef readonly list kept       # arrays that the pointers below lead into
    cdef object spec
    cdef Layer *layers
    cdef Rope *ropes              # each rotary embedding that some layer has
    cdef long n_ropes
    cdef readonly long n_layers
    cdef long max_layers

    # the model
    cdef long hidden, vocab
    cdef float eps, logit_cap     # logit_cap 0: none
    cdef bint gelu, clamped       # silu otherwise
    cdef float alpha, limit, added  # of a clamped SwiGLU
    cdef int kv                   # how blocks store numbers
    cdef const float *final_norm
    cdef const float *last_norm   # the same, before the head
    cdef float residual_scale
    cdef bint layer_norm          # norms of the hidden state have a bias, which stands behind their weights
    cdef Matrix head
    cdef mer_router router
    cdef mer_streams streams      # n 0: a hidden state is a single one
    cdef Matrix head_streams
    cdef const float *head_streams_scale

    # the buffers, see mer/model/scratch.py
    cdef float *x
    cdef float *h
    cdef float *y
    cdef float *shared
    cdef float *gate
    cdef float *up
    cdef float *q
    cdef float *q_gate
    cdef float *k
    cdef float *v
    cdef float *attended
    cdef float *q_latent
    cdef float *latents
    cdef float *q_wide
    cdef float *out_wide
    cdef float *router_logits
    cdef float *choice
    cdef float *expert_weights
    cdef float *last
    cdef float *logit_rows
    cdef float *attention_scratch
    cdef int32_t *expert_ids
    cdef int32_t *ahead_ids
    cdef float *ahead_weights
    cdef int64_t *spans           # [n_spans, 3] sequence, first token, end
    cdef int32_t *sequence_of     # [tokens]
    cdef uint8_t *acts
    cdef const void **act_pointers
    cdef void *linear_scratch
    cdef float *index_q
    cdef float *index_k
    cdef float *index_weights
    cdef float *index_scores
    cdef uint64_t *index_scratch
    cdef int32_t *chosen_positions  # [tokens, top_k] of those that see less than all
    cdef float *x_streams         # [tokens, streams, hidden], of which x is made
    cdef float *mixes             # [tokens, (2 + streams) * streams]
    cdef float *raw_kv
    cdef float *raw_gate
    cdef float *index_raw_kv
    cdef float *index_raw_gate
    cdef float *entry_scratch
    cdef float *entry_scores
    cdef long entry_floats, most_entries  # of the two, for each thread
    cdef long index_floats
    cdef long acts_bytes, part_tokens, attention_floats

    # the batch
    cdef object batch_arrays
    cdef const int32_t *tokens
    cdef const int32_t *positions
    cdef const int32_t *tables
    cdef const int32_t *rows
    cdef long n_tokens, n_spans, table_stride

    # the layer under way, for the tasks
    cdef Layer *layer
    cdef mer_attention attention
    cdef mer_index index
    cdef long score_stride        # floats between the scores of two tokens
    cdef long first_span, end_span, first_token, end_token, heads_per_task
    cdef const Matrix *routing    # the router that is asked
    cdef const int32_t *router_table
    cdef const float *streams_base
    cdef const float *streams_scale
    cdef const float *norm_weights
    cdef float *normed
    cdef float *routed            # its products
    cdef int32_t *chosen
    cdef float *chosen_weights
    cdef long inter

    cdef void *buffer(self, buffers, str name)
    cdef take_buffers(self, buffers)
    cdef take_ropes(self, ropes, buffers)
    cdef const float *floats(self, values) except? NULL
    cdef norm_of(self, weights, str name)
    cdef const float *vector(self, weights, str name) except? NULL
    cdef Matrix matrix(self, weights, str name) except *
    cdef void linear(self, const Matrix *m, const float *x, long n, float *y) noexcept nogil
    cdef void run(self, decoder_task task, long n) noexcept nogil
    cdef void norm(self, const float *weights, float *out) noexcept nogil
    cdef void choose(self, const Layer *layer, const float *x, int32_t *ids, float *weights) noexcept nogil
    cdef void decide(self, const Layer *layer, float *logits, int32_t *ids, float *weights) noexcept nogil
    cdef void cap_logits(self, long n) noexcept nogil
    cdef bint project(self, long index) except -1
    cdef int absorb(self, long index) except -1
    cdef void enter(self, long index) noexcept nogil
    cdef void leave(self) noexcept nogil
    cdef void attend_grouped(self) noexcept nogil
    cdef void attend_spans(self, long first, long end) noexcept nogil
    cdef void feed_forward(self, float *out) noexcept nogil
    cdef char *block_of(self, long token) noexcept nogil
    cdef size_t part_bytes(self, long dim) noexcept nogil
