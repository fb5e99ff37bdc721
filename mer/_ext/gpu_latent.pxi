"""Part of gpu_decoder.pyx: multi-head latent attention on the device, in the steps of latent.pxi."""


cdef load_latent(GpuDecoder d, GpuLayer *g, const Geometry *a, weights, at):
    cdef Places *to = &d.at
    cdef long q = a.nope_dim + a.rope_dim

    def part(name, y):
        return weights[name], at[name], at.get(name + "_bias", 0), y

    g.q_latent_norm, g.latent_norm = at.get("q_latent_norm", 0), at["latent_norm"]
    if "q_latent" in weights:
        g.q_latent = d.add_products([part("q_latent", to.q_latent)], a.query_rank)
    g.qkv = d.add_products([part("q", to.q)], a.n_heads * q)
    g.latent = d.add_products([part("latent", to.qkv)], a.latent_dim)
    g.wide = d.add_heads(weights["k_up"], at["k_up"], a.n_heads, to.q_wide, q, a.n_heads * a.latent_dim)
    g.unfold = d.add_heads(weights["v_up"], at["v_up"], a.n_heads, to.attended, a.kv_rank, a.n_heads * a.value_dim)


cdef void latents(GpuDecoder d, const GpuLayer *g, const Layer *layer) noexcept nogil:
    """Between projections and attention."""
    cdef void *arguments[1]
    cdef mer_gpu_latent a
    cdef const Geometry *geometry = &layer.geometry
    cdef long rope = layer.rope - d.ropes
    memset(&a, 0, sizeof(a))
    a.q, a.wide, a.latents, a.norm = d.at.q, d.at.q_wide, d.at.qkv, g.latent_norm
    a.cosine, a.sine = d.step_angles[2 * rope], d.step_angles[2 * rope + 1]
    a.blocks, a.block_bytes = g.blocks, g.block_bytes
    a.positions, a.sequence_of, a.tables = d.step_positions, d.step_sequences, d.step_tables
    a.eps, a.n_heads = geometry.latent_eps, <int>geometry.n_heads
    a.nope, a.rope, a.rank = <int>geometry.nope_dim, <int>geometry.rope_dim, <int>geometry.kv_rank
    a.pairs, a.interleaved = <int>layer.rope.pairs, layer.rope.interleaved
    a.table_stride, a.kv = <int>d.table_stride, d.kv
    arguments[0] = &a
    call(d, d.latent_kernel, geometry.n_heads + 1, d.n_tokens, 1, geometry.latent_dim * sizeof(float), arguments)


cdef void norm_queries(GpuDecoder d, const GpuLayer *g, const Geometry *geometry) noexcept nogil:
    """q_latent = its norm, prepared where the queries' product takes it so: a join of which nothing is pending."""
    cdef void *arguments[1]
    cdef mer_gpu_join j
    memset(&j, 0, sizeof(j))
    j.x, j.norm, j.eps, j.hidden = d.at.q_latent, g.q_latent_norm, geometry.latent_eps, <int32_t>geometry.query_rank
    if g.qkv.floats:
        j.h = d.at.q_latent
    else:
        j.acts, j.act_bytes = d.at.acts, mer_act_bytes(MER_Q4_0, geometry.query_rank)
    arguments[0] = &j
    call(d, d.join_kernel, d.n_tokens, 1, 1, geometry.query_rank * sizeof(float), arguments, MER_GPU_JOIN_THREADS)


cdef void attend_latents(GpuDecoder d, const GpuLayer *g, const Layer *layer) noexcept nogil:
    """attended = latent attention of norm(x), the tokens' latents being written to the cache first."""
    cdef const Geometry *geometry = &layer.geometry
    cdef const Launches *queries = &g.q_latent if g.q_latent.n else &g.qkv
    cdef bint floats = queries.floats or g.latent.floats, prepared = queries.prepared or g.latent.prepared
    cdef long rows = d.n_tokens * geometry.n_heads
    join(d, g.attention_norm, d.at.h if floats else 0, 0, d.at.h_acts if prepared else 0, 0, 0, 0)
    multiply(d, queries, d.at.h, d.at.h_acts)
    multiply(d, &g.latent, d.at.h, d.at.h_acts)
    if g.q_latent.n:
        norm_queries(d, g, geometry)
        multiply(d, &g.qkv, d.at.q_latent, d.at.acts)
    latents(d, g, layer)
    if g.wide.prepared:
        quantise(d, d.at.q, rows, geometry.nope_dim + geometry.rope_dim, geometry.nope_dim, d.at.acts)
    multiply(d, &g.wide, d.at.q, d.at.acts)
    attention_of(d, g, layer)
    if g.unfold.prepared:
        quantise(d, d.at.out_wide, rows, geometry.kv_rank, geometry.kv_rank, d.at.acts)
    multiply(d, &g.unfold, d.at.out_wide, d.at.acts)
