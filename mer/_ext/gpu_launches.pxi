"""Part of gpu_decoder.pyx: what a step sends to the device. The first error is kept in the decoder, what follows is idle."""


cdef inline void note(GpuDecoder d, int error) noexcept nogil:
    if d.error == 0:
        d.error = error


cdef inline void call(GpuDecoder d, void *function, long x, long y, long z, size_t shared, void **arguments,
                      unsigned threads=THREADS) noexcept nogil:
    cdef unsigned int grid[3]
    grid[0], grid[1], grid[2] = <unsigned>x, <unsigned>y, <unsigned>z
    note(d, d.device.launch(MER_STREAM_COMPUTE, function, grid, threads, <unsigned>shared, arguments))


cdef inline void wait_for_all(GpuDecoder d) noexcept nogil:
    note(d, d.device.finish(MER_STREAM_COMPUTE))
    d.unwaited = False


cdef void multiply(GpuDecoder d, const Launches *m, uint64_t x, uint64_t acts) noexcept nogil:
    """The products of x, or of its prepared rows."""
    cdef void *arguments[7]
    cdef const Launch *each
    cdef uint64_t products, given
    cdef long act_stride
    cdef int i, n
    for i in range(m.n):
        each = &m.each[i]
        products, n = d.at.products + each.first * sizeof(mer_gpu_product), <int>each.n
        given = acts if each.prepared else x
        act_stride = mer_act_bytes(MER_Q4_0, each.cols) if each.prepared else each.x_stride * sizeof(float)
        arguments[0], arguments[1], arguments[2] = &products, &n, &given
        arguments[3], arguments[4], arguments[5] = &act_stride, <void *>&each.rows, <void *>&each.cols
        arguments[6] = <void *>&each.y_stride
        if d.n_tokens <= FEW:
            call(d, each.few, (each.rows + ROWS - 1) // ROWS, n, 1, 0, arguments)
        else:
            call(d, each.many, (each.rows + MANY_ROWS - 1) // MANY_ROWS, n, (d.n_tokens + MANY_TOKENS - 1) // MANY_TOKENS,
                 0, arguments)


cdef void quantise(GpuDecoder d, uint64_t x, long n, long stride, long cols, uint64_t acts) noexcept nogil:
    """acts: the prepared rows of x, f32 [n, cols], stride apart."""
    cdef void *arguments[6]
    cdef long act_bytes = mer_act_bytes(MER_Q4_0, cols)
    cdef int columns = <int>cols, rows = <int>n
    arguments[0], arguments[1], arguments[2], arguments[3] = &x, &stride, &acts, &act_bytes
    arguments[4], arguments[5] = &columns, &rows
    call(d, d.quantise_kernel, (cols + THREADS - 1) // THREADS, min(n, <long>MOST_BLOCKS), 1, 0, arguments)


cdef void join(GpuDecoder d, uint64_t norm, uint64_t h, uint64_t h_host, uint64_t acts, uint64_t norm2, uint64_t h2,
               uint64_t acts2) noexcept nogil:
    """What is pending is added to x; then h = norm(x), h2 = norm2(x). Where they go may be 0."""
    cdef void *arguments[1]
    d.pending.norm, d.pending.h, d.pending.h_host, d.pending.acts = norm, h, h_host, acts
    d.pending.norm2, d.pending.h2, d.pending.acts2 = norm2, h2, acts2
    arguments[0] = &d.pending
    call(d, d.join_kernel, d.n_tokens, 1, 1, d.hidden * sizeof(float), arguments, MER_GPU_JOIN_THREADS)
    owe(d, 0, 0, 0)


cdef void owe(GpuDecoder d, uint64_t y, uint64_t out_norm, uint64_t layer_scale) noexcept nogil:
    """x += y, when the next block begins."""
    memset(&d.pending, 0, sizeof(mer_gpu_join))
    d.pending.x, d.pending.y, d.pending.out_norm, d.pending.layer_scale = d.at.x, y, out_norm, layer_scale
    d.pending.scale, d.pending.eps = d.residual_scale, d.eps
    d.pending.hidden, d.pending.layer_norm = <int32_t>d.hidden, d.layer_norm
    d.pending.act_bytes = mer_act_bytes(MER_Q4_0, d.hidden)


cdef void settle(GpuDecoder d) noexcept nogil:
    if d.pending.y:
        join(d, 0, 0, 0, 0, 0, 0, 0)


cdef void fetch_x(GpuDecoder d) noexcept nogil:
    """x of the host = x of the device, which goes on to have it."""
    settle(d)
    note(d, d.device.download(MER_STREAM_COMPUTE, d.x, d.at.x, d.n_tokens * d.hidden * sizeof(float)))
    wait_for_all(d)


cdef void heads(GpuDecoder d, const GpuLayer *g, const Layer *layer) noexcept nogil:
    """Between projections and attention."""
    cdef void *arguments[1]
    cdef mer_gpu_heads a
    cdef const Geometry *geometry = &layer.geometry
    cdef long rope = layer.rope - d.ropes
    memset(&a, 0, sizeof(a))
    a.qkv, a.q, a.q_norm, a.k_norm = d.at.qkv, d.at.q, g.q_norm, g.k_norm
    a.cosine, a.sine = d.step_angles[2 * rope], d.step_angles[2 * rope + 1]
    a.blocks, a.block_bytes, a.stride = g.blocks, g.block_bytes, g.joint
    a.positions, a.sequence_of, a.tables = d.step_positions, d.step_sequences, d.step_tables
    a.eps, a.limit = d.eps, geometry.clip if geometry.clips else -1.0
    a.n_heads, a.n_kv, a.dim = <int>geometry.n_heads, <int>geometry.n_kv, <int>geometry.head_dim
    a.pairs, a.interleaved = <int>layer.rope.pairs, layer.rope.interleaved
    a.qk_norm, a.qk_norm_last, a.v_norm, a.no_v = geometry.qk_norm, geometry.qk_norm_last, geometry.v_norm, g.no_v
    a.table_stride, a.kv = <int>d.table_stride, d.kv
    arguments[0] = &a
    call(d, d.heads_kernel, geometry.n_heads + 2 * geometry.n_kv, d.n_tokens, 1, geometry.head_dim * sizeof(float),
         arguments)


cdef void attention_of(GpuDecoder d, const GpuLayer *g, const Layer *layer) noexcept nogil:
    """attended = attention of q, or out_wide of q_wide; as many queries at a time as their scores have room."""
    cdef void *arguments[1]
    cdef mer_gpu_attention a
    cdef const Geometry *geometry = &layer.geometry
    cdef long n_kv = 1 if geometry.latent else geometry.n_kv, group = geometry.n_heads // n_kv
    cdef long dim = geometry.latent_dim if geometry.latent else geometry.head_dim
    cdef long value_dim = geometry.kv_rank if geometry.latent else dim
    # Their spans' tiles, of MER_GPU_QUERIES rows, are one dimension of a grid.
    cdef long most = max(1, MOST_BLOCKS * MER_GPU_QUERIES // (SPAN_TOKENS * group))
    cdef long first = 0, end, stride, wanted, span, longest, span_end, width, seen
    cdef long next_span = 0
    memset(&a, 0, sizeof(a))
    a.q, a.out, a.sinks = d.at.q, d.at.attended, g.sinks
    if geometry.latent:
        a.q, a.out, a.latent = d.at.q_wide, d.at.out_wide, 1
    if g.gated:
        a.gate, a.gate_stride = d.at.qkv + g.gate_at * sizeof(float), g.joint
    a.blocks, a.block_bytes = g.blocks, g.block_bytes
    a.positions, a.sequence_of, a.tables = d.step_positions, d.step_sequences, d.step_tables
    a.scores, a.shrinks, a.sums = d.at.scores, d.at.shrinks, d.at.sums
    a.scale, a.n_heads, a.n_kv = geometry.scale, <int>geometry.n_heads, <int>n_kv
    a.dim, a.value_dim = <int>dim, <int>value_dim
    a.window, a.table_stride, a.kv = <int>layer.window, <int>d.table_stride, d.kv
    a.heads = 4 if group > 2 else <int>group
    width = 32 * (THREADS // 32 // a.heads)
    arguments[0] = &a
    while first < d.n_tokens:
        stride, end = 0, first
        while end < d.n_tokens:
            seen = d.positions[end] - layer.window + 1 if layer.window and d.positions[end] >= layer.window else 0
            wanted = max(stride, (d.positions[end] // MER_KV_BLOCK + 1 - seen // MER_KV_BLOCK) * MER_KV_BLOCK)
            if end > first and (wanted * (end + 1 - first) * geometry.n_heads > d.score_floats or end - first == most):
                break
            stride = wanted
            end += 1
        # The spans that these queries are of.
        while d.spans[next_span * 3 + 2] <= first:
            next_span += 1
        span, longest = next_span, 0
        while span < d.n_spans and d.spans[span * 3 + 1] < end:
            span_end = min(end, <long>d.spans[span * 3 + 2])
            longest = max(longest, span_end - max(first, <long>d.spans[span * 3 + 1]))
            span += 1
        a.spans = d.step_spans + next_span * 3 * sizeof(int32_t)
        a.first, a.end, a.stride = <int>first, <int>end, stride
        a.tiles = <int>((longest * group + MER_GPU_QUERIES - 1) // MER_GPU_QUERIES)
        # A tile's queries may see one block more than each of them.
        call(d, d.latent_scores_kernel if geometry.latent else d.scores_kernel,
             (stride // MER_KV_BLOCK + longest // MER_KV_BLOCK + 1 + 7) // 8, n_kv, (span - next_span) * a.tiles,
             MER_GPU_QUERIES * dim * sizeof(float), arguments)
        call(d, d.weights_kernel, geometry.n_heads, end - first, 1, 0, arguments)
        call(d, d.values_kernel, (group + a.heads - 1) // a.heads * ((value_dim + width - 1) // width), n_kv,
             end - first, 0, arguments)
        first = end


cdef void multiply_attended(GpuDecoder d, const GpuLayer *g) noexcept nogil:
    """x += o(attended)"""
    if g.o.prepared:
        quantise(d, d.at.attended, d.n_tokens, g.o.each[0].cols, g.o.each[0].cols, d.at.acts)
    multiply(d, &g.o, d.at.attended, d.at.acts)
    owe(d, d.at.y, g.attention_out_norm, 0)


cdef void feed_forward_of(GpuDecoder d, const GpuLayer *g, uint64_t h, uint64_t acts) noexcept nogil:
    """down(activation(gate(h)) * up(h)), to where `down` puts it."""
    cdef void *arguments[9]
    cdef int rows = <int>d.n_tokens, inter = <int>g.gate_up.each[0].rows
    cdef int kind = 1 if d.gelu else 2 if d.clamped else 0
    cdef long blocks = (<long>rows * inter + THREADS - 1) // THREADS
    multiply(d, &g.gate_up, h, acts)
    arguments[0], arguments[1], arguments[2], arguments[3] = &d.at.gate, &d.at.up, &d.at.gate, &rows
    arguments[4], arguments[5], arguments[6], arguments[7] = &inter, &kind, &d.alpha, &d.limit
    arguments[8] = &d.added
    call(d, d.activate_kernel, blocks if blocks < 4096 else 4096, 1, 1, 0, arguments)
    if g.down.prepared:
        quantise(d, d.at.gate, rows, inter, inter, d.at.acts)
    multiply(d, &g.down, d.at.gate, d.at.acts)


cdef void shared_expert(GpuDecoder d, const GpuLayer *g) noexcept nogil:
    """Of h, or of a norm of x of its own; while the CPU computes the routed ones."""
    if g.shared_norm:
        join(d, g.shared_norm, d.at.h, 0,
             d.at.h_acts if g.gate_up.prepared or g.shared_gate.prepared else 0, 0, 0, 0)
    if g.shared_gate.n:
        multiply(d, &g.shared_gate, d.at.h, d.at.h_acts)
    feed_forward_of(d, g, d.at.h, d.at.h_acts)


cdef void ask_ahead(GpuDecoder d, long index) noexcept nogil:
    """ahead_logits = the products of this layer's router with x as it is."""
    cdef const GpuLayer *g = &d.gpu[index]
    join(d, g.router_norm if g.router_norm else g.mlp_norm, d.at.h2, 0, d.at.acts if g.router.prepared else 0, 0, 0, 0)
    multiply(d, &g.ahead, d.at.h2, d.at.acts)


cdef void count(GpuDecoder d, long n) noexcept nogil:
    """Products are of n tokens from now on; the device has been waited for."""
    cdef long i
    if d.n_counted == n:
        return
    for i in range(d.n_products):
        d.products[i].count = <int32_t>n
    note(d, d.device.upload(MER_STREAM_COMPUTE, d.at.products, d.products, d.n_products * sizeof(mer_gpu_product)))
    d.n_counted = n


cdef size_t put(GpuDecoder d, size_t at, const void *source, size_t nbytes, uint64_t *place) noexcept nogil:
    memcpy(d.step + at, source, nbytes)
    place[0] = d.at.step + at
    return (at + nbytes + STEP_ALIGN - 1) // STEP_ALIGN * STEP_ALIGN


cdef void stage(GpuDecoder d, long n_sequences) noexcept nogil:
    """What the step brings, in one copy; and x."""
    cdef size_t at = 0
    cdef int32_t *spans
    cdef long i, n = d.n_tokens
    at = put(d, at, d.positions, n * sizeof(int32_t), &d.step_positions)
    at = put(d, at, d.sequence_of, n * sizeof(int32_t), &d.step_sequences)
    spans = <int32_t *>(d.step + at)
    d.step_spans = d.at.step + at
    for i in range(3 * d.n_spans):
        spans[i] = <int32_t>d.spans[i]
    at = (at + 3 * d.n_spans * sizeof(int32_t) + STEP_ALIGN - 1) // STEP_ALIGN * STEP_ALIGN
    at = put(d, at, d.tables, n_sequences * d.table_stride * sizeof(int32_t), &d.step_tables)
    for i in range(d.n_ropes):
        at = put(d, at, d.ropes[i].cosine, n * d.ropes[i].pairs * sizeof(float), &d.step_angles[2 * i])
        at = put(d, at, d.ropes[i].sine, n * d.ropes[i].pairs * sizeof(float), &d.step_angles[2 * i + 1])
    note(d, d.device.upload(MER_STREAM_COMPUTE, d.at.step, d.step, at))
    note(d, d.device.upload(MER_STREAM_COMPUTE, d.at.x, d.x, n * d.hidden * sizeof(float)))


cdef void head_logits(GpuDecoder d, const int32_t *rows, long n) noexcept nogil:
    """logits[i] = head(norm(x[rows[i]])), without the cap."""
    cdef void *arguments[1]
    cdef mer_gpu_product *head = d.products + d.head_product
    cdef long tokens = d.n_tokens, i
    memcpy(d.rows_staged, rows, n * sizeof(int32_t))
    note(d, d.device.upload(MER_STREAM_COMPUTE, d.at.rows, d.rows_staged, n * sizeof(int32_t)))
    for i in range(d.gpu_head.each[0].n):
        head[i].count = <int32_t>n
    note(d, d.device.upload(MER_STREAM_COMPUTE, d.at.products + d.head_product * sizeof(mer_gpu_product), head,
                            d.gpu_head.each[0].n * sizeof(mer_gpu_product)))
    d.pending.rows = d.at.rows
    d.n_tokens = n
    join(d, d.gpu_last_norm, d.at.h if d.gpu_head.floats else 0, 0, d.at.h_acts if d.gpu_head.prepared else 0, 0, 0, 0)
    multiply(d, &d.gpu_head, d.at.h, d.at.h_acts)
    d.n_tokens = tokens
    note(d, d.device.download(MER_STREAM_COMPUTE, d.logit_rows, d.at.logits, n * d.vocab * sizeof(float)))
    wait_for_all(d)
