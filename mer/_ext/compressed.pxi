"""Part of decoder.pyx: DeepSeek-V4's attention, over a window and over what further positions were compressed into.

One key for all heads is the value, too, rotated; so what comes of it is rotated back. An indexer of its own, with
smaller compressed rows, chooses which of them a token sees.
"""

cdef extern from "mer_decoder.h" nogil:
    size_t mer_kv_row_bytes(int kv, long n)
    void mer_kv_row_store(char *row, int kv, const float *x, long n)
    void mer_compress(const mer_rows *r, const int32_t *table, long position, const float *bias, float *scratch,
                      float *out)
    char *mer_entry(const mer_rows *r, const int32_t *table, long entry)
    void mer_entry_scores(const mer_rows *r, const int32_t *table, const float *q, const float *weights, long n_heads,
                          long n, float *scratch, float *scores)
    void mer_attend_rows(const mer_attention *a, const mer_rows *r, const int32_t *table, const int32_t *chosen, long n,
                         long t, long h0, long h1, int thread)


cdef take_more_buffers(Decoder d, buffers):
    d.x_streams, d.mixes = <float *>d.buffer(buffers, "streams"), <float *>d.buffer(buffers, "mixes")
    d.raw_kv, d.raw_gate = <float *>d.buffer(buffers, "raw_kv"), <float *>d.buffer(buffers, "raw_gate")
    d.index_raw_kv = <float *>d.buffer(buffers, "index_raw_kv")
    d.index_raw_gate = <float *>d.buffer(buffers, "index_raw_gate")
    d.entry_scratch = <float *>d.buffer(buffers, "entry_scratch")
    d.entry_scores = <float *>d.buffer(buffers, "entry_scores")
    if d.entry_scratch is not NULL:
        d.entry_floats, d.most_entries = buffers["entry_scratch"].shape[1], buffers["entry_scores"].shape[1]


