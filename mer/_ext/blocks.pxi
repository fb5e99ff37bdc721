"""Part of decoder.pyx: what is done token by token in feed-forward blocks, plain ones and those with experts."""


cdef inline void end_layer(Decoder d, long t, float *y) noexcept nogil:
    """x += y, what the layer's last block gave."""
    if d.layer.mlp_out_norm is not NULL:
        mer_rms_norm(y, d.layer.mlp_out_norm, y, d.hidden, d.eps)
    add_block(d, t, y)
    if d.layer.layer_scale is not NULL:
        mer_scale(d.x + t * d.hidden, d.layer.layer_scale[0], d.hidden)


cdef void fed_task(Decoder d, long t, int thread) noexcept nogil:
    cdef float *y = d.y + t * d.hidden
    add_bias(&d.layer.down, y)
    end_layer(d, t, y)


cdef void swiglu_task(Decoder d, long t, int thread) noexcept nogil:
    cdef float *gate = d.gate + t * d.inter
    cdef float *up = d.up + t * d.inter
    add_bias(&d.layer.gate, gate)
    add_bias(&d.layer.up, up)
    if d.gelu:
        d.kernels.geglu(gate, up, gate, d.inter)
    elif d.clamped:
        d.kernels.clamped_swiglu(gate, up, gate, d.inter, d.alpha, d.limit, d.added)
    else:
        d.kernels.swiglu(gate, up, gate, d.inter)


cdef void route_task(Decoder d, long t, int thread) noexcept nogil:
    cdef const int32_t *fixed = NULL
    if d.router_table is not NULL:
        fixed = d.router_table + <long>d.tokens[t] * d.router.top_k
    add_bias(d.routing, d.routed + t * d.router.n_experts)
    mer_route(&d.router, d.routed + t * d.router.n_experts, d.choice + thread * d.router.n_experts, fixed,
              d.chosen + t * d.router.top_k, d.chosen_weights + t * d.router.top_k)


cdef void finish_task(Decoder d, long t, int thread) noexcept nogil:
    cdef float *y = d.y + t * d.hidden
    cdef float *shared = d.shared + t * d.hidden
    add_bias(&d.layer.down, shared)
    if d.layer.routed_out_norm is not NULL:
        mer_rms_norm(y, d.layer.routed_out_norm, y, d.hidden, d.eps)
    if d.layer.shared_out_norm is not NULL:
        mer_rms_norm(shared, d.layer.shared_out_norm, shared, d.hidden, d.eps)
    if d.layer.shared_gate.w is not NULL:
        mer_add_scaled(y, shared, mer_sigmoid(d.router_logits[t]), d.hidden)
    elif d.layer.gate.w is not NULL:
        mer_add(y, shared, d.hidden)
    end_layer(d, t, y)
