"""The decoder layers on the compute pool: norms, projections, paged attention, router, feed-forward blocks.

A `Decoder` owns no memory of size: weights, KV blocks and buffers belong to Python (it keeps references).
Per step: `begin`, then for each layer `attend` and either `feed`, or `route`, the routed experts (done
elsewhere: from `h`, `expert_ids`, `expert_weights` to `y`) and `finish`; at last `logits`. Methods trust
their arguments: mer.model.forward checks them.
"""
import numpy as np

from libc.stdint cimport int32_t, int64_t, uint8_t, uintptr_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy, memset

from mer._ext.kernels cimport Kernels, Pool, mer_task_fn

cdef extern from "mer_decoder.h" nogil:
    enum: MER_KV_BLOCK
    void mer_rms_norm(const float *x, const float *w, float *y, long n, float eps)
    void mer_layer_norm(const float *x, const float *w, const float *bias, float *y, long n, float eps)
    void mer_add(float *x, const float *y, long n)
    void mer_add_scaled(float *x, const float *y, float factor, long n)
    void mer_gate(float *x, const float *gate, long n)
    void mer_scale(float *x, float factor, long n)
    void mer_soft_cap(float *x, float cap, long n)
    void mer_clip(float *x, float limit, long n)
    void mer_rope_angles(int32_t position, const float *inv_freq, long pairs, float scale, float *cosine,
                         float *sine)
    void mer_rope(float *x, const float *cosine, const float *sine, long pairs, int interleaved)
    void mer_latent_store(void *block, int kv, long at, const float *latent, long dim)
    void mer_kv_store(void *block, int kv, long at, const float *k, const float *v, long n_kv, long dim)
    void mer_attend(const mer_attention *a, const int32_t *table, long t0, long t1, long h0, long h1, int thread)
    void mer_attend_chosen(const mer_attention *a, const int32_t *table, const int32_t *chosen, long n, long t, long h0,
                           long h1, int thread)
    size_t mer_kv_part_bytes(int kv, long dim)
    void mer_index_store(void *part, int kv, long at, const float *key, long dim)
    void mer_index_scores(const mer_index *x, const int32_t *table, long t, long b0, long b1, float *scratch,
                          float *scores)
    void mer_choose(const float *scores, long n, long k, uint64_t *scratch, int32_t *chosen)
    void mer_route(const mer_router *r, float *logits, float *choice, const int32_t *fixed, int32_t *ids,
                   float *weights)
    float mer_sigmoid(float x)
    int mer_embed(int fmt, const void *weights, long cols, const int32_t *tokens, long n, float *out)

cdef enum:
    SPAN_TOKENS = 16
    INDEX_POSITIONS = 1024  # scored by one task
    CAP_CHUNK = 4096  # logits of one task

# Most queries of one sequence that share the blocks they read.
SPAN = SPAN_TOKENS
# Scores of positions come in multiples of this.
INDEX_CHUNK = INDEX_POSITIONS


cdef void angles_task(Decoder d, long t, int thread) noexcept nogil:
    cdef Rope *rope
    cdef long i
    for i in range(d.n_ropes):
        rope = &d.ropes[i]
        mer_rope_angles(d.positions[t], rope.inv_freq, rope.pairs, rope.scale, rope.cosine + t * rope.pairs,
                        rope.sine + t * rope.pairs)


cdef inline void norm_state(Decoder d, const float *x, const float *weights, float *y) noexcept nogil:
    """y = norm(x), of a hidden state; x itself where there is no such norm."""
    if weights is NULL:
        memcpy(y, x, d.hidden * sizeof(float))
    elif d.layer_norm:
        mer_layer_norm(x, weights, weights + d.hidden, y, d.hidden, d.eps)
    else:
        mer_rms_norm(x, weights, y, d.hidden, d.eps)


cdef void norm_task(Decoder d, long t, int thread) noexcept nogil:
    norm_state(d, d.x + t * d.hidden, d.norm_weights, d.normed + t * d.hidden)


cdef inline void add_bias(const Matrix *m, float *y) noexcept nogil:
    if m.bias is not NULL:
        mer_add(y, m.bias, m.rows)


cdef inline void add_block(Decoder d, long t, const float *y) noexcept nogil:
    """x += y, what attention or a feed-forward block gave."""
    if d.streams.n:
        spread_block(d, t, y)
    else:
        mer_add_scaled(d.x + t * d.hidden, y, d.residual_scale, d.hidden)