cdef take_compressed(Decoder d, Layer *layer, weights):
    """Of a layer with compressed attention, and the table of a router that has one."""
    cdef Geometry *g = &layer.geometry
    cdef int raw_kv = d.kv if d.kv < 1 else 1  # codes of eight bits would do for means, but not for gates
    cdef long places = 2 if g.overlap else 1, entries
    if "router_table" in weights:
        table = np.ascontiguousarray(weights["router_table"], np.int32)
        d.kept.append(table)
        layer.router_table = <const int32_t *><uintptr_t>table.ctypes.data
    if not g.compressed:
        return
    layer.o_in = d.matrix(weights, "o_in")
    layer.compress_kv, layer.compress_gate = d.matrix(weights, "compress_kv"), d.matrix(weights, "compress_gate")
    layer.compress_norm = d.vector(weights, "compress_norm")
    layer.compress_place_bias = d.vector(weights, "compress_place_bias")
    layer.index_kv, layer.index_gate = d.matrix(weights, "index_kv"), d.matrix(weights, "index_gate")
    layer.index_entry_norm = d.vector(weights, "index_entry_norm")
    layer.index_place_bias = d.vector(weights, "index_place_bias")
    if g.rate == 0:
        return
    # As mer.model.kv counts them: keys, rows to compress, the indexer's, then compressed rows, the indexer's.
    entries = max(MER_KV_BLOCK // g.rate, 1)
    layer.rows = mer_rows(layer.blocks, layer.block_bytes, MER_KV_BLOCK * mer_kv_row_bytes(d.kv, g.head_dim), 0,
                          g.head_dim, g.rate, g.overlap, d.kv, raw_kv)
    layer.index_rows = mer_rows(layer.blocks, layer.block_bytes, 0, 0, g.index_dim, g.rate, g.overlap, d.kv, raw_kv)
    layer.index_rows.raw = layer.rows.raw + MER_KV_BLOCK * mer_kv_row_bytes(raw_kv, 2 * places * g.head_dim)
    layer.rows.entries = layer.index_rows.raw + MER_KV_BLOCK * mer_kv_row_bytes(raw_kv, 2 * places * g.index_dim)
    layer.index_rows.entries = layer.rows.entries + entries * mer_kv_row_bytes(d.kv, g.head_dim)


cdef inline void store_raw(Decoder d, const mer_rows *r, long t, const float *values,
                           const float *gates) noexcept nogil:
    cdef long width = 2 * r.dim if r.overlap else r.dim
    cdef size_t half = mer_kv_row_bytes(r.raw_kv, width)
    cdef char *row = d.block_of(t) + r.raw + <size_t>(d.positions[t] % MER_KV_BLOCK) * 2 * half
    mer_kv_row_store(row, r.raw_kv, values + t * width, width)
    mer_kv_row_store(row + half, r.raw_kv, gates + t * width, width)


cdef void compressed_task(Decoder d, long t, int thread) noexcept nogil:
    """Between projections and attention: norms and rotations of one token, and what it leaves in its block."""
    cdef Layer *layer = d.layer
    cdef Geometry *g = &layer.geometry
    cdef const Rope *rope = layer.rope
    cdef const float *cosine = rope.cosine + t * rope.pairs
    cdef const float *sine = rope.sine + t * rope.pairs
    cdef long dim = g.head_dim, turned = dim - g.rope_dim, i
    cdef float *key = d.latents + t * dim
    cdef float *q = d.q + t * g.n_heads * dim
    mer_rms_norm(key, layer.latent_norm, key, dim, d.eps)
    mer_rope(key + turned, cosine, sine, rope.pairs, rope.interleaved)
    mer_kv_row_store(d.block_of(t) + <size_t>(d.positions[t] % MER_KV_BLOCK) * mer_kv_row_bytes(d.kv, dim), d.kv, key,
                     dim)
    for i in range(g.n_heads):
        mer_rms_norm(q + i * dim, NULL, q + i * dim, dim, d.eps)
        mer_rope(q + i * dim + turned, cosine, sine, rope.pairs, rope.interleaved)
    if g.rate:
        store_raw(d, &layer.rows, t, d.raw_kv, d.raw_gate)
    if g.index_top_k:
        store_raw(d, &layer.index_rows, t, d.index_raw_kv, d.index_raw_gate)
        q = d.index_q + t * g.index_heads * g.index_dim + g.index_dim - g.rope_dim
        for i in range(g.index_heads):
            mer_rope(q + i * g.index_dim, cosine, sine, rope.pairs, rope.interleaved)


cdef inline void make_entry(Decoder d, const mer_rows *r, long t, const float *bias, const float *norm,
                            float *scratch) noexcept nogil:
    """The compressed row of the window that ends with a token: normed, and rotated as its first position is."""
    cdef const Rope *rope = d.layer.rope
    cdef const int32_t *table = d.tables + d.sequence_of[t] * d.table_stride
    cdef long entry = d.positions[t] // r.rate
    cdef float *out = scratch
    cdef float *cosine = out + r.dim
    cdef float *sine = cosine + rope.pairs
    mer_compress(r, table, d.positions[t], bias, sine + rope.pairs, out)
    mer_rms_norm(out, norm, out, r.dim, d.eps)
    mer_rope_angles(<int32_t>(entry * r.rate), rope.inv_freq, rope.pairs, rope.scale, cosine, sine)
    mer_rope(out + r.dim - d.layer.geometry.rope_dim, cosine, sine, rope.pairs, rope.interleaved)
    mer_kv_row_store(mer_entry(r, table, entry), r.kv, out, r.dim)


cdef void entry_task(Decoder d, long t, int thread) noexcept nogil:
    cdef Layer *layer = d.layer
    cdef float *scratch = d.entry_scratch + thread * d.entry_floats
    if (d.positions[t] + 1) % layer.geometry.rate:
        return
    make_entry(d, &layer.rows, t, layer.compress_place_bias, layer.compress_norm, scratch)
    if layer.geometry.index_top_k:
        make_entry(d, &layer.index_rows, t, layer.index_place_bias, layer.index_entry_norm, scratch)


cdef void choose_entries_task(Decoder d, long t, int thread) noexcept nogil:
    cdef Geometry *g = &d.layer.geometry
    cdef long n = (d.positions[t] + 1) // g.rate, k = g.index_top_k
    cdef float *scores = d.entry_scores + thread * d.most_entries
    if n > k:
        mer_entry_scores(&d.layer.index_rows, d.tables + d.sequence_of[t] * d.table_stride,
                         d.index_q + t * g.index_heads * g.index_dim, d.index_weights + t * g.index_heads,
                         g.index_heads, n, d.entry_scratch + thread * d.entry_floats, scores)
        mer_choose(scores, n, k, d.index_scratch + thread * 2 * k, d.chosen_positions + t * k)


cdef void attend_rows_task(Decoder d, long task, int thread) noexcept nogil:
    """Some heads of one token of a part."""
    cdef Geometry *g = &d.layer.geometry
    cdef const Rope *rope = d.layer.rope
    cdef long chunks = g.n_heads // d.heads_per_task, i = task // chunks, t = d.first_token + i
    cdef long head = task % chunks * d.heads_per_task, end = head + d.heads_per_task
    cdef long n = (d.positions[t] + 1) // g.rate if g.rate else 0, j
    cdef const int32_t *chosen = NULL
    cdef const float *cosine = rope.cosine + t * rope.pairs
    cdef float *back = d.entry_scratch + thread * d.entry_floats
    if g.index_top_k and n > g.index_top_k:
        n = g.index_top_k
        chosen = d.chosen_positions + t * n
    mer_attend_rows(&d.attention, &d.layer.rows, d.tables + d.sequence_of[t] * d.table_stride, chosen, n, i, head, end,
                    thread)
    for j in range(rope.pairs):
        back[j] = -rope.sine[t * rope.pairs + j]
    for j in range(head, end):
        mer_rope(d.out_wide + (i * g.n_heads + j + 1) * g.head_dim - g.rope_dim, cosine, back, rope.pairs,
                 rope.interleaved)


cdef void group_task(Decoder d, long group, int thread) noexcept nogil:
    """What one group of heads gave, of a part, made narrower."""
    cdef Geometry *g = &d.layer.geometry
    cdef Matrix *m = &d.layer.o_in
    cdef const void **acts = d.act_pointers + thread * d.part_tokens
    cdef long n = d.end_token - d.first_token, t, stride = g.o_groups * g.o_rank
    for t in range(n):
        acts[t] = d.acts + (thread * d.part_tokens + t) * d.acts_bytes
        d.kernels.prepare(m.format, d.out_wide + t * g.n_heads * g.head_dim + group * m.cols, <void *>acts[t], m.cols)
    d.kernels.matmul(m.format, m.w + group * g.o_rank * m.row_bytes, m.cols, 0, g.o_rank, acts, n,
                     d.attended + d.first_token * stride + group * g.o_rank, stride)


cdef void attend_compressed(Decoder d) noexcept nogil:
    """attended = this attention of h, grouped heads made narrower; what the cache is to have is written first."""
    cdef Layer *layer = d.layer
    cdef Geometry *g = &layer.geometry
    cdef long n = d.n_tokens, chunk = 16
    d.linear(&layer.q_latent, d.h, n, d.q_latent)
    d.run(query_latent_task, n)
    d.linear(&layer.q, d.q_latent, n, d.q)
    d.linear(&layer.latent, d.h, n, d.latents)
    if g.rate:
        d.linear(&layer.compress_kv, d.h, n, d.raw_kv)
        d.linear(&layer.compress_gate, d.h, n, d.raw_gate)
    if g.index_top_k:
        d.linear(&layer.index_kv, d.h, n, d.index_raw_kv)
        d.linear(&layer.index_gate, d.h, n, d.index_raw_gate)
        d.linear(&layer.index_q, d.q_latent, n, d.index_q)
        d.linear(&layer.index_weights, d.h, n, d.index_weights)
    d.run(compressed_task, n)
    if g.rate:
        d.run(entry_task, n)
    if g.index_top_k:
        d.run(choose_entries_task, n)
    # Some heads share rows that were read once; a divisor of the number of heads, up to 16.
    while g.n_heads % chunk or (chunk > 1 and g.n_heads < chunk * d.pool.n_threads):
        chunk -= 1
    d.heads_per_task, d.first_token = chunk, 0
    while d.first_token < n:
        d.end_token = min(n, d.first_token + d.part_tokens)
        d.attention = mer_attention(
            d.q + d.first_token * g.n_heads * g.head_dim, d.out_wide, layer.blocks, d.positions + d.first_token,
            layer.sinks, d.attention_scratch, layer.block_bytes, d.attention_floats, g.n_heads, 1, g.head_dim,
            g.head_dim, layer.window, g.scale, d.kv, 1)
        d.run(attend_rows_task, (d.end_token - d.first_token) * (g.n_heads // chunk))
        d.run(group_task, g.o_groups)
        d.first_token = d.end_token
