"""Part of decoder.pyx: grouped-query attention, between its projections and its scores."""


cdef inline void norm_query_and_key(Decoder d, float *q, float *k) noexcept nogil:
    cdef Layer *layer = d.layer
    cdef Geometry *g = &layer.geometry
    cdef long dim = g.head_dim, i
    if g.qk_norm == 2:
        mer_rms_norm(q, layer.q_norm, q, g.n_heads * dim, d.eps)
        mer_rms_norm(k, layer.k_norm, k, g.n_kv * dim, d.eps)
    elif g.qk_norm == 1:
        for i in range(g.n_heads):
            mer_rms_norm(q + i * dim, layer.q_norm, q + i * dim, dim, d.eps)
        for i in range(g.n_kv):
            mer_rms_norm(k + i * dim, layer.k_norm, k + i * dim, dim, d.eps)


cdef void grouped_task(Decoder d, long t, int thread) noexcept nogil:
    """Between projections and attention: bias, norms, clip, rotation of one token, and its place in the cache."""
    cdef Layer *layer = d.layer
    cdef Geometry *g = &layer.geometry
    cdef const Rope *rope = layer.rope
    cdef long dim = g.head_dim, n_q = g.n_heads * g.head_dim, n_kv = g.n_kv * g.head_dim, i
    cdef float *q = d.q + t * n_q
    cdef float *k = d.k + t * n_kv
    cdef float *v = d.v + t * n_kv
    cdef const float *cosine = rope.cosine + t * rope.pairs
    cdef const float *sine = rope.sine + t * rope.pairs
    add_bias(&layer.q, q)
    add_bias(&layer.k, k)
    if layer.v.w is NULL:
        memcpy(v, k, n_kv * sizeof(float))
    add_bias(&layer.v, v)
    if not g.qk_norm_last:
        norm_query_and_key(d, q, k)
    if g.v_norm:
        for i in range(g.n_kv):
            mer_rms_norm(v + i * dim, NULL, v + i * dim, dim, d.eps)
    if g.clips:
        mer_clip(q, g.clip, n_q)
        mer_clip(k, g.clip, n_kv)
        mer_clip(v, g.clip, n_kv)
    for i in range(g.n_heads):
        mer_rope(q + i * dim, cosine, sine, rope.pairs, rope.interleaved)
    for i in range(g.n_kv):
        mer_rope(k + i * dim, cosine, sine, rope.pairs, rope.interleaved)
    if g.qk_norm_last:
        norm_query_and_key(d, q, k)
    mer_kv_store(d.block_of(t), d.kv, d.positions[t] % MER_KV_BLOCK, k, v, g.n_kv, dim)