cdef void attended_task(Decoder d, long t, int thread) noexcept nogil:
    cdef float *y = d.y + t * d.hidden
    add_bias(&d.layer.o, y)
    if d.layer.attention_out_norm is not NULL:
        mer_rms_norm(y, d.layer.attention_out_norm, y, d.hidden, d.eps)
    add_block(d, t, y)


cdef void attend_task(Decoder d, long task, int thread) noexcept nogil:
    cdef long chunks = d.attention.n_heads // d.heads_per_task
    cdef int64_t *span = d.spans + (d.first_span + task // chunks) * 3
    cdef long head = task % chunks * d.heads_per_task
    cdef long end = head + d.heads_per_task, top_k = d.layer.geometry.index_top_k, t = span[2]
    cdef const int32_t *table = d.tables + span[0] * d.table_stride
    # Of the span's tokens the first may see all positions, the others those that were chosen.
    while top_k and t > span[1] and d.positions[t - 1] >= top_k:
        t -= 1
        mer_attend_chosen(&d.attention, table, d.chosen_positions + t * top_k, top_k, t - d.first_token, head, end,
                          thread)
    if t > span[1]:
        mer_attend(&d.attention, table, span[1] - d.first_token, t - d.first_token, head, end, thread)


include "grouped.pxi"
include "streams.pxi"
include "compressed.pxi"
include "embed.pxi"
include "indexer.pxi"
include "latent.pxi"
include "blocks.pxi"
include "ends.pxi"
include "geometry.pxi"


cdef class Decoder:
    """A model's decoder.

    spec: mer.model.spec.ModelSpec. buffers: of mer.model.scratch. weights: 'head' (a matrix) and 'final_norm'.
    kv: how KV blocks store numbers, 0 F32, 1 F16, 2 Q8_0 (see mer.model.kv).

    A matrix is an object with `data` uint8 [rows, row_bytes], `format` (id) and `cols`; everything else
    is a f32 vector.
    """

    def __cinit__(self, spec, Kernels kernels not None, Pool pool not None, buffers, weights, int kv):
        self.kernels, self.pool, self.kv = kernels, pool, kv
        self.spec, self.kept = spec, [buffers]
        ropes = list(dict.fromkeys(spec.ropes))
        self.max_layers, self.n_ropes = len(spec.layers), len(ropes)
        self.layers = <Layer *>calloc(self.max_layers, sizeof(Layer))
        self.ropes = <Rope *>calloc(self.n_ropes, sizeof(Rope))
        if self.layers is NULL or self.ropes is NULL:
            raise MemoryError
        self.hidden, self.vocab, self.eps = spec.hidden, spec.vocab, spec.norm_eps
        self.logit_cap, self.gelu = spec.logit_cap or 0.0, spec.activation == "gelu"
        r = spec.router
        if r is not None:
            self.router = mer_router(r.n_experts, r.top_k, r.n_groups, r.top_groups, r.group_best,
                                     _SCORES[r.score], r.normalise, r.scale, r.epsilon, r.jitter, NULL, NULL)
        if spec.clamp is not None:
            self.clamped, self.alpha, self.limit = True, spec.clamp.alpha, spec.clamp.limit
            self.added = spec.clamp.added
        self.residual_scale = spec.residual_scale
        take_streams(self, spec, weights)
        self.layer_norm = "final_norm_bias" in weights
        final_norm = self.norm_of(weights, "final_norm")
        self.final_norm = self.floats(final_norm)
        # The head is linear: its input's scale is that of the logits.
        self.last_norm = self.floats(final_norm * np.float32(spec.logit_scale))
        self.head = self.matrix(weights, "head")
        self.take_buffers(buffers)
        self.take_ropes(ropes, buffers)

    def __dealloc__(self):
        free(self.layers)
        free(self.ropes)

    cdef void *buffer(self, buffers, str name):
        return <void *><uintptr_t>buffers[name].ctypes.data if name in buffers else NULL

    cdef take_buffers(self, buffers):
        self.x = <float *>self.buffer(buffers, "x")
        self.h = <float *>self.buffer(buffers, "h")
        self.y = <float *>self.buffer(buffers, "y")
        self.shared = <float *>self.buffer(buffers, "shared")
        self.gate = <float *>self.buffer(buffers, "gate")
        self.up = <float *>self.buffer(buffers, "up")
        self.q = <float *>self.buffer(buffers, "q")
        self.q_gate = <float *>self.buffer(buffers, "q_gate")
        self.k = <float *>self.buffer(buffers, "k")
        self.v = <float *>self.buffer(buffers, "v")
        self.attended = <float *>self.buffer(buffers, "attended")
        self.q_latent = <float *>self.buffer(buffers, "q_latent")
        self.latents = <float *>self.buffer(buffers, "latent")
        self.q_wide = <float *>self.buffer(buffers, "q_wide")
        self.out_wide = <float *>self.buffer(buffers, "out_wide")
        self.router_logits = <float *>self.buffer(buffers, "router_logits")
        self.choice = <float *>self.buffer(buffers, "choice")
        self.expert_ids = <int32_t *>self.buffer(buffers, "expert_ids")
        self.expert_weights = <float *>self.buffer(buffers, "expert_weights")
        self.ahead_ids = <int32_t *>self.buffer(buffers, "ahead_ids")
        self.ahead_weights = <float *>self.buffer(buffers, "ahead_weights")
        self.last = <float *>self.buffer(buffers, "last")
        self.logit_rows = <float *>self.buffer(buffers, "logits")
        self.attention_scratch = <float *>self.buffer(buffers, "attention_scratch")
        self.attention_floats = buffers["attention_scratch"].shape[1]
        self.spans = <int64_t *>self.buffer(buffers, "spans")
        self.sequence_of = <int32_t *>self.buffer(buffers, "sequence_of")
        self.index_q = <float *>self.buffer(buffers, "index_q")
        self.index_k = <float *>self.buffer(buffers, "index_k")
        self.index_weights = <float *>self.buffer(buffers, "index_weights")
        self.index_scratch = <uint64_t *>self.buffer(buffers, "index_scratch")
        self.chosen_positions = <int32_t *>self.buffer(buffers, "chosen_positions")
        self.index_scores = <float *>self.buffer(buffers, "index_scores")
        if self.index_scores is not NULL:
            self.index_floats = buffers["index_scores"].shape[0]
        take_more_buffers(self, buffers)
        self.acts = <uint8_t *>self.buffer(buffers, "acts")
        self.act_pointers = <const void **>self.buffer(buffers, "act_pointers")
        self.linear_scratch = self.buffer(buffers, "linear_scratch")
        if self.acts is not NULL:
            self.acts_bytes, self.part_tokens = buffers["acts"].shape[2], buffers["acts"].shape[1]

    cdef take_ropes(self, ropes, buffers):
        """Each rotary embedding has its part of the buffers."""
        cdef float *cosine = <float *>self.buffer(buffers, "cos")
        cdef float *sine = <float *>self.buffer(buffers, "sin")
        cdef long max_tokens = buffers["x"].shape[0], i
        for i, r in enumerate(ropes):
            self.ropes[i] = Rope(self.floats(r.inv_freq), cosine, sine, len(r.inv_freq), r.scale, r.interleaved)
            cosine += max_tokens * self.ropes[i].pairs
            sine += max_tokens * self.ropes[i].pairs

    cdef const float *floats(self, values) except? NULL:
        """values as f32 that live as long as this object."""
        array = np.ascontiguousarray(values, np.float32)
        self.kept.append(array)
        return <const float *><uintptr_t>array.ctypes.data

    cdef norm_of(self, weights, str name):
        """A norm's weights, where they have biases with these behind them."""
        return np.concatenate([weights[name], weights[name + "_bias"]]) if self.layer_norm else weights[name]

    cdef const float *vector(self, weights, str name) except? NULL:
        return self.floats(weights[name]) if name in weights else NULL

    cdef Matrix matrix(self, weights, str name) except *:
        cdef Matrix m = Matrix(NULL, NULL, 0, 0, 0, 0)
        if name in weights:
            weight = weights[name]
            self.kept.append(weight.data)
            m.w = <const uint8_t *><uintptr_t>weight.data.ctypes.data
            m.bias = self.vector(weights, name + "_bias")
            m.format, m.cols = weight.format, weight.cols
            m.rows, m.row_bytes = weight.data.shape[0], weight.data.shape[1]
        return m

    def add_layer(self, weights, blocks):
        """The next layer. weights: by the canonical names of mer.model.dense. blocks: KV, [n_blocks, elements]."""
        cdef Layer *layer = &self.layers[self.n_layers]
        if self.n_layers == self.max_layers:
            raise ValueError(f"the model has {self.max_layers} layers")
        spec = self.spec.layers[self.n_layers]
        layer.geometry = geometry_of(spec.attention or self.spec.attention)
        layer.rope = &self.ropes[list(dict.fromkeys(self.spec.ropes)).index(spec.rope or self.spec.rope)]
        layer.window = spec.window or 0
        self.kept.append(blocks)
        layer.blocks, layer.block_bytes = <char *><uintptr_t>blocks.ctypes.data, blocks.strides[0]
        if "attention_norm" in weights:
            layer.attention_norm = self.floats(self.norm_of(weights, "attention_norm"))
        if "mlp_norm" in weights:
            layer.mlp_norm = self.floats(self.norm_of(weights, "mlp_norm"))
        layer.q_norm, layer.k_norm = self.vector(weights, "q_norm"), self.vector(weights, "k_norm")
        layer.q_latent_norm = self.vector(weights, "q_latent_norm")
        layer.latent_norm = self.vector(weights, "latent_norm")
        layer.q, layer.k = self.matrix(weights, "q"), self.matrix(weights, "k")
        layer.v, layer.o = self.matrix(weights, "v"), self.matrix(weights, "o")
        layer.q_gate = self.matrix(weights, "q_gate")
        layer.q_latent, layer.latent = self.matrix(weights, "q_latent"), self.matrix(weights, "latent")
        layer.k_up, layer.v_up = self.matrix(weights, "k_up"), self.matrix(weights, "v_up")
        layer.index_q, layer.index_k = self.matrix(weights, "index_q"), self.matrix(weights, "index_k")
        layer.index_weights = self.matrix(weights, "index_weights")
        if "index_norm" in weights:
            layer.index_norm = self.floats(np.concatenate([weights["index_norm"], weights["index_norm_bias"]]))
        layer.gate, layer.up = self.matrix(weights, "gate"), self.matrix(weights, "up")
        layer.down = self.matrix(weights, "down")
        layer.attention_out_norm = self.vector(weights, "attention_out_norm")
        layer.mlp_out_norm = self.vector(weights, "mlp_out_norm")
        layer.routed_out_norm = self.vector(weights, "routed_out_norm")
        layer.shared_norm = self.vector(weights, "shared_norm")
        layer.shared_out_norm = self.vector(weights, "shared_out_norm")
        layer.layer_scale = self.vector(weights, "layer_scale")
        if "router_norm" in weights:
            layer.router_norm = self.floats(weights["router_norm"] * np.float32(self.spec.router.norm_scale))
        layer.expert_scale = self.vector(weights, "router_expert_scale")
        layer.router, layer.router_bias = self.matrix(weights, "router"), self.vector(weights, "router_choice_bias")
        layer.shared_gate, layer.sinks = self.matrix(weights, "shared_gate"), self.vector(weights, "sinks")
        take_compressed(self, layer, weights)
        take_layer_streams(self, layer, weights)
        self.n_layers += 1

    cdef void linear(self, const Matrix *m, const float *x, long n, float *y) noexcept nogil:
        self.kernels.linear(self.pool, m.format, m.w, m.rows, m.cols, x, n, y, self.linear_scratch)

    cdef void run(self, decoder_task task, long n) noexcept nogil:
        # An argument of class Decoder is a pointer, as the pool's void * is.
        self.pool.run(<mer_task_fn>task, <void *>self, n)

    cdef void norm(self, const float *weights, float *out) noexcept nogil:
        self.norm_weights, self.normed = weights, out
        self.run(norm_task, self.n_tokens)

    cdef void choose(self, const Layer *layer, const float *x, int32_t *ids, float *weights) noexcept nogil:
        """ids and weights: the choice of this layer's router for x, which is normed already."""
        self.linear(&layer.router, x, self.n_tokens, self.router_logits)
        self.decide(layer, self.router_logits, ids, weights)

    cdef void decide(self, const Layer *layer, float *logits, int32_t *ids, float *weights) noexcept nogil:
        """The same, of the products that its router gave."""
        self.routing, self.routed, self.chosen, self.chosen_weights = &layer.router, logits, ids, weights
        self.router.bias, self.router.expert_scale = layer.router_bias, layer.expert_scale
        self.router_table = layer.router_table
        self.run(route_task, self.n_tokens)

    cdef size_t part_bytes(self, long dim) noexcept nogil:
        """Bytes of 16 keys, or values, of one head."""
        return mer_kv_part_bytes(self.kv, dim)

    cdef char *block_of(self, long token) noexcept nogil:
        """The block where a token's key and value belong, in the layer under way."""
        cdef const int32_t *table = self.tables + self.sequence_of[token] * self.table_stride
        return self.layer.blocks + <size_t>table[self.positions[token] // MER_KV_BLOCK] * self.layer.block_bytes

    def begin(self, const int32_t[::1] positions, const int32_t[::1] query_offsets,
              const int32_t[:, ::1] block_tables, const int32_t[::1] tokens=None):
        """Take up a batch (see mer.model.batch); the embeddings stand in `x` already.

        tokens: their ids, where experts are chosen by them.
        """
        cdef long s, t, end
        self.batch_arrays = (positions, query_offsets, block_tables, tokens)
        self.tokens = NULL
        if tokens is not None:
            self.tokens = &tokens[0]
        self.positions, self.tables = &positions[0], &block_tables[0, 0]
        self.n_tokens, self.table_stride, self.n_spans = positions.shape[0], block_tables.shape[1], 0
        for s in range(block_tables.shape[0]):
            t = query_offsets[s]
            while t < query_offsets[s + 1]:
                end = min(t + SPAN_TOKENS, <long>query_offsets[s + 1])
                self.spans[self.n_spans * 3] = s
                self.spans[self.n_spans * 3 + 1] = t
                self.spans[self.n_spans * 3 + 2] = end
                self.n_spans += 1
                while t < end:
                    self.sequence_of[t] = <int32_t>s
                    t += 1
        with nogil:
            self.run(angles_task, self.n_tokens)
            if self.streams.n:
                self.run(begin_streams_task, self.n_tokens)

    def attend(self, long index):
        """x += attention(norm(x)), the tokens' keys and values being written to the cache first."""
        with nogil:
            self.enter(index)
            if self.layer.geometry.latent:
                attend_latent(self)
            elif self.layer.geometry.compressed:
                attend_compressed(self)
            else:
                self.attend_grouped()
            self.leave()

    cdef bint project(self, long index) except -1:
        """Whether the layer is elsewhere: then the products are there that its state takes in (see recurrent.pyx)."""
        return False

    cdef int absorb(self, long index) except -1:
        """x += o(attended), of a layer that `project` found elsewhere."""
        return 0

    cdef void enter(self, long index) noexcept nogil:
        """h = norm(x), for what mixes tokens in this layer."""
        self.layer = &self.layers[index]
        collapse(self, &self.layer.attention_streams, self.layer.attention_streams_scale)
        self.norm(self.layer.attention_norm, self.h)

    cdef void leave(self) noexcept nogil:
        """x += o(attended)"""
        self.linear(&self.layer.o, self.attended, self.n_tokens, self.y)
        self.run(attended_task, self.n_tokens)

    cdef void attend_grouped(self) noexcept nogil:
        cdef Layer *layer = self.layer
        cdef Geometry *g = &layer.geometry
        cdef long group = g.n_heads // g.n_kv
        self.linear(&layer.q, self.h, self.n_tokens, self.q)
        self.linear(&layer.k, self.h, self.n_tokens, self.k)
        if layer.v.w is not NULL:
            self.linear(&layer.v, self.h, self.n_tokens, self.v)
        self.run(grouped_task, self.n_tokens)
        # Heads that share a key stay in one task, unless threads would be idle then.
        self.heads_per_task = group
        if self.n_spans * g.n_kv < self.pool.n_threads:
            self.heads_per_task = 1
        self.first_token = 0
        self.attention = mer_attention(
            self.q, self.attended, layer.blocks, self.positions, layer.sinks, self.attention_scratch, layer.block_bytes,
            self.attention_floats, g.n_heads, g.n_kv, g.head_dim, g.head_dim, layer.window, g.scale, self.kv, 0)
        self.attend_spans(0, self.n_spans)
        if layer.q_gate.w is not NULL:
            self.linear(&layer.q_gate, self.h, self.n_tokens, self.q_gate)
            self.run(gate_task, self.n_tokens)

    cdef void attend_spans(self, long first, long end) noexcept nogil:
        self.first_span = first
        self.run(attend_task, (end - first) * (self.attention.n_heads // self.heads_per_task))

    cdef void feed_forward(self, float *out) noexcept nogil:
        """out = down(silu(gate(h)) * up(h))"""
        self.inter = self.layer.gate.rows
        self.linear(&self.layer.gate, self.h, self.n_tokens, self.gate)
        self.linear(&self.layer.up, self.h, self.n_tokens, self.up)
        self.run(swiglu_task, self.n_tokens)
        self.linear(&self.layer.down, self.gate, self.n_tokens, out)

    def feed(self, long index):
        """x += the plain feed-forward block of norm(x)."""
        self.layer = &self.layers[index]
        with nogil:
            collapse(self, &self.layer.mlp_streams, self.layer.mlp_streams_scale)
            self.norm(self.layer.mlp_norm, self.h)
            self.feed_forward(self.y)
            self.run(fed_task, self.n_tokens)

    def route(self, long index):
        """h = norm(x), and the router's choice for it: expert_ids and expert_weights."""
        self.layer = &self.layers[index]
        with nogil:
            collapse(self, &self.layer.mlp_streams, self.layer.mlp_streams_scale)
            self.norm(self.layer.mlp_norm, self.h)
            if self.layer.router_norm is NULL:
                self.choose(self.layer, self.h, self.expert_ids, self.expert_weights)
            else:
                self.norm(self.layer.router_norm, self.y)
                self.choose(self.layer, self.y, self.expert_ids, self.expert_weights)

    def mixture(self, long index, long moe_index, bint guess):
        """In the place of `route` and the experts, whether a device has all of that, and was asked for it.

        guess: somebody would like to know what the next layer will probably want.
        """
        return False

    def note_choices(self, routes):
        """Behind `logits`: the choices of such layers go to routes, i32 [MoE layers, >= T, top_k], or None."""

    def predict(self, long index):
        """ahead_ids: what the router of layer `index` would choose for x as it is now, layers too early.

        Most of a hidden state outlives a layer, so most of the choice does, too. Between `route` and the
        routed experts of the layer under way: y, where they will put their sum, holds the norm meanwhile.
        """
        cdef Layer *layer = &self.layers[index]
        with nogil:
            self.norm(layer.mlp_norm if layer.router_norm is NULL else layer.router_norm, self.y)
            self.choose(layer, self.y, self.ahead_ids, self.ahead_weights)

    def finish(self, long index):
        """x += y + shared expert(h), y being the routed experts' sum."""
        self.layer = &self.layers[index]
        with nogil:
            if self.layer.gate.w is not NULL:
                if self.layer.shared_norm is not NULL:
                    self.norm(self.layer.shared_norm, self.h)
                self.feed_forward(self.shared)
                if self.layer.shared_gate.w is not NULL:
                    self.linear(&self.layer.shared_gate, self.h, self.n_tokens, self.router_logits)
            self.run(finish_task, self.n_tokens)

    def hidden_states(self):
        """h = norm(x), the final one, of all tokens of this step: how many there are."""
        with nogil:
            collapse(self, &self.head_streams, self.head_streams_scale)
            self.norm(self.final_norm, self.h)
        return self.n_tokens

    def logits(self, const int32_t[::1] rows):
        """logits[i] = head(norm(x[rows[i]]))"""
        if rows.shape[0] == 0:
            return
        self.rows = &rows[0]
        with nogil:
            collapse(self, &self.head_streams, self.head_streams_scale)
            self.run(last_task, rows.shape[0])
            self.linear(&self.head, self.last, rows.shape[0], self.logit_rows)
            if self.head.bias is not NULL:
                self.run(head_bias_task, rows.shape[0])
            self.cap_logits(rows.shape[0])

    cdef void cap_logits(self, long n) noexcept nogil:
        if self.logit_cap > 0.0:
            self.run(cap_task, n * ((self.vocab + CAP_CHUNK - 1) // CAP_CHUNK))


include "join.pxi"
