"""Part of decoder.pyx: the choice of positions that a token sees, DeepSeek's sparse attention (DSA)."""


cdef void index_task(Decoder d, long t, int thread) noexcept nogil:
    """Between projections and scores: norm, rotation, and the key's place in the cache."""
    cdef Geometry *g = &d.layer.geometry
    cdef const Rope *rope = d.layer.rope
    cdef const float *cosine = rope.cosine + t * rope.pairs
    cdef const float *sine = rope.sine + t * rope.pairs
    cdef float *k = d.index_k + t * g.index_dim
    cdef float *q = d.index_q + t * g.index_heads * g.index_dim
    cdef long i
    mer_layer_norm(k, d.layer.index_norm, d.layer.index_norm + g.index_dim, k, g.index_dim, 1e-6)
    mer_rope(k, cosine, sine, rope.pairs, g.index_interleaved)
    for i in range(g.index_heads):
        mer_rope(q + i * g.index_dim, cosine, sine, rope.pairs, g.index_interleaved)
    mer_index_store(d.block_of(t) + mer_kv_part_bytes(d.kv, g.latent_dim), d.kv, d.positions[t] % MER_KV_BLOCK, k,
                    g.index_dim)


cdef void score_task(Decoder d, long task, int thread) noexcept nogil:
    """One token's scores of some of the positions before it."""
    cdef long chunks = d.score_stride // INDEX_POSITIONS, t = d.first_token + task // chunks
    cdef long b0 = task % chunks * (INDEX_POSITIONS // MER_KV_BLOCK)
    cdef long b1 = min(b0 + INDEX_POSITIONS // MER_KV_BLOCK, d.positions[t] // MER_KV_BLOCK + 1)
    if d.positions[t] >= d.layer.geometry.index_top_k and b0 < b1:
        mer_index_scores(&d.index, d.tables + d.sequence_of[t] * d.table_stride, t, b0, b1,
                         d.attention_scratch + thread * d.attention_floats,
                         d.index_scores + (t - d.first_token) * d.score_stride + b0 * MER_KV_BLOCK)


cdef void choose_task(Decoder d, long i, int thread) noexcept nogil:
    cdef long k = d.layer.geometry.index_top_k, t = d.first_token + i
    if d.positions[t] >= k:
        mer_choose(d.index_scores + i * d.score_stride, d.positions[t] + 1, k, d.index_scratch + thread * 2 * k,
                   d.chosen_positions + t * k)


cdef void choose_positions(Decoder d) noexcept nogil:
    """chosen_positions of the step's tokens, of h and of the query latent; their keys are written to the cache first.

    As many tokens at a time as there is room for their scores.
    """
    cdef Layer *layer = d.layer
    cdef Geometry *g = &layer.geometry
    cdef long end, stride
    d.linear(&layer.index_q, d.q_latent, d.n_tokens, d.index_q)
    d.linear(&layer.index_k, d.h, d.n_tokens, d.index_k)
    d.linear(&layer.index_weights, d.h, d.n_tokens, d.index_weights)
    d.run(index_task, d.n_tokens)
    d.index = mer_index(d.index_q, d.index_weights, layer.blocks + mer_kv_part_bytes(d.kv, g.latent_dim),
                        layer.block_bytes, g.index_heads, g.index_dim, d.kv)
    d.first_token = 0
    while d.first_token < d.n_tokens:
        d.score_stride, end = 0, d.first_token
        while end < d.n_tokens:
            stride = max(d.score_stride, (d.positions[end] // INDEX_POSITIONS + 1) * INDEX_POSITIONS)
            if end > d.first_token and stride * (end + 1 - d.first_token) > d.index_floats:
                break
            d.score_stride = stride
            end += 1
        d.run(score_task, (end - d.first_token) * (d.score_stride // INDEX_POSITIONS))
        d.run(choose_task, end - d.first_token)
        d.first_token = end
