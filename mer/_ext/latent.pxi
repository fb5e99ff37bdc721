"""Part of decoder.pyx: multi-head latent attention (MLA), one latent and one rotary key per token for all heads.

Scores are formed in the latent's space: a query is taken there by its head's k_up, and the mean latent that comes of it
is made into a value by v_up.
"""


cdef void query_latent_task(Decoder d, long t, int thread) noexcept nogil:
    cdef Geometry *g = &d.layer.geometry
    cdef float *q = d.q_latent + t * g.query_rank
    add_bias(&d.layer.q_latent, q)
    mer_rms_norm(q, d.layer.q_latent_norm, q, g.query_rank, g.latent_eps)


cdef void latent_task(Decoder d, long t, int thread) noexcept nogil:
    """Between projections and attention: norm and rotation of one token's latent, rotary key and queries."""
    cdef Geometry *g = &d.layer.geometry
    cdef const Rope *rope = d.layer.rope
    cdef long head_dim = g.nope_dim + g.rope_dim, i
    cdef float *latent = d.latents + t * g.latent_dim
    cdef float *q = d.q + t * g.n_heads * head_dim + g.nope_dim
    cdef const float *cosine = rope.cosine + t * rope.pairs
    cdef const float *sine = rope.sine + t * rope.pairs
    add_bias(&d.layer.latent, latent)
    mer_rms_norm(latent, d.layer.latent_norm, latent, g.kv_rank, g.latent_eps)
    mer_rope(latent + g.kv_rank, cosine, sine, rope.pairs, rope.interleaved)
    for i in range(g.n_heads):
        mer_rope(q + i * head_dim, cosine, sine, rope.pairs, rope.interleaved)
    mer_latent_store(d.block_of(t), d.kv, d.positions[t] % MER_KV_BLOCK, latent, g.latent_dim)


cdef void absorb_task(Decoder d, long head, int thread) noexcept nogil:
    """One head's queries of a part, taken into the latent's space: score = (q W_k) . latent + q_rope . k_rope."""
    cdef Geometry *g = &d.layer.geometry
    cdef Matrix *m = &d.layer.k_up
    cdef const void **acts = d.act_pointers + thread * d.part_tokens
    cdef long n = d.end_token - d.first_token, t, stride = g.n_heads * g.latent_dim
    cdef float *out = d.q_wide + head * g.latent_dim
    cdef const float *q
    for t in range(n):
        q = d.q + ((d.first_token + t) * g.n_heads + head) * (g.nope_dim + g.rope_dim)
        acts[t] = d.acts + (thread * d.part_tokens + t) * d.acts_bytes
        d.kernels.prepare(m.format, q, <void *>acts[t], g.nope_dim)
        memcpy(out + t * stride + g.kv_rank, q + g.nope_dim, g.rope_dim * sizeof(float))
    d.kernels.matmul(m.format, m.w + head * g.kv_rank * m.row_bytes, m.cols, 0, g.kv_rank, acts, n, out, stride)


cdef void unfold_task(Decoder d, long head, int thread) noexcept nogil:
    """One head's mean latents of a part, made into values."""
    cdef Geometry *g = &d.layer.geometry
    cdef Matrix *m = &d.layer.v_up
    cdef const void **acts = d.act_pointers + thread * d.part_tokens
    cdef long n = d.end_token - d.first_token, t, stride = g.n_heads * g.value_dim
    for t in range(n):
        acts[t] = d.acts + (thread * d.part_tokens + t) * d.acts_bytes
        d.kernels.prepare(m.format, d.out_wide + (t * g.n_heads + head) * g.kv_rank, <void *>acts[t], g.kv_rank)
    d.kernels.matmul(m.format, m.w + head * g.value_dim * m.row_bytes, m.cols, 0, g.value_dim, acts, n,
                     d.attended + d.first_token * stride + head * g.value_dim, stride)


cdef void attend_latent(Decoder d) noexcept nogil:
    """attended = latent attention of h, the tokens' latents being written to the cache first."""
    cdef Layer *layer = d.layer
    cdef Geometry *g = &layer.geometry
    cdef long first = 0, end, chunk
    if layer.q_latent.w is NULL:
        d.linear(&layer.q, d.h, d.n_tokens, d.q)
    else:
        d.linear(&layer.q_latent, d.h, d.n_tokens, d.q_latent)
        d.run(query_latent_task, d.n_tokens)
        d.linear(&layer.q, d.q_latent, d.n_tokens, d.q)
    d.linear(&layer.latent, d.h, d.n_tokens, d.latents)
    d.run(latent_task, d.n_tokens)
    if layer.index_q.w is not NULL:
        choose_positions(d)
    # Some heads share a block that was converted once; a divisor of the number of heads, up to 16.
    chunk = 16
    while g.n_heads % chunk or (chunk > 1 and g.n_heads < chunk * d.pool.n_threads):
        chunk -= 1
    d.heads_per_task = chunk
    while first < d.n_spans:
        d.first_token = d.spans[first * 3 + 1]
        end = first
        while end < d.n_spans and d.spans[end * 3 + 2] - d.first_token <= d.part_tokens:
            end += 1
        d.end_token = d.spans[end * 3 - 1]
        d.attention = mer_attention(
            d.q_wide, d.out_wide, layer.blocks, d.positions + d.first_token, NULL, d.attention_scratch,
            layer.block_bytes, d.attention_floats, g.n_heads, 1, g.latent_dim, g.kv_rank, layer.window, g.scale,
            d.kv, 1)
        d.run(absorb_task, g.n_heads)
        d.attend_spans(first, end)
        d.run(unfold_task, g.n_heads)
        first = end
