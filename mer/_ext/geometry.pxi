"""Part of decoder.pyx: the numbers of a layer's attention, and of routers."""

# As mer_decoder.h numbers them; sparsemixer is known by its jitter.
_SCORES = {"softmax": 0, "sigmoid": 1, "sqrt_softplus": 2, "sparsemixer": 0}


cdef Geometry geometry_of(a):
    """a: AttentionSpec, LatentAttentionSpec or CompressedAttentionSpec."""
    cdef Geometry g
    memset(&g, 0, sizeof(g))
    g.n_heads, g.scale, g.latent = a.n_heads, a.scale, hasattr(a, "kv_rank")
    if g.latent:
        g.nope_dim, g.rope_dim, g.value_dim = a.nope_dim, a.rope_dim, a.value_dim
        g.kv_rank, g.latent_dim, g.query_rank = a.kv_rank, a.latent_dim, a.query_rank or 0
        g.latent_eps = a.norm_eps
        x = a.indexer
        if x is not None:
            g.index_heads, g.index_dim, g.index_top_k = x.n_heads, x.head_dim, x.top_k
            g.index_interleaved = x.interleaved
    elif hasattr(a, "o_groups"):
        g.compressed, g.head_dim, g.rope_dim, g.query_rank = True, a.head_dim, a.rope_dim, a.query_rank
        g.o_groups, g.o_rank, g.rate, g.overlap, g.latent_eps = a.o_groups, a.o_rank, a.rate, a.overlap, a.norm_eps
        if a.index_top_k:
            g.index_heads, g.index_dim, g.index_top_k = a.index_heads, a.index_dim, a.index_top_k
    else:
        g.n_kv, g.head_dim = a.n_kv_heads, a.head_dim
        g.qk_norm = {"none": 0, "head": 1, "vector": 2}[a.qk_norm]
        g.qk_norm_last = a.qk_norm_last
        g.v_norm = a.v_norm
        g.clips, g.clip = a.clip is not None, a.clip or 0.0
    return g
